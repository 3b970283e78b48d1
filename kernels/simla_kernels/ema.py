"""ema_update_: an exponential moving average of many tensors at once, in place.

    target <- momentum * target + (1 - momentum) * source
`torch._foreach_lerp_` computes target + (1 - momentum) * (source - target): one pass, and nearer to the formula than a
product and a sum, because the large term is not rounded on the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from simla_kernels import dispatch
from simla_kernels.dispatch import Operation

CAST_BUDGET = {"cpu": 2**20}
"""Bytes of sources that are cast to their targets' dtype at a time: on a CPU what its cache holds, elsewhere LARGE."""
LARGE = 64 * 2**20
_WHY_TORCH = "torch._foreach_lerp_ reads and writes every element once already, as a kernel would"


def ema_update_reference(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> list[Tensor]:
    """Return the moved targets, by the definition; nothing is changed in place."""
    return [momentum * t + (1 - momentum) * s.to(t.dtype) for t, s in zip(targets, sources, strict=True)]


@torch.no_grad()
def ema_update_(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    """Move each target towards its source by 1 - momentum, in place.

    Args:
        targets: floating tensors of any shapes and dtypes; float32, or small steps are rounded away.
        sources: one for each, of the same shape and on the same device, in any floating dtype.
        momentum: in [0, 1]; 1 leaves the targets alone.

    Raises:
        ValueError: tensors that do not match, a target that shares memory with another tensor, a momentum
            outside [0, 1].
    """
    _check(targets, sources, momentum)
    groups: dict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = {}  # the fast path takes no mixture
    for target, source in zip(targets, sources, strict=True):
        group = groups.setdefault((target.device, target.dtype, source.dtype), ([], []))
        group[0].append(target)
        group[1].append(source)
    for group_targets, group_sources in groups.values():
        if group_targets[0].dtype == group_sources[0].dtype:
            _move(group_targets, group_sources, momentum)
            continue
        for few in _within_budget(group_targets, CAST_BUDGET.get(group_targets[0].device.type, LARGE)):
            few_targets = [group_targets[i] for i in few]
            _move(few_targets, _cast([group_sources[i] for i in few], few_targets), momentum)


def _move(targets: list[Tensor], sources: list[Tensor], momentum: float) -> None:
    torch.ops.aten._foreach_lerp_.Scalar(targets, sources, 1 - momentum)


def _cast(sources: list[Tensor], like: list[Tensor]) -> list[Tensor]:
    cast = [torch.empty_like(tensor) for tensor in like]
    torch.ops.aten._foreach_copy_(cast, sources)
    return cast


def _within_budget(tensors: list[Tensor], budget: int) -> Iterator[list[int]]:
    """Yield runs of positions whose tensors take at most `budget` bytes, or a single one that takes more."""
    run, size = [], 0
    for position, tensor in enumerate(tensors):
        if run and size + tensor.nbytes > budget:
            yield run
            run, size = [], 0
        run.append(position)
        size += tensor.nbytes
    if run:
        yield run


def _check(targets: Sequence[Tensor], sources: Sequence[Tensor], momentum: float) -> None:
    if not 0 <= momentum <= 1:
        raise ValueError(f"ema_update_: momentum={momentum} must be in [0, 1]")
    if len(targets) != len(sources):
        raise ValueError(f"ema_update_: {len(targets)} targets and {len(sources)} sources must be as many")
    for i, (target, source) in enumerate(zip(targets, sources, strict=True)):
        if target.shape != source.shape or target.device != source.device:
            raise ValueError(
                f"ema_update_: sources[{i}] {tuple(source.shape)} on {source.device} must be as targets[{i}], "
                f"{tuple(target.shape)} on {target.device}"
            )
        for name, tensor in (("targets", target), ("sources", source)):
            if not tensor.is_floating_point():
                raise ValueError(f"ema_update_: {name}[{i}] {tuple(tensor.shape)} {tensor.dtype} must be floating")
    _check_memory(targets, sources)


def _check_memory(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Raise where one update would write what another one reads or writes. Sources may share memory."""
    spans = [(*_span(t), "targets", i) for i, t in enumerate(targets) if _has_memory(t)]
    spans += [(*_span(s), "sources", i) for i, s in enumerate(sources) if _has_memory(s)]
    reached = {"targets": (0, ""), "sources": (0, "")}  # the furthest end so far, and whose it is
    for start, end, kind, i in sorted(spans):
        for other in ("targets", "sources") if kind == "targets" else ("targets",):
            if start < reached[other][0]:
                raise ValueError(
                    f"ema_update_: {kind}[{i}] and {reached[other][1]} share memory; each target needs its own"
                )
        reached[kind] = max(reached[kind], (end, f"{kind}[{i}]"))


def _has_memory(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and tensor.device.type != "meta"


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses a tensor occupies; of a strided view only the first element, its gaps being another's."""
    start = tensor.data_ptr()
    return start, start + (tensor.nbytes if tensor.is_contiguous() else tensor.element_size())


def _example(size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    shapes: Iterable[tuple[int, ...]] = [(), (31,), (257, 8)][: size + 1]
    generator = torch.Generator().manual_seed(size)
    targets = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    sources = [torch.randn(t.shape, generator=generator).to(device, dtype) for t in targets]
    return {"targets": targets, "sources": sources, "momentum": 0.995}


dispatch.register(Operation(ema_update_, ema_update_reference, _example, torch_only=_WHY_TORCH))
