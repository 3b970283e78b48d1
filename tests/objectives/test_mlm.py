"""Masked language modelling against the plain formula, and what padding may and may not do to it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.task import PretrainTask
from simla_ds.types import Batch
from tests.tiny import labelled, make_batch, make_task, run_config, with_masks

LENGTHS = [7, 4, 6, 5]


def make(fidelity: str = "corrected") -> PretrainTask:
    return make_task(run_config(fidelity=fidelity))


def logits(task: PretrainTask, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the student's and the teacher's (B, L, V) logits for the masked caption, each over its own picture."""
    found = []
    for network in (task.model, task.teacher.module):
        image = network.image_encoder(batch["image"])
        hidden, _ = network.text_over_image(batch["mlm_input_ids"], batch["text_mask"], image)
        found.append(network.language_head(hidden).double())
    return found[0], found[1]


@torch.no_grad()
def mlm_loss(task: PretrainTask, batch: Batch, alpha: float) -> Tensor:
    return task(batch, alpha=alpha)["losses"]["mlm"].double()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@torch.no_grad()
def test_corrected_loss_equals_the_plain_formula_over_words(alpha: float):
    task, batch = make(), make_batch(LENGTHS)
    z, z_m = logits(task, batch)
    chosen = labelled(batch)
    assert chosen.sum() >= 3
    hard = F.cross_entropy(z[chosen], batch["input_ids"][chosen])
    soft = -(z_m.softmax(-1) * z.log_softmax(-1)).sum(-1)[chosen].mean()
    wanted = (1 - alpha) * hard + alpha * soft
    torch.testing.assert_close(mlm_loss(task, batch, alpha), wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_official_loss_normalises_the_teachers_term_over_positions():
    task, batch = make("official"), make_batch(LENGTHS)
    z, z_m = logits(task, batch)
    chosen = labelled(batch)
    hard = F.cross_entropy(z[chosen], batch["input_ids"][chosen])
    soft = -(z_m.softmax(-1) * z.log_softmax(1)).sum(-1)[chosen].mean()
    torch.testing.assert_close(mlm_loss(task, batch, 0.4), 0.6 * hard + 0.4 * soft, atol=1e-5, rtol=0)


def test_corrected_loss_does_not_depend_on_the_batchs_padding_and_official_does():
    batch, padded = make_batch(LENGTHS), make_batch(LENGTHS, pad_to=11)
    assert torch.equal(batch["labels"], padded["labels"])
    task = make()
    torch.testing.assert_close(mlm_loss(task, padded, 0.4), mlm_loss(task, batch, 0.4), atol=2e-6, rtol=0)
    task = make("official")
    assert mlm_loss(task, padded, 0.4) > mlm_loss(task, batch, 0.4) + 0.02  # more positions to normalise over
    torch.testing.assert_close(mlm_loss(task, padded, 0.0), mlm_loss(task, batch, 0.0), atol=2e-6, rtol=0)


@pytest.mark.parametrize("fidelity", ["corrected", "official"])
def test_no_labelled_token_gives_zero_and_finite_gradients(fidelity: str):
    task, batch = make(fidelity), make_batch(LENGTHS)
    empty = with_masks(batch, torch.zeros_like(batch["text_mask"]), batch["patch_mask"])
    result = task(empty, alpha=0.4)
    result["loss"].backward()
    assert result["losses"]["mlm"] == 0
    assert result["loss"].isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.parameters())


def test_loss_is_divided_by_the_count_it_is_given():
    """The mean number per rank and micro-step, not the batch's own: else it is a mean of means."""
    task, batch = make(), make_batch(LENGTHS)
    own = mlm_loss(task, batch, 0.4)
    count = batch["label_count"].item()
    batch["label_count"] = torch.tensor([2.5 * count])
    torch.testing.assert_close(mlm_loss(task, batch, 0.4) * 2.5, own, atol=1e-6, rtol=0)


@torch.no_grad()
def test_accuracy_counts_labelled_tokens_guessed_right():
    for fidelity in ("corrected", "official"):
        task, batch = make(fidelity), make_batch(LENGTHS)
        z, _ = logits(task, batch)
        chosen = labelled(batch)
        batch["labels"] = batch["labels"].clone()
        batch["labels"][0] = z[chosen][0].argmax()  # at least one right
        right = (z[chosen].argmax(-1) == batch["labels"]).sum().item()
        result = task(batch, alpha=0.4, keep=True)
        measures = task.objectives["mlm"].measures(batch, result["features"], result["outputs"]["mlm"])
        assert measures["mlm/accuracy"].tolist() == [right, int(chosen.sum())]
