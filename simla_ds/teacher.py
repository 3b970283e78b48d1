"""The momentum teacher: an exponential moving average of the student, kept in float32.  (SIMLA section 3.3, as MoCo)

Pure torch: where the student's float32 values come from (a plain module, ZeRO shards, an offloaded optimizer), and how
whole parameters are put together from them, is the business of a ParameterSource.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from simla_ds.model.network import Network
from simla_kernels import ema_update_

N = TypeVar("N", bound=Network)


class ParameterSource(Protocol):
    """Whoever knows the student's float32 parameters; under ZeRO each rank knows a share of them.

    Methods take shards, by name: the student's own, or others of the same layout, as a teacher's master is.
    """

    def shards(self) -> dict[str, Tensor]:
        """Return what this rank holds of the student; the same names, shapes and devices at every call."""
        ...

    def whole(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the parameters that lie whole in this rank's shards, by name, as views."""
        ...

    def fill(self, parameters: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> None:
        """Write these parameters, cast to their dtype, from all ranks' shards; every rank must call it alike."""
        ...


class ModuleSource:
    """The float32 values of a module that no optimizer shards or casts."""

    def __init__(self, module: nn.Module):
        self.module = module

    def shards(self) -> dict[str, Tensor]:
        """Return the module's own parameters."""
        return {name: parameter.detach() for name, parameter in self.module.named_parameters()}

    def whole(self, shards: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the shards: each is a parameter."""
        return dict(shards)

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, Tensor], shards: Mapping[str, Tensor]) -> None:
        """Copy, but for parameters that are the shards."""
        for name, parameter in parameters.items():
            if parameter.data_ptr() != shards[name].data_ptr():
                parameter.copy_(shards[name])


class Teacher(Generic[N]):
    """A network like the student that follows it: theta_m <- m theta_m + (1 - m) theta.

    `master` is float32: in bfloat16 a momentum of .995 would round every small step away. It is laid out as its source
    holds the student, so that under ZeRO every rank averages its own share and nothing else. `module` computes in the
    training dtype and is refreshed from all ranks' masters. It is no submodule of what DeepSpeed wraps.
    """

    source: ParameterSource

    def __init__(
        self,
        student: N,
        *,
        dropout: bool,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ):
        """Make a network like the student, without weights: `follow` gives it memory and values."""
        with torch.device("meta"):
            self.module = type(student)(student.config).to(dtype)
        self.module.requires_grad_(False)
        self.module.train(dropout)
        self.device = device
        self.master: dict[str, Tensor] = {}
        self._resident: dict[str, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        """What the module computes in."""
        return next(self.module.parameters()).dtype

    def follow(self, source: ParameterSource, *, by_layer: bool = False) -> Teacher[N]:
        """Become what the source's student is, to average that from now on; return self. To be called once.

        A parameter that computes in float32, and that this rank holds whole, is the master itself: no second copy.
        by_layer: a layer's parameters are filled for each forward of that layer, and empty otherwise; what lies outside
        the layers stays whole.
        """
        parameters = dict(self.module.named_parameters())
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        layers = self._fill_by_layer(shapes) if by_layer else set()
        self.source = source
        shards = source.shards()
        self.master = {name: shard.detach().to(torch.float32, copy=True) for name, shard in shards.items()}
        whole = source.whole(self.master)
        self._resident = {name: parameter for name, parameter in parameters.items() if name not in layers}
        for name, parameter in parameters.items():
            value = torch.empty(shapes[name] if name in self._resident else 0, dtype=self.dtype, device=self.device)
            master = whole.get(name) if name in self._resident else None
            if master is not None and (master.dtype, master.device) == (value.dtype, value.device):
                value = master
            torch.utils.swap_tensors(parameter, nn.Parameter(value, requires_grad=False))  # whoever has it keeps it
        self.refresh()
        return self

    def update(self, momentum: float) -> None:
        """Move towards the student by 1 - momentum; once per applied optimizer step. Collective as the source is."""
        shards = self.source.shards()
        ema_update_(list(self.master.values()), [shards[name] for name in self.master], momentum)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Let the module compute with the master's values, after they were changed."""
        self.source.fill(self._resident, self.master)

    def _fill_by_layer(self, shapes: Mapping[str, torch.Size]) -> set[str]:
        """Have the layers filled before their forward and emptied after it; return the names of their parameters."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        found: set[str] = set()
        for layer in self.module.layers():
            own = {names[id(parameter)]: parameter for parameter in layer.parameters()}
            if not own:  # the activation of a head, say
                continue

            def fill(*_: object, own: dict[str, nn.Parameter] = own) -> None:
                for name, parameter in own.items():
                    parameter.data = parameter.data.new_empty(shapes[name])
                self.source.fill(own, self.master)

            def empty(*_: object, own: dict[str, nn.Parameter] = own) -> None:
                for parameter in own.values():
                    parameter.data = parameter.data.new_empty(0)

            layer.register_forward_pre_hook(fill)
            layer.register_forward_hook(empty, always_call=True)
            found |= own.keys()
        return found

    def state_dict(self) -> dict[str, Tensor]:
        """Return the float32 master, by its source's names."""
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
        self.refresh()
