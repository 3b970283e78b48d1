"""The fused operations against what they replace: `python -m benchmarks kernels`.

On a CPU: attention against eager and SDPA, the loss heads against the published order (logits at all positions, full
softmaxes), LayerNorm against eager. On a card (`--device cuda`) every operation by Triton against PyTorch's best:
SDPA's flash, efficient and cuDNN backends, FlexAttention, F.linear_cross_entropy. Forward and backward, in turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import cost_model
from benchmarks.compilation import README, write_section
from benchmarks.head_orders import IGNORED, Head, mlm_official_order, xmm_official_order
from benchmarks.peak_memory import peak_growth_mib
from benchmarks.timing import alternate, environment
from benchmarks.tuning import tune
from simla_kernels import cross_attention, dispatch, dropout_add_layer_norm, linear_soft_ce, tuned

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = {
    "text over image": (30, 257),
    "image over text": (257, 30),
    "image": (257, 257),
    "text": (30, 30),
}
ROWS, HEADS, DIM, WIDTH, ALPHA = 16, 12, 64, 768, 0.4

Contenders = dict[str, Callable[[], object]]


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Contenders]]]:
    """Yield (operation and sizes, what makes its contenders); `ours` is this project's."""
    for name, (queries, keys) in ATTENTION.items():
        yield f"cross_attention: {name} ({queries} x {keys})", partial(_attention, queries, keys, device, dtype)
    yield "linear_soft_ce: XMM (16 x 256, 75 masked, V 8192)", partial(xmm_head, device, dtype)
    yield "linear_soft_ce: MLM (16 x 30, 15 % masked, V 30522)", partial(_mlm_head, device, dtype)
    for tokens in (ROWS * 257, ROWS * 30):
        yield f"dropout_add_layer_norm: {tokens} x {WIDTH}, dropout 0.1", partial(_layer_norm, tokens, device, dtype)


def _attention(queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> Contenders:
    def tokens(length: int) -> Tensor:
        t = torch.randn(ROWS, length, HEADS, DIM, device=device).to(dtype)
        return t.transpose(1, 2).requires_grad_()

    q, k, v = tokens(queries), tokens(keys), tokens(keys)

    def eager() -> Tensor:
        return ((q * DIM**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v

    def by(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: _tensor(cross_attention(q, k, v)),
        "eager": eager,
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        flexible: Any = torch.compile(flex_attention)
        runs |= {"FlexAttention": lambda: flexible(q, k, v)}
        backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        runs |= {f"SDPA {backend.name.lower()}": by(backend) for backend in backends}
    return {name: _with_backward(run, (q, k, v)) for name, run in runs.items()}


def xmm_head(device: torch.device, dtype: torch.dtype) -> Contenders:
    """16 pictures of 256 patches, 75 of each masked, 8,192 codes; student's and teacher's hidden states at all."""
    hidden, teacher_hidden, head, teacher_head = _heads((ROWS, 256), 8192, device, dtype)
    masked = torch.zeros(ROWS, 256, dtype=torch.bool, device=device)
    for row in masked:
        row[torch.randperm(256, device=device)[:75]] = True
    index = masked.flatten().nonzero()[:, 0]
    labels = torch.randint(8192, (len(index),), device=device)
    return _head_contenders(
        (hidden, head, teacher_hidden, teacher_head),
        (index, labels),
        lambda: xmm_official_order(hidden, head, teacher_hidden, teacher_head, masked, labels, ALPHA),
    )


def _mlm_head(device: torch.device, dtype: torch.dtype) -> Contenders:
    hidden, teacher_hidden, head, teacher_head = _heads((ROWS, 30), 30_522, device, dtype)
    index = torch.randperm(ROWS * 30, device=device)[: round(0.15 * ROWS * 30)].sort().values
    labels = torch.randint(30_522, (len(index),), device=device)
    everywhere = torch.full((ROWS * 30,), IGNORED, device=device).index_copy(0, index, labels).view(ROWS, 30)
    return _head_contenders(
        (hidden, head, teacher_hidden, teacher_head),
        (index, labels),
        lambda: mlm_official_order(hidden, head, teacher_hidden, teacher_head, everywhere, ALPHA),
    )


def _heads(shape: tuple[int, int], classes: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, ...]:
    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, device=device) * scale).to(dtype)

    heads = [Head(normal(classes, WIDTH, scale=0.05), normal(classes, scale=0.05)) for _ in range(2)]
    for t in heads[0]:
        t.requires_grad_()
    return normal(*shape, WIDTH).requires_grad_(), normal(*shape, WIDTH), *heads


def _head_contenders(
    inputs: tuple[Any, ...], read: tuple[Tensor, Tensor], official: Callable[[], Tensor]
) -> Contenders:
    hidden, head, teacher_hidden, teacher_head = inputs
    index, labels = read

    def rows(t: Tensor) -> Tensor:
        return t.flatten(0, 1).index_select(0, index)

    def ours() -> Tensor:
        of_teacher = (rows(teacher_hidden), teacher_head.weight, teacher_head.bias)
        return linear_soft_ce(rows(hidden), head.weight, head.bias, *of_teacher, labels, ALPHA)

    def masked_unfused() -> Tensor:
        logits = F.linear(rows(hidden), *head).float()
        with torch.no_grad():
            targets = F.linear(rows(teacher_hidden), *teacher_head).float().softmax(-1)
        soft = -(targets * logits.log_softmax(-1)).sum(-1).mean()
        return (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * soft

    runs: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "official order": official,
        "masked, unfused": masked_unfused,
    }
    fused_hard: Any = getattr(F, "linear_cross_entropy", None)
    if fused_hard is not None and hidden.device.type == "cuda":  # hard labels only: less than what is compared
        runs["F.linear_cross_entropy (hard labels only)"] = lambda: fused_hard(rows(hidden), head.weight, labels)
    return {name: _with_backward(run, (hidden, *head)) for name, run in runs.items()}


def _layer_norm(tokens: int, device: torch.device, dtype: torch.dtype) -> Contenders:
    x, residual = (torch.randn(tokens, WIDTH, device=device).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.ones(WIDTH, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: dropout_add_layer_norm(x, residual, weight, bias, 0.1),
        "eager": lambda: F.layer_norm(residual + F.dropout(x, 0.1), (WIDTH,), weight, bias, 1e-12),
    }
    return {name: _with_backward(run, (x, residual, weight, bias)) for name, run in runs.items()}


def _with_backward(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    direction: list[Tensor] = []

    def forward_and_backward() -> object:
        out = run()
        if not direction:
            direction.append(torch.randn_like(out))
        return torch.autograd.grad(out, inputs, direction[0])

    return forward_and_backward


def _tensor(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def measure(device: torch.device, dtypes: list[str], repeats: int, only: str) -> list[dict[str, Any]]:
    """Time every case that contains `only`; print as it goes."""
    results = []
    for dtype in dtypes:
        for name, make in cases(device, DTYPES[dtype]):
            if only not in name:
                continue
            contenders = make()
            times = _on_card(contenders) if device.type == "cuda" else alternate(contenders, repeats)
            others = {key: value["median"] for key, value in times.items() if key != "ours"}
            ratios = {key: value / times["ours"]["median"] for key, value in others.items()}
            results.append({"case": name, "dtype": dtype, "milliseconds": times, "ratio": ratios})
            said = ", ".join(f"{key} {value:.2f}x" for key, value in ratios.items())
            print(f"{dtype:5} {name:58} ours {times['ours']['median']:9.3f} ms;  {said}", flush=True)
    return results


def tune_all(device: torch.device, dtypes: list[str], only: str, path: Path) -> int:
    """Look for faster configurations case by case; store what is found after each."""
    import triton.testing

    def median(run: Callable[[], object]) -> float:
        taken: Any = triton.testing.do_bench(run, return_mode="median")
        return taken

    for dtype in dtypes:
        for name, make in cases(device, DTYPES[dtype]):
            if only in name:
                run: Any = make()["ours"]
                found = tune(run, median)
                tuned.store(path, device, found)
                print(f"{dtype:5} {name:58} {len(found)} faster configuration(s)", flush=True)
    return 0


def _on_card(contenders: Contenders) -> dict[str, dict[str, float]]:
    import triton.testing

    times = {}
    for name, run in contenders.items():
        try:
            quantiles: Any = triton.testing.do_bench(run, quantiles=[0.5, 0.0])
            median, fastest = quantiles
        except RuntimeError as error:  # a backend that does not take these sizes says so
            print(f"      {name}: {str(error).splitlines()[0]}")
            continue
        times[name] = {"median": median, "fastest": fastest}
    return times


def table(results: list[dict[str, Any]], memory: dict[str, float], where: dict[str, Any]) -> str:
    """Return Markdown of the measured figures."""
    machine = f"{where['processor']}, {where['threads']} thread(s), {where['device']}, torch {where['torch']}"
    lines = [
        f"Measured on {machine}, commit {where['commit']}: milliseconds of forward + backward, medians, in turns.",
        "",
        "| operation | dtype | ours | others / ours |",
        "|---|---|---|---|",
    ]
    for r in results:
        said = ", ".join(f"{name} {ratio:.2f}" for name, ratio in r["ratio"].items())
        lines.append(f"| {r['case']} | {r['dtype']} | {r['milliseconds']['ours']['median']:.2f} | {said} |")
    said = ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items())
    return "\n".join(
        [*lines, "", f"Peak growth of memory, XMM head, fp32, forward + backward, 1,200 masked rows: {said}."]
    )


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernels", description="The fused operations against what they replace."
    )
    card = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=card, help="default: a card where there is one")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="of inputs (default: all)")
    parser.add_argument("--repeats", type=int, default=20, metavar="N", help="timed runs of each contender (CPU)")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures")
    parser.add_argument("--write", action="store_true", help="put the tables into kernels/README.md")
    parser.add_argument(
        "--tune", type=Path, metavar="FILE", help=f"on a card: store faster launch configurations, for {tuned.VARIABLE}"
    )
    arguments = parser.parse_args(argv)
    names = [name for name, _ in cases(torch.device("cpu"), torch.float32)]
    if not any(arguments.only in name for name in names):
        parser.error(f"--only {arguments.only}: in none of {'; '.join(names)}")
    if arguments.only and arguments.write:
        parser.error("--write puts the whole table into kernels/README.md: leave --only out")
    device, where = torch.device(arguments.device), environment()
    torch.manual_seed(0)
    if arguments.tune:
        if device.type != "cuda":
            parser.error("--tune times Triton's kernels and needs a card: --device cuda")
        return tune_all(device, arguments.dtype, arguments.only, arguments.tune)
    if device.type == "cuda":
        print(
            "\n".join(f"{op}: {dispatch.backend(op, **_arguments(op, device))}" for op in sorted(dispatch.OPERATIONS))
        )
    results = measure(device, arguments.dtype, arguments.repeats, arguments.only)
    memory = {} if arguments.only else {name: peak_growth_mib(name, device) for name in ("ours", "official order")}
    if memory:
        print("peak growth of memory, XMM head: " + ", ".join(f"{name} {mib:.0f} MiB" for name, mib in memory.items()))
    if arguments.json:
        content = {"environment": where, "results": results, "peak_growth_mib": memory}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.write:
        write_section(README, "measured", table(results, memory, where))
        write_section(README, "computed", cost_model.table())
    return 0


def _arguments(op: str, device: torch.device) -> dict[str, Any]:
    return dispatch.OPERATIONS[op].example(1, device, torch.bfloat16)
