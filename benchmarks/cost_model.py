"""Floating-point operations and bytes of each fused operation, by counting: what a card cannot go below.

Base sizes: B 64 pairs, 12 heads of 64, width 768, 25 words, 257 image rows, half precision. Forward and backward of one
call. Three orders: `official` (what the published code does), `masked` (unfused, but only the rows a loss reads: the
honest baseline) and `fused` (these kernels). An order is a list of passes; a pass takes the longer of its arithmetic
and its traffic. Every figure is computed, none is a timing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

HALF, FULL = 2, 4
"""Bytes of a number."""
B, HEADS, DIM, WIDTH, WORDS, IMAGE = 64, 12, 64, 768, 25, 257
PATCHES, MASKED, CODES = 256, 75, 8192
LABELLED, VOCABULARY = 0.15, 30_522
FEATURE, QUEUE = 256, 65_536
STEP_FLOPS = 797.7e9 * B
"""One step of 64 pairs in the published order (REFERENCE_STEP section 7)."""


class Card(NamedTuple):
    """Peak half-precision tensor rate and memory bandwidth, by the makers' data sheets."""

    flops: float
    bytes: float


CARDS = {"A100": Card(312e12, 2.04e12), "H100": Card(989e12, 3.35e12)}


class Pass(NamedTuple):
    """One trip over memory."""

    flops: float
    bytes: float

    def seconds(self, card: Card) -> float:
        """The longer of arithmetic and traffic."""
        return max(self.flops / card.flops, self.bytes / card.bytes)


Order = list[Pass]


@dataclass(frozen=True)
class Work:
    """One operation at base size, in three orders, and how often a step runs it."""

    calls: int
    """Per step, of student (forward and backward)."""
    official: Order
    masked: Order
    fused: Order


def floor(order: Order, card: Card) -> float:
    """Return seconds below which an order cannot get on a card."""
    return sum(one.seconds(card) for one in order)


def attention(rows: int, queries: int, keys: int) -> Work:
    """Attention of `rows` x 12 heads: the unfused order writes and reads the weights in every pass."""
    matrix = rows * HEADS * queries * keys
    gemm = 2.0 * matrix * DIM
    q, k = rows * HEADS * queries * DIM * HALF, rows * HEADS * keys * DIM * HALF
    weights, dropped = matrix * HALF, matrix  # the stored dropout mask takes a byte
    unfused = [
        Pass(gemm, q + k + weights),  # scores
        Pass(0, 2 * weights),  # + mask
        Pass(0, 2 * weights),  # softmax
        Pass(0, 2 * weights + dropped),  # dropout
        Pass(gemm, weights + k + q),  # out
        Pass(2 * gemm, 2 * weights + 2 * q + 2 * k),  # dv, d weights
        Pass(0, 2 * weights + dropped),  # dropout
        Pass(0, 3 * weights),  # softmax
        Pass(2 * gemm, 2 * weights + 2 * q + 2 * k),  # dq, dk
    ]
    fused = [
        Pass(2 * gemm, 2 * q + 2 * k),
        Pass(3 * gemm, 4 * q + 2 * k),  # dq, with the weights made again
        Pass(4 * gemm, 2 * q + 4 * k),  # dk, dv
    ]
    return Work(12, unfused, unfused, fused)


def language_head(rows_official: float, rows: float, classes: int) -> Work:
    """XMM's or MLM's head: student and teacher logits, softmaxes, and the gradient."""

    def unfused(n: float) -> Order:
        logits, gemm = n * classes * FULL, 2.0 * n * classes * WIDTH
        weight, hidden = classes * WIDTH * HALF, n * WIDTH * HALF
        return [
            *[Pass(gemm, weight + hidden + logits)] * 2,  # student's and teacher's logits
            *[Pass(0, 2 * logits)] * 2,  # softmax, log-softmax
            Pass(0, 2 * logits),  # their product, summed
            Pass(0, logits),  # hard term
            Pass(0, 3 * logits),  # backward of the soft term
            Pass(0, 2 * logits),  # backward of the hard term, added
            Pass(gemm, weight + hidden + logits),  # d hidden
            Pass(gemm, weight + hidden + logits),  # d weight
        ]

    logits, gemm = rows * classes * FULL, 2.0 * rows * classes * WIDTH
    weight, hidden = classes * WIDTH * HALF, rows * WIDTH * HALF
    fused = [
        *[Pass(gemm, weight + hidden + logits)] * 2,
        Pass(0, 5 * logits),  # the row kernel reads both twice and writes the gradient in place
        Pass(gemm, weight + hidden + logits),
        Pass(gemm, 2 * weight + hidden + logits),  # d weight, accumulated
    ]
    return Work(1, unfused(rows_official), unfused(rows), fused)


def concept_head() -> Work:
    """PSL's multi-label head over the words."""
    logits, gemm = B * VOCABULARY * FULL, 2.0 * B * VOCABULARY * FEATURE
    weight = VOCABULARY * FEATURE * HALF
    gemms = [Pass(gemm, weight + logits)] * 4
    unfused = [*gemms, *[Pass(0, 2 * logits)] * 2, *[Pass(0, 3 * logits)] * 4]  # targets; two losses and their backward
    return Work(1, unfused, unfused, [*gemms, Pass(0, 3 * logits)])


def contrastive() -> Work:
    """ITC against the queue, both directions."""
    keys = B + QUEUE
    similarity, gemm = B * keys * FULL, 2.0 * B * keys * FEATURE
    features = keys * FEATURE * FULL
    one = [
        Pass(0, 2 * features),  # clone and cat of the queue
        *[Pass(gemm, features + similarity)] * 2,
        *[Pass(0, 2 * similarity)] * 4,  # / temperature, softmax, targets, log-softmax
        Pass(0, 3 * similarity),
        *[Pass(0, 3 * similarity)] * 2,
        Pass(gemm, features + similarity),
    ]
    fused = [Pass(2 * gemm, features), Pass(3 * gemm, features)]  # statistics; loss and gradient
    return Work(2, one, one, fused)


def layer_norm(tokens: int) -> Work:
    """LayerNorm(residual + dropout(x)), forward and backward."""
    size = tokens * WIDTH * HALF
    unfused = [Pass(0, 2.5 * size), Pass(0, 3 * size), Pass(0, 2 * size), Pass(0, 3 * size), Pass(0, 2.5 * size)]
    return Work(36, unfused, unfused, [Pass(0, 4 * size), Pass(0, 4 * size)])


WORK = {
    "cross_attention: text over image": attention(4 * B, WORDS, IMAGE),
    "cross_attention: image over text": attention(B, IMAGE, WORDS),
    "cross_attention: image": attention(B, IMAGE, IMAGE),
    "cross_attention: text": attention(5 * B, WORDS, WORDS),
    "linear_soft_ce: XMM": language_head(B * PATCHES, B * MASKED, CODES),
    "linear_soft_ce: MLM": language_head(B * WORDS, B * WORDS * LABELLED, VOCABULARY),
    "linear_soft_bce: PSL": concept_head(),
    "contrastive_loss": contrastive(),
    "dropout_add_layer_norm: image": layer_norm(B * IMAGE),
    "dropout_add_layer_norm: text": layer_norm(5 * B * WORDS),
}


def table() -> str:
    """Return Markdown: bytes, operations, floors, ratios and shares, all computed."""
    head = "| operation, forward + backward of a call | GFLOP | MB fused | MB unfused | floor A100 / H100 (us) "
    head += (
        "| unfused, all rows / fused | unfused, read rows / fused | share of the step's floor before -> after (H100) |"
    )
    lines = [head, "|" + "---|" * 7]
    steps = {name: step_seconds(CARDS["H100"], name) for name in ("official", "fused")}
    for name, work in WORK.items():
        a100, h100 = (floor(work.fused, card) for card in CARDS.values())
        ratios = [floor(order, CARDS["H100"]) / h100 for order in (work.official, work.masked)]
        before = work.calls * floor(work.official, CARDS["H100"]) / steps["official"]
        after = work.calls * h100 / steps["fused"]
        lines.append(
            f"| {name} | {sum(p.flops for p in work.fused) / 1e9:.1f} | {_megabytes(work.fused)} "
            f"| {_megabytes(work.masked)} | {1e6 * a100:.0f} / {1e6 * h100:.0f} | {ratios[0]:.1f} | {ratios[1]:.1f} "
            f"| {before:.1%} -> {after:.1%} |"
        )
    return "\n".join(lines)


def step_seconds(card: Card, order: str) -> float:
    """Return the floor of a whole step: these operations in an order, and the published step's other arithmetic."""
    ours = sum(work.calls * floor(getattr(work, order), card) for work in WORK.values())
    other = STEP_FLOPS - sum(work.calls * sum(p.flops for p in work.official) for work in WORK.values())
    return ours + other / card.flops


def _megabytes(order: Order) -> str:
    return f"{sum(p.bytes for p in order) / 1e6:,.0f}"
