"""Image-text contrast against its definition, row by row in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.config import ObjectivesConfig, VocabularyConfig
from simla_ds.objectives.base import Networks
from simla_ds.objectives.feature_queue import FeatureQueue
from simla_ds.objectives.itc import ImageTextContrast, similarities
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


def make_step(fidelity: str = "corrected", fill: int = 5) -> tuple[ImageTextContrast, Batch, StepFeatures, Tensor]:
    """Return the objective, a batch, its features and the temperature; the queue of 8 has `fill` rows."""
    batch = make_batch([5] * ROWS)
    batch["image_id"] = torch.tensor(PICTURES)
    queue = FeatureQueue(8, WIDTH)
    queue.push(unit_rows(5, 11)[:fill], unit_rows(5, 12)[:fill], torch.tensor(QUEUED[:fill], dtype=torch.long))
    student, teacher = make_features(1), make_features(3)
    student.image_feature.requires_grad_()
    temperature = torch.tensor([TEMPERATURE], requires_grad=True)
    official = fidelity == "official"
    step = StepFeatures(student, teacher, similarities(student, teacher, batch, temperature, queue, official=official))
    config = ObjectivesConfig(fidelity=fidelity)  # type: ignore[arg-type]  one of two, by parametrize
    networks = Networks(None, None)  # type: ignore[arg-type]  ITC has no head
    return ImageTextContrast(networks, config, VocabularyConfig(size=50)), batch, step, temperature


def definition(step: StepFeatures, alpha: float, *, excludes: bool, fill: int = 5) -> Tensor:
    """Loop over rows, dropping the columns of the row's own picture (but not its own pair)."""
    losses = []
    directions = (("image_feature", "text_feature", 12), ("text_feature", "image_feature", 11))
    for own, other, seed in directions:
        keys = torch.cat([getattr(step.teacher, other), unit_rows(5, seed)[:fill]]).double()
        ids = PICTURES + QUEUED[:fill]
        for row in range(ROWS):
            kept = [c for c in range(len(ids)) if c == row or not excludes or ids[c] != PICTURES[row]]
            student = getattr(step.student, own)[row].double() @ keys[kept].T / TEMPERATURE
            teacher = getattr(step.teacher, own)[row].double() @ keys[kept].T / TEMPERATURE
            target = alpha * teacher.softmax(-1)
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


def test_targets_are_distributions_with_nothing_on_excluded_keys():
    objective, _, step, _ = make_step()
    s = step.similarities
    assert s.excluded is not None
    for alpha in (0.0, 0.4, 1.0):
        targets = objective.targets(s.teacher_image_to_text, s, alpha)
        torch.testing.assert_close(targets.sum(-1), torch.ones(ROWS))
        assert not targets[s.excluded].any()
        # by the ids: pair 0 excludes pair 2 and queue row 2, pair 1 queue row 0
        assert s.excluded.nonzero().tolist() == [[0, 2], [0, 6], [1, 4], [2, 0], [2, 6]]
    assert torch.equal(objective.targets(s.teacher_image_to_text, s, 0.0)[:, :ROWS], torch.eye(ROWS))


def test_gradients_reach_student_and_temperature_but_not_the_teacher():
    objective, batch, step, temperature = make_step()
    objective.loss(batch, step, Outputs(), 0.4).backward()
    exact = step.student.image_feature.grad
    assert exact is not None
    assert exact.abs().sum() > 0.1
    assert not step.similarities.teacher_image_to_text.requires_grad
    # the temperature's gradient by central differences of the definition
    assert temperature.grad is not None
    losses = []
    for change in (1e-3, -1e-3):
        s = step.similarities
        scaled = [t * TEMPERATURE / (TEMPERATURE + change) for t in (s.image_to_text, s.text_to_image)]
        moved = StepFeatures(step.student, step.teacher, type(s)(**{**vars(s), "image_to_text": scaled[0]}))
        moved.similarities.text_to_image = scaled[1]
        losses.append(objective.loss(batch, moved, Outputs(), 0.4).item())
    assert temperature.grad.item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-3)


def test_a_low_temperature_gives_no_nan_where_keys_are_excluded():
    objective, batch, step, _ = make_step()
    s = step.similarities
    for name in ("image_to_text", "text_to_image", "teacher_image_to_text", "teacher_text_to_image"):
        setattr(s, name, getattr(s, name) * 300)  # temperature .001
    loss = objective.loss(batch, step, Outputs(), 0.4)
    loss.backward()
    assert loss.isfinite()
    assert step.student.image_feature.grad is not None
    assert step.student.image_feature.grad.isfinite().all()


def test_accuracy_counts_rows_whose_own_pair_is_nearest():
    objective, batch, step, _ = make_step()
    right = sum(row.argmax().item() == i for i, row in enumerate(step.similarities.image_to_text))
    assert objective.measures(batch, step, Outputs())["itc/accuracy"].tolist() == [right, ROWS]
