"""The student's float32 weights out of whatever DeepSpeed made of them, for the momentum teacher and for model folders;
and where the temperature is bounded. Layouts: zero_layout.

The teacher's master lies as the optimizer's float32 weights do, so that its average needs no communication. Bytes of
the teacher on each of n ranks, for P parameters, E of them outside the layers and L in the largest layer:

    stage   master   what it computes with        communication
    0       4 P      2 P                          none
    1, 2    4 P / n  2 P                          2 P received per update
    3       4 P / n  2 E, and 2 L for a moment    2 E per update, 2 bytes per parameter of a layer when it runs
In float32 these are 4 P, 4 E and 4 L, less what a rank holds whole outside layers that come and go: that is the master
itself. Parts are padded as the optimizer's; with an offloaded optimizer the master is on the CPU; frozen parameters are
whole in every master at stages 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import deepspeed
import torch
from torch import Tensor, nn

from simla_ds.engine.distributed import gather_objects
from simla_ds.engine.zero_layout import Engine, held_pieces, local_piece

BUCKET = 2**24
"""Elements, of all ranks together, that one all-gather brings: 32 MiB in bfloat16."""


@dataclass(frozen=True)
class _Slot:
    """A range of a flattened parameter, and where in a bucket a rank sends it."""

    rank: int
    offset: int
    name: str
    start: int
    count: int


class EngineSource:
    """The student's float32 parameters, as DeepSpeed shares them among the ranks (a teacher.ParameterSource).

    The engine wraps a PretrainTask, whose student is `.model`; names are those within the student. A shard is what the
    optimizer steps: at stage 0 a parameter (or all of them), at stages 1 and 2 this rank's part of a parameter group,
    at stage 3 its part of a sub-group; on the CPU when offloaded. What lies beside shards takes as many bytes.
    """

    def __init__(self, engine: Engine):
        """Collective. RuntimeError when DeepSpeed shows less than all float32 weights of a parameter."""
        self.engine = engine
        self._pieces = {piece.name: piece for piece in held_pieces(engine)}
        own = [(p.name, p.start, p.count) for p in self._pieces.values() if not p.replicated]
        self._rank, self._shares = 0, [own]
        if any(hasattr(p, "_hp_mapping") or hasattr(p, "ds_id") for p in engine.module.model.parameters()):
            self._rank, self._shares = deepspeed.comm.get_rank(), gather_objects(own)
        self._names = {name for name, _ in engine.module.model.named_parameters()}
        self._buckets: dict[tuple[str, ...], list[list[_Slot]]] = {}
        self._check_complete()

    def shards(self) -> dict[str, Tensor]:
        """Return what the optimizer steps on this rank, float32; frozen parameters in their own dtype."""
        return {piece.shard: piece.holder.detach() for piece in self._pieces.values()}

    def whole(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that lie whole in this rank's shards, by name, as views."""
        pieces = self._pieces.items()
        return {name: p.of(shards[p.shard]).view(p.shape) for name, p in pieces if p.count == p.numel}

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> None:
        """Write these parameters from all ranks' shards: own pieces by copying, others' by an all-gather per bucket.

        Every rank must name the same ones. They are cast before they travel. Memory: two buckets; no parameter is
        whole in float32 that is not so in the parameters given. Those on the meta device are left alone.

        Raises:
            KeyError: a name that is none of the student's.
        """
        flats = {name: p.detach().view(-1) for name, p in parameters.items() if not p.is_meta}
        here = [self._pieces[name] for name in flats if name in self._pieces]
        pairs = [(flats[p.name].narrow(0, p.start, p.count), p.of(shards[p.shard])) for p in here]
        _copy([(target, value) for target, value in pairs if target.data_ptr() != value.data_ptr()])
        dtype = next(iter(parameters.values())).dtype
        for bucket in self._plan(tuple(parameters)):
            self._exchange(bucket, dtype, shards, flats)

    def _exchange(
        self, bucket: list[_Slot], dtype: torch.dtype, shards: Mapping[str, Tensor], flats: Mapping[str, Tensor]
    ) -> None:
        """Send this rank's slots of a bucket and lay the others' into the flattened parameters."""
        width = max(slot.offset + slot.count for slot in bucket)
        mine, sources = [slot for slot in bucket if slot.rank == self._rank], []
        for slot in mine:
            piece = self._pieces[slot.name].part(slot.start, slot.count)
            sources.append(piece.of(shards[piece.shard]))
        sent = torch.empty(width, dtype=dtype, device=sources[0].device if mine else self.engine.device)
        _copy([(sent.narrow(0, s.offset, s.count), value) for s, value in zip(mine, sources, strict=True)])
        sent = sent.to(self.engine.device)  # when offloaded, cast before it travels
        received = sent.new_empty(len(self._shares) * width)
        deepspeed.comm.all_gather_into_tensor(received, sent, group=self.engine.data_parallel_group)
        others = [slot for slot in bucket if slot.rank != self._rank and slot.name in flats]
        values = [received.narrow(0, slot.rank * width + slot.offset, slot.count) for slot in others]
        _copy([(flats[s.name].narrow(0, s.start, s.count), value) for s, value in zip(others, values, strict=True)])

    def _plan(self, names: tuple[str, ...]) -> list[list[_Slot]]:
        """Cut what each rank holds of some parameters, laid end to end, into buckets; the same on every rank."""
        if names not in self._buckets:
            if unknown := set(names) - self._names:
                raise KeyError(f"the student has no parameter {min(unknown)}")
            wanted, most = set(names), max(1, BUCKET // len(self._shares))
            buckets: dict[int, list[_Slot]] = {}
            for rank, share in enumerate(self._shares if len(self._shares) > 1 else []):
                position = 0
                for name, start, count in share:
                    end = start + count if name in wanted else start
                    while start < end:
                        number, offset = divmod(position, most)
                        part = min(end - start, most - offset)
                        buckets.setdefault(number, []).append(_Slot(rank, offset, name, start, part))
                        start, position = start + part, position + part
            self._buckets[names] = [buckets[number] for number in sorted(buckets)]
        return self._buckets[names]

    def _check_complete(self) -> None:
        known = {name: piece.count for name, piece in self._pieces.items() if piece.replicated}
        for share in self._shares:
            for name, _, count in share:
                known[name] = known.get(name, 0) + count
        for name, parameter in self.engine.module.model.named_parameters():
            if known.get(name, 0) != _numel(parameter):
                raise RuntimeError(
                    f"DeepSpeed's {type(self.engine.optimizer).__name__} shows {known.get(name, 0)} of the "
                    f"{_numel(parameter)} float32 weights of {name}; set another zero_optimization.stage"
                )


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy and cast: target, value."""
    if pairs:
        torch.ops.aten._foreach_copy_([target for target, _ in pairs], [value for _, value in pairs])


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


def _numel(parameter: nn.Parameter) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # a partitioned parameter is empty between uses


def _copies(parameter: nn.Parameter) -> list[Tensor]:
    """Return what the forward reads: the parameter, and at stage 3 also this rank's shard of it."""
    shard = getattr(parameter, "ds_tensor", None)
    copies = [parameter.data] if shard is None else [shard.data, parameter.data]
    return [copy for copy in copies if copy.numel()]
