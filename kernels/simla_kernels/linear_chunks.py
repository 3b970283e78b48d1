"""A wide linear layer and the loss on its outputs, some rows at a time: what the linear_soft_* operations share.

N rows, K width, V classes. Logits z = h W^T of one chunk of rows exist at a time, in fp32. A row loss turns them into
losses and into d loss / d z, from which the gradients of h, W and the bias follow at once; they are kept in fp32.
Matrix products of half precision keep fp32 results on a card. On a CPU with bf16 units (AVX512-BF16, AMX) PyTorch
rounds them to bf16, as its own linear layer does; on one without, half inputs are multiplied in fp32, which is faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import half

CHUNK_BYTES = 16 * 2**20
"""Memory for one chunk of fp32 logits on a CPU: 512 rows of 8,192 classes, 137 of 30,522; the teacher's as much."""
CARD_CHUNK_BYTES = 64 * 2**20
"""Likewise on a card, where every chunk reads and writes the whole gradient of the weight again."""
CPU_BLOCK = 512
"""Classes multiplied at a time in fp32 on a CPU: 72 rows times 30,522 classes are 1.4 times as fast as all at once, and
half weights are cast a block at a time."""
FP16_SCALE = 2.0**12
"""d loss / d z of a row is in [-1, 1]; times this it stays above fp16's smallest numbers down to 1.5e-11."""
ALIGNMENT = 16
"""Rows of logits for Triton start at multiples of this, whatever V is, so that loads are 128 bits wide."""


class RowLoss(Protocol):
    """The loss of each row as a function of its logits."""

    def __call__(
        self, z: Tensor, teacher_z: Tensor | None, rows: slice, gradient: Tensor | None, scale: float
    ) -> Tensor:
        """Return the losses (n,) of `rows`; write scale * d loss / d z into `gradient`.

        z, teacher_z: (n, V) logits without biases, fp32 (fp64 for fp64 inputs); may be overwritten.
        gradient: (n, V), z itself or a tensor of lower precision; None: none is wanted.
        """
        ...


class Gradients(NamedTuple):
    """Of the sum of the losses; fp32 (fp64 for fp64 inputs), empty where none is wanted."""

    h: Tensor
    """(N, K)."""
    weight: Tensor
    """(V, K); where keeps_dz, dz (N, V) as an operand, for weight_gradient."""
    bias: Tensor
    """(V,)."""


def losses_and_gradients(
    h: Tensor,
    weight: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    row_loss: RowLoss,
    wanted: list[bool],
    aligned: bool,
) -> tuple[Tensor, Gradients]:
    """Return the losses (N,) and the gradients of their sum.

    Args:
        h: (N, K). weight: (V, K). teacher: its hidden states and weight, whose logits row_loss also gets.
        wanted: whether the gradient of h, of the weight and of the bias is wanted.
        aligned: give row_loss rows that start at multiples of ALIGNMENT, with columns to spare.
    """
    losses = h.new_empty(h.shape[0], dtype=exact(h.dtype))
    gradients = empty_gradients(h, weight, wanted)
    if h.shape[0] == 0:
        for gradient in gradients:
            gradient.zero_()
    h, teacher = half.operand(h), teacher and (half.operand(teacher[0]), teacher[1])
    scale = FP16_SCALE if h.dtype == torch.float16 else 1.0  # on a card: operands on a CPU are not fp16
    with half.without_autocast(h.device):
        for rows in _chunks(h.shape[0], weight):
            _one_chunk(h, weight, teacher, row_loss, rows, losses, gradients, scale, aligned)
    if scale != 1:
        for gradient in gradients:
            if gradient.dtype != h.dtype:  # weight_gradient knows of dz's scale
                gradient.mul_(1 / scale)
    return losses, gradients


def keeps_dz(h: Tensor, weight: Tensor) -> bool:
    """Whether a few rows' dz is kept for backward in place of the weight's gradient: it is smaller, and one chunk."""
    return h.shape[0] < h.shape[1] and h.shape[0] <= _most_rows(weight)


def _one_chunk(
    h: Tensor,
    weight: Tensor,
    teacher: tuple[Tensor, Tensor] | None,
    row_loss: RowLoss,
    rows: slice,
    losses: Tensor,
    gradients: Gradients,
    scale: float,
    aligned: bool,
) -> None:
    part, shape = h[rows], (rows.stop - rows.start, weight.shape[0])
    z = _logits(part, weight, aligned)
    teacher_z = None if teacher is None else _logits(teacher[0][rows], teacher[1], aligned)
    if not any(g.numel() for g in gradients):
        losses[rows] = row_loss(z, teacher_z, rows, None, 1.0)
        return
    dz = z if z.dtype == h.dtype else _rows_of(shape, h.dtype, h.device, aligned)
    losses[rows] = row_loss(z, teacher_z, rows, dz, scale)
    del z, teacher_z  # before the weight's gradient: it is what memory peaks at
    if gradients.h.numel():
        for columns, block in weight_blocks(weight):
            (product if columns.start == 0 else add_product)(dz[:, columns], block, gradients.h[rows])
    first = rows.start == 0
    if gradients.weight.numel() and keeps_dz(h, weight):
        gradients.weight.copy_(dz)
    elif gradients.weight.numel():
        (product if first else add_product)(dz.t(), part, gradients.weight)
    if gradients.bias.numel():
        columns = dz.sum(0, dtype=gradients.bias.dtype)
        gradients.bias.copy_(columns) if first else gradients.bias.add_(columns)


def _chunks(rows: int, weight: Tensor) -> Iterator[slice]:
    """Yield equal parts of the rows whose logits fit the budget."""
    count = -(-rows // _most_rows(weight))
    for i in range(count):
        yield slice(rows * i // count, rows * (i + 1) // count)


def _most_rows(weight: Tensor) -> int:
    return max(1, chunk_bytes(weight.device) // (4 * weight.shape[0]))


def chunk_bytes(device: torch.device) -> int:
    """Return the memory for one chunk of fp32 logits."""
    return CHUNK_BYTES if device.type == "cpu" else CARD_CHUNK_BYTES


def exact(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of logits, losses and gradients."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def weight_blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield (classes, their rows of the weight as an operand): all at once, or CPU_BLOCK at a time in fp32 on a CPU."""
    classes = weight.shape[0]
    blocked = weight.device.type == "cpu" and not half.on_units(weight)
    step = CPU_BLOCK if blocked else classes
    for start in range(0, classes, step):
        part = slice(start, min(start + step, classes))
        yield part, half.operand(weight[part])


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Write a @ b, of operands in one dtype, into `out`, which is fp32 for half operands."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # PyTorch has no product there that keeps fp32 results
        return out.copy_(a @ b)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Add a @ b to `out`, which is fp32 for half operands."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b)
    return out.add_(a @ b if a.device.type == "cpu" else torch.mm(a, b, out_dtype=out.dtype))


def _logits(h: Tensor, weight: Tensor, aligned: bool) -> Tensor:
    z = _rows_of((h.shape[0], weight.shape[0]), exact(h.dtype), h.device, aligned)
    for columns, block in weight_blocks(weight):
        product(h, block.t(), out=z[:, columns])
    return z


def _rows_of(shape: tuple[int, int], dtype: torch.dtype, device: torch.device, aligned: bool) -> Tensor:
    columns = padded(shape[1]) if aligned else shape[1]
    rows = torch.empty(shape[0], columns, dtype=dtype, device=device)
    if device.type == "cpu":  # PyTorch's products with AMX read what lies behind a row, and NaN times zero is NaN
        rows[:, shape[1] :] = 0
    return rows[:, : shape[1]]


def padded(columns: int) -> int:
    """Return the next multiple of ALIGNMENT."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def add_biases(z: Tensor, bias: Tensor | None, teacher_z: Tensor | None, teacher_bias: Tensor | None) -> None:
    """Add the student's and the teacher's bias in place, where there are any."""
    if bias is not None:
        z.add_(bias)
    if teacher_z is not None and teacher_bias is not None:
        teacher_z.add_(teacher_bias)


def padded_bias(bias: Tensor | None) -> Tensor | None:
    """Return a bias as Triton's row kernels read it: fp32, with as many entries as aligned rows have columns."""
    return None if bias is None else F.pad(bias.float(), (0, padded(bias.shape[0]) - bias.shape[0]))


def empty_gradients(h: Tensor, weight: Tensor, wanted: list[bool]) -> Gradients:
    """Return room for the wanted gradients."""
    dtype, (of_h, of_weight, of_bias) = exact(h.dtype), wanted
    kept = keeps_dz(h, weight)
    return Gradients(
        h=torch.empty(h.shape if of_h else (0,), dtype=dtype, device=h.device),
        weight=torch.empty(
            (0,) if not of_weight else (h.shape[0], weight.shape[0]) if kept else weight.shape,
            dtype=half.operand_dtype(h) if kept else dtype,
            device=h.device,
        ),
        bias=torch.empty(weight.shape[0] if of_bias else 0, dtype=dtype, device=h.device),
    )


def gradients_times(by: Tensor, gradients: Gradients, h: Tensor, kept: bool, wanted: list[bool]) -> list[Tensor | None]:
    """Return the gradients of h, weight and bias times `by`, in h's dtype: multiplied before they are cast."""
    of_h, of_weight, of_bias = wanted
    weight = None
    if of_weight and kept:
        weight = weight_gradient(gradients.weight, h, by)
    elif of_weight:
        weight = scaled_gradient(gradients.weight, by, h.dtype)
    return [
        scaled_gradient(gradients.h, by, h.dtype) if of_h else None,
        weight,
        scaled_gradient(gradients.bias, by, h.dtype) if of_bias else None,
    ]


@torch.library.custom_op("simla_kernels::scaled_gradient", mutates_args=())
def scaled_gradient(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """Return gradient * by in `dtype`."""
    return torch.mul(gradient, by, out=torch.empty_like(gradient, dtype=dtype))


@scaled_gradient.register_fake
def _(gradient: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(gradient, dtype=dtype)


@torch.library.custom_op("simla_kernels::linear_weight_gradient", mutates_args=())
def weight_gradient(dz: Tensor, h: Tensor, by: Tensor) -> Tensor:
    """Return dz^T h * by (V, K) in h's dtype, of a dz that was kept."""
    factor = half.operand(h)
    total = torch.empty(dz.shape[1], h.shape[1], dtype=exact(h.dtype), device=h.device)
    with half.without_autocast(h.device):
        if factor.dtype == total.dtype:
            return product(dz.t(), factor * by, out=total).to(h.dtype)
        if half.on_units(factor):  # whose products are rounded to bf16 anyway
            return dz.t() @ (factor * by)
        by = by / FP16_SCALE if dz.dtype == torch.float16 else by
        return torch.mul(product(dz.t(), factor, out=total), by, out=torch.empty_like(total, dtype=h.dtype))


@weight_gradient.register_fake
def _(dz: Tensor, h: Tensor, by: Tensor) -> Tensor:
    return h.new_empty(dz.shape[1], h.shape[1])


def check_head(
    op: str,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher: tuple[Tensor | None, ...],
    alpha: float,
    rows: int | None = None,
) -> None:
    """Check a student's head, its teacher's (h, weight, bias; `rows` rows, None: as many as h) and alpha.

    Raises:
        ValueError: naming the argument, its shape and what was expected.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"{op}: alpha={alpha} must be in [0, 1]")
    _check_linear(op, "", h, weight, bias)
    teacher_h, teacher_weight, teacher_bias = teacher
    if teacher_h is None and teacher_weight is None and teacher_bias is None:
        return
    if teacher_h is None or teacher_weight is None:
        missing = "teacher_h" if teacher_h is None else "teacher_weight"
        raise ValueError(f"{op}: {missing} is missing; give teacher_h and teacher_weight, or neither of them")
    rows = len(h) if rows is None else rows
    if teacher_h.dim() != 2 or len(teacher_h) != rows:
        raise ValueError(f"{op}: teacher_h {tuple(teacher_h.shape)} must be ({rows}, K)")
    _check_linear(op, "teacher_", teacher_h, teacher_weight, teacher_bias)
    if teacher_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"{op}: teacher_weight {tuple(teacher_weight.shape)} must have {weight.shape[0]} rows like weight"
        )
    check_device(op, h, teacher_h=teacher_h)


def _check_linear(op: str, of: str, h: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if not h.is_floating_point():
        raise ValueError(f"{op}: {of}h {tuple(h.shape)} {h.dtype} must be floating")
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != h.shape[-1] or weight.dtype != h.dtype:
        raise ValueError(
            f"{op}: {of}weight {tuple(weight.shape)} {weight.dtype} must be (V, {h.shape[-1]}) {h.dtype} like {of}h"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != h.dtype):
        raise ValueError(
            f"{op}: {of}bias {tuple(bias.shape)} {bias.dtype} must be ({weight.shape[0]},) {h.dtype} like {of}weight"
        )
    check_device(op, h, **{f"{of}weight": weight, f"{of}bias": bias})


def check_device(op: str, h: Tensor, **others: Tensor | None) -> None:
    """Check that the other arguments are where h is."""
    for name, other in others.items():
        if other is not None and other.device != h.device:
            raise ValueError(
                f"{op}: {name} {tuple(other.shape)} is on {other.device}, h on {h.device}; move one of them"
            )


def triton_refuses(h: Tensor) -> str | None:
    """Return why Triton's row kernels cannot take h; None when they can."""
    if h.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"h is {h.dtype}; the kernels take float32, bfloat16 and float16"
    return None
