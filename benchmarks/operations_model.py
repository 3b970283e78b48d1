"""Operations of a whole step with fast passes, by formula: 2 per multiply-add, products and convolutions only.

B pairs, T real tokens in all, L padded length, N image rows, D width. A student's operation runs three times (forward,
gradient of its input, gradient of its weight), a teacher's once. In corrected fidelity, all objectives on.
"""

from __future__ import annotations

from simla_ds.config import Config


def step_operations(config: Config, tokens: int, longest: int, labelled: int, masked: int) -> float:
    """Return the operations of one step.

    Args:
        config: model and batch.
        tokens: T, real tokens of the batch. longest: L. labelled, masked: tokens and patches that are predicted.
    """
    model, batch = config.model, config.train.batch_size
    rows, image_tokens = model.vision.patches + 1, batch * (model.vision.patches + 1)
    width, vocabulary, feature = model.stream.width, model.vocabulary, model.projection_size
    pixels = 3 * model.vision.patch_size**2
    patches = 2.0 * batch * model.vision.patches * width * pixels
    encoder = 2 * _encoder(config, batch, rows)  # clean and masked
    text = _stream(config, tokens, tokens / batch, batch)
    fused_tokens = 3 * tokens + batch * longest  # matched, wrong picture, MLM; wrong caption
    fused = _stream(config, fused_tokens, fused_tokens / (4 * batch), 3 * batch + labelled, (image_tokens, rows))
    image = _stream(config, image_tokens, rows, masked, (tokens, tokens / batch))
    # MLM's and PSL's rows; in the last layer MLM's alone, which read the teacher's own pictures
    last = _layer(config, tokens, tokens / batch, labelled, (image_tokens, rows))
    fused_m = (model.stream.depth - 1) * _layer(
        config, 2 * tokens, tokens / batch, 2 * tokens, (2 * image_tokens, rows)
    )
    fused_m += last
    heads = 2.0 * (labelled * (width * width + width * vocabulary.size) + masked * width * vocabulary.visual_size)
    heads += 2.0 * batch * (feature * vocabulary.size + 2 * width * feature)
    contrast = 4.0 * batch * (batch + config.objectives.itc.queue_size) * feature
    student = 3 * (encoder + text + fused + image + heads) + 2 * patches + 2 * contrast
    teacher = encoder + text + fused_m + image + heads + patches + contrast
    return student + teacher


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
