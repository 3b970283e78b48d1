"""What the distilled losses share: a student's head against labels and the teacher's head (ALBEF section 3.3)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from simla_ds.model.heads import Classifier, HeadLoss
from simla_kernels import linear_soft_ce


def distilled(
    teacher: Classifier, hidden: Tensor | None, labels: Tensor, alpha: float, reduction: Literal["sum", "none"] = "sum"
) -> HeadLoss:
    """Return the loss of a student's Classifier: the sum over rows of (1 - alpha) CE(label) + alpha CE(teacher).

    Args:
        teacher: the teacher's head. hidden: (N, D) what it reads; None: labels only.
        labels: (N,) int64.
        reduction: none: (N,) instead of the sum.
    """
    of_teacher = (None, None, None) if hidden is None else (hidden, teacher.weight, teacher.bias)

    def loss(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_soft_ce(rows, weight, bias, *of_teacher, labels, alpha, reduction=reduction)

    return loss


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over rows of -sum_j targets_j log softmax_j(logits); both (N, K) float32."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def per_target(total: Tensor, count: Tensor) -> Tensor:
    """Divide a summed loss by (1,) targets; a batch without any has the loss 0, not NaN."""
    return (total / count.clamp(min=1e-6)).squeeze()
