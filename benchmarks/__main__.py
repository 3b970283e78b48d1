"""`python -m benchmarks NAME ...`: hands over to the benchmark of that name."""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "kernels": "the fused operations against what they replace",
    "compilation": "what compilers make of them",
    "step": "a whole training step against the published order and FLAVA",
    "growth": "how a step's cost grows with batch, length, resolution, queue, depth and width",
    "precision": "loss curves in bf16 against fp32, over seeds",
    "data": "from JPEGs to training views, against the published pipeline, webdataset and decoding alone",
    "memory": "what `simla plan` computes against what the real trainer holds",
    "communication": "what ZeRO stages send in a step, counted and planned, and what stages and ranks cost",
    "rerank": "retrieval's re-ranking by ITM against every layer anew for each pair, and its memory",
    "tasks": "what the downstream tasks learn on scenes: pretrained, from scratch, one input blanked",
    "data_efficiency": "what objective sets learn from fractions of the data",
    "heat_maps": "a sheet of where the model finds what 20 expressions name",
    "report": "the history of what was stored, and what got worse",
}


def main(argv: list[str]) -> int:
    """Run one benchmark; 2 when there is none of that name."""
    if argv and argv[0] in BENCHMARKS:
        return importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])
    if argv and not argv[0].startswith("-"):
        print(f"there is no benchmark called {argv[0]}", file=sys.stderr)
    lines = [f"  {name:15} {what}" for name, what in BENCHMARKS.items()]
    print("\n".join(["usage: python -m benchmarks NAME [--help] ...", *lines]))
    return 0 if argv in (["--help"], ["-h"]) else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
