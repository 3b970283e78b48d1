"""Which implementation runs: what `backend` says is what happens, and nothing falls back in silence."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from simla_kernels import backend, cross_attention, dispatch, self_check

Q = torch.zeros(1, 1, 3, 16)


def test_a_cpu_runs_pytorch_and_says_why():
    assert backend("cross_attention", Q, Q, Q) == ("torch", "on cpu, where PyTorch's is the fast one")


def test_pytorch_can_be_asked_for(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIMLA_KERNELS", "torch")
    assert backend("cross_attention", Q, Q, Q) == ("torch", "SIMLA_KERNELS=torch")


def test_triton_asked_for_where_it_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIMLA_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for call in (lambda: backend("cross_attention", Q, Q, Q), lambda: cross_attention(Q, Q, Q)):
        with pytest.raises(ValueError, match=r"SIMLA_KERNELS=triton cannot run here: the tensors are on cpu"):
            call()


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SIMLA_KERNELS", "triton")
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    with pytest.raises(ValueError, match=r"triton is not installed \(pip install"):
        backend("cross_attention", Q, Q, Q)


def test_arguments_that_triton_refuses_fall_back_aloud_once_and_are_errors_when_strict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("SIMLA_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(dispatch, "_said", set())
    narrow = torch.zeros(1, 1, 3, 8)
    for _ in range(2):
        assert backend("cross_attention", narrow, narrow, narrow) == ("torch", "head size 8 is outside 16..128")
    assert capsys.readouterr().err == "simla_kernels: cross_attention runs in PyTorch: head size 8 is outside 16..128\n"
    assert backend("cross_attention", Q, Q, Q) == ("triton", "SIMLA_KERNELS=triton")
    assert backend("cross_attention", *[Q.double()] * 3).name == "torch"
    monkeypatch.setenv("SIMLA_KERNELS_STRICT", "1")
    with pytest.raises(ValueError, match="SIMLA_KERNELS_STRICT=1 and Triton cannot take this call: head size 8"):
        cross_attention(narrow, narrow, narrow)


def test_wrong_settings_and_names_are_one_clear_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"no operation 'cross_atention'; there are .*cross_attention"):
        backend("cross_atention", Q)
    with pytest.raises(ValueError, match="at least one tensor"):
        backend("cross_attention")
    monkeypatch.setenv("SIMLA_KERNELS", "cuda")
    with pytest.raises(ValueError, match="SIMLA_KERNELS='cuda' must be one of auto, triton, torch"):
        backend("cross_attention", Q, Q, Q)


class Card:
    """Stands in for a CUDA tensor, which cannot exist here: dispatch looks at nothing but the device."""

    device = torch.device("cuda", 0)


def on_card(refusal: str | None = None) -> Any:
    tensor: Any = Card()
    return dispatch.choose("cross_attention", tensor, lambda: refusal)


@pytest.mark.parametrize("verdict", [None, "its self-check on cuda:0 found grad.q off by 1.0e-01"])
def test_on_a_card_auto_takes_triton_after_its_self_check_only(verdict: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(self_check, "objection", lambda op, device: verdict)
    assert on_card() == (("triton", "SIMLA_KERNELS=auto") if verdict is None else ("torch", verdict))
    assert on_card("head size 8").name == "torch"
    with dispatch.forced("triton"):
        assert on_card() == ("triton", "forced")


def test_a_verdict_is_kept_by_card_version_and_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "failure", lambda op, device: runs.append(op) or "off by 1")
    device = torch.device("cpu")
    for _ in range(2):
        self_check.objection.cache_clear()
        assert self_check.objection("cross_attention", device) == "off by 1"
    assert runs == ["cross_attention"]
    file = tmp_path / "simla_kernels" / "self_check.json"
    (key,) = json.loads(file.read_text())
    assert key.startswith(f"cross_attention | cpu | torch {torch.__version__} | triton ")
    assert list(file.parent.iterdir()) == [file]
    file.write_text('{"cut')  # a damaged file costs another check, no more
    self_check.objection.cache_clear()
    assert self_check.objection("cross_attention", device) == "off by 1"
    assert len(runs) == 2
    self_check.objection.cache_clear()
    monkeypatch.setattr(self_check, "interpreting", lambda: True)  # says nothing of what is compiled
    assert self_check.objection("cross_attention", device) == "off by 1"
    assert len(runs) == 3
    self_check.objection.cache_clear()


def test_another_users_cache_costs_a_check_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def read_text(self: Path, **_: Any) -> str:
        raise PermissionError(self)

    monkeypatch.setattr(Path, "read_text", read_text)
    assert self_check._read(tmp_path / "self_check.json") == {}


def test_a_verdict_that_cannot_be_kept_still_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    (tmp_path / "simla_kernels").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "failure", lambda op, device: None)
    self_check.objection.cache_clear()
    assert self_check.objection("cross_attention", torch.device("cpu")) is None
    self_check.objection.cache_clear()
    assert "self-checks will run at every start" in capsys.readouterr().err


@pytest.mark.parametrize(("message", "told"), [("no units\nsecond line", "no units"), ("", "")])
def test_a_kernel_that_raises_fails_its_self_check_for_this_process_only(
    message: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def failure(op: str, device: torch.device) -> str | None:
        raise RuntimeError(message)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "failure", failure)
    self_check.objection.cache_clear()
    found = self_check.objection("cross_attention", torch.device("cpu"))
    self_check.objection.cache_clear()
    assert found == f"its self-check on cpu ended with RuntimeError: {told}"
    assert not list(tmp_path.iterdir())


class DoubledBackward(torch.autograd.Function):
    """x, whose gradient comes out twice too large."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return 2 * gradients[0]


@torch.library.custom_op("simla_kernels_tests::objection_inside", mutates_args=())
def objection_inside(x: torch.Tensor) -> torch.Tensor:
    found = self_check.objection("doubled", torch.device("cpu"))
    return torch.full_like(x, float("grad.x" in str(found)))


@pytest.mark.parametrize("surroundings", ["none", "no_grad", "inference", "operator", "fake tensors"])
def test_gradients_are_checked_wherever_the_first_call_stands(
    surroundings: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def example(size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
        return {"x": torch.ones(3 + size, device=device, dtype=dtype, requires_grad=True)}

    operation = dispatch.Operation(DoubledBackward.apply, lambda x: x.clone(), example)
    monkeypatch.setitem(dispatch.OPERATIONS, "doubled", operation)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    self_check.objection.cache_clear()
    if surroundings == "operator":
        assert objection_inside(torch.zeros(1)) == 1
        return
    modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "fake tensors": FakeTensorMode}
    with modes.get(surroundings, nullcontext)():
        found = self_check.objection("doubled", torch.device("cpu"))
    self_check.objection.cache_clear()
    assert "found grad.x off by" in str(found)
