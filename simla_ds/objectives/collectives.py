"""What objectives exchange between ranks. Without a process group every function is the identity.

Sample i of the global batch is on rank i mod W, so rows gathered from W ranks are interleaved into global order: what
is computed from them does not depend on the number of ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Gather (B, ...) rows of all ranks into (B * W, ...) in global order, without gradient."""
    if world_size() == 1:
        return rows.detach()
    return _interleave(_all_gather(rows.detach()))


def gather_by_rank(rows: Tensor) -> Tensor:
    """Gather (B, ...) rows of all ranks into (W * B, ...), rank after rank, without gradient."""
    return rows.detach() if world_size() == 1 else torch.cat(_all_gather(rows.detach()))


def of_first_rank(t: Tensor, device: torch.device) -> Tensor:
    """Return rank 0's tensor, which is as large on every rank, on the device of t; device: where ranks exchange."""
    if world_size() == 1:
        return t
    sent = t.to(device, copy=True).contiguous()
    dist.broadcast(sent, 0)
    return sent.to(t.device)


def in_global_order(rows: Tensor) -> Tensor:
    """Put what gather_by_rank returns into the order of gather_rows."""
    return rows if world_size() == 1 else _interleave(list(rows.chunk(world_size())))


def gather_rows_with_gradient(rows: Tensor) -> Tensor:
    """Gather (B, ...) rows of all ranks into (B * W, ...) in global order; each rank's rows get the summed gradient."""
    return rows if world_size() == 1 else _GatherRows.apply(rows)


def own_rows(count: int, device: torch.device) -> Tensor:
    """Return (count,) int64: where this rank's rows stand in what gather_rows returns."""
    return torch.arange(count, device=device) * world_size() + rank()


def _all_gather(rows: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return parts


def _interleave(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts, dim=1).flatten(0, 1)


class _GatherRows(torch.autograd.Function):
    """all_gather whose backward sums the gradients of all ranks (all_reduce: gloo has no reduce_scatter)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.count = rows.shape[0]
        return _interleave(_all_gather(rows))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        return total.index_select(0, own_rows(ctx.count, total.device))
