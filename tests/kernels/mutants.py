"""A module with one line broken on purpose, to see that its check fails."""

import importlib
import itertools
from pathlib import Path
from types import ModuleType

import pytest

from simla_kernels import dispatch

_count = itertools.count()


def mutant(monkeypatch: pytest.MonkeyPatch, module: str, good: str, bad: str) -> ModuleType:
    """Return a copy of a module of simla_kernels with `bad` for `good`, and with names of its own for its operators."""
    original = importlib.import_module(f"simla_kernels.{module}")
    assert original.__file__ is not None
    source = Path(original.__file__).read_text(encoding="utf-8")
    assert source.count(good) == 1, f"{good!r} is in {module} {source.count(good)} times"
    source = source.replace(good, bad).replace('"simla_kernels::', f'"mutant{next(_count)}::')
    copy = ModuleType(f"mutant_of_{module}")
    monkeypatch.setattr(dispatch, "OPERATIONS", dict(dispatch.OPERATIONS))  # the copy registers itself
    exec(compile(source, original.__file__, "exec"), copy.__dict__)
    return copy
