"""linear_soft_ce's row kernel: from logits to losses and to their gradient, two passes over a row, in place.

    loss = lse(z) - (1 - alpha) z[label] - alpha <softmax(t), z>
    dz = softmax(z) - (1 - alpha) onehot(label) - alpha softmax(t)
z student's and t teacher's logits, n rows of one chunk, V classes. The matrix products around it are cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from simla_kernels.configs import config
from simla_kernels.launching import interpreting, launch
from simla_kernels.linear_chunks import FP16_SCALE, RowLoss, padded, padded_bias


@triton.jit
def load_logits(logits_ptr, bias_ptr, columns, V, padded_V, HAS_BIAS: tl.constexpr):
    """Return a tile of z with its bias, -inf beyond V. Reads up to padded_V, a multiple of 16: whole 128-bit loads."""
    z = tl.load(logits_ptr + columns, mask=columns < padded_V, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < padded_V, other=0.0)
    return tl.where(columns < V, z, -float("inf"))


@triton.jit
def row_loss_kernel(
    student_ptr,  # in   (n, V) fp32 logits without bias, rows of padded_V entries
    teacher_ptr,  # in   (n, V) fp32 likewise, or None
    student_bias_ptr,  # in   (padded_V,) fp32, or None
    teacher_bias_ptr,  # in   (padded_V,) fp32, or None
    label_ptr,  # in   (n,) int64
    row_weight_ptr,  # in   (n,) fp32, factors of the gradient, or None
    loss_ptr,  # out  (n,) fp32
    gradient_ptr,  # out  (n, V) fp32 over the student's logits, or half elsewhere; None: not wanted
    V,
    padded_V,
    student_stride,
    teacher_stride,
    gradient_stride,
    alpha,
    scale,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    student_ptr += row * student_stride
    label = tl.load(label_ptr + row)
    known = (label >= 0) & (label < V)
    # before the second pass writes over it; NaN makes a label out of range visible
    picked = tl.load(student_ptr + label, mask=known, other=float("nan"))
    if HAS_BIAS:
        picked += tl.load(student_bias_ptr + label, mask=known, other=0.0)
    columns = tl.arange(0, BLOCK_V)

    largest, total = -float("inf"), tl.zeros([BLOCK_V], tl.float32)
    teacher_largest, teacher_total = -float("inf"), tl.zeros([BLOCK_V], tl.float32)
    agreement = tl.zeros([BLOCK_V], tl.float32)  # sum of exp(t - teacher_largest) z
    if HAS_TEACHER:
        teacher_ptr += row * teacher_stride
    for start in range(0, V, BLOCK_V):
        at = start + columns
        z = load_logits(student_ptr, student_bias_ptr, at, V, padded_V, HAS_BIAS)
        new = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - new) + tl.exp(z - new)
        largest = new
        if HAS_TEACHER:
            t = load_logits(teacher_ptr, teacher_bias_ptr, at, V, padded_V, HAS_TEACHER_BIAS)
            new = tl.maximum(teacher_largest, tl.max(t, 0))
            shrink, weight = tl.exp(teacher_largest - new), tl.exp(t - new)
            teacher_total = teacher_total * shrink + weight
            agreement = agreement * shrink + weight * tl.where(at < V, z, 0.0)
            teacher_largest = new

    lse = largest + tl.log(tl.sum(total, 0))
    loss = lse - (1 - alpha) * picked
    share = 0.0
    if HAS_TEACHER:
        share = alpha / tl.sum(teacher_total, 0)
        loss -= share * tl.sum(agreement, 0)
    tl.store(loss_ptr + row, loss)

    if HAS_GRADIENT:
        gradient_ptr += row * gradient_stride
        factor = scale
        if HAS_WEIGHT:
            factor *= tl.load(row_weight_ptr + row)
        for start in range(0, V, BLOCK_V):
            at = start + columns
            z = load_logits(student_ptr, student_bias_ptr, at, V, padded_V, HAS_BIAS)
            dz = tl.exp(z - lse) - tl.where(at == label, 1 - alpha, 0.0)
            if HAS_TEACHER:
                t = load_logits(teacher_ptr, teacher_bias_ptr, at, V, padded_V, HAS_TEACHER_BIAS)
                dz -= share * tl.exp(t - teacher_largest)
            tl.store(gradient_ptr + at, (factor * dz).to(gradient_ptr.dtype.element_ty), mask=at < padded_V)


def row_loss(
    bias: Tensor | None, teacher_bias: Tensor | None, labels: Tensor, alpha: float, row_weights: Tensor | None
) -> RowLoss:
    """Return the RowLoss of these biases (V,), labels (N,) and factors of the gradient's rows (N,)."""
    bias, teacher_bias, labels = padded_bias(bias), padded_bias(teacher_bias), labels.contiguous()
    row_weights = None if row_weights is None else row_weights.contiguous()

    def by_row(z: Tensor, teacher_z: Tensor | None, rows: slice, gradient: Tensor | None, scale: float) -> Tensor:
        losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
        # the interpreter cuts fp32 down to bf16 where a card rounds
        rounded = gradient is not None and gradient.dtype != z.dtype and interpreting()
        written = z if rounded else gradient
        launch(
            row_loss_kernel,
            (z.shape[0],),
            config("linear_soft_ce.row_loss", "any", z.device),
            student_ptr=z,
            teacher_ptr=teacher_z,
            student_bias_ptr=bias,
            teacher_bias_ptr=teacher_bias,
            label_ptr=labels[rows],
            row_weight_ptr=None if row_weights is None else row_weights[rows],
            loss_ptr=losses,
            gradient_ptr=written,
            V=z.shape[1],
            padded_V=padded(z.shape[1]),
            student_stride=z.stride(0),
            teacher_stride=0 if teacher_z is None else teacher_z.stride(0),
            gradient_stride=0 if written is None else written.stride(0),
            alpha=float(alpha),
            scale=float(scale),
            HAS_BIAS=bias is not None,
            HAS_TEACHER_BIAS=teacher_bias is not None,
            HAS_TEACHER=teacher_z is not None,
            HAS_WEIGHT=row_weights is not None,
            HAS_GRADIENT=written is not None,
        )
        if rounded and gradient is not None:
            gradient.copy_(z)
        return losses

    return by_row


def compile_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what the two heads launch at batch 64: with gradients, in evaluation, and reduction "none" in backward."""
    for name, rows, classes in (("XMM head", 1600, 8192), ("MLM head", 288, 30_522)):
        for case in ("with gradient", "loss only", "labels only", "row weights"):
            yield f"{name}, {case}", lambda r=rows, v=classes, case=case: _launch_on_meta(dtype, r, v, case)


def _launch_on_meta(dtype: torch.dtype, rows: int, classes: int, case: str) -> None:
    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    columns = padded(classes)
    z = empty(rows, columns)[:, :classes]
    teacher_z = None if case == "labels only" else empty(rows, columns)[:, :classes]
    gradient = None if case == "loss only" else z if dtype == z.dtype else empty(rows, columns, of=dtype)[:, :classes]
    bias, labels = empty(classes, of=dtype), empty(rows, of=torch.int64)
    weights = empty(rows) if case == "row weights" else None
    by_row = row_loss(bias, None if teacher_z is None else bias, labels, 0.4, weights)
    by_row(z, teacher_z, slice(0, rows), gradient, FP16_SCALE if dtype == torch.float16 else 1.0)
