"""Weakly supervised grounding: where in a picture is what a text says?  (Grad-CAM of the cross-attention; ALBEF
section 5.4)

Nobody shows the model a box: the map is what the matching head's "yes" owes to each patch. B pairs, H heads, L tokens,
N patches and [CLS]. Boxes are [x, y, width, height] in pixels of the original picture.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.downstream.annotations import Annotations, Entry, wrong_text
from simla_ds.downstream.base import TaskBatch, predict_each
from simla_ds.downstream.retrieval_tuning import Retrieval
from simla_ds.model.rows import Rows
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Attention, Context, StreamLayer

Box = Sequence[float]
HOT = 0.5
"""Share of a map's peak that a place must reach to belong to the box drawn around it."""


def default_layer(model: Simla) -> int:
    """Return the published layer, 8 of 12 counted from 0, or the one at the same height of another stream."""
    return min(len(model.stream.layers) - 1, round(8 / 11 * (len(model.stream.layers) - 1)))


def heat_maps(model: Simla, batch: TaskBatch, layer: int | None = None) -> tuple[Tensor, Tensor]:
    """Return Grad-CAM maps (B, grid, grid) and the logits of "matches" (B,), float32; model is in eval mode.

    The sum of the logits is differentiated by the cross-attention A of one layer; negative gradients and padded words
    count nothing; A times gradient is averaged over heads and words. batch: `image`, `input_ids`, `text_mask`.
    """
    number = default_layer(model) if layer is None else layer
    with torch.no_grad():
        image = model.image_encoder(batch["image"])
        rows = Rows.of(batch["text_mask"])
        context = Context(image.flatten(0, 1), Rows.dense(image))
        x = model.stream.embeddings(batch["input_ids"]).flatten(0, 1)
        for block in model.stream.layers[:number]:
            x = block(x, rows, context.tokens, context.rows, None)
        block = model.stream.layers[number]
        if not isinstance(block, StreamLayer) or block.cross_attention is None:
            raise ValueError(f"layer {number} has no cross-attention to look at; name a later one")
        x = block.self_attention(x, x, rows, rows)
        attention, value = _weights(block.cross_attention, rows.pad(x), image)
    with torch.enable_grad():
        attention.requires_grad_()
        read = (attention.to(value.dtype) @ value).transpose(1, 2).flatten(2).flatten(0, 1)
        x = block.feed_forward(block.cross_attention.norm(block.cross_attention.output(read), x))
        for later in model.stream.layers[number + 1 :]:
            x = later(x, rows, context.tokens, context.rows, None)
        logits = model.match_head(rows.pad(x)[:, 0]).float()[:, 1]
        (gradient,) = torch.autograd.grad(logits.sum(), attention)
    cam = attention.detach().float() * gradient.float().clamp(min=0) * batch["text_mask"][:, None, :, None]
    cam = cam[..., 1:].mean((1, 2))
    side = round(cam.shape[1] ** 0.5)
    return cam.view(-1, side, side), logits.detach()


def _weights(attention: Attention, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor]:
    """Return a cross-attention's probabilities (B, H, L, N), float32 or wider, and values (B, H, N, d), spelled out."""
    query, key, value = (
        layer(t).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
        for layer, t in ((attention.query, x), (attention.key, source), (attention.value, source))
    )
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1), value


def upsample(cam: Tensor, width: int, height: int) -> Tensor:
    """Return a map (grid, grid) at the picture's size, (height, width), bicubic."""
    return F.interpolate(cam[None, None], size=(height, width), mode="bicubic", align_corners=False)[0, 0]


def rank_proposals(heat: Tensor, proposals: Sequence[Box]) -> int:
    """Return the number of the box with the most heat for the square root of its area; heat is (height, width).

    As published: the sum inside, cut at the picture's border, over the root of the whole box's area. Unlike published,
    a box with negative heat can win when all have some.
    """
    scores = []
    for x, y, w, h in proposals:
        inside = heat[max(0, int(y)) : max(0, int(y + h)), max(0, int(x)) : max(0, int(x + w))]
        scores.append(float(inside.sum()) / (w * h) ** 0.5)
    return max(range(len(scores)), key=scores.__getitem__)


def hot_box(heat: Tensor) -> list[float]:
    """Return the box around all that is at least HOT of the peak; heat is (height, width)."""
    hot = heat >= heat.min() + HOT * (heat.max() - heat.min())
    ys, xs = hot.any(1).nonzero()[:, 0], hot.any(0).nonzero()[:, 0]
    left, top = float(xs[0]), float(ys[0])
    return [left, top, float(xs[-1]) + 1 - left, float(ys[-1]) + 1 - top]


def iou(a: Box, b: Box) -> float:
    """Return intersection over union with inclusive pixels, as the REFER evaluation: right edge at x + w - 1."""
    left, top = max(a[0], b[0]), max(a[1], b[1])
    right, bottom = min(a[0] + a[2] - 1, b[0] + b[2] - 1), min(a[1] + a[3] - 1, b[1] + b[3] - 1)
    shared = (right - left + 1) * (bottom - top + 1) if left < right and top < bottom else 0.0
    return shared / (a[2] * a[3] + b[2] * b[3] - shared)


class Grounding(Retrieval):
    """Retrieval's training on expressions; evaluated by where the maps are hot.

    Entries: {"image": path, "text": expression, "box": [x, y, w, h], "size": [width, height] of the picture in pixels,
    "proposals": optional list of boxes, "split": optional name}.
    """

    name = "grounding"
    metric = "pointing"
    whole = False

    def problems(self, entry: Entry, *, train: bool) -> Iterator[str]:
        """A picture and a text; a box in pixels of a picture of known size where an evaluation needs them."""
        yield from wrong_text(entry, "image", "text")
        if not train:
            for key, count in (("box", 4), ("size", 2)):
                if not _numbers(entry.get(key), count):
                    yield f"key {key!r} must hold {count} numbers"
            if not all(_numbers(box, 4) and min(box[2:]) > 0 for box in entry.get("proposals") or []):
                yield "key 'proposals' must hold boxes of 4 numbers with a size"

    def rows(self, annotations: Annotations) -> Annotations:
        """Return the entries: each has one text."""
        return annotations

    def text(self, entry: Entry) -> str:
        """Return the expression, cleaned as captions are."""
        return super().text({"caption": entry["text"]})

    def fields(self, entry: Entry) -> dict[str, Any]:
        """Return a number that all expressions about one picture share."""
        return super().fields({"image_id": entry["image"]})

    def predictions(self, network: Simla, batches: Iterable[TaskBatch]) -> list[dict[str, Any]]:
        """Return each pair's map (grid by grid) and how well picture and text match."""

        def predict(network: Simla, batch: TaskBatch) -> list[dict[str, Any]]:
            maps, logits = heat_maps(network, batch)
            return [{"map": m, "match": s} for m, s in zip(maps.tolist(), logits.tolist(), strict=True)]

        return predict_each(network, batches, predict)

    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return percentages of expressions: `pointing`, the map's peak lies in the box; `box_iou50`, the box around
        the hot region overlaps it by half; `proposal_iou50`, the best proposal does, where there are proposals.

        Each also by split. Beside them what guessing gives: `centre` points at the middle of every picture, `random`
        anywhere; `proposal_random` takes any proposal. Where others have proposals, an expression without any is wrong.
        """
        sums: dict[str, list[float]] = {}
        proposed = any(entries[said["entry"]].get("proposals") for said in predictions)
        for said in predictions:
            entry = entries[said["entry"]]
            width, height = (int(value) for value in entry["size"])
            heat, box = upsample(torch.tensor(said["map"]), width, height), entry["box"]
            peak = int(heat.argmax())
            found = {
                "pointing": _inside(peak % width + 0.5, peak // width + 0.5, box),
                "box_iou50": iou(hot_box(heat), box) >= 0.5,
                "centre": _inside(width / 2, height / 2, box),
                "random": box[2] * box[3] / (width * height),
            }
            if proposals := entry.get("proposals"):
                overlaps = [iou(proposal, box) >= 0.5 for proposal in proposals]
                found["proposal_iou50"] = overlaps[rank_proposals(heat, proposals)]
                found["proposal_random"] = sum(overlaps) / len(overlaps)
            elif proposed:
                found |= {"proposal_iou50": False, "proposal_random": 0.0}
            for name, value in found.items():
                for key in (name, f"{name}/{entry['split']}") if "split" in entry else (name,):
                    sums.setdefault(key, []).append(float(value))
        return {name: 100 * sum(v) / len(v) for name, v in sums.items()} | {"expressions": len(predictions)}


def _inside(x: float, y: float, box: Box) -> bool:
    return box[0] <= x < box[0] + box[2] and box[1] <= y < box[1] + box[3]


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(isinstance(n, (int, float)) for n in value)
