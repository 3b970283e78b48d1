"""Compile what the kernels would launch for cards that are not here, and read off what the compiler made of it.

    python -m benchmarks.compilation                      every kernel, dtype and architecture
    python -m benchmarks.compilation cross_attention --dtype bf16 --architecture sm_90
    python -m benchmarks.compilation --write              also the table in kernels/README.md

Needs triton and no driver. Nothing here is a timing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from simla_kernels import dispatch
from simla_kernels.launching import ARCHITECTURES, Launch, recording

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "compilation.json"
README = ROOT / "kernels" / "README.md"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
"""Bytes of shared memory that one program may use."""
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
ALIGNED = [["tt.divisibility", 16]]
REGISTER_LIMIT = {"sm_80": 168, "sm_90": 168, "sm_100": 168, "gfx942": 256}
"""Registers per thread that leave room for three programs of four warps (NVIDIA), for two waves (AMD)."""


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch."""

    operation: str
    case: str
    """Which sizes, and forward or backward."""
    kernel: str
    dtype: str
    architecture: str
    tiles: str
    num_warps: int
    registers: int
    """Per thread; on AMD all vector registers, of which a wave has up to 512."""
    spills: int
    """Instructions that spill or reload (NVIDIA), registers spilled (AMD)."""
    shared: int
    """Bytes of shared memory per program."""
    matrix_instruction: str
    """mma.sync, wgmma, tcgen05, mfma, or -."""
    wide_loads: int
    """Load instructions of 128 bits per thread."""
    has_dot: bool
    """Whether the kernel multiplies matrices."""


def objections(c: Compiled) -> list[str]:
    """Return what is not as it must be; half precision is held to more than fp32, whose spills are only listed."""
    found = []
    if c.shared > SHARED_LIMIT[c.architecture]:
        found.append(f"{c.shared} bytes of shared memory, {SHARED_LIMIT[c.architecture]} fit")
    if c.dtype == "fp32":
        return found
    if c.spills:
        found.append(f"{c.spills} spills")
    if c.registers > REGISTER_LIMIT[c.architecture]:
        found.append(f"{c.registers} registers, {REGISTER_LIMIT[c.architecture]} at most")
    if c.has_dot and c.matrix_instruction == "-":
        found.append("products without tensor cores")
    if c.has_dot and not c.wide_loads:
        found.append("no 128-bit loads")
    return found


def operations() -> list[str]:
    """Return the public functions that have Triton kernels."""
    folder = Path(dispatch.__file__).parent
    return sorted(path.name.removesuffix("_triton.py") for path in folder.glob("*_triton.py"))


def compile_all(
    names: Iterable[str], dtypes: Iterable[str], architectures: Iterable[str], *, once: bool = False
) -> Iterator[Compiled]:
    """Compile every launch of every case, each distinct one once; with `once` only the last case of each kernel."""
    for name in names:
        module = importlib.import_module(f"simla_kernels.{name}_triton")
        for dtype in dtypes:
            for architecture in architectures:
                found = {}
                for case, run in module.compile_cases(DTYPES[dtype]):
                    with recording(architecture) as recorded:
                        run()
                    for launch in recorded.launches:
                        source = _source(launch)
                        same = (launch.kernel.__name__, source.signature, source.constants, source.attrs, launch.config)
                        found[launch.kernel.__name__ if once else repr(same)] = (case, launch)
                for case, launch in found.values():
                    yield compile_launch(name, case, dtype, architecture, launch)


def compile_launch(operation: str, case: str, dtype: str, architecture: str, launch: Launch) -> Compiled:
    """Compile one launch for one architecture."""
    options = {"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages}
    built = triton.compile(_source(launch), target=TARGETS[architecture], options=options)
    found = _amd(built.asm["amdgcn"]) if architecture.startswith("gfx") else _nvidia(built.asm)
    return Compiled(
        operation=operation,
        case=case,
        kernel=launch.kernel.__name__,
        dtype=dtype,
        architecture=architecture,
        tiles=" ".join(f"{key.removeprefix('BLOCK_').lower()}{value}" for key, value in launch.config.tiles.items()),
        num_warps=launch.config.num_warps,
        shared=built.metadata.shared,
        has_dot="tt.dot" in built.asm["ttir"],
        **found,
    )


def _source(launch: Launch) -> ASTSource:
    """Specialise as a launch on a card does: 1 is a constant, multiples of 16 are known to be such."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (_specialised(parameter, value) and value == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                attributes[(position,)] = ALIGNED
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and _specialised(parameter, value):
                attributes[(position,)] = ALIGNED
    return ASTSource(launch.kernel, signature, constants, attributes)


def _specialised(parameter: Any, value: Any) -> bool:
    return type(value) is int and not parameter.do_not_specialize


def _nvidia(asm: dict[str, Any]) -> dict[str, Any]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _run(str(tools / "cuobjdump"), "-res-usage", file.name)
        listing = _run(str(tools / "nvdisasm"), "-c", file.name)
    ptx = asm["ptx"]
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", listing)),
        "matrix_instruction": next(
            (name for name in ("tcgen05", "wgmma", "mma.sync") if re.search(rf"\b{re.escape(name)}\b", ptx)), "-"
        ),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\S*\.128", listing)),
    }


def _amd(assembly: str) -> dict[str, Any]:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", assembly)[0])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
        "matrix_instruction": "mfma" if "v_mfma" in assembly else "-",
        "wide_loads": len(re.findall(r"\b(?:buffer|global)_load_dwordx4\b", assembly)),
    }


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def line(c: Compiled) -> str:
    """Return one printed line."""
    return (
        f"{c.case:34} {c.kernel:28} {c.dtype:5} {c.architecture:7} {c.tiles:22} {c.num_warps:2}w {c.registers:4} regs "
        f"{c.spills:4} spills {c.shared / 1024:6.1f} KiB  {c.matrix_instruction:8} {c.wide_loads:3} x 128 bit"
    )


def table(results: Iterable[Compiled]) -> str:
    """Return Markdown: a row per kernel, dtype and tiles, the worst case of each architecture in a cell."""
    rows: dict[tuple[str, ...], dict[str, list[Compiled]]] = {}
    for c in results:
        rows.setdefault((c.operation, c.kernel, c.dtype, c.tiles, str(c.num_warps)), {}).setdefault(
            c.architecture, []
        ).append(c)
    head = "| operation | kernel | dtype | tiles | warps | " + " | ".join(ARCHITECTURES) + " |"
    lines = [head, "|" + "---|" * (5 + len(ARCHITECTURES))]
    lines += [
        f"| {' | '.join(key)} | " + " | ".join(_cell(of.get(a)) for a in ARCHITECTURES) + " |"
        for key, of in rows.items()
    ]
    return "\n".join(lines)


def _cell(found: list[Compiled] | None) -> str:
    if not found:
        return ""
    registers, spills = max(c.registers for c in found), max(c.spills for c in found)
    shared, wide = max(c.shared for c in found), min(c.wide_loads for c in found)
    return f"{registers} / {spills} / {shared / 1024:.0f} / {found[0].matrix_instruction} / {wide}"


def write_section(path: Path, name: str, content: str) -> None:
    """Replace what lies between `<!-- NAME -->` and `<!-- /NAME -->` in a Markdown file."""
    text = path.read_text(encoding="utf-8")
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if start not in text or end not in text:
        raise ValueError(f"{path} has no section between {start} and {end}")
    before, after = text.split(start)[0], text.split(end)[1]
    path.write_text(f"{before}{start}\n{content}\n{end}{after}", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Compile, print, and on request store."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compilation", description="Compile the kernels for cards that are not here."
    )
    parser.add_argument("operations", nargs="*", metavar="OPERATION", help=f"of {', '.join(operations())}; all")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of inputs (default: all)")
    parser.add_argument(
        "--architecture",
        nargs="+",
        choices=ARCHITECTURES,
        default=list(ARCHITECTURES),
        help="compiled for (default: all)",
    )
    parser.add_argument("--write", action="store_true", help=f"store {RESULT.name} and the table in kernels/README.md")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.operations) - set(operations())
    if unknown:
        parser.error(f"no kernels called {', '.join(sorted(unknown))}; there are {', '.join(operations())}")
    results = []
    for c in compile_all(arguments.operations or operations(), arguments.dtype, arguments.architecture):
        print(line(c), *objections(c), flush=True)
        results.append(c)
    if arguments.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps([asdict(c) for c in results], indent=1) + "\n", encoding="utf-8")
        write_section(README, "compiled", table(results))
    failed = sum(bool(objections(c)) for c in results)
    print(f"{len(results)} compiled, {failed} with objections")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
