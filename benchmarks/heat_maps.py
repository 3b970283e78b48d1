"""A sheet of heat maps: `python -m benchmarks heat_maps --model DIR --scenes runs/demo/scenes --out sheet.png`.

Expressions of random test scenes, one a scene: the picture under its Grad-CAM map (`simla visualize`), the named
thing's box in green and the hottest place as a cross. Says on how many the cross is in the box.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from simla_ds.data.processor import SimlaProcessor
from simla_ds.data.sample import read_picture
from simla_ds.downstream.annotations import Annotations, Entry
from simla_ds.downstream.grounding import heat_maps, upsample
from simla_ds.downstream.scenes import scene_annotations
from simla_ds.hub import load_model_folder
from simla_ds.model.simla import Simla
from simla_ds.visualize import overlay

SIDE, MARGIN, COLUMNS = 192, 34, 5
"""Pixels of a picture, pixels under it for the words, and pictures in a row."""


@dataclass(frozen=True)
class Found:
    """One picture of the sheet."""

    picture: Image.Image
    hit: bool
    chance: float
    """One over the things in the scene."""


def drawn(model: Simla, processor: SimlaProcessor, scenes: Annotations, entry: Entry) -> Found:
    """Draw one expression's map."""
    picture = read_picture(scenes.pictures.members(entry["image"]))
    inputs = processor(picture, entry["text"])
    mask = inputs["attention_mask"].bool()
    maps, _ = heat_maps(model, {"image": inputs["pixel_values"], "input_ids": inputs["input_ids"], "text_mask": mask})
    heat = upsample(maps[0], SIDE, SIDE)
    peak, scale = int(heat.argmax()), SIDE / entry["size"][0]
    across, down = peak % SIDE, peak // SIDE
    x, y, w, h = (scale * value for value in entry["box"])
    hit = x <= across < x + w and y <= down < y + h
    tile = Image.new("RGB", (SIDE, SIDE + MARGIN), "white")
    tile.paste(overlay(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC), heat.numpy()), (0, 0))
    pen = ImageDraw.Draw(tile)
    pen.rectangle((x, y, x + w, y + h), outline="lime", width=2)
    for line in ((across - 6, down, across + 6, down), (across, down - 6, across, down + 6)):
        pen.line(line, fill="white", width=2)
    pen.text((3, SIDE + 4), entry["text"], fill="black")
    pen.text((3, SIDE + 18), "right" if hit else "wrong", fill="green" if hit else "red")
    return Found(tile, hit, 1 / len(entry["proposals"]))


def choose(scenes: Annotations, count: int, seed: int) -> list[Entry]:
    """Return expressions of `count` random scenes, one of each."""
    random, by_scene = Random(seed), dict[str, list[Entry]]()
    for entry in scenes.entries:
        by_scene.setdefault(entry["image"], []).append(entry)
    return [random.choice(by_scene[key]) for key in random.sample(sorted(by_scene), min(count, len(by_scene)))]


def main(argv: list[str] | None = None) -> int:
    """Draw, save, say how many are right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks heat_maps", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", type=Path, required=True, metavar="DIR", help="pretrained or fine-tuned for grounding"
    )
    parser.add_argument(
        "--scenes", type=Path, required=True, metavar="DIR", help="folder of scenes, with its test split"
    )
    parser.add_argument("--out", type=Path, default=Path("heat_maps.png"), metavar="PNG", help="file to write")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="scenes (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which scenes (default: 0)")
    arguments = parser.parse_args(argv)
    try:
        model, _ = load_model_folder(arguments.model)
        processor = SimlaProcessor.from_pretrained(arguments.model)
        scenes = scene_annotations("grounding", str(arguments.scenes / "test"))
    except (ValueError, OSError) as error:
        print(f"heat_maps: error: {error}", file=sys.stderr)
        return 2
    found = [drawn(model, processor, scenes, entry) for entry in choose(scenes, arguments.count, arguments.seed)]
    rows = -(-len(found) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * (SIDE + MARGIN)), "white")
    for number, one in enumerate(found):
        sheet.paste(one.picture, (number % COLUMNS * SIDE, number // COLUMNS * (SIDE + MARGIN)))
    sheet.save(arguments.out, "PNG")
    right, guessed = sum(one.hit for one in found), sum(one.chance for one in found)
    print(f"{arguments.out}: the hottest place is on the named thing in {right} of {len(found)} scenes")
    print(f"(whoever points at any thing of the scene is right in {guessed:.1f})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
