"""`simla doctor`: what is installed and what would be used, a line each; and whether training could start."""

from __future__ import annotations

import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

import simla_kernels
from simla_ds.model.layer_norm import apex_layer_norm
from simla_kernels import dispatch
from simla_kernels.launching import triton_version

SHARED_MEMORY = 512 * 2**20
"""Bytes in /dev/shm from which loader processes have room for the batches that they hand over."""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    says: str
    grade: Literal["ok", "note", "FAILS"] = "ok"
    """note: worth a look; FAILS: training cannot start."""


def examine() -> int:
    """Print every finding; return 1 if training could not start, else 0."""
    findings = [finding for look in LOOKS for finding in look()]
    for finding in findings:
        print(f"{finding.grade:5}  {finding.what:30} {finding.says}")
    fatal = [finding.what for finding in findings if finding.grade == "FAILS"]
    print(f"training cannot start: {', '.join(fatal)}" if fatal else "training can start")
    return 1 if fatal else 0


def _torch() -> Iterator[Finding]:
    cards = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    built = (
        f"CUDA {torch.version.cuda}"
        if torch.version.cuda
        else f"ROCm {torch.version.hip}"
        if torch.version.hip
        else "CPUs"
    )
    yield Finding("torch", f"{torch.__version__}, built for {built}")
    yield Finding("devices", ", ".join(cards) if cards else f"no card, CPU ({torch.backends.cpu.get_cpu_capability()})")


def _libraries() -> Iterator[Finding]:
    for name in ("transformers", "timm", "webdataset"):
        version = _version(name)
        yield Finding(name, version or "missing: pip install -e '.[train]'", "ok" if version else "FAILS")


def _deepspeed() -> Iterator[Finding]:
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        yield Finding("deepspeed", f"cannot be imported ({error}): pip install -e '.[train]'", "FAILS")
        return
    yield Finding("deepspeed", deepspeed.__version__)
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    missing = [name for name in ("g++", "ninja") if shutil.which(name, path=_path()) is None]
    missing += [] if header.is_file() else [str(header)]
    if missing:
        remedy = "apt-get install g++ python3-dev, pip install ninja"
        says = f"cannot be compiled without {', '.join(missing)}, and an offloaded optimizer needs them: {remedy}"
        yield Finding("DeepSpeed's operators", says, "note")
    else:
        yield Finding("DeepSpeed's operators", "can be compiled")


def _collectives() -> Iterator[Finding]:
    wanted = "nccl" if torch.cuda.is_available() else "gloo"
    there = [name for name in ("nccl", "gloo", "mpi") if getattr(dist, f"is_{name}_available")()]
    says = f"{', '.join(there) or 'none'}; {wanted} would be used"
    yield Finding("collectives", says, "ok" if wanted in there else "FAILS")


def _kernels() -> Iterator[Finding]:
    triton = triton_version()
    yield Finding("triton", triton or "missing: PyTorch's own paths are used", "ok" if triton else "note")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for name in sorted(dispatch.OPERATIONS):
        backend, why = simla_kernels.backend(name, **dispatch.OPERATIONS[name].example(0, device, dtype))
        yield Finding(name, f"{backend} ({why})")


def _apex() -> Iterator[Finding]:
    try:
        is_nvidias = find_spec("apex.normalization") is not None
    except ImportError:  # no package apex at all
        yield Finding("NVIDIA Apex", "not installed; it is optional")
        return
    if not is_nvidias:
        other = "PyPI's apex is another project: pip uninstall apex, and install NVIDIA's from its repository"
        yield Finding("apex", other, "note")
        return
    try:
        apex_layer_norm()
    except ImportError as error:
        yield Finding("NVIDIA Apex", f"its fused LayerNorm cannot be used ({error}); PyTorch's is", "note")
        return
    yield Finding("NVIDIA Apex", "its fused LayerNorm is used on a card")


def _machine() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = os.environ.get("OMP_NUM_THREADS", "not set: cores are divided among the ranks")
    yield Finding("cores", f"{cores} to use; OMP_NUM_THREADS {threads}")
    shm = Path("/dev/shm")
    if shm.is_dir():
        free = shutil.disk_usage(shm).free
        little = free < SHARED_MEMORY
        wish = f"; {SHARED_MEMORY / 2**20:.0f} are wanted: docker run --shm-size" if little else ""
        yield Finding("/dev/shm", f"{free / 2**20:.0f} MiB free{wish}", "note" if little else "ok")


LOOKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _torch,
    _libraries,
    _deepspeed,
    _collectives,
    _kernels,
    _apex,
    _machine,
)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _path() -> str:
    """PATH as a run has it: the environment's own programmes first (see distributed.start)."""
    return f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ.get('PATH', '')}"
