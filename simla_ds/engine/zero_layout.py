"""Where DeepSpeed keeps the float32 weights and AdamW's moments, one description for every layout.

stage 0, fp32           the parameter itself
stage 0, bf16 or fp16   a tensor per parameter, or (FusedAdam) a slice of a flat one; whole on every rank
stages 1 and 2          its piece of this rank's flat partition, often empty; BF16_Optimizer (stage 1 in bf16) the same
stage 3                 its padded piece of this rank's sub-group

With the optimizer offloaded the pieces lie in CPU memory. (DeepSpeed's safe_get_full_fp32_param knows the last two
only, and spends a collective per parameter.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import deepspeed
import torch
from torch import Tensor, nn

Engine = Any
"""A deepspeed.DeepSpeedEngine, whose own annotations know neither the wrapped module nor the optimizers' insides."""

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class HeldPiece:
    """A range of a flattened parameter that this rank holds in float32."""

    name: str
    shape: tuple[int, ...]
    """Of the whole parameter."""
    start: int
    count: int
    holder: Tensor
    """What the optimizer steps: this range and often others. For a frozen parameter, its storage in the module."""
    offset: int
    """Where in the flattened holder the range begins."""
    optimizer: torch.optim.Optimizer | None
    """AdamW, whose state is kept by holder; None when frozen."""
    replicated: bool
    """Whether every rank holds the same."""
    shard: str = ""
    """Name of the holder: the first parameter that it holds."""

    @property
    def numel(self) -> int:
        """Elements of the whole parameter."""
        return prod(self.shape)

    def of(self, flat: Tensor) -> Tensor:
        """Return this range of the holder, or of a tensor beside it, as a view."""
        return flat.detach().view(-1).narrow(0, self.offset, self.count)

    @property
    def weight(self) -> Tensor:
        """(count,) the weights, as a view; float32 unless frozen."""
        return self.of(self.holder)

    def part(self, start: int, count: int) -> HeldPiece:
        """Return a range within this one, named by its first element in the parameter."""
        return replace(self, start=start, offset=self.offset + start - self.start, count=count)


def held_pieces(engine: Engine) -> list[HeldPiece]:
    """Return what this rank holds of the student, in the order of the model's parameters."""
    find, pieces = _Finder(engine.optimizer), []
    shards: dict[int, str] = {}
    for name, parameter in engine.module.model.named_parameters():
        piece = find(name, parameter)
        if piece is not None:
            pieces.append(replace(piece, shard=shards.setdefault(id(piece.holder), name)))
    return pieces


def owned_pieces(pieces: list[HeldPiece], rank: int, world_size: int) -> list[HeldPiece]:
    """Return a rank's share, so that all ranks' shares make the whole once: what others hold too is divided evenly."""
    total = sum(piece.count for piece in pieces if piece.replicated)
    first, last = total * rank // world_size, total * (rank + 1) // world_size
    owned, position = [], 0
    for piece in pieces:
        if not piece.replicated:
            owned.append(piece)
            continue
        low, high = max(0, first - position), min(piece.count, last - position)
        if low < high:
            owned.append(piece.part(piece.start + low, high - low))
        position += piece.count
    return owned


def of_teacher(pieces: list[HeldPiece], master: Mapping[str, Tensor]) -> list[HeldPiece]:
    """Return the same ranges of a teacher's master, whose shards lie as the student's."""
    return [replace(piece, holder=master[piece.shard], optimizer=None) for piece in pieces]


class _Finder:
    """Finds a parameter's piece in the optimizer's buffers."""

    def __init__(self, optimizer: Any):
        self.zero = optimizer
        self.adamw = getattr(optimizer, "optimizer", optimizer)
        self.stage0 = _replicated_holders(optimizer)

    def __call__(self, name: str, parameter: Any) -> HeldPiece | None:
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if not parameter.requires_grad:
            return self._frozen(name, shape, parameter)
        if hasattr(parameter, "ds_id"):
            group, offset, count = self.zero.grad_position[self.zero.get_param_id(parameter)]
            holder = self.zero.fp32_partitioned_groups_flat[group]
            start = count * deepspeed.comm.get_rank(parameter.ds_process_group)
            count = min(count, parameter.ds_numel - start)  # the rest is padding
            return HeldPiece(name, shape, start, count, holder, offset, self.adamw, False) if count > 0 else None
        if hasattr(parameter, "_hp_mapping"):
            fragment = parameter._hp_mapping
            if fragment is None:
                return None
            flats = getattr(self.zero, "single_partition_of_fp32_groups", None) or self.zero.fp32_groups_flat_partition
            low, high = fragment.lp_fragment_address, fragment.hp_fragment_address
            holder = flats[fragment.param_group_index]
            return HeldPiece(name, shape, low.start, low.numel, holder, high.start, self.adamw, False)
        holder, offset = self.stage0.get(id(parameter), (parameter, 0))
        if holder.dtype != torch.float32:
            kind = type(self.zero).__name__
            raise RuntimeError(f"DeepSpeed's {kind} shows no float32 weights of {name} ({parameter.dtype})")
        return HeldPiece(name, shape, 0, parameter.numel(), holder, offset, self.adamw, True)

    @staticmethod
    def _frozen(name: str, shape: tuple[int, ...], parameter: Any) -> HeldPiece | None:
        if not hasattr(parameter, "ds_id"):
            return HeldPiece(name, shape, 0, parameter.numel(), parameter, 0, None, True)
        part = parameter.ds_tensor.ds_numel
        start = part * deepspeed.comm.get_rank(parameter.ds_process_group)
        count = min(part, parameter.ds_numel - start)
        return HeldPiece(name, shape, start, count, parameter.ds_tensor, 0, None, False) if count > 0 else None


def _replicated_holders(optimizer: Any) -> dict[int, tuple[Tensor, int]]:
    """Return id(parameter) -> float32 tensor and offset in it, for the stage-0 optimizers that keep one per rank."""
    if hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer: torch's AdamW in bf16 or fp16
        groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        return {id(p): (master, 0) for ps, masters in groups for p, master in zip(ps, masters, strict=True)}
    holders = {}
    if hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer: FusedAdam in bf16 or fp16
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            offset = 0
            for p in parameters:
                holders[id(p)] = (flat, offset)
                offset += p.numel()
    return holders


def replicated_masters(optimizer: Any) -> dict[int, Tensor]:
    """Return id(parameter) -> whole float32 master, for the stage-0 optimizers that keep one on every rank.

    Empty for all other layouts.
    """
    holders = _replicated_holders(optimizer)
    groups = getattr(optimizer, "fp16_groups", []) if holders else []
    return {
        id(p): holders[id(p)][0].detach().view(-1).narrow(0, holders[id(p)][1], p.numel()).view_as(p)
        for parameters in groups
        for p in parameters
    }


def local_piece(optimizer: Any, parameter: nn.Parameter) -> tuple[Tensor | None, int]:
    """Return this rank's piece of a trained parameter's float32 master, as a view, and where in the whole it starts.

    None where this rank has none.
    """
    piece = _Finder(optimizer)("", parameter)
    return (None, 0) if piece is None else (piece.weight, piece.start)


def adamw_step(piece: HeldPiece) -> int:
    """Return how many updates AdamW has counted for a piece."""
    assert piece.optimizer is not None
    state = piece.optimizer.state.get(piece.holder) or {}
    counts = [state.get("step", 0)]
    if type(piece.optimizer).__name__ == "FusedAdam" and piece.replicated:
        counts += [other.get("step", 0) for other in piece.optimizer.state.values()]  # it counts in the last one only
    return max(int(count) for count in counts)


def adamw_moments(piece: HeldPiece) -> dict[str, Tensor]:
    """Return exp_avg and exp_avg_sq of a piece, (count,) float32; zeros before its first update."""
    assert piece.optimizer is not None
    state = piece.optimizer.state.get(piece.holder)
    if not state:
        return {name: torch.zeros(piece.count) for name in MOMENTS}
    return {name: piece.of(state[name]) for name in MOMENTS}


def set_adamw_step(piece: HeldPiece, step: int) -> None:
    """Let AdamW have counted `step` updates of a piece's holder at least; make its moments if there are none."""
    adamw, holder = piece.optimizer, piece.holder
    assert adamw is not None
    if not adamw.state.get(holder):
        adamw.state[holder] = {"step": 0, **{name: torch.zeros_like(holder) for name in MOMENTS}}
    state = adamw.state[holder]
    step = max(step, int(state["step"]))  # a holder of several parameters counts for all
    state["step"] = step
    if isinstance(adamw, torch.optim.AdamW):  # counts in a tensor, on the device when fused
        group = adamw.param_groups[0]
        device = holder.device if group["fused"] or group["capturable"] else "cpu"
        state["step"] = torch.tensor(float(step), device=device)


def forget_adamw(pieces: Iterable[HeldPiece]) -> None:
    """Put AdamW's moments and counts back to zero, in place."""
    for piece in pieces:
        if piece.optimizer is not None and (state := piece.optimizer.state.get(piece.holder)):
            for name in MOMENTS:
                state[name].zero_()
            state["step"] = 0


@torch.no_grad()
def before_loading(engine: Engine) -> None:
    """Make the stored pieces the only truth: at stage 3 parameters that are kept whole are partitioned."""
    if hasattr(engine.optimizer, "checkpoint_event_prologue"):
        engine.optimizer.checkpoint_event_prologue()


@torch.no_grad()
def after_loading(engine: Engine) -> None:
    """Renew what the forward reads from the float32 weights; every rank must call it."""
    optimizer = engine.optimizer
    if hasattr(optimizer, "checkpoint_event_epilogue"):  # stage 3
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):  # stages 1 and 2, BF16_Optimizer
        optimizer.update_lp_params()
    else:
        masters = replicated_masters(optimizer)
        for parameter in engine.module.model.parameters():
            if id(parameter) in masters:
                parameter.copy_(masters[id(parameter)])


def loss_scale_state(optimizer: Any) -> dict[str, float]:
    """Return fp16's dynamic loss scale and its counters; empty where there is none."""
    scaler = _loss_scaler(optimizer)
    return {name: getattr(scaler, name) for name in _SCALE if getattr(scaler, name, None) is not None}


def set_loss_scale_state(optimizer: Any, state: dict[str, float]) -> None:
    """Restore loss_scale_state, as far as this optimizer knows the same counters."""
    scaler = _loss_scaler(optimizer)
    for name, value in state.items():
        if getattr(scaler, name, None) is not None:
            setattr(scaler, name, value)


_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _loss_scaler(optimizer: Any) -> Any:
    """Return what counts the loss scale: an object at stages 1 to 3, a configuration at stage 0; None without fp16."""
    scaler = getattr(optimizer, "loss_scaler", None) or getattr(optimizer, "loss_scale_config", None)
    return scaler if getattr(scaler, "dynamic", False) or getattr(scaler, "dynamic_loss_scale", False) else None
