"""REFER's annotations (RefCOCO, RefCOCO+, RefCOCOg) as grounding's: `simla prepare refcoco`.

A data set is `refs(SPLITTER).p`, a pickled list of referred objects with their expressions and splits, and
`instances.json`, COCO's boxes and picture sizes (Kazemzadeh et al., EMNLP 2014; Yu et al., ECCV 2016).
"""

from __future__ import annotations

import io
import json
import math
import pickle
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simla_ds.downstream.annotations import BadAnnotations, Entry, read_json


def convert_refer(
    refs: Path, instances: Path, out: Path, *, proposals: Path | None = None, pictures: str = "train2014"
) -> dict[str, int]:
    """Write OUT/SPLIT.json for each split that refs has, an entry per expression; return how many by split.

    proposals: {image id: [[x, y, width, height, ...], ...]}, boxes in pixels that a detector found; `without proposals`
    then counts the expressions whose picture has none. pictures: the pictures' folder below what will be the image
    root. Raises ValueError (all that is wrong, before anything is written) and OSError.
    """
    splits: dict[str, list[Entry]] = {}
    problems: list[str] = []
    images, annotations = _instances(instances)
    boxes = _proposals(proposals) if proposals else None
    for number, ref in enumerate(read_refs(refs)):
        try:
            splits.setdefault(_split(ref), []).extend(_entries(ref, images, annotations, boxes, pictures))
        except KeyError as error:
            problems.append(f"ref {number}: no {error.args[0]}")
        except ValueError as error:
            problems.append(f"ref {number}: {error}")
        except (AttributeError, TypeError):
            problems.append(f"ref {number}: not as REFER's: {reprlib.repr(ref)}")
    if problems:
        raise BadAnnotations(f"{refs} with {instances}", problems)
    out.mkdir(parents=True, exist_ok=True)
    for split, entries in splits.items():
        partial = out / f"{split}.json.partial"
        partial.write_text(json.dumps(entries), encoding="utf-8")
        partial.replace(out / f"{split}.json")
    counts = {split: len(entries) for split, entries in splits.items()}
    without = sum("proposals" not in entry for entries in splits.values() for entry in entries)
    return counts | ({"without proposals": without} if boxes is not None and without else {})


class _PlainValues(pickle.Unpickler):
    """Reads lists, dicts, texts and numbers. Importing is what could run code: refused."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(f"besides plain values it holds {module_name}.{global_name}, which could run code")


def read_refs(file: Path) -> list[dict[str, Any]]:
    """Return the list that a pickle of Python 2 or 3 holds. Raises ValueError when it holds more than plain values."""
    content = file.read_bytes()
    try:
        refs = _PlainValues(io.BytesIO(content), encoding="utf-8", errors="replace").load()
    except Exception as error:  # a damaged pickle raises whatever its opcodes run into
        raise ValueError(f"{file} cannot be read as REFER's refs: {str(error) or type(error).__name__}") from error
    if not isinstance(refs, list) or not refs or not all(isinstance(ref, dict) for ref in refs):
        raise ValueError(f"{file} must hold a list of referred objects (dicts), as refs(unc).p does")
    return refs


def _split(ref: Mapping[str, Any]) -> str:
    """Return train, val, testA, ...: it becomes a file's name."""
    split = ref["split"]
    if not split.isalnum():
        raise ValueError(f"{reprlib.repr(split)} is no split's name")
    return split


def _entries(
    ref: Mapping[str, Any],
    images: Mapping[Any, Entry],
    annotations: Mapping[Any, Any],
    boxes: Mapping[str, list[list[float]]] | None,
    pictures: str,
) -> Iterator[Entry]:
    """Yield an entry for each expression of a referred object. KeyError says what is missing."""
    if ref["image_id"] not in images:
        raise KeyError(f"picture {ref['image_id']} in instances")
    if ref["ann_id"] not in annotations:
        raise KeyError(f"box {ref['ann_id']} in instances")
    image = images[ref["image_id"]]
    entry: Entry = {
        **image,
        "image": "/".join(filter(None, (pictures, image["image"]))),
        "ref_id": int(ref["ref_id"]),
        "split": ref["split"],
        "box": _box(annotations[ref["ann_id"]]),
    }
    if boxes is not None and (proposed := boxes.get(str(ref["image_id"]))):
        entry["proposals"] = proposed
    for sentence in ref["sentences"]:
        if not isinstance(sentence["sent"], str):
            raise TypeError("an expression is a text")
        yield {**entry, "text": sentence["sent"]}


def _instances(file: Path) -> tuple[dict[Any, Entry], dict[Any, Any]]:
    """Return `image` and `size` of pictures, and boxes as they are, by id. Raises ValueError when it is no COCO file.

    COCO has boxes without area, which nobody refers to.
    """
    content = _json(file)
    try:
        images = {
            entry["id"]: {"image": str(entry["file_name"]), "size": [int(entry["width"]), int(entry["height"])]}
            for entry in content["images"]
        }
        return images, {entry["id"]: entry["bbox"] for entry in content["annotations"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} must hold `images` (id, file_name, width, height) and `annotations` (id, bbox), as COCO's "
            f"instances.json does: {type(error).__name__} {error}"
        ) from error


def _proposals(file: Path) -> dict[str, list[list[float]]]:
    content = _json(file)
    try:
        return {str(image): [_box(box[:4]) for box in boxes] for image, boxes in content.items()}
    except (AttributeError, TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{file} must hold an object of boxes by image id, {{id: [[x, y, width, height], ...]}}: {error}"
        ) from error


def _box(numbers: Any) -> list[float]:
    """Return [x, y, width, height]. Raises TypeError, ValueError."""
    x, y, width, height = map(float, numbers)
    if not (math.isfinite(x) and math.isfinite(y) and 0 < width < math.inf and 0 < height < math.inf):
        raise ValueError(f"{numbers} is no box [x, y, width, height]")
    return [x, y, width, height]


def _json(file: Path) -> Any:
    try:
        return read_json(file)
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
