"""NVIDIA Apex cannot be installed here: a stand-in with its module names and constructor shows that it is chosen."""

import sys
from types import ModuleType

import torch
from torch import nn

from simla_ds.model.layer_norm import ResidualLayerNorm, layer_norm


class FusedLayerNorm(nn.LayerNorm):
    """Stands in for apex.normalization.FusedLayerNorm."""


def install(monkeypatch, *names: str) -> None:
    for name in names:
        module = ModuleType(name)
        module.FusedLayerNorm = FusedLayerNorm  # type: ignore[attr-defined]  a stand-in is given its one name
        monkeypatch.setitem(sys.modules, name, module)


def test_apex_is_used_where_its_extension_is_there(monkeypatch):
    install(monkeypatch, "fused_layer_norm_cuda", "apex", "apex.normalization")
    norm = layer_norm(8, 1e-12)
    assert type(norm) is FusedLayerNorm
    assert norm.eps == 1e-12


def test_another_package_called_apex_changes_nothing(monkeypatch):
    install(monkeypatch, "apex")  # PyPI's: no `normalization`, no compiled extension
    norm, x = layer_norm(8, 1e-5), torch.randn(3, 8)
    assert type(norm) is nn.LayerNorm
    torch.testing.assert_close(norm(x), (x - x.mean(-1, keepdim=True)) / (x.var(-1, False, keepdim=True) + 1e-5).sqrt())


def test_the_residual_kind_drops_out_in_training_only():
    torch.manual_seed(0)
    norm, x, residual = ResidualLayerNorm(64, 1e-12, dropout=0.5), torch.randn(50, 64), torch.randn(50, 64)
    plain = nn.functional.layer_norm(x + residual, (64,), eps=1e-12)
    torch.testing.assert_close(norm.eval()(x, residual), plain)
    torch.manual_seed(1)
    first = norm.train()(x, residual)
    assert not torch.allclose(first, plain)
    torch.manual_seed(1)
    assert torch.equal(norm(x, residual), first)
