"""What autograd keeps from forward to backward of one micro-step with fast passes, by formula.

B pairs, N = patches + 1, T real tokens, D width; `size` is the bytes of a number in the training dtype. Counted per
stack of layers, as the layers' own modules keep it: a linear layer its input, LayerNorm its input and two numbers a
row, attention its queries, keys, values and output. Text is packed on a card and padded where a CPU attends (see
model.rows.attend). benchmarks.counting.saved_for_backward counts the same while a step runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from simla_ds.config import Config
from simla_ds.planner.shape import StepShape
from simla_kernels.half import has_bf16_units

STATISTICS = 8
"""Bytes of LayerNorm's mean and reciprocal deviation of a row, in float32."""


@dataclass(frozen=True)
class Activations:
    """Bytes."""

    stacks: float
    """Kept by the layers of the image encoder and of the stream's three passes."""
    inputs: float
    """Kept around them: pictures, embeddings, encoded pictures, what the stream reads across."""
    heads: float
    """Gradients that the loss heads make in forward."""
    layer: float
    """Of the largest layer alone: what checkpointing makes again at a time."""

    @property
    def total(self) -> float:
        """All that is kept."""
        return self.stacks + self.inputs + self.heads


def activations(config: Config, shape: StepShape, size: int, *, padded: bool, checkpointing: bool) -> Activations:
    """Return what is kept, for a training dtype of `size` bytes; padded: on a CPU, whose attention pads its rows."""
    stream, width = config.model.stream, config.model.stream.width
    rows = config.model.vision.patches + 1
    pictures, slots = shape.pairs * rows, shape.pairs * shape.longest
    fused_slots = 4 * slots if padded else 3 * shape.tokens + slots
    fused_tokens, read = 3 * shape.tokens + slots, 3 * shape.pairs + shape.labelled
    text_slots = slots if padded else shape.tokens

    def layer(tokens: float, slots: float, asking: float, context: float) -> float:
        """Numbers and statistics of one stream layer; `asking` of its `tokens` go on to the next."""
        numbers = width * (tokens + asking * (asking < tokens) + 3 * slots + 2 * asking)  # self-attention
        numbers += width * (2 * asking + slots + 2 * context) * (context > 0) + width * asking * (context > 0)
        numbers += asking * (2 * width + stream.intermediate_size)
        return numbers * size + STATISTICS * asking * (2 + (context > 0))

    block = _block(config, 2 * pictures, size)
    passes = [  # depth, tokens, slots, read in the last layer, context
        (stream.text_depth, shape.tokens, text_slots, shape.pairs, 0.0),
        (stream.depth, fused_tokens, fused_slots, read, pictures),
        (stream.depth, pictures, pictures, shape.masked, text_slots),
    ]
    inner = [layer(tokens, slots, tokens, context) for _, tokens, slots, _, context in passes]
    if checkpointing:
        stacks = size * width * (2 * pictures * config.model.vision.layers + sum(d * t for d, t, *_ in passes))
    else:
        last = [layer(tokens, slots, read, context) for _, tokens, slots, read, context in passes]
        depths = [depth for depth, *_ in passes]
        stacks = config.model.vision.layers * block
        stacks += sum((d - 1) * one + end for d, one, end in zip(depths, inner, last, strict=True))
    operand = 4 if padded and not has_bf16_units() else size  # such a CPU multiplies half precision in float32
    heads = _heads(config, shape, operand)
    return Activations(stacks, _inputs(config, shape, size, padded), heads, max(block, *inner))


def _block(config: Config, tokens: float, size: int) -> float:
    """One block of the image encoder (pre-LN, flash attention) over so many tokens."""
    vision = config.model.vision
    return tokens * (size * vision.width * (8 + vision.mlp_ratio) + 2 * STATISTICS + 4 * vision.heads)


def _inputs(config: Config, shape: StepShape, size: int, padded: bool) -> float:
    """What lies around the layers."""
    model, width = config.model, config.model.stream.width
    pictures = shape.pairs * (model.vision.patches + 1)
    fused_tokens = 3 * shape.tokens + shape.pairs * shape.longest
    pixels = shape.pairs * 3 * model.vision.image_size**2
    encoded = 2 * pictures + pictures + 2 * pictures  # LayerNorm's input, the clean half as context, its output
    embedded = shape.tokens + fused_tokens + pictures
    mask = (size if padded else 1) if model.stream.dropout else 0  # of the embeddings' dropout, as torch keeps it
    return (
        size * (pixels + width * (encoded + embedded))
        + mask * width * embedded
        + STATISTICS * (2 * pictures + embedded)
    )


def _heads(config: Config, shape: StepShape, operand: int) -> float:
    """Gradients of the heads' weights and inputs, float32; of a few rows those of the logits instead (keeps_dz), in the
    dtype that they are multiplied in."""
    model = config.model
    width, words, codes = model.stream.width, model.vocabulary.size, model.vocabulary.visual_size
    heads = ((shape.labelled, width, words), (shape.masked, width, codes), (shape.pairs, model.projection_size, words))
    total = 0.0
    for rows, inner, classes in heads:
        total += operand * classes * rows if rows < inner else 4 * classes * inner
        total += 4 * (rows * inner + classes)
    return total
