"""The text/fusion stream against plain tensor functions in float64, in both layouts."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.config import StreamConfig
from simla_ds.model.rows import Rows
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Context
from tests import reference_step
from tests.tiny import ALBEF, STREAM, make_batch, model_config, spread_weights

SIZES = {"heads": 4}
CLOSE: dict[str, Any] = {
    "atol": 1e-12,
    "rtol": 0.0,
}


def make_model(stream: StreamConfig = STREAM) -> Simla:
    model = Simla(model_config(stream))
    spread_weights(model)
    return model.double()


@pytest.fixture
def model() -> Simla:
    """Return a tiny float64 model with one shared stream of two layers."""
    return make_model()


def published(model: Simla, first_layer: int = 0) -> dict[str, Tensor]:
    """Return the stream's parameters under the published names, its layers counted from first_layer."""
    names = {}
    for name, value in model.stream.state_dict().items():
        name = re.sub(r"^embeddings\.(word|position)\.", r"embeddings.\1_embeddings.", name)
        name = name.replace("embeddings.norm.", "embeddings.LayerNorm.")
        if found := re.match(r"layers\.(\d+)\.(.*)", name):
            part = found[2].replace("self_attention.", "attention.").replace("cross_attention.", "crossattention.")
            part = re.sub(r"attention\.(query|key|value)\.", r"attention.self.\1.", part)
            part = part.replace("attention.output.", "attention.output.dense.")
            part = part.replace("attention.norm.", "attention.output.LayerNorm.")
            part = part.replace("feed_forward.up.", "intermediate.dense.")
            part = part.replace("feed_forward.down.", "output.dense.")
            part = part.replace("feed_forward.norm.", "output.LayerNorm.")
            name = f"encoder.layer.{int(found[1]) - first_layer}.{part}"
        names[name] = value
    return names


def make_inputs(lengths: list[int], pad_to: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return ids (B, L), mask (B, L) and image tokens (B, 10, 32) in float64."""
    batch = make_batch(lengths, pad_to=pad_to)
    image = torch.randn(len(lengths), 10, 32, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return batch["input_ids"], batch["text_mask"], image


def test_padding_never_changes_a_real_row_in_any_of_the_three_passes(model: Simla):
    lengths = [7, 2, 5]
    ids, mask, image = make_inputs(lengths)
    padded_ids, padded_mask, _ = make_inputs(lengths, pad_to=12)
    embeddings, padded_embeddings = model.stream.embeddings(ids), model.stream.embeddings(padded_ids)
    # what stands in the padding is of no account either
    padded_ids = padded_ids.masked_fill(~padded_mask, 17)
    padded_embeddings = padded_embeddings.masked_fill(~padded_mask[..., None], 50.0)
    text, padded_text = model.stream(embeddings, mask)[0], model.stream(padded_embeddings, padded_mask)[0]
    fused, cls = model.text_over_image(ids, mask, image, cls_attention=True)
    padded_fused, padded_cls = model.text_over_image(padded_ids, padded_mask, image, cls_attention=True)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(padded_text[row, :length], text[row, :length], **CLOSE)
        torch.testing.assert_close(padded_fused[row, :length], fused[row, :length], **CLOSE)
        assert cls is not None
        assert padded_cls is not None
        torch.testing.assert_close(padded_cls[row, :, :length], cls[row, :, :length], atol=1e-6, rtol=0)
        assert not padded_cls[row, :, length:].any()
    reverse = model.image_over_text(image, embeddings, mask)
    torch.testing.assert_close(model.image_over_text(image, padded_embeddings, padded_mask), reverse, **CLOSE)


def test_rows_that_share_a_picture_equal_rows_with_their_own_copy(model: Simla):
    """Forward and the gradients of pictures and weights; picture 1 is read by none, picture 2 by three rows."""
    ids, mask, image = make_inputs([7, 2, 5, 4, 6])
    index, image = torch.tensor([2, 0, 2, 2, 0]), image[:3]
    results = []
    for repeated in (False, True):
        model.zero_grad()
        pictures = image.clone().requires_grad_()
        arguments = (pictures[index], None) if repeated else (pictures, index)
        hidden, _ = model.text_over_image(ids, mask, *arguments)
        hidden.square().sum().backward()
        assert pictures.grad is not None
        gradients = {n: p.grad.clone() for n, p in model.stream.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), pictures.grad, gradients))
    (hidden, picture, weights), (hidden_copies, picture_copies, weights_copies) = results
    torch.testing.assert_close(hidden, hidden_copies, **CLOSE)
    torch.testing.assert_close(picture, picture_copies, atol=1e-9, rtol=1e-9)
    assert not picture[1].any()
    assert weights.keys() == weights_copies.keys()
    for name, gradient in weights.items():
        torch.testing.assert_close(gradient, weights_copies[name], atol=1e-9, rtol=1e-9)


def test_albef_layout_reads_text_by_its_first_layers_and_fuses_in_the_rest():
    model = make_model(ALBEF)
    ids, mask, image = make_inputs([7, 2, 5])
    weights = published(model)
    assert not any(n.startswith("encoder.layer.0.crossattention") for n in weights)
    words = F.embedding(ids, weights["embeddings.word_embeddings.weight"])
    rows = reference_step.embed(weights, "", vectors=words + weights["embeddings.token_type.weight"][0])
    text, _ = reference_step.stack(weights, "", rows, mask, {**SIZES, "bert_layers": 1})
    features = model.features(make_batch([7, 2, 5])["image"].double(), ids, mask)
    torch.testing.assert_close(features.text_tokens, text, **CLOSE)
    fused, attention = reference_step.stack(
        published(model, first_layer=1), "", text, mask, {**SIZES, "bert_layers": 2}, image
    )
    hidden, cls = model.text_over_image(ids, mask, image, cls_attention=True)
    torch.testing.assert_close(hidden, fused, **CLOSE)
    assert cls is not None
    torch.testing.assert_close(cls.double(), attention[:, :, 0], atol=1e-6, rtol=0)


def test_shared_layout_runs_every_layer_in_every_pass(model: Simla):
    ids, mask, image = make_inputs([7, 2, 5])
    weights, sizes = published(model), {**SIZES, "bert_layers": 2}
    words = reference_step.embed(weights, "", ids)
    text, _ = reference_step.stack(weights, "", words, mask, sizes)
    torch.testing.assert_close(model.stream(model.stream.embeddings(ids), mask)[0], text, **CLOSE)
    fused, _ = reference_step.stack(weights, "", words, mask, sizes, image)
    torch.testing.assert_close(model.text_over_image(ids, mask, image)[0], fused, **CLOSE)
    rows = reference_step.embed(weights, "", vectors=image)
    reverse, _ = reference_step.stack(weights, "", rows, None, sizes, words, mask)
    torch.testing.assert_close(model.image_over_text(image, words, mask), reverse, **CLOSE)


@pytest.mark.parametrize("stream", [STREAM, ALBEF], ids=["simla", "albef"])
def test_packed_rows_equal_padded_ones_and_the_last_layer_computes_what_is_read(stream: StreamConfig):
    model, lengths = make_model(stream), [7, 2, 5]
    ids, mask, image = make_inputs(lengths, pad_to=9)
    rows = Rows.of(mask, mask.flatten().nonzero()[:, 0])
    wanted, attention = model.text_over_image(ids, mask, image, cls_attention=True)
    context = Context(image.flatten(0, 1), Rows.dense(image))
    x = model.stream.embeddings(rows.pack(ids), rows.positions(ids.device))
    hidden = model.stream.body(x, rows, context)
    torch.testing.assert_close(model.stream.last(hidden, rows, context), rows.pack(wanted), **CLOSE)
    read = torch.tensor([0, 3, 8, 9, 13])  # two of the first row, one and three of the others
    torch.testing.assert_close(model.stream.last(hidden, rows, context, read), rows.pack(wanted)[read], **CLOSE)
    torch.testing.assert_close(model.stream.last_attention(hidden, rows), attention, atol=1e-6, rtol=0)
    text = model.stream.last(model.stream.body(x, rows), rows)
    torch.testing.assert_close(text, rows.pack(model.stream(model.stream.embeddings(ids), mask)[0]), **CLOSE)


def bicubic_at(grid: Tensor, y: float, x: float, a: float = -0.75) -> Tensor:
    """Return Keys' cubic convolution of (S, S, D) at a point, the border repeated, by the definition."""

    def kernel(t: float) -> float:
        t = abs(t)
        if t < 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    top, left = int(y // 1), int(x // 1)
    last, total = len(grid) - 1, torch.zeros(grid.shape[-1], dtype=grid.dtype)
    for i in range(top - 1, top + 3):
        for j in range(left - 1, left + 3):
            weight = kernel(y - i) * kernel(x - j)
            total += weight * grid[min(max(i, 0), last), min(max(j, 0), last)]
    return total


@pytest.mark.parametrize("size", [2, 5, 6])  # smaller; larger, odd; twice the trained 3 x 3
def test_image_rows_at_another_resolution_get_their_text_positions_resampled_as_a_grid(model: Simla, size: int):
    table = model.stream.embeddings.position.weight.detach()
    trained, scale = table[1:10].view(3, 3, -1), 3 / size
    points = [(i + 0.5) * scale - 0.5 for i in range(size)]
    grid = torch.stack([bicubic_at(trained, y, x) for y in points for x in points])
    image = torch.randn(2, size * size + 1, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    positions = torch.cat([table[:1], grid])
    weights = published(model)
    wanted = reference_step.norm(weights, "embeddings.LayerNorm", image + positions, 1e-12)
    torch.testing.assert_close(model.stream.embeddings(image), wanted, atol=1e-5, rtol=0)  # resampled in float32


def test_image_rows_at_the_trained_resolution_get_the_first_text_positions(model: Simla):
    _, _, image = make_inputs([3, 3])
    torch.testing.assert_close(
        model.stream.embeddings(image), reference_step.embed(published(model), "", vectors=image), **CLOSE
    )


def test_the_padding_row_gets_no_gradient_from_lookups_but_every_other_word_does(model: Simla):
    ids, _mask, _ = make_inputs([7, 2, 5])
    model.stream.embeddings(ids).pow(3).sum().backward()
    gradient = model.stream.embeddings.word.weight.grad
    assert gradient is not None
    used = set(ids.unique().tolist()) - {0}
    assert set(gradient.any(1).nonzero()[:, 0].tolist()) == used
