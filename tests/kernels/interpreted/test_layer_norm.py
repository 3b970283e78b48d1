"""dropout_add_layer_norm's Triton kernels, by the interpreter: forward and every gradient against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import checking, dispatch, layer_norm_triton, self_check
from simla_kernels.dropout import philox_uniform
from simla_kernels.layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_reference
from tests.kernels.guards import guard_launches

TOLERANCE = 1e-5  # of a result's largest entry; 5e-7 was measured
HALF_FLOOR = 1e-4


@pytest.fixture(autouse=True)
def _by_triton():
    with dispatch.forced("triton"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return guard_launches(monkeypatch, layer_norm_triton)


def arguments(*shape: int, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    """x and residual are slices of wider rows; weight and bias are every second number."""
    generator = torch.Generator().manual_seed(sum(shape))

    def rows() -> Tensor:
        wide = torch.randn(*shape[:-1], shape[-1] + 24, generator=generator).to(dtype)
        return wide[..., 8 : 8 + shape[-1]].requires_grad_()

    def parameter() -> Tensor:
        return torch.randn(2 * shape[-1], generator=generator).to(dtype)[::2].requires_grad_()

    tensors = {"x": rows(), "residual": rows(), "weight": parameter(), "bias": parameter()}
    return {**tensors, "dropout_p": 0.0, "seed": 7, **more}


@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
# one row; widths that are no power of two in each size class; a last block of rows that is not full
@pytest.mark.parametrize("shape", [(1, 64), (30, 17), (31, 128), (2, 3, 768), (5, 1000), (2, 2050)])
def test_output_and_gradients_equal_the_definition(shape: tuple[int, ...], dropout_p: float, launched: list[str]):
    given = arguments(*shape, dropout_p=dropout_p)
    truth = checking.results(dropout_add_layer_norm_reference, checking.upcast(given))
    for name, error in checking.errors(checking.results(dropout_add_layer_norm, given), truth).items():
        assert error <= TOLERANCE, f"{name} is off by {error:.1e}"
    assert launched == ["layer_norm_forward_kernel", "layer_norm_backward_kernel"]


def test_a_program_takes_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, launched: list[str]):
    monkeypatch.setattr(layer_norm_triton, "BACKWARD_PROGRAMS", 3)
    given = arguments(61, 24, dropout_p=0.3)
    truth = checking.results(dropout_add_layer_norm_reference, checking.upcast(given))
    assert max(checking.errors(checking.results(dropout_add_layer_norm, given), truth).values()) <= TOLERANCE


def test_the_mask_is_philoxs_at_each_position():
    given = arguments(5, 24, dropout_p=0.5, seed=2**40 + 3)
    given |= {"weight": torch.ones(24), "bias": torch.zeros(24)}
    found = checking.results(dropout_add_layer_norm, given)
    kept = philox_uniform(2**40 + 3, torch.arange(5 * 24)).reshape(5, 24) >= 0.5
    assert torch.equal(found["grad.x"] != 0, kept)
    torch.testing.assert_close(found["grad.x"], found["grad.residual"] * kept * 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_twice_pytorchs(dtype: torch.dtype):
    given = arguments(31, 200, dtype=dtype)
    tensors = {name: given[name] for name in ("x", "residual", "weight", "bias")}

    def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(residual + x, weight.shape, weight, bias, 1e-12)

    truth = checking.results(eager, checking.upcast(tensors))
    theirs = checking.errors(checking.results(eager, tensors), truth)
    mine = checking.errors(checking.results(dropout_add_layer_norm, tensors), truth)
    assert all(mine[name] <= 2 * theirs[name] + HALF_FLOOR for name in truth)


def test_an_expanded_gradient_is_read_as_it_is():
    given = arguments(30, 24)
    tensors = [given[name] for name in ("x", "residual", "weight", "bias")]
    gradients = [
        torch.autograd.grad(function(*tensors).sum(), tensors)
        for function in (dropout_add_layer_norm, dropout_add_layer_norm_reference)
    ]
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_no_rows_are_no_work():
    found = checking.results(dropout_add_layer_norm, arguments(0, 8, dropout_p=0.1))
    assert found["grad.weight"].tolist() == [0] * 8


def test_it_passes_its_own_self_check():
    assert self_check.failure("dropout_add_layer_norm", torch.device("cpu")) is None


@pytest.mark.mutation
def test_another_mask_in_backward_is_seen(monkeypatch: pytest.MonkeyPatch):
    backward: Any = layer_norm_triton.backward
    monkeypatch.setattr(layer_norm_triton, "backward", lambda *given: backward(*given[:-1], given[-1] + 1))
    given = arguments(5, 24, dropout_p=0.3)
    truth = checking.results(dropout_add_layer_norm_reference, checking.upcast(given))
    assert max(checking.errors(checking.results(dropout_add_layer_norm, given), truth).values()) > 10 * TOLERANCE
