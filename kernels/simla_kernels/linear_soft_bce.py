"""linear_soft_bce: the loss of a multi-label head against a few keywords and a teacher, without its logits kept.

    z = h W^T + b,   y = (1 - alpha) hot + alpha sigmoid(z_teacher),   loss = sum_v softplus(z) - y z
N rows, K width, V classes; hot is 1 at a row's keywords, however often they are named. Binary cross-entropy is linear
in its target, so the hard and the soft term are one against the mixture. Logits and sums are fp32 whatever the inputs
(linear_chunks says where a CPU cannot); the gradients are made in forward, as linear_soft_ce's are.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import dispatch, linear_autograd
from simla_kernels.dispatch import Operation
from simla_kernels.linear_chunks import (
    RowLoss,
    add_biases,
    check_device,
    check_head,
    exact,
    losses_and_gradients,
    triton_refuses,
)

REDUCTIONS = ("mean", "sum_over_words")
MOST_KEYWORDS = 64
"""Per row: Triton compares every class with each of them."""


def linear_soft_bce_reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    keyword_ids: Tensor,
    alpha: float,
    reduction: str = "mean",
) -> Tensor:
    """Return what linear_soft_bce returns, by the definition."""
    z = F.linear(h, weight, bias).to(exact(h.dtype))
    classes = torch.arange(len(weight), device=h.device)
    target = (keyword_ids[:, :, None] == classes).any(1).to(z.dtype)
    if teacher_h is not None and teacher_weight is not None:
        soft = F.linear(teacher_h, teacher_weight, teacher_bias).detach().to(z.dtype).sigmoid()
        target = (1 - alpha) * target + alpha * soft
    losses = F.binary_cross_entropy_with_logits(z, target, reduction="none")
    return losses.sum() / _terms(len(h), len(weight), reduction)


def _terms(rows: int, classes: int, reduction: str) -> int:
    """Return what the sum over rows and classes is divided by; no rows give 0, not NaN."""
    return max(rows, 1) * (classes if reduction == "mean" else 1)


# ---- PyTorch path


def row_losses(
    z: Tensor, teacher_z: Tensor | None, keyword_ids: Tensor, alpha: float, gradient: Tensor | None, scale: float
) -> Tensor:
    """Return the losses (n,), summed over classes; write scale * d loss / d z. z and teacher_z are overwritten."""
    target = torch.zeros_like(z) if teacher_z is None else teacher_z.sigmoid_().mul_(alpha)
    if keyword_ids.shape[1]:
        keyword_ids = keyword_ids.masked_fill(keyword_ids >= z.shape[1], -1)  # on a card nobody refused them
        # an absent id becomes one of the row's own, so that every writer of an entry writes the same number
        largest = keyword_ids.amax(1, keepdim=True)
        ids = torch.where(keyword_ids < 0, largest, keyword_ids).clamp_(min=0)
        hard = (1 - alpha) * (largest >= 0).to(z.dtype)  # a row without any writes its entry 0 back
        target.scatter_(1, ids, target.gather(1, ids) + hard)
    losses = F.softplus(z).sum(-1) - torch.einsum("nv,nv->n", target, z)
    if gradient is not None:
        dz = z.sigmoid_().sub_(target)
        if gradient is not dz:
            torch.mul(dz, scale, out=gradient)
    return losses


def torch_row_loss(bias: Tensor | None, teacher_bias: Tensor | None, keyword_ids: Tensor, alpha: float) -> RowLoss:
    """Return the RowLoss of these biases (V,) and keywords (N, up to 64)."""

    def by_row(z: Tensor, teacher_z: Tensor | None, rows: slice, gradient: Tensor | None, scale: float) -> Tensor:
        add_biases(z, bias, teacher_z, teacher_bias)
        return row_losses(z, teacher_z, keyword_ids[rows], alpha, gradient, scale)

    return by_row


def _check_range(keyword_ids: Tensor, classes: int) -> None:
    """Where it costs nothing: on a card it would wait for the device, and an id out of range is no keyword there."""
    if keyword_ids.device.type == "cpu" and keyword_ids.numel():
        least, most = int(keyword_ids.min()), int(keyword_ids.max())
        if not -1 <= least <= most < classes:
            raise ValueError(
                f"linear_soft_bce: keyword_ids {tuple(keyword_ids.shape)} go from {least} to {most}; "
                f"expected -1 (none) to {classes - 1}"
            )


# ---- registration


@torch.library.custom_op("simla_kernels::linear_soft_bce_sum", mutates_args=())
def _sum(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    keyword_ids: Tensor,
    alpha: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sum over rows and classes and the gradients of h, weight and bias, by the backend that suits h."""
    _check_range(keyword_ids, weight.shape[0])
    chosen = dispatch.choose("linear_soft_bce", h, lambda: triton_refuses(h)).name
    if chosen == "triton":
        from simla_kernels.linear_soft_bce_triton import row_loss
    else:
        row_loss = torch_row_loss
    by_row = row_loss(bias, teacher_bias, keyword_ids, alpha)
    teacher = None if teacher_h is None or teacher_weight is None else (teacher_h, teacher_weight)
    losses, made = losses_and_gradients(h, weight, teacher, by_row, wanted, aligned=chosen == "triton")
    return losses.sum(), made.h, made.weight, made.bias


linear_autograd.register(_sum)


# ---- public


def linear_soft_bce(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    keyword_ids: Tensor,
    alpha: float,
    reduction: str = "mean",
) -> Tensor:
    """Return the binary cross-entropy with logits against keywords and the teacher's probabilities: an fp32 scalar.

    Args:
        h: (N, K). weight: (V, K). bias: (V,) or None; all of one dtype.
        teacher_h, teacher_weight, teacher_bias: likewise (N, K'), (V, K'), (V,); they get no gradient. None: the
            keywords alone count, as with alpha 0 (the teacher's product is skipped then).
        keyword_ids: (N, up to 64) int64 in [0, V), -1 for none; an id that a row names twice counts once.
        alpha: weight of the teacher's probabilities, in [0, 1].
        reduction: "mean" over N x V, or "sum_over_words": the sum over V, averaged over N. No rows give 0.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; ids out of range (on a CPU).
    """
    op = "linear_soft_bce"
    if h.dim() != 2:
        raise ValueError(f"{op}: h {tuple(h.shape)} must be (N, K)")
    shape = tuple(keyword_ids.shape)
    if len(shape) != 2 or shape[0] != len(h) or shape[1] > MOST_KEYWORDS or keyword_ids.dtype != torch.int64:
        raise ValueError(
            f"{op}: keyword_ids {shape} {keyword_ids.dtype} must be ({len(h)}, at most {MOST_KEYWORDS}) torch.int64"
        )
    check_head(op, h, weight, bias, (teacher_h, teacher_weight, teacher_bias), alpha)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
    check_device(op, h, keyword_ids=keyword_ids)
    if teacher_h is None or alpha == 0:
        teacher_h = teacher_weight = teacher_bias = None
        alpha = 0.0
    able = torch.is_grad_enabled()
    wanted = [able and x is not None and x.requires_grad for x in (h, weight, bias)]
    total = _sum(h, weight, bias, teacher_h, teacher_weight, teacher_bias, keyword_ids, float(alpha), wanted)[0]
    return total / _terms(len(h), len(weight), reduction)


def _example(size: int, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    rows, width, classes = ((31, 16, 37), (257, 64, 2049), (9, 24, 30_522))[size]
    generator = torch.Generator().manual_seed(size)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    def head() -> tuple[Tensor, Tensor, Tensor]:
        return normal(rows, width), normal(classes, width, scale=width**-0.5), normal(classes)

    names = ("h", "weight", "bias")
    student = {name: x.requires_grad_() for name, x in zip(names, head(), strict=True)}
    teacher = {f"teacher_{name}": x for name, x in zip(names, head(), strict=True)}
    ids = torch.randint(-1, classes, (rows, 5), generator=generator)
    ids[:, 1] = ids[:, 0]
    return {**student, **teacher, "keyword_ids": ids.to(device), "alpha": 0.4, "reduction": REDUCTIONS[size % 2]}


dispatch.register(
    Operation(
        function=linear_soft_bce,
        reference=linear_soft_bce_reference,
        example=_example,
        refuses=lambda h, *_, **__: triton_refuses(h),
    )
)
