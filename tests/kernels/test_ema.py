"""ema_update_: exact to a rounding, in place, for mixed dtypes, and never on memory that is shared."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from simla_kernels import dispatch
from simla_kernels.ema import ema_update_, ema_update_reference
from tests.kernels.mutants import mutant

MODULE: Any = importlib.import_module("simla_kernels.ema")
SHAPES = [(), (1,), (30,), (257, 31), (0, 4)]
ROUNDING = 2.0**-24  # half the distance of two float32 numbers, relative


def tensors(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def largest_error(update: Any, sources: list[Tensor], momentum: float) -> float:
    """In units of the largest term that goes in."""
    targets = tensors(torch.float32, 0)
    doubled = [t.double() for t in targets], [s.double() for s in sources]
    truth = ema_update_reference(*doubled, momentum)
    sizes = [torch.maximum(*(t.abs() for t in pair)) for pair in zip(*doubled, strict=True)]
    update(targets, sources, momentum)
    errors = [((t - true).abs() / size).flatten() for t, true, size in zip(targets, truth, sizes, strict=True)]
    return float(torch.cat(errors).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.4, 0.995, 0.9999, 1.0])
def test_targets_move_as_the_formula_says_to_a_rounding(dtype: torch.dtype, momentum: float):
    assert largest_error(ema_update_, tensors(dtype, 1), momentum) <= 2 * ROUNDING


def test_sources_of_several_dtypes_go_in_one_call():
    mixed = [
        s.to(dtype) for s, dtype in zip(tensors(torch.float32, 1), [torch.bfloat16, torch.float32] * 3, strict=False)
    ]
    assert largest_error(ema_update_, mixed, 0.995) <= 2 * ROUNDING


def test_small_steps_are_not_lost_over_many_updates():
    target, source = torch.ones(8), torch.full((8,), 1 + 2.0**-9)
    for _ in range(2000):
        ema_update_([target], [source], 0.995)
    expected = 1 + 2.0**-9 * (1 - 0.995**2000)
    # steps stop at half a rounding of 1, which is ROUNDING / 0.005 before the end; bfloat16 would not move at all
    assert (target.double() - expected).abs().max() <= 2 * ROUNDING / 0.005


def test_casts_stay_within_their_budget(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(MODULE.CAST_BUDGET, "cpu", 2 * 31 * 4)
    targets = [torch.zeros(31) for _ in range(5)]
    runs = list(MODULE._within_budget(targets, 2 * 31 * 4))
    assert runs == [[0, 1], [2, 3], [4]]
    assert list(MODULE._within_budget([torch.zeros(1000)], 8)) == [[0]]
    ema_update_(targets, [torch.ones(31, dtype=torch.bfloat16) for _ in targets], 0.75)
    assert all(torch.equal(t, torch.full((31,), 0.25)) for t in targets)


def test_strided_targets_and_their_neighbours():
    ring = torch.full((6, 10), 7.0)
    left, right = ring[1:5, 1:4], ring[1:5, 4:8]
    ema_update_([left, right], [torch.zeros(4, 3), torch.zeros(4, 4)], 0.5)
    assert torch.equal(ring[1:5, 1:8], torch.full((4, 7), 3.5))
    assert ring.sum() == 7 * (60 - 28) + 3.5 * 28


def test_parameters_are_moved_without_a_graph():
    target = torch.nn.Parameter(torch.ones(3))
    ema_update_([target], [torch.nn.Parameter(torch.zeros(3))], 0.5)
    assert torch.equal(target.detach(), torch.full((3,), 0.5))
    assert target.grad_fn is None


def test_no_tensors_are_no_work():
    ema_update_([], [], 0.5)


def test_backend_says_that_torch_runs_everywhere_and_why():
    given = [torch.zeros(1)], [torch.zeros(1)], 0.5
    name, why = dispatch.backend("ema_update_", *given)
    assert name == "torch"
    assert "_foreach_lerp_" in why
    assert isinstance(MODULE._example(2, torch.device("cpu"), torch.float32)["targets"], list)


BASE = torch.zeros(10)


@pytest.mark.parametrize(
    ("targets", "sources", "momentum", "message"),
    [
        ([torch.zeros(2)], [torch.zeros(2)], 1.5, r"momentum=1.5 must be in \[0, 1\]"),
        ([torch.zeros(2)], [], 0.5, "1 targets and 0 sources"),
        ([torch.zeros(2)], [torch.zeros(3)], 0.5, r"sources\[0\] \(3,\) on cpu must be as targets\[0\], \(2,\) on cpu"),
        ([torch.zeros(2)], [torch.zeros(2, device="meta")], 0.5, r"sources\[0\] \(2,\) on meta"),
        (
            [torch.zeros(2, dtype=torch.int64)],
            [torch.zeros(2)],
            0.5,
            r"targets\[0\] \(2,\) torch.int64 must be floating",
        ),
        ([torch.zeros(2)], [torch.zeros(2, dtype=torch.bool)], 0.5, r"sources\[0\] \(2,\) torch.bool must be floating"),
        ([BASE, BASE], [torch.zeros(10)] * 2, 0.5, "share memory; each target needs its own"),
        ([BASE[:6], BASE[4:]], [torch.zeros(6)] * 2, 0.5, "share memory; each target needs its own"),
        ([BASE], [BASE], 0.5, "share memory"),
        ([BASE[:4]], [BASE[2:6]], 0.5, "share memory"),
        ([BASE[2:6]], [BASE[:4]], 0.5, "share memory"),
    ],
)
def test_bad_input_is_named_with_its_shape(targets: Any, sources: Any, momentum: float, message: str):
    with pytest.raises(ValueError, match=message):
        ema_update_(targets, sources, momentum)


MUTATIONS = {
    "momentum swapped": ("sources, 1 - momentum)", "sources, momentum)"),
    "sums in bfloat16": (
        "torch.ops.aten._foreach_lerp_.Scalar(targets, sources, 1 - momentum)",
        "[t.copy_(t.bfloat16().lerp(s.bfloat16(), 1 - momentum)) for t, s in zip(targets, sources)]",
    ),
}


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_update_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    broken = mutant(monkeypatch, "ema", *MUTATIONS[name])
    assert largest_error(broken.ema_update_, tensors(torch.float32, 1), 0.995) > 1000 * ROUNDING
