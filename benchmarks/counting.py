"""Operations, and what autograd keeps, counted while something runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
CPU_FLASH = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v: sdpa_flop_count(q.shape, k.shape, v.shape),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda d, q, k, v: sdpa_backward_flop_count(
        d.shape, q.shape, k.shape, v.shape
    ),
}
"""Missing from torch's registry. The backward's count includes the scores that flash makes again."""
REGISTRY = {**flop_registry, aten.addmm_: flop_registry[aten.addmm], aten.baddbmm_: flop_registry[aten.baddbmm]}
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm)


class Operations(TorchDispatchMode):
    """Adds up floating-point operations, 2 per multiply-add, of products and convolutions.

    It looks inside simla_kernels' operations, which torch's own counter takes for one unknown operator each.

    Args:
        bf16_in_fp32: multiply bf16 matrices in fp32 and round, for a CPU without bf16 units, where PyTorch's own
            products are a hundred times slower. Autograd keeps the same bf16 tensors.
    """

    def __init__(self, *, bf16_in_fp32: bool = False):
        super().__init__()
        self.total = 0
        self.bf16_in_fp32 = bf16_in_fp32

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if func.namespace == "simla_kernels":
            device = next(x.device for x in args if isinstance(x, Tensor))
            keys = torch._C.DispatchKeySet(torch._C._dispatch_key_parse(device.type.upper()))
            with self:
                return func.redispatch(keys, *args, **kwargs)
        if self.bf16_in_fp32 and packet in PRODUCTS and args[-1].dtype == torch.bfloat16 and "out" not in kwargs:
            out = func(*(x.float() if isinstance(x, Tensor) else x for x in args), **kwargs).bfloat16()
        else:
            out = func(*args, **kwargs)
        if packet in CPU_FLASH:
            self.total += CPU_FLASH[packet](*args[: 4 if "backward" in packet.__name__ else 3])
        elif packet in REGISTRY:
            self.total += REGISTRY[packet](*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out)
        return out


@contextmanager
def saved_for_backward(*networks: nn.Module) -> Iterator[list[int]]:
    """Collect the bytes that autograd keeps for backward within this context, into the yielded list's only entry.

    Each storage counts once and whole; the networks' parameters do not count.
    """
    known = {p.untyped_storage()._cdata for network in networks for p in network.parameters()}
    kept: dict[int, Tensor] = {}
    result = [0]

    def keep(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known and storage._cdata not in kept:
            kept[storage._cdata] = t  # alive, so that no other storage takes its place
            result[0] += storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        yield result
