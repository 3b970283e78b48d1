"""linear_soft_ce: the loss of a linear classifier against a label and a teacher, without its logits.

    z = h W^T + b,   loss = logsumexp(z) - (1 - alpha) z[label] - alpha <softmax(z_teacher), z>
N rows, K width, V classes. (1 - alpha) CE(label) + alpha CE(teacher's softmax) needs one log-sum-exp. Neither (N, V)
matrix exists whole; logits and sums are fp32 whatever the inputs (linear_chunks says where a CPU cannot). After Liger
(arXiv 2410.10989): the gradients are made in forward, so that ZeRO-3 has nothing to gather in backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import dispatch, linear_autograd
from simla_kernels.dispatch import Operation
from simla_kernels.linear_chunks import (
    Gradients,
    RowLoss,
    add_biases,
    check_device,
    check_head,
    exact,
    gradients_times,
    keeps_dz,
    losses_and_gradients,
    triton_refuses,
)

REDUCTIONS = ("mean", "sum", "none")


def linear_soft_ce_reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    alpha: float,
    reduction: str = "mean",
) -> Tensor:
    """Return what linear_soft_ce returns, by the definition."""
    log_p = F.linear(h, weight, bias).to(exact(h.dtype)).log_softmax(-1)
    losses = -log_p.gather(1, labels[:, None])[:, 0]
    if teacher_h is not None and teacher_weight is not None:
        targets = F.linear(teacher_h, teacher_weight, teacher_bias).detach().to(log_p.dtype).softmax(-1)
        losses = (1 - alpha) * losses - alpha * (targets * log_p).sum(-1)
    return _reduced(losses, reduction)


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    return losses.sum() / (max(len(losses), 1) if reduction == "mean" else 1)


# ---- PyTorch path


def row_losses(
    z: Tensor,
    teacher_z: Tensor | None,
    labels: Tensor,
    alpha: float,
    row_weights: Tensor | None,
    gradient: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the losses (n,); write scale * row_weight * d loss / d z into `gradient`. z, teacher_z are overwritten."""
    log_p, picked = torch.log_softmax(z, -1, out=z), labels[:, None]
    losses = -(1 - alpha) * log_p.gather(1, picked)[:, 0]
    targets = None
    if teacher_z is not None:
        targets = torch.softmax(teacher_z, -1, out=teacher_z)
        losses -= alpha * torch.einsum("nv,nv->n", targets, log_p)
    if gradient is None:
        return losses
    dz = log_p.exp_()
    if targets is not None:
        dz.sub_(targets, alpha=alpha)
    dz.scatter_add_(1, picked, torch.full_like(picked, alpha - 1, dtype=dz.dtype))
    if row_weights is not None:
        dz.mul_(row_weights[:, None])
    if gradient is not dz:
        torch.mul(dz, scale, out=gradient)
    return losses


def torch_row_loss(
    bias: Tensor | None, teacher_bias: Tensor | None, labels: Tensor, alpha: float, row_weights: Tensor | None
) -> RowLoss:
    """Return the RowLoss of these biases (V,), labels (N,) and factors of the gradient's rows (N,)."""

    def by_row(z: Tensor, teacher_z: Tensor | None, rows: slice, gradient: Tensor | None, scale: float) -> Tensor:
        add_biases(z, bias, teacher_z, teacher_bias)
        weights = None if row_weights is None else row_weights[rows]
        return row_losses(z, teacher_z, labels[rows], alpha, weights, gradient, scale)

    return by_row


def _run(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor | None, Tensor | None, Tensor | None],
    labels: Tensor,
    alpha: float,
    wanted: list[bool],
    row_weights: Tensor | None = None,
) -> tuple[Tensor, Gradients]:
    """Return losses (N,) and the gradients of h, weight and bias, by the backend that suits h."""
    check_label_range("linear_soft_ce", labels, weight.shape[0])
    chosen = dispatch.choose("linear_soft_ce", h, lambda: triton_refuses(h)).name
    teacher_h, teacher_weight, teacher_bias = teacher
    if chosen == "triton":
        from simla_kernels.linear_soft_ce_triton import row_loss
    else:
        row_loss = torch_row_loss
    by_row = row_loss(bias, teacher_bias, labels, alpha, row_weights)
    heads = None if teacher_h is None or teacher_weight is None else (teacher_h, teacher_weight)
    return losses_and_gradients(h, weight, heads, by_row, wanted, aligned=chosen == "triton")


def check_label_range(op: str, labels: Tensor, classes: int) -> None:
    """Where it costs nothing: on a card it would wait for the device, and a label out of range gives NaN there."""
    if labels.device.type == "cpu" and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"{op}: labels {tuple(labels.shape)} go from {int(labels.min())} to {int(labels.max())}; "
            f"expected 0 to {classes - 1}"
        )


# ---- registration: the sum of the losses makes its gradients in forward, the losses one by one in backward


@torch.library.custom_op("simla_kernels::linear_soft_ce_sum", mutates_args=())
def _sum(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    alpha: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    teacher = (teacher_h, teacher_weight, teacher_bias)
    losses, made = _run(h, weight, bias, teacher, labels, alpha, wanted)
    return losses.sum(), made.h, made.weight, made.bias


linear_autograd.register(_sum)


@torch.library.custom_op("simla_kernels::linear_soft_ce_rows", mutates_args=())
def _rows(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    alpha: float,
    wanted: list[bool],
) -> Tensor:
    return _run(h, weight, bias, (teacher_h, teacher_weight, teacher_bias), labels, alpha, [False] * 3)[0]


@_rows.register_fake
def _(h, weight, bias, teacher_h, teacher_weight, teacher_bias, labels, alpha, wanted):
    return h.new_empty(h.shape[0], dtype=exact(h.dtype))


@torch.library.custom_op("simla_kernels::linear_soft_ce_rows_backward", mutates_args=())
def _rows_gradients(
    grad_out: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    alpha: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    largest = grad_out.abs().amax().clamp(min=1e-30) if len(grad_out) else grad_out.new_ones(())
    teacher = (teacher_h, teacher_weight, teacher_bias)
    # d loss / d z stays within [-1, 1]: a loss scale of 2^16 would be beyond fp16
    _, made = _run(h, weight, bias, teacher, labels, alpha, wanted, row_weights=grad_out / largest)
    scaled = gradients_times(largest, made, h, keeps_dz(h, weight), wanted)
    dh, dweight, dbias = (h.new_empty(0) if gradient is None else gradient for gradient in scaled)
    return dh, dweight, dbias


@_rows_gradients.register_fake
def _(grad_out, h, weight, bias, teacher_h, teacher_weight, teacher_bias, labels, alpha, wanted):
    shapes = (h.shape, weight.shape, weight.shape[:1])
    return tuple(h.new_empty(shape if yes else 0) for shape, yes in zip(shapes, wanted, strict=True))


def _rows_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7])
    ctx.set_materialize_grads(False)
    ctx.alpha, ctx.wanted = inputs[7:]


def _rows_backward(ctx, grad_out):
    if grad_out is None:
        return (None,) * 9
    gradients = _rows_gradients(grad_out, *ctx.saved_tensors, ctx.alpha, ctx.wanted)
    made = (gradient if yes else None for gradient, yes in zip(gradients, ctx.wanted, strict=True))
    return *made, *(None,) * 6


_rows.register_autograd(_rows_backward, setup_context=_rows_context)


# ---- public


def linear_soft_ce(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    labels: Tensor,
    alpha: float,
    reduction: str = "mean",
) -> Tensor:
    """Return (1 - alpha) CE(label) + alpha CE(softmax of the teacher's logits): fp32, (N,) or a scalar.

    Args:
        h: (N, K). weight: (V, K). bias: (V,) or None; all of one dtype.
        teacher_h, teacher_weight, teacher_bias: likewise (N, K'), (V, K'), (V,); they get no gradient. None: the labels
            alone count, as with alpha 0 (the teacher's product is skipped then).
        labels: (N,) int64 in [0, V).
        alpha: weight of the teacher's distribution, in [0, 1].
        reduction: "mean" and "sum" make all gradients in forward; no rows give 0, and zero gradients. "none" does the
            work again in backward and reads the weight there: not for ZeRO-3, which has partitioned it by then.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; labels out of range (on a CPU).
    """
    op = "linear_soft_ce"
    if h.dim() != 2:
        raise ValueError(f"{op}: h {tuple(h.shape)} must be (N, K)")
    if labels.shape != h.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"{op}: labels {tuple(labels.shape)} {labels.dtype} must be ({len(h)},) torch.int64")
    check_head(op, h, weight, bias, (teacher_h, teacher_weight, teacher_bias), alpha)
    check_device(op, h, labels=labels)
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction={reduction!r} must be one of {', '.join(REDUCTIONS)}")
    if teacher_h is None or alpha == 0:
        teacher_h = teacher_weight = teacher_bias = None
        alpha = 0.0
    able = torch.is_grad_enabled()
    wanted = [able and x is not None and x.requires_grad for x in (h, weight, bias)]
    arguments = (h, weight, bias, teacher_h, teacher_weight, teacher_bias, labels, float(alpha), wanted)
    if reduction == "none":
        return _rows(*arguments)
    total = _sum(*arguments)[0]
    return total / max(len(labels), 1) if reduction == "mean" else total


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
    labels = torch.randint(classes, (rows,), generator=generator).to(device)
    return {**student, **teacher, "labels": labels, "alpha": 0.4, "reduction": REDUCTIONS[size]}


dispatch.register(
    Operation(
        function=linear_soft_ce,
        reference=linear_soft_ce_reference,
        example=_example,
        refuses=lambda h, *_, **__: triton_refuses(h),
    )
)
