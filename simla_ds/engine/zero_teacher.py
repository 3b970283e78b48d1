"""Where DeepSpeed keeps the float32 weights: what the momentum teacher follows, and where the temperature is bounded.

stage 0, fp32           the parameter itself
stage 0, bf16 or fp16   a tensor per parameter, or (FusedAdam) a slice of a flat one; whole on every rank
stages 1 and 2          its piece of this rank's flat partition, often empty; BF16_Optimizer (stage 1 in bf16) the same
stage 3                 its padded piece of this rank's sub-group

With the optimizer offloaded the pieces lie in CPU memory. DeepSpeed's safe_get_full_fp32_param gives the right answer
for the last two and None for the others. A sharded teacher would be another ParameterSource: the teacher asks for
fp32_parameters() and nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed import DeepSpeedEngine
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn


class EngineSource:
    """The student's whole float32 parameters, out of whatever DeepSpeed made of them (a teacher.ParameterSource).

    The engine wraps a PretrainTask, whose student is `.model`; names are those within the student.
    """

    def __init__(self, engine: DeepSpeedEngine):
        self.engine = engine

    @torch.no_grad()
    def fp32_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and whole value of each parameter, one at a time, in the same order on every rank.

        Collective at stages 1 to 3: every rank must run it to its end. A parameter that the optimizer does not hold
        (frozen) comes from the module.
        """
        optimizer = self.engine.optimizer
        masters = replicated_masters(optimizer)
        for name, parameter in self.engine.module.model.named_parameters():
            if id(parameter) in masters:
                yield name, masters[id(parameter)]
            elif parameter.requires_grad and _is_sharded(parameter):
                yield name, _checked(safe_get_full_fp32_param(parameter), name, optimizer)
            elif hasattr(parameter, "ds_id"):
                with deepspeed.zero.GatheredParameters([parameter]):
                    value = parameter.detach().float().clone()
                yield name, value
            elif parameter.requires_grad and parameter.dtype != torch.float32:
                _checked(None, name, optimizer)
            else:
                yield name, parameter.detach().float()


@torch.no_grad()
def clamp_temperature_master(engine: DeepSpeedEngine, low: float, high: float) -> None:
    """Keep the temperature within bounds where it is stored; to be called on every rank after each applied step.

    Each rank bounds its own piece of the master, if it has one, and its copy in the training dtype: elementwise and in
    place, without a collective or a device synchronisation. Clamping the copy alone would be lost: the next step
    overwrites it from the master.
    """
    parameter = engine.module.model.temperature.value
    for stored in (_local_master(engine.optimizer, parameter), *_copies(parameter)):
        if stored is not None:
            stored.clamp_(low, high)


def replicated_masters(optimizer: Any) -> dict[int, Tensor]:
    """Return id(parameter) -> whole float32 master, for the stage-0 optimizers that keep one on every rank.

    Empty for all other layouts.
    """
    if hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer: torch's AdamW in bf16 or fp16
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {id(p): master.detach() for ps, masters in groups for p, master in zip(ps, masters, strict=True)}
    masters = {}
    if hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer: FusedAdam in bf16 or fp16
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            pieces = flat.detach().split([p.numel() for p in parameters])
            masters.update({id(p): piece.view_as(p) for p, piece in zip(parameters, pieces, strict=True)})
    return masters


def _is_sharded(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id")


def _checked(value: Tensor | None, name: str, optimizer: Any) -> Tensor:
    if value is None:
        raise RuntimeError(f"DeepSpeed's {type(optimizer).__name__} shows no float32 weights of {name}")
    return value


def _local_master(optimizer: Any, parameter: nn.Parameter) -> Tensor | None:
    """Return this rank's piece of a trained parameter's float32 master, as a view; None where it has none."""
    if hasattr(parameter, "ds_id"):
        group, start, count = optimizer.grad_position[optimizer.get_param_id(parameter)]
        return optimizer.fp32_partitioned_groups_flat[group].narrow(0, start, count)
    if hasattr(parameter, "_hp_mapping"):
        fragment = parameter._hp_mapping
        return None if fragment is None else fragment.hp_fragment
    return replicated_masters(optimizer).get(id(parameter))


def _copies(parameter: nn.Parameter) -> list[Tensor]:
    """Return what the forward reads: the parameter, and at stage 3 also this rank's shard of it."""
    shard = getattr(parameter, "ds_tensor", None)
    copies = [parameter.data] if shard is None else [shard.data, parameter.data]
    return [copy for copy in copies if copy.numel()]  # a partitioned parameter is empty between uses
