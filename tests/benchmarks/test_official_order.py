"""The baseline computes what the project computes in `official` fidelity."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from benchmarks.official_order import OfficialOrder, draw_negatives
from simla_ds.types import Batch
from tests.tiny import STREAM, make_batch, make_task, run_config

LENGTHS = [7, 6, 6, 5]


def recorded_draws() -> Batch:
    batch = make_batch(LENGTHS)
    batch["negative_image"], batch["negative_text"] = torch.tensor([1, 2, 3, 0]), torch.tensor([2, 0, 1, 0])
    return batch


@pytest.mark.parametrize("passes", ["fast", "plain"])
def test_losses_and_gradients_are_the_projects(passes: Literal["fast", "plain"]):
    batch, runs = recorded_draws(), []
    for order in ("ours", "official"):
        task = make_task(run_config(passes, STREAM, fidelity="official"))
        result = task(batch, alpha=0.4) if order == "ours" else None
        losses = OfficialOrder(task).losses(batch, alpha=0.4) if result is None else result["losses"]
        (losses["total"] if result is None else result["loss"]).backward()
        gradients = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
        runs.append((losses, gradients))
    (losses, gradients), (baseline, their_gradients) = runs
    for name, loss in losses.items():
        torch.testing.assert_close(baseline[name].detach(), loss, rtol=1e-5, atol=0, msg=name)
    assert gradients.keys() == their_gradients.keys()
    largest = max(float(g.abs().max()) for g in gradients.values())
    for name, wanted in gradients.items():
        scale = largest if name.endswith("key.bias") else float(wanted.abs().max())
        assert (their_gradients[name] - wanted).abs().max() <= 2e-5 * scale, name


def test_the_teacher_moves_as_the_projects_does_and_the_queue_takes_its_features():
    task, other = (make_task(run_config("plain", STREAM, fidelity="official")) for _ in range(2))
    baseline = OfficialOrder(task)
    baseline.move_teacher(0.9)
    for ours, theirs, student in zip(
        other.teacher.module.parameters(), baseline.teacher.parameters(), task.model.parameters(), strict=True
    ):
        torch.testing.assert_close(theirs, 0.9 * ours + 0.1 * student)
    baseline.losses(recorded_draws(), alpha=0.4)
    with torch.no_grad():
        feature = baseline.teacher.image_feature(baseline.teacher.image_encoder(recorded_draws()["image"]))
    torch.testing.assert_close(baseline.image_queue[:, :4], feature.T)


def test_negatives_are_drawn_by_similarity_and_never_the_pair_itself():
    similarity = torch.full((3, 3), -50.0)
    similarity[0, 2] = similarity[1, 0] = similarity[2, 1] = 50.0
    batch = make_batch([4, 4, 4])
    wrong: Tensor = torch.tensor(draw_negatives(batch, similarity, similarity.T))
    assert wrong.tolist() == [[1, 2, 0], [2, 0, 1]]
