"""Cross-modal reconstruction against the plain formula, its keys, and batches without masked patches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.config import CrossModalConfig
from simla_ds.task import PretrainTask
from simla_ds.types import Batch
from tests.tiny import labelled, make_batch, make_task, run_config, with_masks

LENGTHS = [7, 4, 6, 5]


def make(**xmm: Any) -> PretrainTask:
    return make_task(run_config(xmm=CrossModalConfig(**xmm)))


@torch.no_grad()
def logits(task: PretrainTask, batch: Batch, *, encoded: bool = False) -> tuple[Tensor, Tensor]:
    """Return both networks' (B, P, K) logits; both read the student's caption."""
    keys = task.model.stream.embeddings(batch["input_ids"])
    if encoded:
        keys, _ = task.model.stream(keys, batch["text_mask"])
    found = []
    for network in (task.model, task.teacher.module):
        image = network.image_encoder(batch["image"], batch["patch_mask"])
        hidden = network.image_over_text(image, keys, batch["text_mask"])
        found.append(network.visual_head(hidden[:, 1:]).double())
    return found[0], found[1]


@torch.no_grad()
def xmm_loss(task: PretrainTask, batch: Batch, alpha: float) -> Tensor:
    return task(batch, alpha=alpha)["losses"]["xmm"].double()


def formula(z: Tensor, z_m: Tensor, batch: Batch, alpha: float) -> Tensor:
    hidden = batch["patch_mask"]
    assert "visual_ids" in batch
    hard = F.cross_entropy(z[hidden], batch["visual_ids"][hidden])
    soft = -(z_m.softmax(-1) * z.log_softmax(-1)).sum(-1)[hidden].mean()
    return (1 - alpha) * hard + alpha * soft


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_loss_equals_the_plain_formula_over_masked_patches(alpha: float):
    task, batch = make(), make_batch(LENGTHS)
    wanted = formula(*logits(task, batch), batch, alpha)
    torch.testing.assert_close(xmm_loss(task, batch, alpha), wanted, atol=1e-5, rtol=0)


def test_encoded_keys_read_the_text_pass():
    batch = make_batch(LENGTHS)
    task = make(text_keys="encoded")
    wanted = formula(*logits(task, batch, encoded=True), batch, 0.4)
    torch.testing.assert_close(xmm_loss(task, batch, 0.4), wanted, atol=1e-5, rtol=0)
    assert abs(wanted - xmm_loss(make(), batch, 0.4)) > 1e-3


def test_without_distillation_only_the_visual_tokens_count_and_the_teacher_does_not_run():
    task, batch = make(distill=False), make_batch(LENGTHS)
    torch.testing.assert_close(xmm_loss(task, batch, 0.4), formula(*logits(task, batch), batch, 0.0), atol=1e-5, rtol=0)
    assert task.features(batch).teacher.masked_image_tokens is None
    assert len(task.objectives["xmm"].requests(batch, task.features(batch))) == 1


def test_loss_does_not_depend_on_the_captions_padding():
    task = make()
    batch, padded = make_batch(LENGTHS), make_batch(LENGTHS, pad_to=11)
    torch.testing.assert_close(xmm_loss(task, padded, 0.4), xmm_loss(task, batch, 0.4), atol=2e-6, rtol=0)


def test_no_masked_patch_gives_zero_and_finite_gradients():
    task, batch = make(), make_batch(LENGTHS)
    empty = with_masks(batch, labelled(batch), torch.zeros_like(batch["patch_mask"]))
    result = task(empty, alpha=0.4)
    result["loss"].backward()
    assert result["losses"]["xmm"] == 0
    assert result["loss"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())


def test_loss_is_divided_by_the_count_it_is_given():
    task, batch = make(), make_batch(LENGTHS)
    own = xmm_loss(task, batch, 0.4)
    batch["masked_count"] = 2.5 * batch["masked_count"]
    torch.testing.assert_close(xmm_loss(task, batch, 0.4) * 2.5, own, atol=1e-6, rtol=0)


def test_accuracy_counts_masked_patches_guessed_right():
    task, batch = make(), make_batch(LENGTHS)
    z, _ = logits(task, batch)
    assert "visual_ids" in batch
    batch["visual_ids"][0] = z[0].argmax(-1)
    right = (z.argmax(-1) == batch["visual_ids"])[batch["patch_mask"]].sum().item()
    with torch.no_grad():
        result = task(batch, alpha=0.4, keep=True)
    measures = task.objectives["xmm"].measures(batch, result["features"], result["outputs"]["xmm"])
    assert right >= 4
    assert measures["xmm/accuracy"].tolist() == [right, 16]


def test_gradients_reach_the_captions_embeddings_and_the_mask_token():
    task, batch = make(), make_batch(LENGTHS)
    features = task.features(batch)
    objective = task.objectives["xmm"]
    outputs = task.outputs(batch, features, {"xmm": objective})["xmm"]
    objective.loss(batch, features, outputs, 0.4).backward()
    for parameter in (task.model.stream.embeddings.word.weight, task.model.image_encoder.mask_token):
        assert parameter.grad is not None
        assert parameter.grad.abs().max() > 1e-4
    assert all(p.grad is None for p in task.teacher.module.parameters())
