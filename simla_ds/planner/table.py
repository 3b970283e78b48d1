"""A plan for people, as aligned text or Markdown, and for programmes, as JSON."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from simla_ds.planner.cards import GIB
from simla_ds.planner.plan import RESERVED, Plan, Row

HEAD = (
    "layout", "recompute", "weights", "optimizer", "gradients", "teacher", "queue", "activations", "logits",
    "buckets", "peak", "host", "fits", "largest batch", "pairs/s", "days", "sent a step", "of its time",
)  # fmt: skip


def render(plan: Plan, *, markdown: bool = False) -> str:
    """Return the table between what it is for and how to read it."""
    rows = [HEAD, *(_cells(row) for row in plan.rows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    if markdown:
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "|" + "---|" * len(HEAD))
    else:
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
            for row in rows
        ]
    return "\n".join([_title(plan), "", *lines, "", _notes(plan)])


def as_json(plan: Plan) -> dict[str, Any]:
    """Return everything as numbers: bytes, seconds, pairs."""
    rows = [
        {
            **asdict(row),
            "layout": str(row.zero),
            "peak": row.memory.peak,
            "days": None if math.isinf(row.days) else row.days,
        }
        for row in plan.rows
    ]
    return {
        "computed": True,
        "precision": plan.precision,
        "parameters": plan.parameters,
        "pairs": plan.pairs,
        "hardware": asdict(plan.hardware),
        "assumed_vocabulary": plan.assumed_vocabulary,
        "rows": rows,
    }


def _title(plan: Plan) -> str:
    hardware, train = plan.hardware, plan.config.train
    return (
        f"{plan.parameters / 1e6:.1f} M parameters, {plan.precision}, {hardware.nodes} node(s) x {hardware.cards} "
        f"card(s) of {hardware.card.memory / GIB:.1f} GiB, {train.batch_size} pairs a card and micro-step x "
        f"{train.grad_accumulation}, {plan.pairs:,} pairs in all. Everything is computed, nothing measured."
    )


def _cells(row: Row) -> tuple[str, ...]:
    memory, parts = row.memory, row.memory.parts
    teacher = parts.get("teacher", 0.0) + parts.get("teacher copy", 0.0)
    gradients = parts.get("gradients", 0.0) + memory.gradients
    buckets = parts.get("buckets", 0.0) + max(memory.buckets + memory.gathered, memory.step, memory.refresh)
    waiting = row.seconds.communication / row.seconds.total if row.seconds else 0.0
    return (
        str(row.zero),
        "yes" if row.checkpointing else "no",
        *(_gib(parts.get(name, 0.0)) for name in ("weights", "optimizer")),
        *(_gib(number) for number in (gradients, teacher, parts.get("queue", 0.0), memory.activations, memory.logits)),
        _gib(buckets),
        _gib(memory.peak),
        _gib(memory.host),
        "yes" if row.fits else "no",
        str(row.largest or "none"),
        _two_digits(row.pairs_per_second),
        _two_digits(row.days),
        f"{row.sent.total / 1e9:.2f} GB",
        f"{waiting:.0%}",
    )


def _two_digits(number: float) -> str:
    """A guess has no more of them."""
    if not number or math.isinf(number):
        return "-"
    return f"{float(f'{number:.2g}'):,g}"


def _gib(number: float) -> str:
    return f"{number / GIB:.2f}" if number else "-"


def _notes(plan: Plan) -> str:
    hardware = plan.hardware
    memory = (
        "Memory in GiB a card, at the recipe's micro batch; not all parts are there at once, so that the peak is less "
        f"than their sum. {RESERVED / GIB:.0f} GiB of a card are left for CUDA, NCCL and fragments."
    )
    columns = (
        "recompute: train.activation_checkpointing. optimizer: float32 weights and AdamW's moments. teacher: float32 "
        "master and the copy that computes. buckets: DeepSpeed's, and weights that are whole meanwhile at stage 3. "
        "host: what is offloaded."
    )
    speed = (
        f"Speed: the step's operations at {hardware.utilisation:.0%} of {hardware.card.flops / 1e12:g} TFLOP/s "
        "(--utilisation), then all that is sent at the links' bandwidth, nothing overlapped; at the recipe's micro "
        "batch or the largest that fits."
    )
    notes = [memory, columns, speed]
    if plan.assumed_vocabulary:
        vocabulary = plan.config.model.vocabulary
        notes.append(
            f"Vocabulary assumed: {vocabulary.size:,} words, {vocabulary.visual_size:,} visual tokens "
            "(--data.tokenizer DIR --data.visual_tokenizer DIR, or --model.vocabulary.size N)."
        )
    return "\n".join(notes)
