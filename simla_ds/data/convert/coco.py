"""COCO captions: the official captions_*.json, or Karpathy's dataset_{coco,flickr30k,flickr8k}.json with its splits.

One sample per picture with all of its captions (the loader draws one each time).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from simla_ds.data.convert.rows import Row, dicts, read_json, require_folders, under

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
"""What Karpathy's files call each split: models are trained on train and restval."""


def rows(*, annotations: Sequence[Path], images: Sequence[Path], split: str | None = None) -> Iterator[Row]:
    """Yield a row per picture, in file order. ValueError on files of another form or a split that isn't there."""
    folders = tuple(images)
    require_folders(folders)
    for file in annotations:
        content = read_json(file)
        pictures = content.get("images") if isinstance(content, dict) else None
        if not isinstance(pictures, list):
            raise ValueError(f"{file} has no list `images`; give COCO's captions JSON or Karpathy's dataset JSON")
        if isinstance(content.get("annotations"), list):
            yield from _official(file, content, folders, split)
        else:
            yield from _karpathy(file, content, folders, split)


def _official(file: Path, content: dict, folders: tuple[Path, ...], split: str | None) -> Iterator[Row]:
    if split is not None:
        raise ValueError(f"--split {split}: {file} is one split already (COCO's official form); leave --split out")
    captions: dict[str, list] = {}
    for annotation in dicts(content["annotations"]):
        captions.setdefault(str(annotation.get("image_id")), []).append(annotation.get("caption"))
    for picture in dicts(content["images"]):
        name = picture.get("file_name")
        said = captions.get(str(picture.get("id")))
        yield Row(str(name), under(folders, name), said, f"coco:{picture.get('id')}")


def _karpathy(file: Path, content: dict, folders: tuple[Path, ...], split: str | None) -> Iterator[Row]:
    if split is None:
        raise ValueError(f"{file} holds several splits (Karpathy's form); choose one with --split {'|'.join(SPLITS)}")
    data_set = content.get("dataset", "coco")
    for picture in dicts(content["images"]):
        if picture.get("split") not in SPLITS[split]:
            continue
        name, folder = picture.get("filename"), picture.get("filepath", "")
        number = picture.get("cocoid", picture.get("imgid"))
        said = [sentence.get("raw") for sentence in dicts(picture.get("sentences"))]
        paths = under(folders, f"{folder}/{name}" if folder else name) + under(folders, name)
        yield Row(str(name), paths, said, f"{data_set}:{number}")
