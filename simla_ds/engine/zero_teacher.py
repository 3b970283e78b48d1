"""The student's float32 weights out of whatever DeepSpeed made of them, for the momentum teacher and for model folders;
and where the temperature is bounded. Layouts: zero_layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
import torch
from torch import Tensor, nn

from simla_ds.engine.zero_layout import Engine, local_piece, replicated_masters

BUCKET = 2**24
"""Elements gathered by one collective (64 MiB), unless a single parameter is larger."""


class EngineSource:
    """The student's whole float32 parameters, out of whatever DeepSpeed made of them (a teacher.ParameterSource).

    The engine wraps a PretrainTask, whose student is `.model`; names are those within the student.
    """

    def __init__(self, engine: Engine):
        self.engine = engine

    @torch.no_grad()
    def fp32_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and whole value of each parameter, in the same order on every rank.

        Collective at stages 1 to 3: every rank must run it to its end. Memory: one bucket at a time. A parameter that
        the optimizer does not hold (frozen) comes from the module.
        """
        masters = replicated_masters(self.engine.optimizer)
        bucket, size = [], 0
        for name, parameter in self.engine.module.model.named_parameters():
            if parameter.requires_grad and _is_sharded(parameter):
                if bucket and size + _numel(parameter) > BUCKET:
                    yield from self._gather(bucket)
                    bucket, size = [], 0
                bucket.append((name, parameter))
                size += _numel(parameter)
            elif id(parameter) in masters:
                yield name, masters[id(parameter)]
            else:
                yield name, self._from_module(name, parameter)
        if bucket:
            yield from self._gather(bucket)

    def _gather(self, bucket: list[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
        """Lay every rank's pieces into zeros and add them up: exact, since each element has one owner."""
        flat = torch.zeros(sum(_numel(p) for _, p in bucket), device=self.engine.device)
        wholes = flat.split([_numel(p) for _, p in bucket])
        for (_, parameter), whole in zip(bucket, wholes, strict=True):
            piece, start = local_piece(self.engine.optimizer, parameter)
            if piece is not None:
                whole[start : start + piece.numel()].copy_(piece)
        deepspeed.comm.all_reduce(flat, group=self.engine.data_parallel_group)
        for (name, parameter), whole in zip(bucket, wholes, strict=True):
            yield name, whole.view(getattr(parameter, "ds_shape", parameter.shape))

    def _from_module(self, name: str, parameter: nn.Parameter) -> Tensor:
        """Return a parameter that no optimizer casts or cuts."""
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().float().clone()
        if parameter.requires_grad and parameter.dtype != torch.float32:
            kind = type(self.engine.optimizer).__name__
            raise RuntimeError(f"DeepSpeed's {kind} shows no float32 weights of {name} ({parameter.dtype})")
        return parameter.detach().float()


@torch.no_grad()
def clamp_temperature_master(engine: Engine, low: float, high: float) -> None:
    """Keep the temperature within bounds where it is stored; to be called on every rank after each applied step.

    Each rank bounds its own piece of the master, if it has one, and its copy in the training dtype: elementwise and in
    place, without a collective or a device synchronisation. Clamping the copy alone would be lost: the next step
    overwrites it from the master.
    """
    parameter = engine.module.model.temperature.value
    for stored in (local_piece(engine.optimizer, parameter)[0], *_copies(parameter)):
        if stored is not None:
            stored.clamp_(low, high)


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # a partitioned parameter is empty between uses


def _copies(parameter: nn.Parameter) -> list[Tensor]:
    """Return what the forward reads: the parameter, and at stage 3 also this rank's shard of it."""
    shard = getattr(parameter, "ds_tensor", None)
    copies = [parameter.data] if shard is None else [shard.data, parameter.data]
    return [copy for copy in copies if copy.numel()]
