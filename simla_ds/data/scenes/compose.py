"""One scene from (seed, split, index), whoever asks and in whatever order: picture bytes and what is known of it."""

from __future__ import annotations

import io
import json
from random import Random

from PIL import Image

from simla_ds.data.scenes.captions import Caption, write_caption
from simla_ds.data.scenes.kit import kit
from simla_ds.data.scenes.plan import Plan, draw_plan
from simla_ds.data.scenes.relations import relations
from simla_ds.data.scenes.splits import SPLITS, Split

JPEG_QUALITY = 90
WORDINGS = 4
"""Captions tried of one plan: words are cheaper than a plan, but the same few plans should not always win."""
MAX_ATTEMPTS = 5000
"""A caption is some one split's in ten (train: five in ten), so several plans are usual and tens happen."""


def compose(split_name: str, index: int, seed: int, size: int) -> tuple[Plan, Caption]:
    """Return the plan and caption of one scene: the first draw whose caption belongs to the split."""
    split = SPLITS[split_name]
    random = Random(f"{seed}/{split_name}/{index}/{size}")
    for _ in range(MAX_ATTEMPTS):
        plan = draw_plan(split, size, random)
        if plan is None:
            continue
        for _ in range(WORDINGS):
            caption = write_caption(plan, size, random)
            if caption and split.owns(caption.text):
                return plan, caption
    raise RuntimeError(f"no scene for {split_name} {index} at {size} px, seed {seed}, in {MAX_ATTEMPTS} draws")


def render(plan: Plan, size: int) -> Image.Image:
    """Paste the plan's drawings onto its background; return an RGB picture of side `size`."""
    background = plan.background
    if background.photo is None:
        scene = Image.new("RGB", (size, size), background.rgb)
    else:
        picture = kit().background(background.photo, round(size * 1.1))
        x, y = (round(share * (side - size)) for share, side in zip(background.crop, picture.size, strict=True))
        scene = picture.crop((x, y, x + size, y + size))
    for thing in plan.things:
        drawing = thing.drawing.resize(thing.box[2:], Image.Resampling.LANCZOS)
        scene.paste(drawing, thing.box[:2], drawing)
    return scene


def describe(plan: Plan, caption: Caption, split: Split, index: int, size: int) -> dict:
    """Return the sample's JSON, as the docstring of `simla_ds.data.scenes` lays it out."""
    things = plan.things
    background = {"kind": "photo" if plan.background.photo else "plain", "name": plan.background.name}
    if plan.background.photo:
        photo = kit().photos[plan.background.photo]
        background |= {"photo": photo.file, "plural": photo.plural, "may_contain": photo.may_contain}
    else:
        background |= {"colour": plan.background.colour, "rgb": list(plan.background.rgb)}
    return {
        "caption": caption.text,
        "image_id": split.first_image_id + index,
        "size": size,
        "background": background,
        "objects": [
            {
                "concept": thing.concept.id,
                "name": thing.concept.name,
                "category": thing.concept.category,
                "colour": thing.colour,
                "turned": thing.turned,
                "size": thing.size,
                "box": list(thing.box),
                "vendor": thing.vendor,
            }
            for thing in things
        ],
        "relations": relations([thing.box for thing in things], size),
        "phrases": [
            {
                "text": caption.text[phrase.start : phrase.end],
                "span": [phrase.start, phrase.end],
                "objects": list(phrase.things),
                "box": _around([things[i].box for i in phrase.things]) if phrase.things else [0, 0, size, size],
            }
            for phrase in caption.phrases
        ],
        "claims": [list(claim) for claim in caption.claims],
    }


def _around(boxes: list[tuple[int, int, int, int]]) -> list[int]:
    left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
    right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
    return [left, top, right - left, bottom - top]


def make_sample(split_name: str, index: int, seed: int, size: int) -> tuple[str, dict[str, bytes]]:
    """Return (key, {"jpg": ..., "json": ...}) of one scene, the same bytes wherever and whenever it is made."""
    plan, caption = compose(split_name, index, seed, size)
    picture = io.BytesIO()
    render(plan, size).save(picture, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    record = describe(plan, caption, SPLITS[split_name], index, size)
    encoded = json.dumps(record, separators=(",", ":"), ensure_ascii=False).encode()
    return f"{split_name}_{index:07d}", {"jpg": picture.getvalue(), "json": encoded}
