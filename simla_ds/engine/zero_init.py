"""Networks that come into being in parts, for ZeRO-3: no rank ever holds more of one than its share and a parameter.

    with ZeroInit(settings, dtype, device):
        model = Simla(config)      # any code that builds networks, and reads or writes their parameters
        initialise(model, init)

Within, a parameter is whole in memory only while an operation reads or writes it; all ranks must do the same. After it,
what is left of the networks is partitioned as DeepSpeed's own zero.Init would.

zero.Init itself gives other weights than the same code does without it: it partitions a module when its __init__ ends,
so that functions which draw start values later find an empty tensor (it mends Module.apply alone; timm uses another),
and it draws on the accelerator in the training dtype.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_OVERWRITING = {torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_, torch.ops.aten.normal_}
_OVERWRITING |= {torch.ops.aten.uniform_}
"""What leaves nothing of its first argument, which therefore needs no gathering."""


@dataclass
class _Sharded:
    """A parameter whose storage is empty between uses."""

    parameter: weakref.ref[nn.Parameter]
    storage: torch.UntypedStorage
    bytes: int
    flat: Tensor
    """The storage as one row, when it is filled."""
    shard: Tensor
    """This rank's part, when it is not."""


class ZeroInit(TorchDispatchMode):
    """See the module. Collective, as what is done within must be."""

    def __init__(self, settings: dict[str, Any], dtype: torch.dtype, device: torch.device):
        """settings: DeepSpeed's. dtype: of the parameters afterwards. device: where ranks exchange them."""
        super().__init__()
        self.settings, self.dtype, self.device = settings, dtype, device
        self._parameters: dict[int, _Sharded] = {}
        self._filled: set[int] = set()

    def __enter__(self) -> ZeroInit:
        self._hook = register_module_parameter_registration_hook(self._adopt)
        return super().__enter__()

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        self._hook.remove()
        if error is None:
            self._partition()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation with the parameters that it touches whole, and no others."""
        keys = [_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        touched = dict.fromkeys(key for key in keys if key in self._parameters)  # in the same order on every rank
        if touched:
            self._empty(self._filled - touched.keys())
        for key in touched:
            if key not in self._filled:
                overwritten = func.overloadpacket in _OVERWRITING and _covers(args[0], self._parameters[key])
                self._fill(key, None if overwritten else self._gathered(self._parameters[key]))
        return func(*args, **(kwargs or {}))

    def _adopt(self, _module: nn.Module, _name: str, parameter: Any) -> None:
        """Take care of a parameter from its registration in a module on. It is whole until the next operation."""
        if parameter is None or parameter.is_meta or (key := _key(parameter)) in self._parameters:
            return
        storage = parameter.untyped_storage()
        known, filled = self._parameters, self._filled

        def forget(_: object) -> None:
            known.pop(key, None)
            filled.discard(key)

        with _disable_current_modes():
            flat = parameter.detach().view(-1)
        self._parameters[key] = _Sharded(weakref.ref(parameter, forget), storage, storage.nbytes(), flat, flat[:0])
        self._filled.add(key)

    def _empty(self, keys: Iterable[int]) -> None:
        """Keep of parameters this rank's part."""
        ranks, rank = deepspeed.comm.get_world_size(), deepspeed.comm.get_rank()
        for key in list(keys):
            one = self._parameters[key]
            part = -(-one.flat.numel() // ranks)
            one.shard = torch.zeros(part, dtype=one.flat.dtype)
            own = one.flat[rank * part : (rank + 1) * part]
            one.shard[: own.numel()].copy_(own)
            one.storage.resize_(0)
            self._filled.discard(key)

    def _fill(self, key: int, value: Tensor | None) -> None:
        """Give a parameter its memory, and its value unless it is to be overwritten."""
        one = self._parameters[key]
        one.storage.resize_(one.bytes)
        if value is not None:
            one.flat.copy_(value)
        one.shard = one.flat[:0]
        self._filled.add(key)

    def _gathered(self, one: _Sharded) -> Tensor:
        """Return a parameter of which every rank has a part, as one row on the device."""
        whole = torch.empty(
            one.shard.numel() * deepspeed.comm.get_world_size(), dtype=one.shard.dtype, device=self.device
        )
        deepspeed.comm.all_gather_into_tensor(whole, one.shard.to(self.device))
        return whole[: one.flat.numel()]

    @torch.no_grad()
    def _partition(self) -> None:
        """Make DeepSpeed's parameters of those that are still in use, one by one."""
        gc.collect()  # the same ones on every rank
        self._empty(self._filled)
        hierarchical = self.settings["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        group = groups._get_zero_param_intra_parallel_group() if hierarchical else None  # of another engine, if any
        first: Any = None
        for key in list(self._parameters):
            one = self._parameters.pop(key)
            parameter: Any = one.parameter()
            if _key(parameter) != key:
                raise RuntimeError(
                    "a parameter was moved or replaced while it was built in parts; write into it instead"
                )
            parameter.data = self._gathered(one).view(parameter.shape).to(self.dtype)
            del one  # its shard, before DeepSpeed makes its own
            if first is None:
                first = parameter
                deepspeed.zero.Init(
                    module=nn.ParameterList([first]),
                    config_dict_or_path=copy.deepcopy(self.settings),
                    zero_param_parallel_group=group,
                )
            else:
                first.convert_to_zero_parameters([parameter])


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _covers(tensor: Tensor, one: _Sharded) -> bool:
    return _key(tensor) == one.storage._cdata and tensor.numel() == one.flat.numel()
