"""The momentum teacher: an exponential moving average of the student, kept in float32.  (SIMLA section 3.3, as MoCo)

Pure torch: where the student's float32 values come from (a plain module, ZeRO shards, an offloaded optimizer) is the
business of a ParameterSource.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from simla_ds.model.network import Network
from simla_kernels import ema_update_

NUMBERS_AT_ONCE = 2**24
"""Student numbers that wait to be averaged in one go (64 MiB): a source may gather what it gives out."""


N = TypeVar("N", bound=Network)


class ParameterSource(Protocol):
    """Whoever knows the student's float32 parameters."""

    def fp32_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each student parameter once: its name in the model and its whole float32 value, on every rank."""
        ...


class ModuleSource:
    """The float32 values of a module that no optimizer shards or casts."""

    def __init__(self, module: nn.Module):
        self.module = module

    def fp32_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the module's own parameters."""
        for name, parameter in self.module.named_parameters():
            yield name, parameter.detach()


class Teacher(Generic[N]):
    """A copy of the student that follows it: theta_m <- m theta_m + (1 - m) theta.

    `master` is float32: in bfloat16 a momentum of .995 would round every small step away. `module` computes in the
    training dtype and is refreshed from the master. It is no submodule of what DeepSpeed wraps.
    """

    def __init__(self, student: N, *, dropout: bool, dtype: torch.dtype = torch.float32):
        self.module = copy.deepcopy(student)
        self.module.requires_grad_(False)
        self.module.set_activation_checkpointing(False)  # nothing is differentiated, nothing is worth recomputing
        self.module.train(dropout)
        self.master = {name: p.detach().float().clone() for name, p in self.module.named_parameters()}
        self.set_dtype(dtype)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Compute in dtype. In float32 the module's parameters are the master itself."""
        self.dtype = dtype
        self.module.to(dtype)
        for name, parameter in self.module.named_parameters():
            parameter.data = self.master[name] if dtype == torch.float32 else self.master[name].to(dtype)

    def to(self, device: torch.device | str) -> Teacher[N]:
        """Move to a device and return self."""
        self.module.to(device)
        self.master = {name: value.to(device) for name, value in self.master.items()}
        self.set_dtype(self.dtype)
        return self

    @torch.no_grad()
    def update(self, source: ParameterSource, momentum: float) -> None:
        """Move towards the student by 1 - momentum; once per applied optimizer step."""
        seen: set[str] = set()
        masters, values = [], []
        for name, value in source.fp32_parameters():
            seen.add(name)
            masters.append(self.master[name])
            values.append(value.to(self.master[name].device))
            if sum(v.numel() for v in values) >= NUMBERS_AT_ONCE:
                ema_update_(masters, values, momentum)
                masters, values = [], []
        ema_update_(masters, values, momentum)
        if missing := self.master.keys() - seen:
            raise RuntimeError(f"the teacher got no value for {len(missing)} parameter(s), first {min(missing)}")
        self._refresh()

    @torch.no_grad()
    def _refresh(self) -> None:
        if self.dtype != torch.float32:
            for name, parameter in self.module.named_parameters():
                parameter.copy_(self.master[name])

    def state_dict(self) -> dict[str, Tensor]:
        """Return the float32 master, by student parameter name."""
        return self.master

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what state_dict returned, one tensor after another. ValueError when names or shapes differ."""
        if state.keys() != self.master.keys():
            odd = sorted(state.keys() ^ self.master.keys())
            raise ValueError(
                f"the checkpoint's teacher has other parameters than this model: {len(odd)}, first {odd[0]}"
            )
        for name, master in self.master.items():
            value = state[name]
            if value.shape != master.shape:
                raise ValueError(
                    f"the checkpoint's teacher has {name} {tuple(value.shape)}, this model {tuple(master.shape)}"
                )
            master.copy_(value)
        self._refresh()
