"""Hold an implementation against its definition: outputs and every gradient, in the units of the largest entry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def results(function: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Run forward and backward; return detached outputs (`out0`, ...) and gradients (`grad.NAME`).

    The outputs' gradients are fixed pseudo-random numbers, the same for every implementation. Floating tensors that
    require a gradient among the arguments get one; the arguments themselves are left alone.
    """
    inputs = {
        name: value.detach().clone(memory_format=torch.preserve_format).requires_grad_(value.requires_grad)
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
    outputs = function(**inputs)
    outputs = [o for o in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(o, Tensor)]
    found = {f"out{i}": o.detach() for i, o in enumerate(outputs)}
    wanted = {n: v for n, v in inputs.items() if isinstance(v, Tensor) and v.requires_grad}
    through = [o for o in outputs if o.requires_grad]
    if wanted and through:
        ones = [_pseudo_random(o) for o in through]
        gradients = torch.autograd.grad(through, list(wanted.values()), ones, allow_unused=True)
        found |= {f"grad.{n}": g for n, g in zip(wanted, gradients, strict=True) if g is not None}
    return found


def upcast(arguments: dict[str, Any], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Return the arguments with every floating tensor in `dtype`."""
    return {
        n: v.detach().to(dtype).requires_grad_(v.requires_grad)
        if isinstance(v, Tensor) and v.is_floating_point()
        else v
        for n, v in arguments.items()
    }


def errors(found: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Return max |found - truth| / max |truth| for each result; infinite where one is missing or not finite."""
    result = {}
    for name, true in truth.items():
        if name not in found or found[name].shape != true.shape or not bool(found[name].isfinite().all()):
            result[name] = float("inf")
            continue
        if not true.numel():
            result[name] = 0.0
            continue
        difference = (found[name].double() - true.double().to(found[name].device)).abs().max()
        scale = true.double().abs().max().to(difference.device)
        result[name] = float(difference / scale) if scale > 0 else float(difference)
    return result


def _pseudo_random(like: Tensor) -> Tensor:
    """Return numbers in [-1, 1] that follow from the shape alone."""
    count = torch.arange(like.numel(), dtype=torch.float64)
    return torch.sin(count * 12.9898 + 1).reshape(like.shape).to(like.device, like.dtype)
