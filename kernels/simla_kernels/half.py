"""What half precision is multiplied in on a CPU: PyTorch's own half products are ten times slower without the units."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def operand_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a matrix is multiplied in."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if half and x.device.type == "cpu" and not on_units(x) else x.dtype


def operand(x: Tensor) -> Tensor:
    """Return a matrix in the dtype that it is multiplied in."""
    return x.to(operand_dtype(x))


def on_units(x: Tensor) -> bool:
    """Whether a tensor is bf16 on a CPU that multiplies bf16 natively."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and has_bf16_units()


@cache
def has_bf16_units() -> bool:
    """Whether this CPU multiplies bf16 matrices faster than fp32 ones."""
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Within this context products stay in their operands' dtype."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()
