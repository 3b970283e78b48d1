"""GeluLinear computes a linear layer of GELU and keeps only what goes in."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ds.model.gelu_linear import GeluLinear


def layers(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> tuple[GeluLinear, nn.Linear]:
    torch.manual_seed(0)
    layer, plain = GeluLinear(12, 5, bias=bias, dtype=dtype), nn.Linear(12, 5, bias=bias, dtype=dtype)
    plain.load_state_dict(layer.state_dict())
    return layer, plain


@pytest.mark.parametrize("shape", [(7, 12), (2, 3, 12), (0, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_equals_gelu_and_a_linear_layer(shape: tuple[int, ...], bias: bool):
    layer, plain = layers(bias=bias)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(*shape[:-1], 5, dtype=torch.float64)
    results = []
    for run, module in ((layer(x), layer), (plain(F.gelu(x)), plain)):
        wanted = [x, *module.parameters()]
        results.append([run, *torch.autograd.grad(run, wanted, direction)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_frozen_parts_get_no_gradient():
    layer, _ = layers()
    layer.weight.requires_grad_(False)
    layer(torch.randn(3, 12, dtype=torch.float64)).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


def test_bf16_rounds_as_a_linear_layer_does():
    layer, plain = layers(torch.bfloat16)
    x = torch.randn(9, 12, dtype=torch.bfloat16, requires_grad=True)
    ours, theirs = (torch.autograd.grad(y.sum(), x)[0] for y in (layer(x), plain(F.gelu(x))))
    assert ours.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)


def test_only_the_input_is_kept():
    layer, _ = layers()
    x, kept = torch.randn(3, 12, dtype=torch.float64, requires_grad=True), []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer(x)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), layer.weight.data_ptr()}
