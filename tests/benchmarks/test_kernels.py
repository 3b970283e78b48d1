"""`python -m benchmarks kernels`: what it compares, and what it refuses before it measures anything."""

import pytest
import torch

from benchmarks import kernels
from benchmarks.__main__ import main
from benchmarks.kernel_cases import Case, Run, cases
from benchmarks.kernels import MEMORY, TOLERANCE, measure, measure_case
from benchmarks.timing import CPU, Clock
from simla_kernels import dispatch

CASES = dict(cases(CPU, torch.float32))


@pytest.mark.parametrize("name", [name for name in CASES if "XMM" not in name and "257 x 257" not in name])
def test_contenders_agree_and_ours_repeats(name: str):
    case = CASES[name]()
    assert case.runs.keys() == case.checked.keys()
    first, second = case.runs["ours"](), case.runs["ours"]()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # or --tune could not judge it
    row = measure_case(case._replace(runs={"ours": lambda: first}), Clock(), 1)
    assert len(row["difference"]) >= 1
    assert max(row["difference"].values()) < 1e-4
    assert (row["backend"], row["refused"]) == ("torch", {})
    assert dispatch.OPERATIONS[case.operation].refuses(**case.arguments) is None  # as a card asks: Triton takes it


def test_every_operation_with_a_kernel_is_a_case():
    named = {name.partition(":")[0] for name in CASES}
    assert named == {name for name, operation in dispatch.OPERATIONS.items() if not operation.torch_only}


def case(other: float) -> Case:
    runs: dict[str, Run] = {"ours": lambda: [torch.ones(3)], "theirs": lambda: [torch.full((3,), other)]}
    tensor = torch.ones(1, 1, 1, 16)
    return Case("cross_attention", {"q": tensor, "k": tensor, "v": tensor}, runs, runs)


@pytest.mark.parametrize(("other", "wrong"), [(1.0005, 0), (1.01, 1), (float("nan"), 1)])
def test_contenders_that_disagree_are_an_error(monkeypatch, capsys, other: float, wrong: int):
    monkeypatch.setattr(kernels, "cases", lambda device, dtype: [("a case", lambda: case(other))])
    rows, objections = measure(Clock(), ["fp32"], 1, "")
    assert len(objections) == wrong
    assert rows[0]["backend"] == "torch"
    argv = ["--device", "cpu", "--dtype", "fp32", "--repeats", "1", "--only", "case"]
    assert kernels.main(argv) == wrong
    assert ("a case, fp32: ours and theirs differs" in capsys.readouterr().err) == bool(wrong)


def test_what_does_not_take_the_sizes_is_left_out_by_name_and_ours_is_not():
    def refuses() -> list[torch.Tensor]:
        raise RuntimeError("no kernel for this head size\nand much more")

    made = case(1.0)
    runs = {**made.runs, "theirs": refuses}
    row = measure_case(made._replace(runs=runs, checked=runs), Clock(), 1)
    assert row["refused"] == {"theirs": "no kernel for this head size"}
    assert row["milliseconds"].keys() == {"ours"}
    with pytest.raises(RuntimeError, match="no kernel"):
        measure_case(made._replace(runs={"ours": refuses}), Clock(), 1)


def test_the_memory_of_what_is_timed_is_compared():
    assert set(MEMORY) == set(CASES["linear_soft_ce: MLM (16 x 30, 15 % masked, V 30522)"]().runs)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", list(CASES))
def test_contenders_agree_on_a_card(name: str, dtype: str):
    made = dict(cases(torch.device("cuda"), kernels.DTYPES[dtype]))[name]()
    row = measure_case(made, Clock("wall", torch.device("cuda")), 1)
    assert row["backend"] in ("triton", "apex")
    assert max(row["difference"].values()) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--only", "zzz"], "--only zzz: in none of cross_attention: text over image (30 x 257); "),
        (["--only", "XMM", "--write"], "leave --only out"),
    ],
)
def test_a_selection_that_makes_no_sense_is_status_2(monkeypatch, capsys, argv, told):
    monkeypatch.setattr(kernels, "measure", lambda *_: pytest.fail("nothing must be measured"))
    with pytest.raises(SystemExit) as exit:
        kernels.main(argv)
    assert exit.value.code == 2
    assert told in capsys.readouterr().err


def test_a_benchmark_that_is_not_there_is_told_by_name(capsys):
    assert main(["kernel"]) == 2
    out, err = capsys.readouterr()
    assert "there is no benchmark called kernel" in err
    assert "kernels" in out
