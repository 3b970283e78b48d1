"""dropout_add_layer_norm in PyTorch: numbers, the mask made again in backward, and what torch.compile makes of it."""

import importlib
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from simla_kernels import checking, dispatch, dropout
from simla_kernels.dropout import keep_mask
from simla_kernels.layer_norm import dropout_add_layer_norm, dropout_add_layer_norm_reference
from tests.kernels.mutants import mutant

MODULE: Any = importlib.import_module("simla_kernels.layer_norm")
TOLERANCE = 1e-5  # of a result's largest entry; 5e-7 was measured
HALF_FLOOR = 1e-4
# one row; a caption; a caption, odd on purpose; 16 x 16 patches and [CLS]. Widths: small, odd, BERT's
SHAPES = [(1, 8), (30, 64), (31, 17), (257, 768), (2, 3, 5, 16)]


def arguments(*shape: int, dtype: torch.dtype = torch.float32, **more: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(shape))

    def draw(*of: int) -> Tensor:
        return (torch.randn(of, generator=generator) + 0.3).to(dtype).requires_grad_()

    tensors = {"x": draw(*shape), "residual": draw(*shape), "weight": draw(shape[-1]), "bias": draw(shape[-1])}
    return {**tensors, "dropout_p": 0.0, "seed": 7, **more}


def eager(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, seed: int) -> Tensor:
    """What a model would write, with the mask of PyTorch's path."""
    if dropout_p:
        x = x * keep_mask(torch.tensor([seed]), x, dropout_p) / (1 - dropout_p)
    return F.layer_norm(residual + x, weight.shape, weight, bias, 1e-12)


def worst_error(function: Any, given: dict[str, Any]) -> float:
    truth = checking.results(eager, checking.upcast(given))
    return max(checking.errors(checking.results(function, given), truth).values())


def as_operator(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout_p: float, seed: int) -> Tensor:
    """Without the shortcut that a CPU takes where there is no dropout."""
    return MODULE._forward(x, residual, weight, bias, dropout_p, torch.tensor([seed]), 1e-12)[0]


@pytest.mark.parametrize("function", [dropout_add_layer_norm_reference, dropout_add_layer_norm, as_operator])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradients_are_those_of_finite_differences(function: Any, dropout_p: float):
    given = checking.upcast(arguments(3, 5, dropout_p=dropout_p))
    options = {name: given.pop(name) for name in ("dropout_p", "seed")}
    assert torch.autograd.gradcheck(lambda *tensors: function(*tensors, **options), tuple(given.values()))


@pytest.mark.parametrize("function", [dropout_add_layer_norm, as_operator])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients_equal_the_definition(shape: tuple[int, ...], dropout_p: float, function: Any):
    assert worst_error(function, arguments(*shape, dropout_p=dropout_p)) <= TOLERANCE


def test_the_definition_is_pytorchs():
    given = arguments(31, 17)
    truth = checking.results(eager, checking.upcast(given))
    found = checking.results(dropout_add_layer_norm_reference, checking.upcast(given))
    assert max(checking.errors(found, truth).values()) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(31, 17), (257, 64), (2000, 128)])
def test_half_precision_is_no_worse_than_twice_pytorchs(shape: tuple[int, ...], dropout_p: float, dtype: torch.dtype):
    given = arguments(*shape, dtype=dtype, dropout_p=dropout_p)
    truth = checking.results(eager, checking.upcast(given))
    theirs = checking.errors(checking.results(eager, given), truth)
    mine = checking.errors(checking.results(dropout_add_layer_norm, given), truth)
    assert all(mine[name] <= 2 * theirs[name] + HALF_FLOOR for name in truth), (mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_parameters_gradients_are_added_up_in_fp32(dtype: torch.dtype):
    given = arguments(4000, 64, dtype=dtype)
    tensors = [given[name] for name in ("x", "residual", "weight", "bias")]
    ones = torch.ones_like(given["x"])  # exact in every dtype
    bias_gradient = torch.autograd.grad(dropout_add_layer_norm(*tensors), tensors[3], ones)[0]
    assert torch.equal(bias_gradient.float(), torch.full((64,), 4000.0).to(dtype).float())


def test_parameters_may_be_fp32_under_half_inputs():
    given = arguments(30, 64, dtype=torch.bfloat16)
    for name in ("weight", "bias"):
        given[name] = given[name].detach().float().requires_grad_()
    found = checking.results(dropout_add_layer_norm, given)
    assert found["out0"].dtype == torch.bfloat16
    assert found["grad.weight"].dtype == torch.float32
    assert max(checking.errors(found, checking.results(eager, checking.upcast(given))).values()) <= 3e-2


def test_a_large_common_offset_does_not_cost_the_variance():
    given = arguments(31, 64)
    given["residual"] = (given["residual"].detach() + 1000).requires_grad_()
    assert worst_error(dropout_add_layer_norm, given) <= 20 * TOLERANCE  # 1000 itself takes ten of the 24 bits


def test_strides_do_not_matter():
    given = arguments(30, 64, dropout_p=0.3)
    transposed = {**given, "x": given["x"].detach().T.contiguous().T.requires_grad_()}
    wide = torch.full((30, 80), float("nan"))
    wide[:, 8:72] = given["residual"].detach()
    transposed["residual"] = wide[:, 8:72].requires_grad_()
    expected, found = (checking.results(dropout_add_layer_norm, g) for g in (given, transposed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_seed_repeats_the_mask_and_another_one_does_not():
    given = arguments(30, 64, dropout_p=0.5)
    first, again = dropout_add_layer_norm(**given), dropout_add_layer_norm(**{**given, "seed": torch.tensor([7])})
    assert torch.equal(first, again)
    assert not torch.equal(first, dropout_add_layer_norm(**{**given, "seed": 8}))
    torch.manual_seed(3)
    drawn = dropout_add_layer_norm(**{**given, "seed": None})
    torch.manual_seed(3)
    assert torch.equal(drawn, dropout_add_layer_norm(**{**given, "seed": None}))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_as_many_elements_are_kept_as_asked(dropout_p: float):
    kept = keep_mask(torch.tensor([1]), torch.empty(1001, 999), dropout_p)
    spread = (dropout_p * (1 - dropout_p) / kept.numel()) ** 0.5
    assert kept.unique().tolist() == [0, 1]
    assert abs(kept.mean().item() - (1 - dropout_p)) < 5 * spread
    together = (kept[:, 1:] * kept[:, :-1]).mean().item()  # four draws come out of one number
    assert abs(together - (1 - dropout_p) ** 2) < 10 * spread


@pytest.mark.parametrize("dropout_p", [1e-9, 1 - 1e-9])
def test_chances_beyond_16_bits_are_taken_as_near_as_can_be(dropout_p: float):
    kept = keep_mask(torch.tensor([1]), torch.empty(100_000), dropout_p).mean()
    assert abs(float(kept) - (1 - dropout_p)) < 1e-3


def test_the_definition_draws_as_the_kernels_do():
    given = arguments(3, 64, dropout_p=0.4)
    uniform = dropout.philox_uniform(7, torch.arange(3 * 64)).reshape(3, 64)
    x = given["x"] * (uniform >= 0.4) / 0.6
    expected = F.layer_norm(given["residual"] + x, (64,), given["weight"], given["bias"], 1e-12)
    torch.testing.assert_close(dropout_add_layer_norm_reference(**given), expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operator_passes_opcheck(dropout_p: float, dtype: torch.dtype):
    tensors = [arguments(2, 3, 8, dtype=dtype)[name] for name in ("x", "residual", "weight", "bias")]
    torch.library.opcheck(MODULE._forward, (*tensors, dropout_p, torch.tensor([7]), 1e-12))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_it_compiles_into_one_graph(backend: str, dropout_p: float):
    given = arguments(30, 64, dropout_p=dropout_p)
    given["seed"] = torch.tensor([7])
    compiled = torch.compile(dropout_add_layer_norm, fullgraph=True, backend=backend)
    expected, found = checking.results(dropout_add_layer_norm, given), checking.results(compiled, given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_may_be_recomputed_without_a_seed():
    given = arguments(30, 64, dropout_p=0.3, seed=None)

    def recomputed(**inputs: Any) -> Any:
        return checkpoint(dropout_add_layer_norm, use_reentrant=False, **inputs)

    torch.manual_seed(1)
    expected = checking.results(dropout_add_layer_norm, given)
    torch.manual_seed(1)
    found = checking.results(recomputed, given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_runs_are_bit_identical():
    for dtype in (torch.float32, torch.bfloat16):
        given = arguments(257, 64, dtype=dtype, dropout_p=0.1)
        first, second = checking.results(dropout_add_layer_norm, given), checking.results(dropout_add_layer_norm, given)
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_rows_are_no_work():
    given = arguments(0, 8, dropout_p=0.1)
    found = checking.results(dropout_add_layer_norm, given)
    assert found["out0"].shape == (0, 8)
    assert found["grad.weight"].tolist() == [0] * 8


def test_nothing_but_the_sum_and_two_numbers_a_row_is_kept():
    given = arguments(30, 64, dropout_p=0.3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dropout_add_layer_norm(**given)
    assert sum(t.numel() for t in kept) == 30 * 64 + 2 * 30 + 64 + 1


def test_apexs_kernel_is_found_by_its_extension(monkeypatch: pytest.MonkeyPatch):
    MODULE._apex.cache_clear()
    apex, extension = ModuleType("apex.normalization.fused_layer_norm"), ModuleType("fused_layer_norm_cuda")
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))  # PyPI's: no normalization
    assert MODULE._apex() is None
    MODULE._apex.cache_clear()
    apex.__dict__["fused_layer_norm_affine"] = lambda x, weight, bias, shape, eps: F.layer_norm(
        x, shape, weight, bias, eps
    )
    monkeypatch.setitem(sys.modules, "apex.normalization", ModuleType("apex.normalization"))
    monkeypatch.setitem(sys.modules, "apex.normalization.fused_layer_norm", apex)
    monkeypatch.setitem(sys.modules, "fused_layer_norm_cuda", extension)
    given = arguments(30, 64, dropout_p=0.3, seed=torch.tensor([7]))
    torch.testing.assert_close(MODULE._apex_forward(*given.values(), 1e-12), dropout_add_layer_norm(**given))
    MODULE._apex.cache_clear()


def test_the_backend_is_named():
    assert dispatch.backend("dropout_add_layer_norm", **arguments(3, 8)).name == "torch"
    assert MODULE._refuses(**arguments(1, 5000)) == "rows of 5000 are wider than 4096"
    assert "float64" in MODULE._refuses(**checking.upcast(arguments(1, 8)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.tensor(1.0)}, r"x \(\) torch.float32 must be \(..., D\)"),
        ({"x": torch.zeros(3, 8, dtype=torch.int64)}, r"x \(3, 8\) torch.int64 must be .* floating"),
        ({"residual": torch.zeros(4, 8)}, r"residual \(4, 8\) torch.float32 must be as x, \(3, 8\)"),
        ({"residual": torch.zeros(3, 8).double()}, r"residual \(3, 8\) torch.float64 must be as x"),
        ({"weight": torch.zeros(7)}, r"weight \(7,\) torch.float32 must be \(8,\)"),
        ({"bias": torch.zeros(8).double()}, r"bias \(8,\) torch.float64 must be \(8,\) torch.float32"),
        ({"bias": torch.zeros(8, device="meta")}, r"bias \(8,\) on meta must be on cpu"),
        ({"dropout_p": 1.0}, r"dropout_p=1.0 must be in \[0, 1\)"),
        ({"seed": torch.tensor([1.0])}, r"seed \(1,\) torch.float32 .* must be one int64"),
    ],
)
def test_bad_input_is_named_with_its_shape(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dropout_add_layer_norm(**arguments(3, 8) | change)


MUTATIONS = {
    "another mask in backward": (
        "keep_mask(seed, grad_total, dropout_p)",
        "keep_mask(seed + 1, grad_total, dropout_p)",
    ),
    "gradients not scaled": (".mul_(grad_total).mul_(1 / (1 - dropout_p))", ".mul_(grad_total)"),
    "residual dropped, not x": (
        "torch.addcmul(residual, x, keep_mask(seed, x",
        "torch.addcmul(x, residual, keep_mask(seed, x",
    ),
    "residual's gradient for x": ("return grad_x if ctx.dropout_p else grad_total,", "return grad_total,"),
}


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_layer_norm_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    broken = mutant(monkeypatch, "layer_norm", *MUTATIONS[name])
    assert worst_error(broken.dropout_add_layer_norm, arguments(30, 64, dropout_p=0.3)) > 10 * TOLERANCE


@pytest.mark.mutation
def test_gradients_added_up_in_bfloat16_are_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MODULE, "_half_on_cpu", lambda tensor: False)  # aten's own way
    with pytest.raises(AssertionError):
        test_parameters_gradients_are_added_up_in_fp32(torch.bfloat16)
