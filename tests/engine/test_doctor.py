"""simla doctor: what it says of this machine, and of one where something is missing."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from simla_ds import cli
from simla_ds.engine import doctor
from simla_kernels import dispatch


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def examine() -> tuple[int, dict[str, str]]:
        status = cli.main(["doctor"])
        lines = capsys.readouterr().out.splitlines()
        return status, {line[7:].split("  ")[0].strip(): line for line in lines}

    return examine


def test_here_training_can_start_and_every_operation_says_what_runs_it(run: Any):
    status, lines = run()
    assert status == 0
    assert not any(line.startswith("FAILS") for line in lines.values())
    assert lines.keys() >= {"torch", "deepspeed", "triton", "collectives", "cores", *dispatch.OPERATIONS}
    assert "torch (on cpu" in lines["cross_attention"]


def test_a_missing_deepspeed_stops_training(run: Any, monkeypatch: pytest.MonkeyPatch):
    known = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "deepspeed":
            raise ImportError("No module named 'deepspeed'")
        return known(name, package)

    monkeypatch.setattr(doctor.importlib, "import_module", without)
    status, lines = run()
    assert status == 1
    assert lines["deepspeed"].startswith("FAILS")
    assert "pip install" in lines["deepspeed"]


def test_a_missing_compiler_is_named(run: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path: None if name == "g++" else f"/bin/{name}")
    status, lines = run()
    assert status == 0
    assert lines["DeepSpeed's operators"].startswith("note")
    assert "without g++, and an offloaded optimizer needs them" in lines["DeepSpeed's operators"]


def test_pypis_apex_is_told_from_nvidias(run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    package = tmp_path / "apex"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    status, lines = run()
    assert status == 0
    assert lines["apex"].startswith("note")
    assert "another project" in lines["apex"]
    sys.modules.pop("apex")
    (package / "normalization.py").write_text("")
    importlib.invalidate_caches()
    without = run()[1]["NVIDIA Apex"]  # its Python alone
    assert without.startswith("note")
    assert "No module named 'fused_layer_norm_cuda'" in without
    (package / "normalization.py").write_text("FusedLayerNorm = object")
    (tmp_path / "fused_layer_norm_cuda.py").write_text("")
    importlib.invalidate_caches()
    assert "fused LayerNorm is used" in run()[1]["NVIDIA Apex"]
    for name in ("apex", "apex.normalization", "fused_layer_norm_cuda"):
        sys.modules.pop(name, None)
