"""A student's head against labels and a teacher's head, against the definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.model.heads import Classifier
from simla_ds.objectives.soft_targets import distilled, per_target


def heads(rows: int, classes: int) -> tuple[Classifier, Classifier, Tensor, Tensor, Tensor]:
    """Student, teacher of another width, what they read, and labels."""
    torch.manual_seed(rows + classes)
    student, teacher = Classifier(16, classes), Classifier(24, classes)
    return student, teacher, 3 * torch.randn(rows, 16), 3 * torch.randn(rows, 24), torch.randint(classes, (rows,))


def definition(logits: Tensor, labels: Tensor, teacher: Tensor, alpha: float) -> Tensor:
    hard = F.one_hot(labels, logits.shape[1]).double()
    targets = (1 - alpha) * hard + alpha * teacher.double().softmax(-1)
    return -(targets * logits.double().log_softmax(-1)).sum()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("rows", "classes"), [(1, 2), (7, 720), (5, 30_522)])  # smallest; recorded; BERT's words
def test_the_sum_over_rows_and_its_gradients_equal_the_definition(rows: int, classes: int, alpha: float):
    student, teacher, read, teacher_read, labels = heads(rows, classes)
    read.requires_grad_()
    inputs = (read, student.weight, student.bias)
    wanted = definition(student(read), labels, teacher(teacher_read).detach(), alpha)
    found = student(read, distilled(teacher, teacher_read, labels, alpha))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-6)
    for mine, theirs in zip(torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)
    assert teacher.weight.grad is None


def test_without_a_teacher_only_the_label_counts():
    student, teacher, read, _, labels = heads(7, 50)
    found = student(read, distilled(teacher, None, labels, 0.4))
    torch.testing.assert_close(found, F.cross_entropy(student(read), labels, reduction="sum"))


def test_no_rows_give_a_zero_that_can_be_differentiated():
    student, teacher, read, teacher_read, labels = heads(0, 50)
    total = per_target(student(read, distilled(teacher, teacher_read, labels, 0.4)), torch.zeros(1))
    total.backward()
    assert total == 0
    assert student.weight.grad is not None
    assert not student.weight.grad.any()
