"""Cross-entropy against a label and a teacher, against its definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.objectives.soft_targets import soft_cross_entropy_rows, soft_target_cross_entropy


def make_logits(rows: int, classes: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + classes)
    student, teacher = (scale * torch.randn(2, rows, classes, generator=generator)).unbind()
    return student, teacher, torch.randint(classes, (rows,), generator=generator)


def definition(logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    hard = F.one_hot(labels, logits.shape[1]).double()
    targets = (1 - alpha) * hard + alpha * teacher.double().softmax(-1)
    return -(targets * logits.double().log_softmax(-1)).sum(-1)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(
    ("rows", "classes", "scale"),
    [(1, 2, 1.0), (7, 720, 3.0), (5, 30_522, 10.0)],  # smallest; the recorded vocabulary; BERT's, confident
)
def test_rows_and_gradients_equal_the_definition(rows: int, classes: int, scale: float, alpha: float):
    student, teacher, labels = make_logits(rows, classes, scale)
    student.requires_grad_()
    exact = student.detach().double().requires_grad_()
    wanted = definition(exact, labels, teacher, alpha)
    mine = soft_cross_entropy_rows(student, labels, teacher, alpha)
    torch.testing.assert_close(mine.double(), wanted, atol=1e-5, rtol=1e-6)
    (gradient,), (wanted_gradient,) = torch.autograd.grad(mine.sum(), student), torch.autograd.grad(wanted.sum(), exact)
    torch.testing.assert_close(gradient.double(), wanted_gradient, atol=1e-6, rtol=0)


def test_without_a_teacher_only_the_label_counts():
    student, _, labels = make_logits(7, 50, 3.0)
    mine = soft_cross_entropy_rows(student, labels, None, 0.4)
    torch.testing.assert_close(mine, F.cross_entropy(student, labels, reduction="none"))


def test_bfloat16_logits_are_summed_in_float32():
    student, teacher, labels = make_logits(5, 30_522, 3.0)
    rounded = student.bfloat16(), teacher.bfloat16()
    mine = soft_cross_entropy_rows(rounded[0], labels, rounded[1], 0.4)
    assert mine.dtype == torch.float32
    torch.testing.assert_close(mine.double(), definition(rounded[0], labels, rounded[1], 0.4), atol=1e-5, rtol=1e-6)


def test_no_rows_give_a_zero_that_can_be_differentiated():
    student = torch.zeros(0, 50, requires_grad=True)
    total = soft_cross_entropy_rows(student, torch.zeros(0, dtype=torch.long), torch.zeros(0, 50), 0.4).sum()
    total.backward()
    assert total == 0


def test_the_mean_against_given_targets_equals_the_definition():
    student, teacher, _ = make_logits(7, 50, 3.0)
    targets = teacher.softmax(-1)
    wanted = -(targets.double() * student.double().log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(soft_target_cross_entropy(student, targets).double(), wanted, atol=1e-6, rtol=0)
