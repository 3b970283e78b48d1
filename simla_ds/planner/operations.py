"""Operations of a whole step with fast passes, by formula: 2 per multiply-add, products and convolutions only.

B pairs, T real tokens in all, L padded length, N image rows, D width. A student's operation runs three times (forward,
gradient of its input, gradient of its weight), a teacher's once. In corrected fidelity, all objectives on.
"""

from __future__ import annotations

from simla_ds.config import Config
from simla_ds.planner.shape import StepShape


def step_operations(config: Config, shape: StepShape) -> float:
    """Return the operations of one micro-step of one rank."""
    student, once, teacher = _forwards(config, shape)
    return 3 * student + 2 * once + teacher


def recomputed_operations(config: Config, shape: StepShape) -> float:
    """Return what activation checkpointing adds: the student's layers once more."""
    encoder, text, fused, image = _layers(config, shape)
    return encoder + text + fused + image


def _forwards(config: Config, shape: StepShape) -> tuple[float, float, float]:
    """Return operations of the student's forward, of what it has no gradient of the input or weight of, the teacher's.

    Patches and contrast run twice in training: pictures and keys get no gradient.
    """
    model, batch = config.model, shape.pairs
    rows, image_tokens = model.vision.patches + 1, batch * (model.vision.patches + 1)
    width, vocabulary, feature = model.stream.width, model.vocabulary, model.projection_size
    patches = 2.0 * batch * model.vision.patches * width * 3 * model.vision.patch_size**2
    encoder, text, fused, image = _layers(config, shape)
    # MLM's and PSL's rows; in the last layer MLM's alone, which read the teacher's own pictures
    mean = shape.tokens / batch
    last = _layer(config, shape.tokens, mean, shape.labelled, (image_tokens, rows))
    fused_of_teacher = last + (model.stream.depth - 1) * _layer(
        config, 2 * shape.tokens, mean, 2 * shape.tokens, (2 * image_tokens, rows)
    )
    words = 2.0 * shape.labelled * (width * width + width * vocabulary.size)
    codes = 2.0 * shape.masked * width * vocabulary.visual_size
    heads = words + codes + 2.0 * batch * (feature * vocabulary.size + 2 * width * feature)
    contrast = 4.0 * batch * (batch + config.objectives.itc.queue_size) * feature
    teacher = text + fused_of_teacher + heads + patches + contrast
    # without distillation the teacher sees no masked picture
    teacher += encoder + image if config.objectives.xmm.distill else encoder / 2 - codes
    return encoder + text + fused + image + heads, patches + contrast, teacher


def _layers(config: Config, shape: StepShape) -> tuple[float, float, float, float]:
    """Return the student's forward through its layers: pictures, text, text over image, image over text."""
    rows, batch = config.model.vision.patches + 1, shape.pairs
    image_tokens, mean = batch * rows, shape.tokens / batch
    encoder = 2 * _encoder(config, batch, rows)  # clean and masked
    text = _stream(config, shape.tokens, mean, batch)
    fused_tokens = 3 * shape.tokens + batch * shape.longest  # matched, wrong picture, MLM; wrong caption
    read = 3 * batch + shape.labelled
    fused = _stream(config, fused_tokens, fused_tokens / (4 * batch), read, (image_tokens, rows))
    image = _stream(config, image_tokens, rows, shape.masked, (shape.tokens, mean))
    return encoder, text, fused, image


def _encoder(config: Config, images: int, rows: int) -> float:
    vision = config.model.vision
    tokens, width = images * rows, vision.width
    linear = (8 + 4 * vision.mlp_ratio) * tokens * width**2
    return vision.layers * (linear + 4.0 * tokens * rows * width)


def _stream(
    config: Config, tokens: float, length: float, read: float, context: tuple[float, float] | None = None
) -> float:
    """Return the forward of the stream over `tokens` in rows of `length`; the last layer computes `read` rows of them.

    context: tokens whose keys and values are projected in each layer, and the length of their rows.
    """
    depth = config.model.stream.text_depth if context is None else config.model.stream.depth
    last = _layer(config, tokens, length, read, context)
    return (depth - 1) * _layer(config, tokens, length, tokens, context) + last


def _layer(
    config: Config, tokens: float, length: float, asking: float, context: tuple[float, float] | None = None
) -> float:
    width, inner = config.model.stream.width, config.model.stream.intermediate_size
    total = 4.0 * tokens * width**2  # keys and values
    total += asking * (4 * width**2 + 4 * length * width + 4 * width * inner)
    if context is not None:
        total += 4 * context[0] * width**2 + asking * (4 * width**2 + 4 * context[1] * width)
    return total
