"""linear_soft_ce_over_positions: masked language modelling's loss as published, with a log-softmax over positions.

    z = h W^T + b,   sum_m (1 - alpha) (logsumexp_v z_m - z_m[label]) - alpha <softmax(t_m), log_softmax_p(z)[m]>
B captions of L positions, M labelled ones, K width, V classes; t the teacher's logits at labelled positions. The
teacher's term normalises each class over the caption's positions p (a bug, kept for `official` fidelity), so it needs z
everywhere. Classes are independent there: they are done some at a time, all positions of a class at once, after a first
pass over the labelled positions for the two sums over classes. In PyTorch on every device: there is no Triton kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import dispatch
from simla_kernels.dispatch import Operation
from simla_kernels.half import operand, without_autocast
from simla_kernels.linear_chunks import (
    add_product,
    check_device,
    check_head,
    chunk_bytes,
    exact,
    product,
    scaled_gradient,
)
from simla_kernels.linear_soft_ce import check_label_range, linear_soft_ce

FP16_SCALE = 2.0**8
"""d loss / d z is at most alpha times a caption's labelled positions: less room than one row's."""


def linear_soft_ce_over_positions_reference(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    label_index: Tensor,
    labels: Tensor,
    alpha: float,
) -> Tensor:
    """Return what linear_soft_ce_over_positions returns, by the definition."""
    z = F.linear(h, weight, bias).to(exact(h.dtype))
    log_p = z.flatten(0, 1).index_select(0, label_index).log_softmax(-1)
    hard = -log_p.gather(1, labels[:, None]).sum()
    if teacher_h is None or teacher_weight is None:
        return hard
    targets = F.linear(teacher_h, teacher_weight, teacher_bias).detach().to(z.dtype).softmax(-1)
    over_positions = z.log_softmax(1).flatten(0, 1).index_select(0, label_index)
    return (1 - alpha) * hard - alpha * (targets * over_positions).sum()


class Linear(NamedTuple):
    """Rows (N, K) as an operand, and what they are multiplied with: weight (V, K), bias (V,)."""

    rows: Tensor
    weight: Tensor
    bias: Tensor | None

    def logits(self, block: Tensor, columns: slice) -> Tensor:
        """Return the logits (N, columns) of some classes in `exact` dtype; `block`: their rows of the weight."""
        shape = (self.rows.shape[0], block.shape[0])
        z = torch.empty(shape, dtype=exact(self.rows.dtype), device=self.rows.device)
        product(self.rows, block.t(), out=z)
        return z if self.bias is None else z.add_(self.bias[columns])


def _blocks(positions: int, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (classes, their rows of the weight as an operand), as many as fit the budget at all positions."""
    step = max(1, chunk_bytes(weight.device) // (4 * max(positions, 1)))
    for start in range(0, weight.shape[0], step):
        columns = slice(start, min(start + step, weight.shape[0]))
        yield columns, operand(weight[columns])


def _log_sum_exp(of: Linear, positions: int) -> Tensor:
    """Return logsumexp over all classes, (N,)."""
    total = torch.full_like(of.rows[:, 0], -torch.inf, dtype=exact(of.rows.dtype))
    for columns, block in _blocks(positions, of.weight):
        total = torch.logaddexp(total, of.logits(block, columns).logsumexp(-1))
    return total


@torch.library.custom_op("simla_kernels::linear_soft_ce_over_positions", mutates_args=())
def _sum(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    label_index: Tensor,
    labels: Tensor,
    alpha: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss and its gradients."""
    check_label_range("linear_soft_ce_over_positions", labels, weight.shape[0])
    with without_autocast(h.device):
        return _loss_and_gradients(
            h,
            weight,
            bias,
            Linear(operand(teacher_h), teacher_weight, teacher_bias),
            label_index,
            labels,
            alpha,
            wanted,
        )


def _loss_and_gradients(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: Linear,
    label_index: Tensor,
    labels: Tensor,
    alpha: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions, flat = h.shape[0] * h.shape[1], operand(h).flatten(0, 1)
    lse = _log_sum_exp(Linear(flat.index_select(0, label_index), weight, bias), positions)
    teacher_lse = _log_sum_exp(teacher, positions)
    gradients = _empty_gradients(h, weight, wanted)
    gradients[0].zero_()
    total = lse.new_zeros(())
    for columns, block in _blocks(positions, weight):
        z = Linear(flat, weight, bias).logits(block, columns)
        targets = (teacher.logits(operand(teacher.weight[columns]), columns) - teacher_lse[:, None]).exp_()
        hit = torch.arange(columns.start, columns.stop, device=h.device) == labels[:, None]
        loss, dz = _losses_of_classes(z.view(*h.shape[:2], -1), lse, targets, hit, label_index, alpha)
        total += loss
        _add_gradients(gradients, dz, flat, block, columns)
    if flat.dtype == torch.float16:
        for gradient in gradients[:2]:
            gradient.mul_(1 / FP16_SCALE)
    return total, *gradients


def _losses_of_classes(
    z: Tensor, lse: Tensor, targets: Tensor, hit: Tensor, label_index: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Return the share of some classes in the loss, and d loss / d z (B L, classes).

    z: (B, L, classes). lse: (M,) over all classes. targets, hit: (M, classes), the teacher's shares and the labels.
    """
    rows = z.flatten(0, 1).index_select(0, label_index)
    # through the row itself; what comes through the sum over positions is added to it below
    dz_rows = (rows - lse[:, None]).exp_().sub_(hit.to(z.dtype)).mul_(1 - alpha).sub_(targets, alpha=alpha)
    loss = (1 - alpha) * (hit * (lse[:, None] - rows)).sum()
    over_positions = z.log_softmax(1)
    loss -= alpha * (targets * over_positions.flatten(0, 1).index_select(0, label_index)).sum()
    # a product sums over a caption's labelled positions, deterministically on a card too
    caption = torch.arange(z.shape[0], device=z.device)[:, None] == label_index // z.shape[1]
    mass = caption.to(targets.dtype) @ targets  # (B, classes)
    dz = over_positions.exp_().mul_(alpha * mass[:, None]).flatten(0, 1)
    return loss, dz.index_add_(0, label_index, dz_rows)


def _add_gradients(
    gradients: tuple[Tensor, Tensor, Tensor], dz: Tensor, flat: Tensor, block: Tensor, columns: slice
) -> None:
    of_h, of_weight, of_bias = gradients
    if of_bias.numel():
        of_bias[columns] = dz.sum(0)
    if dz.dtype != flat.dtype:
        dz = (dz * FP16_SCALE if flat.dtype == torch.float16 else dz).to(flat.dtype)
    if of_weight.numel():
        product(dz.t(), flat, out=of_weight[columns])
    if of_h.numel():
        add_product(dz, block, out=of_h.view(-1, of_h.shape[-1]))


def _empty_gradients(h: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    of_h, of_weight, of_bias = (
        torch.empty(shape if yes else (0,), dtype=exact(h.dtype), device=h.device)
        for shape, yes in zip((h.shape, weight.shape, weight.shape[:1]), wanted, strict=True)
    )
    return of_h, of_weight, of_bias


@_sum.register_fake
def _(h, weight, bias, teacher_h, teacher_weight, teacher_bias, label_index, labels, alpha, wanted):
    return h.new_empty((), dtype=exact(h.dtype)), *_empty_gradients(h, weight, wanted)


def _context(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.wanted = inputs[0].dtype, inputs[-1]


def _backward(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 10
    made = (
        scaled_gradient(gradient, grad_out, ctx.dtype) if yes else None
        for gradient, yes in zip(ctx.saved_tensors, ctx.wanted, strict=True)
    )
    return *made, *(None,) * 7


_sum.register_autograd(_backward, setup_context=_context)


def linear_soft_ce_over_positions(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_h: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    label_index: Tensor,
    labels: Tensor,
    alpha: float,
) -> Tensor:
    """Return the sum over labelled positions of the published loss: an fp32 scalar. All gradients are made in forward.

    Args:
        h: (B, L, K). weight: (V, K). bias: (V,) or None; all of one dtype.
        teacher_h, teacher_weight, teacher_bias: (M, K') at labelled positions, (V, K'), (V,); they get no gradient.
            None: the labels alone count, as with alpha 0; no other position is then read.
        label_index: (M,) int64, the labelled positions in h.flatten(0, 1), each once.
        labels: (M,) int64 in [0, V).
        alpha: weight of the teacher's term, in [0, 1].

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together; labels out of range (on a CPU).
    """
    op = "linear_soft_ce_over_positions"
    if h.dim() != 3:
        raise ValueError(f"{op}: h {tuple(h.shape)} must be (B, L, K)")
    for name, index in (("labels", labels), ("label_index", label_index)):
        if index.dim() != 1 or index.shape != labels.shape or index.dtype != torch.int64:
            raise ValueError(f"{op}: {name} {tuple(index.shape)} {index.dtype} must be (M,) torch.int64, both alike")
    check_head(op, h, weight, bias, (teacher_h, teacher_weight, teacher_bias), alpha, rows=len(labels))
    check_device(op, h, labels=labels, label_index=label_index)
    if teacher_h is None or teacher_weight is None or alpha == 0:
        rows = h.flatten(0, 1).index_select(0, label_index)
        return linear_soft_ce(rows, weight, bias, None, None, None, labels, 0.0, reduction="sum")
    able = torch.is_grad_enabled()
    wanted = [able and x is not None and x.requires_grad for x in (h, weight, bias)]
    arguments = (teacher_h, teacher_weight, teacher_bias, label_index, labels, float(alpha), wanted)
    return _sum(h, weight, bias, *arguments)[0]


def _example(size: int, device: torch.device, dtype: torch.dtype) -> dict[str, object]:
    captions, length, width, classes = ((3, 7, 16, 37), (2, 31, 64, 2049), (2, 5, 24, 30_522))[size]
    generator = torch.Generator().manual_seed(size)
    labelled = torch.randperm(captions * length, generator=generator)[: captions * length // 3 + 1]

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator)).to(device, dtype)

    def head() -> dict[str, Tensor]:
        return {"weight": normal(classes, width, scale=width**-0.5), "bias": normal(classes)}

    return {
        "h": normal(captions, length, width).requires_grad_(),
        **{name: x.requires_grad_() for name, x in head().items()},
        "teacher_h": normal(len(labelled), width),
        **{f"teacher_{name}": x for name, x in head().items()},
        "label_index": labelled.to(device),
        "labels": torch.randint(classes, (len(labelled),), generator=generator).to(device),
        "alpha": 0.4,
    }


dispatch.register(
    Operation(
        function=linear_soft_ce_over_positions,
        reference=linear_soft_ce_over_positions_reference,
        example=_example,
        torch_only="for `official` fidelity only: no Triton kernel",
    )
)
