"""linear_soft_bce's row kernel: from logits to losses and to their gradient, one pass over a row, in place.

    y = (1 - alpha) hot + alpha sigmoid(t),   loss = sum_v softplus(z) - y z,   dz = sigmoid(z) - y
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
def load_logits(logits_ptr, bias_ptr, columns, padded_V, HAS_BIAS: tl.constexpr):
    """Return a tile of z with its bias. Reads up to padded_V, a multiple of 16: whole 128-bit loads."""
    z = tl.load(logits_ptr + columns, mask=columns < padded_V, other=0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + columns, mask=columns < padded_V, other=0.0)
    return z


@triton.jit
def log1p_of_exp(e):
    """Return log(1 + e) for e in [0, 1] as 2 atanh(e / (2 + e)), which keeps the digits of a small e."""
    s = e / (2 + e)
    q = s * s  # at most 1/9: the next term is 2e-8 of the sum
    series = 1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return 2 * s * series


@triton.jit
def sigmoid_from(z, e):
    """Return sigmoid(z), given e = exp(-|z|)."""
    return tl.where(z >= 0, 1.0, e) / (1 + e)


@triton.jit
def row_loss_kernel(
    student_ptr,  # in   (n, V) fp32 logits without bias, rows of padded_V entries
    teacher_ptr,  # in   (n, V) fp32 likewise, or None
    student_bias_ptr,  # in   (padded_V,) fp32, or None
    teacher_bias_ptr,  # in   (padded_V,) fp32, or None
    keyword_ptr,  # in   (n, KEYWORDS) int64, -1 for none
    loss_ptr,  # out  (n,) fp32
    gradient_ptr,  # out  (n, V) fp32 over the student's logits, or half elsewhere; None: not wanted
    V,
    padded_V,
    student_stride,
    teacher_stride,
    gradient_stride,
    alpha,
    scale,
    KEYWORDS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEACHER_BIAS: tl.constexpr,
    HAS_TEACHER: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # row * stride passes 2^31
    student_ptr += row * student_stride
    if HAS_TEACHER:
        teacher_ptr += row * teacher_stride
    if HAS_GRADIENT:
        gradient_ptr += row * gradient_stride
    columns = tl.arange(0, BLOCK_V)
    total = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        at = start + columns
        z = load_logits(student_ptr, student_bias_ptr, at, padded_V, HAS_BIAS)
        hot = tl.zeros([BLOCK_V], tl.int1)
        for k in tl.static_range(KEYWORDS):  # pyright: ignore[reportGeneralTypeIssues]  triton unrolls it
            hot |= at == tl.load(keyword_ptr + row * KEYWORDS + k)
        target = tl.where(hot, 1 - alpha, 0.0)
        if HAS_TEACHER:
            t = load_logits(teacher_ptr, teacher_bias_ptr, at, padded_V, HAS_TEACHER_BIAS)
            target += alpha * sigmoid_from(t, tl.exp(-tl.abs(t)))
        e = tl.exp(-tl.abs(z))
        total += tl.where(at < V, tl.maximum(z, 0.0) + log1p_of_exp(e) - target * z, 0.0)
        if HAS_GRADIENT:
            dz = scale * (sigmoid_from(z, e) - target)
            tl.store(gradient_ptr + at, dz.to(gradient_ptr.dtype.element_ty), mask=at < padded_V)
    tl.store(loss_ptr + row, tl.sum(total, 0))


def row_loss(bias: Tensor | None, teacher_bias: Tensor | None, keyword_ids: Tensor, alpha: float) -> RowLoss:
    """Return the RowLoss of these biases (V,) and keywords (N, up to 64)."""
    bias, teacher_bias, keyword_ids = padded_bias(bias), padded_bias(teacher_bias), keyword_ids.contiguous()

    def by_row(z: Tensor, teacher_z: Tensor | None, rows: slice, gradient: Tensor | None, scale: float) -> Tensor:
        losses = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
        # the interpreter cuts fp32 down to bf16 where a card rounds
        rounded = gradient is not None and gradient.dtype != z.dtype and interpreting()
        written = z if rounded else gradient
        launch(
            row_loss_kernel,
            (z.shape[0],),
            config("linear_soft_bce.row_loss", "any", z.device),
            student_ptr=z,
            teacher_ptr=teacher_z,
            student_bias_ptr=bias,
            teacher_bias_ptr=teacher_bias,
            keyword_ptr=keyword_ids[rows],
            loss_ptr=losses,
            gradient_ptr=written,
            V=z.shape[1],
            padded_V=padded(z.shape[1]),
            student_stride=z.stride(0),
            teacher_stride=0 if teacher_z is None else teacher_z.stride(0),
            gradient_stride=0 if written is None else written.stride(0),
            alpha=float(alpha),
            scale=float(scale),
            KEYWORDS=keyword_ids.shape[1],
            HAS_BIAS=bias is not None,
            HAS_TEACHER_BIAS=teacher_bias is not None,
            HAS_TEACHER=teacher_z is not None,
            HAS_GRADIENT=written is not None,
        )
        if rounded and gradient is not None:
            gradient.copy_(z)
        return losses

    return by_row


def compile_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what PSL's head launches at batch 64: with gradients, in evaluation, without a teacher."""
    for case in ("with gradient", "loss only", "keywords only"):
        yield f"PSL head, {case}", lambda case=case: _launch_on_meta(dtype, 64, 30_522, case)


def _launch_on_meta(dtype: torch.dtype, rows: int, classes: int, case: str) -> None:
    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    z = empty(rows, padded(classes))[:, :classes]
    teacher_z = None if case == "keywords only" else empty(rows, padded(classes))[:, :classes]
    gradient = None if case == "loss only" else z if dtype == z.dtype else empty(rows, padded(classes), of=dtype)
    bias, ids = empty(classes, of=dtype), empty(rows, 16, of=torch.int64)
    by_row = row_loss(bias, None if teacher_z is None else bias, ids, 0.4)
    by_row(z, teacher_z, slice(0, rows), gradient, FP16_SCALE if dtype == torch.float16 else 1.0)
