"""Image-text contrast against its definition, row by row in float64."""

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.config import ObjectivesConfig, VocabularyConfig
from simla_ds.objectives import itc
from simla_ds.objectives.base import Networks
from simla_ds.objectives.feature_queue import FeatureQueue
from simla_ds.objectives.itc import ImageTextContrast, contrast_keys, excluded_keys, similarities
from simla_ds.types import Batch, Features, Outputs, StepFeatures
from tests.tiny import make_batch

ROWS, WIDTH, TEMPERATURE = 4, 16, 0.3
PICTURES = [7, 8, 7, 9]  # pairs 0 and 2 show one picture
QUEUED = [8, 1, 7, 2, 3]  # so does queue row 2; queue row 0 shows pair 1's


def unit_rows(count: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def make_features(seed: int) -> Features:
    image, text = unit_rows(ROWS, seed), unit_rows(ROWS, seed + 1)
    empty = torch.empty(0)
    return Features(empty, None, empty, empty, image_feature=image, text_feature=text)


def make_step(
    fidelity: Literal["corrected", "official"] = "corrected", fill: int = 5
) -> tuple[ImageTextContrast, Batch, StepFeatures, Tensor]:
    """Return the objective, a batch, its features and the temperature; the queue of 8 has `fill` rows."""
    batch = make_batch([5] * ROWS)
    batch["image_id"] = torch.tensor(PICTURES)
    queue = FeatureQueue(8, WIDTH)
    queue.push(unit_rows(5, 11)[:fill], unit_rows(5, 12)[:fill], torch.tensor(QUEUED[:fill], dtype=torch.long))
    student, teacher = make_features(1), make_features(3)
    student.image_feature.requires_grad_()
    temperature = torch.tensor([TEMPERATURE], requires_grad=True)
    official = fidelity == "official"
    keys = contrast_keys(teacher, batch, temperature, queue, official=official)
    step = StepFeatures(student, teacher, keys)
    config = ObjectivesConfig(fidelity=fidelity)
    no_head: Any = None
    networks = Networks(no_head, no_head)
    return ImageTextContrast(networks, config, VocabularyConfig(size=50)), batch, step, temperature


def definition(
    step: StepFeatures, alpha: float, *, excludes: bool, fill: int = 5, temperature: float | Tensor = TEMPERATURE
) -> Tensor:
    """Loop over rows, dropping the columns of the row's own picture (but not its own pair)."""
    losses = []
    directions = (("image_feature", "text_feature", 12), ("text_feature", "image_feature", 11))
    for own, other, seed in directions:
        keys = torch.cat([getattr(step.teacher, other), unit_rows(5, seed)[:fill]]).double()
        ids = PICTURES + QUEUED[:fill]
        for row in range(ROWS):
            kept = [c for c in range(len(ids)) if c == row or not excludes or ids[c] != PICTURES[row]]
            student = getattr(step.student, own)[row].double() @ keys[kept].T / temperature
            teacher = getattr(step.teacher, own)[row].double() @ keys[kept].T / temperature
            target = alpha * teacher.softmax(-1).detach()
            target[kept.index(row)] += 1 - alpha
            losses.append(-(target * student.log_softmax(-1)).sum())
    return torch.stack(losses).sum() / (2 * ROWS)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("fill", [0, 3, 5])  # empty queue; one without row 3 and 4; with another of picture 7
def test_keys_of_the_same_picture_are_excluded_in_batch_and_queue(alpha: float, fill: int):
    objective, batch, step, _ = make_step(fill=fill)
    loss = objective.loss(batch, step, Outputs(), alpha)
    wanted = definition(step, alpha, excludes=True, fill=fill)
    torch.testing.assert_close(loss.double(), wanted, atol=1e-6, rtol=0)
    assert abs(wanted - definition(step, alpha, excludes=False, fill=fill)) > 1e-2


def test_official_fidelity_takes_every_other_pair_for_a_negative():
    objective, batch, step, _ = make_step("official")
    loss = objective.loss(batch, step, Outputs(), 0.4)
    torch.testing.assert_close(loss.double(), definition(step, 0.4, excludes=False), atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [TEMPERATURE, 1e-3])
def test_gradients_are_those_of_the_definition_for_student_and_temperature_and_none_for_the_teacher(temperature: float):
    objective, batch, step, _ = make_step()
    step.keys.temperature = torch.tensor([temperature], requires_grad=True)
    inputs = (step.student.image_feature, step.student.text_feature.requires_grad_(), step.keys.temperature)
    made = torch.autograd.grad(objective.loss(batch, step, Outputs(), 0.4), inputs)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    step.student = replace(step.student, image_feature=exact[0], text_feature=exact[1])
    wanted = torch.autograd.grad(definition(step, 0.4, excludes=True, temperature=exact[2]), exact)
    for gradient, right in zip(made, wanted, strict=True):
        torch.testing.assert_close(gradient.double(), right, rtol=1e-5, atol=1e-5 * right.abs().max().item())
    assert not any(t.requires_grad for t in (step.keys.image, step.keys.text))


def test_whole_matrices_hold_batch_then_queue():
    _, _, step, _ = make_step()
    image_to_text, text_to_image = similarities(step.student, step.keys)
    assert image_to_text.shape == text_to_image.shape == (ROWS, ROWS + 5)
    wanted = step.student.text_feature[1] @ unit_rows(5, 11)[3] / TEMPERATURE
    torch.testing.assert_close(text_to_image[1, ROWS + 3], wanted)


def test_alone_reads_no_other_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(itc, "gather_by_rank", lambda rows: pytest.fail("other ranks were asked"))
    teacher, queue = make_features(3), FeatureQueue(0, WIDTH)
    batch = make_batch([5] * ROWS)
    keys = contrast_keys(teacher, batch, torch.ones(1), queue, official=False, alone=True)
    assert keys.image is teacher.image_feature
    assert keys.first == 0


@pytest.mark.parametrize("fidelity", ["corrected", "official"])
def test_measures_are_of_the_keys_that_the_loss_compares(fidelity: Literal["corrected", "official"]):
    objective, batch, step, _ = make_step(fidelity)
    mine, theirs = similarities(step.student, step.keys)[0], similarities(step.teacher, step.keys)[0]
    ids, right, entropies = PICTURES + QUEUED, 0, []
    for row in range(ROWS):
        others = [c for c in range(len(ids)) if c != row and (fidelity == "official" or ids[c] != PICTURES[row])]
        kept = [row, *others]
        right += int(mine[row, kept].argmax() == 0)
        p = theirs[row, kept].double().softmax(-1)
        entropies.append(-(p * p.log()).sum())
    found = objective.measures(batch, step, Outputs())
    assert found["itc/accuracy"].tolist() == [right, ROWS]
    torch.testing.assert_close(found["itc/target_entropy"][0].double(), torch.stack(entropies).sum())


def test_keys_of_one_picture_that_are_positives_too_are_not_left_out():
    _, batch, step, _ = make_step()
    assert excluded_keys(batch, step.keys, "pair").sum() == 5  # two in the batch, three in the queue
    assert not excluded_keys(batch, step.keys, "image").any()
