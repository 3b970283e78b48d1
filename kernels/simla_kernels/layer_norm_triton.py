"""Triton kernels of dropout_add_layer_norm: a row is read once and normalised in registers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from simla_kernels.configs import config
from simla_kernels.launching import LaunchConfig, interpreting, launch, next_power_of_2

BACKWARD_PROGRAMS = 512
"""At most so many programs, each with its own sum of the parameters' gradients: added up in one order every time."""


@triton.jit(do_not_specialize=["seed"])
def layer_norm_forward_kernel(
    x_ptr,  # in   (N, D) of row stride x_stride
    residual_ptr,  # in   (N, D) of row stride residual_stride
    weight_ptr,  # in   (D,)
    bias_ptr,  # in   (D,)
    y_ptr,  # out  (N, D) contiguous
    total_ptr,  # out  (N, D) contiguous: residual + dropout(x)
    mean_ptr,  # out  (N,) fp32
    rstd_ptr,  # out  (N,) fp32
    rows,
    width,
    x_stride,
    residual_stride,
    eps,
    dropout_p,
    seed,
    DROPOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    inside = (row < rows) & (column < width)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + row * residual_stride + column, mask=inside, other=0.0).to(tl.float32)
    offset = row * width + column
    if DROPOUT:
        x = tl.where(tl.rand(seed, offset) >= dropout_p, x * (1 / (1 - dropout_p)), 0.0)
    total = residual + x
    mean = tl.sum(total, 1, keep_dims=True) / width
    centred = tl.where(column < width, total - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1, keep_dims=True) / width + eps)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(total_ptr + offset, total.to(total_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean, mask=row < rows)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["seed"])
def layer_norm_backward_kernel(
    grad_ptr,  # in   (N, D) of row stride grad_stride
    total_ptr,  # in   (N, D) contiguous
    mean_ptr,  # in   (N,) fp32
    rstd_ptr,  # in   (N,) fp32
    weight_ptr,  # in   (D,)
    grad_x_ptr,  # out  (N, D) contiguous; not written without dropout
    grad_total_ptr,  # out  (N, D) contiguous
    grad_weight_ptr,  # out  (programs, D) fp32, one sum per program
    grad_bias_ptr,  # out  (programs, D) fp32
    rows,
    width,
    grad_stride,
    dropout_p,
    seed,
    blocks_per_program,
    DROPOUT: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    grad_weight = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    grad_bias = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    for block in range(blocks_per_program):
        row = (program * blocks_per_program + block) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
        inside = (row < rows) & (column < width)
        offset = row * width + column
        grad = tl.load(grad_ptr + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
        total = tl.load(total_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        normalised = tl.where(inside, (total - mean) * rstd, 0.0)
        scaled = grad * weight
        along_one = tl.sum(scaled, 1, keep_dims=True) / width
        along_normalised = tl.sum(scaled * normalised, 1, keep_dims=True) / width
        grad_total = (scaled - along_one - normalised * along_normalised) * rstd
        tl.store(grad_total_ptr + offset, grad_total.to(grad_total_ptr.dtype.element_ty), mask=inside)
        if DROPOUT:
            grad_x = tl.where(tl.rand(seed, offset) >= dropout_p, grad_total * (1 / (1 - dropout_p)), 0.0)
            tl.store(grad_x_ptr + offset, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        grad_weight += grad * normalised
        grad_bias += grad
    to = program * width + column
    tl.store(grad_weight_ptr + to, tl.sum(grad_weight, 0, keep_dims=True), mask=column < width)
    tl.store(grad_bias_ptr + to, tl.sum(grad_bias, 0, keep_dims=True), mask=column < width)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, seed: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, total (..., D) in x's dtype, mean and rstd (rows,) fp32."""
    dtype, shape = x.dtype, x.shape
    if interpreting():  # it computes wrongly in half precision
        x, residual, weight, bias = (t.float() for t in (x, residual, weight, bias))
    x, residual = _as_rows(x), _as_rows(residual)
    rows, width = x.shape
    y, total = (torch.empty((rows, width), dtype=x.dtype, device=x.device) for _ in range(2))
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    chosen = config("layer_norm.forward", _size_class(width), x.device)
    launch(
        layer_norm_forward_kernel,
        (triton.cdiv(rows, chosen.tiles["BLOCK_ROWS"]),),
        chosen,
        x_ptr=x,
        residual_ptr=residual,
        weight_ptr=weight.contiguous(),
        bias_ptr=bias.contiguous(),
        y_ptr=y,
        total_ptr=total,
        mean_ptr=mean,
        rstd_ptr=rstd,
        rows=rows,
        width=width,
        x_stride=x.stride(0),
        residual_stride=residual.stride(0),
        eps=eps,
        dropout_p=dropout_p,
        seed=int(seed),
        DROPOUT=dropout_p > 0,
        BLOCK_D=next_power_of_2(width),
    )
    return y.view(shape).to(dtype), total.view(shape).to(dtype), mean, rstd


def backward(
    grad: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, dropout_p: float, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x (empty without dropout), residual, weight and bias."""
    dtype, weight_dtype, shape = total.dtype, weight.dtype, total.shape
    if interpreting():
        grad, total, weight = grad.float(), total.float(), weight.float()
    grad, total = _as_rows(grad), _as_rows(total)
    rows, width = total.shape
    grad_total = torch.empty_like(total)
    grad_x = torch.empty_like(total) if dropout_p else total.new_empty(0)
    chosen = config("layer_norm.backward", _size_class(width), total.device)
    programs, blocks_per_program = _split(rows, chosen)
    sums = torch.empty((2, programs, width), dtype=torch.float32, device=total.device)
    launch(
        layer_norm_backward_kernel,
        (programs,),
        chosen,
        grad_ptr=grad,
        total_ptr=total,
        mean_ptr=mean,
        rstd_ptr=rstd,
        weight_ptr=weight.contiguous(),
        grad_x_ptr=grad_x,
        grad_total_ptr=grad_total,
        grad_weight_ptr=sums[0],
        grad_bias_ptr=sums[1],
        rows=rows,
        width=width,
        grad_stride=grad.stride(0),
        dropout_p=dropout_p,
        seed=int(seed),
        blocks_per_program=blocks_per_program,
        DROPOUT=dropout_p > 0,
        BLOCK_D=next_power_of_2(width),
    )
    grad_weight, grad_bias = sums[0].sum(0).to(weight_dtype), sums[1].sum(0).to(weight_dtype)
    grad_x = grad_x.view(shape).to(dtype) if dropout_p else grad_x.to(dtype)
    return grad_x, grad_total.view(shape).to(dtype), grad_weight, grad_bias


def compile_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield what a step launches: a text batch, a picture batch, and the ends of each size class."""
    seed = torch.zeros(1, dtype=torch.int64)
    for rows, width in ((64 * 257, 768), (64 * 30, 768), (64 * 64, 128), (4096, 4096)):
        for dropout_p in (0.0, 0.1):

            def run(rows: int = rows, width: int = width, dropout_p: float = dropout_p) -> object:
                x = torch.empty(rows, width, dtype=dtype, device="meta")
                weight = torch.empty(width, dtype=dtype, device="meta")
                _, total, mean, rstd = forward(x, x, weight, weight, dropout_p, seed, 1e-12)
                return backward(x, total, mean, rstd, weight, dropout_p, seed)

            yield f"{rows}x{width} dropout {dropout_p}", run


def _split(rows: int, chosen: LaunchConfig) -> tuple[int, int]:
    """Return (programs, blocks of rows that each of them takes)."""
    blocks = triton.cdiv(rows, chosen.tiles["BLOCK_ROWS"])
    blocks_per_program = triton.cdiv(blocks, BACKWARD_PROGRAMS)
    return (triton.cdiv(blocks, blocks_per_program) if blocks else 0), blocks_per_program


def _size_class(width: int) -> str:
    return "narrow" if width <= 256 else "medium" if width <= 1024 else "wide"


def _as_rows(tensor: Tensor) -> Tensor:
    """Return (N, D) whose last dimension is dense; a copy only where it is not."""
    tensor = tensor.reshape(-1, tensor.shape[-1])
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()
