"""On a card where a kernel never ran, its numbers are checked before they are used: seconds, once per card and version.

Three odd sizes, forward and every gradient against the definition in float64, and two runs that must agree bit by
bit. The verdict is kept in a file, by card, versions, the kernels' own source and tuned configurations.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from simla_kernels import checking, dispatch, tuned
from simla_kernels.launching import interpreting, triton_version

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest error in units of a result's largest entry."""
SIZES = 3
T = TypeVar("T")


@cache
def objection(op: str, device: torch.device) -> str | None:
    """Return why `op`'s Triton implementation may not be used on `device`; None when it passed."""
    path, key = _cache_file(), _key(op, device)
    verdicts = _read(path)
    if key in verdicts:
        return verdicts[key]
    try:
        verdict = _apart(failure, op, device)
    except Exception as error:  # a compiler or driver may fail in any way, this once or always: nothing is kept
        return f"its self-check on {device} ended with {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    _write(path, _read(path) | {key: verdict})
    return verdict


def failure(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)) -> str | None:
    """Run the check now; return what failed first, or None. Whatever the kernel raises is raised."""
    operation = dispatch.OPERATIONS[op]
    for dtype in dtypes:
        for size in range(SIZES):
            arguments = operation.example(size, device, dtype)
            truth = checking.results(operation.reference, checking.upcast(arguments))
            trained = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.requires_grad]
            if unseen := [name for name in trained if f"grad.{name}" not in truth]:
                return f"its self-check on {device} computed no gradient of {', '.join(unseen)}"
            with dispatch.forced("triton"):
                first = checking.results(operation.function, arguments)
                second = checking.results(operation.function, arguments)
            for name, error in checking.errors(first, truth).items():
                if not error <= TOLERANCES[dtype]:
                    return f"its self-check on {device} found {name} off by {error:.1e} in {dtype} (size {size})"
            if any(not torch.equal(first[name], second[name]) for name in first):
                return f"its self-check on {device} found two runs that differ in {dtype} (size {size})"
    return None


def _apart(function: Callable[..., T], *arguments: Any) -> T:
    """Call in a thread of its own: none of the caller's modes (no_grad, autocast, FakeTensorMode, an operator's
    missing autograd) holds there, and with any of them gradients would go unchecked."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(function, *arguments).result()


def _key(op: str, device: torch.device) -> str:
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source.update(path.read_bytes())
    source.update(repr(sorted(tuned.configs(device).items())).encode())  # other configurations, another check
    triton = f"triton {triton_version()}" + (", interpreted" if interpreting() else "")
    return f"{op} | {card} | torch {torch.__version__} | {triton} | {source.hexdigest()[:16]}"


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "simla_kernels" / "self_check.json"


def _read(path: Path) -> dict[str, str | None]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # none yet, another user's, or cut off while it was written: check again
    return content if isinstance(content, dict) else {}


def _write(path: Path, verdicts: dict[str, str | None]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tuned.replace_text(path, json.dumps(verdicts, indent=1) + "\n")
    except OSError as error:
        print(f"simla_kernels: self-checks will run at every start, {path} cannot be written: {error}", file=sys.stderr)
