"""linear_soft_ce against its definition in float64."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from simla_kernels import backend, checking, half, linear_chunks
from simla_kernels.linear_soft_ce import linear_soft_ce, linear_soft_ce_reference
from tests.kernels.linear_heads import (
    FP32_TOLERANCE,
    as_on_a_card,
    assert_exact_in_fp32,
    assert_no_worse_than_torch,
    heads,
    mutate,
    worst_error,
)

MODULE = importlib.import_module("simla_kernels.linear_soft_ce")
REDUCTIONS = ["mean", "sum", "none"]
SEVERAL_CHUNKS = 4 * 37 * 12  # bytes: 12 rows of 37 classes at a time, so that 31 rows are 3 unequal chunks


def inputs(rows: int = 31, *, alpha: float = 0.4, reduction: str = "mean", classes: int = 37, **more: Any) -> dict:
    labels = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(3))
    return heads(rows, classes=classes, **more) | {"labels": labels, "alpha": alpha, "reduction": reduction}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("function", [linear_soft_ce_reference, linear_soft_ce])
def test_gradients_are_the_derivative(function: Any, reduction: str):
    given = checking.upcast(inputs(5, width=3, classes=7, reduction=reduction))
    wanted = ("h", "weight", "bias")
    torch.autograd.gradcheck(
        lambda *x: function(**{**given, **dict(zip(wanted, x, strict=True))}), [given[n] for n in wanted]
    )


# one row; a caption; odd on purpose; more rows than the width, where the weight's gradient is made in forward
@pytest.mark.parametrize("rows", [1, 30, 31, 257])
@pytest.mark.parametrize("width", [8, 16, 64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_loss_and_gradients_equal_the_definition(rows: int, width: int, reduction: str):
    given = inputs(rows, width=width, classes=731, reduction=reduction)
    assert_exact_in_fp32(linear_soft_ce, linear_soft_ce_reference, given)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_option_equals_the_definition(alpha: float, bias: bool, teacher: bool, reduction: str):
    given = inputs(alpha=alpha, bias=bias, teacher=teacher, reduction=reduction)
    assert_exact_in_fp32(linear_soft_ce, linear_soft_ce_reference, given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_torch(dtype: torch.dtype, reduction: str):
    for rows in (30, 257):
        given = inputs(rows, width=64, classes=731, reduction=reduction, dtype=dtype)
        assert_no_worse_than_torch(linear_soft_ce, linear_soft_ce_reference, given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_bf16_units_of_a_cpu_do_not_make_it_worse(reduction: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(half, "has_bf16_units", lambda: True)
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", 100 * 4 * 731)
    for rows in (30, 257):  # kept dz; three chunks
        given = inputs(rows, width=64, classes=731, reduction=reduction, dtype=torch.bfloat16)
        assert_no_worse_than_torch(linear_soft_ce, linear_soft_ce_reference, given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_chunks_of_rows_and_blocks_of_classes_add_up(reduction: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", SEVERAL_CHUNKS)
    monkeypatch.setattr(linear_chunks, "CPU_BLOCK", 10)
    assert_exact_in_fp32(linear_soft_ce, linear_soft_ce_reference, inputs(reduction=reduction))


def test_any_strides_will_do():
    given = inputs(257, reduction="none")
    for name in ("h", "weight", "teacher_h", "teacher_weight"):
        given[name] = given[name].detach().t().contiguous().t().requires_grad_(not name.startswith("teacher"))
    given["labels"] = given["labels"].repeat_interleave(2)[::2]
    assert_exact_in_fp32(linear_soft_ce, linear_soft_ce_reference, given)
    losses = linear_soft_ce(**given)
    (expanded,) = torch.autograd.grad(losses.sum(), given["h"])  # backward gets a gradient of stride 0
    (whole,) = torch.autograd.grad(linear_soft_ce(**{**given, "reduction": "sum"}), given["h"])
    torch.testing.assert_close(expanded, whole)


def test_large_logits_overflow_nothing():
    given = inputs(reduction="sum")
    given = {n: 300 * x if n in ("bias", "teacher_bias") else x for n, x in given.items()}
    given["bias"] = given["bias"].detach().requires_grad_()
    assert_exact_in_fp32(linear_soft_ce, linear_soft_ce_reference, given)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_cost_nothing_and_move_nothing(reduction: str):
    given = inputs(0, reduction=reduction)
    loss = linear_soft_ce(**given)
    assert loss.shape == ((0,) if reduction == "none" else ())
    wanted = [given[name] for name in ("h", "weight", "bias")]
    for x, gradient in zip(wanted, torch.autograd.grad(loss.sum(), wanted), strict=True):
        torch.testing.assert_close(gradient, torch.zeros_like(x), rtol=0, atol=0)
    assert loss.sum() == 0


def test_without_alpha_the_teacher_is_not_read():
    given = inputs(alpha=0.0)
    without: dict[str, Any] = {n: None if n.startswith("teacher") else x for n, x in given.items()}
    given["teacher_weight"] = given["teacher_weight"] * float("nan")
    assert torch.equal(linear_soft_ce(**given), linear_soft_ce(**without))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_only_wanted_gradients_are_made(reduction: str):
    for wanted in (["h"], ["weight"], ["bias"], ["h", "bias"]):
        given = inputs(reduction=reduction)
        every = checking.results(linear_soft_ce, given)
        for name in {"h", "weight", "bias"} - set(wanted):
            given[name] = given[name].detach()
        some = checking.results(linear_soft_ce, given)
        assert some.keys() == {"out0", *(f"grad.{name}" for name in wanted)}
        assert all(torch.equal(some[name], every[name]) for name in some)


def test_evaluation_makes_no_gradients(monkeypatch: pytest.MonkeyPatch):
    seen = []

    def spy(*given: Any, **more: Any) -> Any:
        losses, made = linear_chunks.losses_and_gradients(*given, **more)
        seen.append([x.numel() for x in made])
        return losses, made

    monkeypatch.setattr(MODULE, "losses_and_gradients", spy)
    with torch.no_grad():
        assert not linear_soft_ce(**inputs()).requires_grad
    assert seen == [[0, 0, 0]]


@pytest.mark.parametrize("rows", [10, 257])  # dz kept; the weight's gradient made in forward
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_backward_does_not_read_the_weight(rows: int, reduction: str):
    given = inputs(rows, reduction=reduction)
    wanted = [given[name] for name in ("h", "weight", "bias")]
    before = torch.autograd.grad(linear_soft_ce(**given), wanted)
    loss = linear_soft_ce(**given)
    given["weight"].data.fill_(float("nan"))  # ZeRO-3 has taken it away
    assert all(map(torch.equal, before, torch.autograd.grad(loss, wanted)))


@pytest.mark.parametrize("on_a_card", [False, True])
@pytest.mark.parametrize("rows", [10, 257])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_loss_scale_of_65536_neither_overflows_nor_underflows(
    rows: int, reduction: str, on_a_card: bool, monkeypatch: pytest.MonkeyPatch
):
    given = inputs(rows, classes=731, dtype=torch.float16, reduction=reduction)
    exact = checking.upcast(given)
    loss = linear_soft_ce_reference(**exact)
    names = ("h", "weight", "bias")
    # a small share of a large batch: sums stay below fp16's 65504 when scaled, their terms do not stay above 6e-8
    share = 1 / 4096 if reduction == "sum" else 1 / 64
    truth = torch.autograd.grad((loss * share).mean(), [exact[name] for name in names])
    if on_a_card:
        as_on_a_card(monkeypatch)
    found = torch.autograd.grad((linear_soft_ce(**given) * (share * 65536)).mean(), [given[name] for name in names])
    for true, x in zip(truth, found, strict=True):
        assert (x.double() / 65536 - true).abs().max() <= 2e-3 * true.abs().max()


def test_the_operators_are_well_formed():
    for rows in (5, 40):  # dz kept or not
        given = inputs(rows, width=8, classes=11)
        arguments = (*list(given.values())[:-1], [True, True, True])
        torch.library.opcheck(torch.ops.simla_kernels.linear_soft_ce_sum.default, arguments)
        torch.library.opcheck(torch.ops.simla_kernels.linear_soft_ce_rows.default, arguments)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_it_compiles_as_one_graph(compiler: str):
    torch.compiler.reset()
    cases = [inputs(rows, reduction=r) for rows in (5, 40) for r in ("mean", "none")]
    compiled = torch.compile(linear_soft_ce, fullgraph=True, backend=compiler)
    for given in cases:
        expected, found = checking.results(linear_soft_ce, given), checking.results(compiled, given)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_recomputation_changes_nothing(reduction: str):
    given = inputs(reduction=reduction)
    again = checking.results(lambda **x: checkpoint(linear_soft_ce, *x.values(), use_reentrant=False), given)
    once = checking.results(linear_soft_ce, given)
    assert all(torch.equal(again[name], once[name]) for name in once)


@pytest.mark.parametrize("rows", [10, 257])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_runs_and_two_backward_passes_agree_bit_by_bit(rows: int, reduction: str):
    given = inputs(rows, classes=731, reduction=reduction)
    first, second = checking.results(linear_soft_ce, given), checking.results(linear_soft_ce, given)
    assert all(torch.equal(first[name], second[name]) for name in first)
    loss, wanted = linear_soft_ce(**given).sum(), [given[name] for name in ("h", "weight", "bias")]
    passes = [torch.autograd.grad(loss, wanted, retain_graph=True) for _ in range(2)]
    assert all(map(torch.equal, *passes))


def test_autocast_does_not_lower_the_precision():
    given = inputs(257)
    plain = checking.results(linear_soft_ce, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = checking.results(linear_soft_ce, given)
    assert all(torch.equal(plain[name], cast[name]) for name in plain)


MEMORY = """
import sys, torch
from simla_kernels.linear_soft_ce import linear_soft_ce
def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))
N, V, K = 1200, 8192, 768
def run(n):
    (h, w, b), (t, u, c) = [(x[:n], w, b) for x, w, b in heads]
    linear_soft_ce(h, w, b, t, u, c, labels[:n], 0.4).backward()
    for x in (w, b): x.grad = None
heads = [(torch.randn(N, K), torch.randn(V, K), torch.zeros(V)) for _ in range(2)]
labels = torch.randint(V, (N,))
for x in heads[0]: x.requires_grad_()
run(2)
before = kib("VmRSS")
run(N)
print((kib("VmHWM") - before) / 1024)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
def test_the_visual_head_grows_by_100_mib_at_most(project_root: Path):
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # or glibc keeps what was freed before
    command = [sys.executable, "-c", MEMORY]
    ran = subprocess.run(
        command, cwd=project_root / "kernels", env=environment, capture_output=True, text=True, check=True
    )
    assert float(ran.stdout) <= 100


# mistakes made on purpose

MUTATIONS = {
    "alpha swapped": (MODULE.row_losses, "losses = -(1 - alpha)", "losses = -alpha"),
    "alpha swapped in backward": (MODULE.row_losses, "alpha=alpha", "alpha=1 - alpha"),
    "teacher's softmax over rows": (MODULE.row_losses, "torch.softmax(teacher_z, -1", "torch.softmax(teacher_z, 0"),
    "student's softmax over rows": (MODULE.row_losses, "torch.log_softmax(z, -1", "torch.log_softmax(z, 0"),
    "teacher and student swapped": (MODULE.torch_row_loss, "row_losses(z, teacher_z,", "row_losses(teacher_z, z,"),
    "label's gradient left out": (MODULE.row_losses, "alpha - 1", "0"),
    "teacher's bias left out": (MODULE.torch_row_loss, "teacher_z, teacher_bias)", "teacher_z, None)"),
    "gradients accumulated in bf16": (linear_chunks.empty_gradients, "= exact(h.dtype),", "= torch.bfloat16,"),
    "chunks overwrite each other": (linear_chunks._one_chunk, "rows.start == 0", "True"),
}


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_head_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linear_chunks, "CHUNK_BYTES", SEVERAL_CHUNKS)
    assert worst_error(linear_soft_ce, linear_soft_ce_reference, inputs(reduction="sum")) <= FP32_TOLERANCE
    mutate(monkeypatch, *MUTATIONS[name])
    assert worst_error(linear_soft_ce, linear_soft_ce_reference, inputs(reduction="sum")) > 100 * FP32_TOLERANCE


@pytest.mark.mutation
def test_gradients_of_each_row_ignoring_its_factor_are_seen(monkeypatch: pytest.MonkeyPatch):
    mutate(monkeypatch, MODULE.row_losses, "dz.mul_(row_weights[:, None])", "pass")
    assert worst_error(linear_soft_ce, linear_soft_ce_reference, inputs(reduction="none")) > 100 * FP32_TOLERANCE


# bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.zeros(31)}, r"h \(31,\) must be \(N, K\)"),
        ({"h": torch.zeros(31, 16, dtype=torch.int64)}, r"h \(31, 16\) torch.int64 must be floating"),
        ({"weight": torch.zeros(37, 8)}, r"weight \(37, 8\) torch.float32 must be \(V, 16\) torch.float32 like h"),
        ({"weight": torch.zeros(0, 16)}, r"weight \(0, 16\)"),
        ({"weight": torch.zeros(37, 16).bfloat16()}, r"weight \(37, 16\) torch.bfloat16 must be .* torch.float32"),
        ({"bias": torch.zeros(36)}, r"bias \(36,\) torch.float32 must be \(37,\)"),
        ({"teacher_h": torch.zeros(30, 16)}, r"teacher_h \(30, 16\) must be \(31, K\)"),
        ({"teacher_h": None}, "teacher_h is missing"),
        ({"teacher_weight": None}, "teacher_weight is missing"),
        ({"teacher_weight": torch.zeros(36, 16), "teacher_bias": None}, r"teacher_weight \(36, 16\) must have 37 rows"),
        ({"teacher_bias": torch.zeros(1, 37)}, r"teacher_bias \(1, 37\)"),
        ({"labels": torch.zeros(31)}, r"labels \(31,\) torch.float32 must be \(31,\) torch.int64"),
        ({"labels": torch.zeros(31, 1, dtype=torch.int64)}, r"labels \(31, 1\)"),
        ({"labels": torch.full((31,), 37)}, r"labels \(31,\) go from 37 to 37; expected 0 to 36"),
        ({"labels": torch.full((31,), -100)}, r"labels \(31,\) go from -100 to -100"),
        ({"labels": torch.zeros(31, dtype=torch.int64, device="meta")}, r"labels \(31,\) is on meta, h on cpu"),
        ({"weight": torch.zeros(37, 16, device="meta")}, r"weight \(37, 16\) is on meta, h on cpu"),
        ({"alpha": 1.5}, r"alpha=1.5 must be in \[0, 1\]"),
        ({"reduction": "avg"}, "reduction='avg' must be one of mean, sum, none"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"linear_soft_ce: .*{message}"):
        linear_soft_ce(**{**inputs(), **change})


def test_backend_says_what_runs():
    assert backend("linear_soft_ce", **inputs()).name == "torch"
