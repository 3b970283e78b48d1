"""Visual Genome: region_descriptions.json, the phrases of a picture's regions as captions of the whole picture.

That is how ALBEF and SIMLA use it. One sample per picture with all its phrases (the loader draws one each time). With
image_data.json a picture that is also in COCO gets COCO's image id, so that the two know each other in one batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from simla_ds.data.convert.rows import Row, dicts, json_items, require_folders, under


def rows(*, regions: Path, images: Sequence[Path], image_data: Path | None = None) -> Iterator[Row]:
    """Yield a row per picture, in file order. ValueError on a file that is no JSON list."""
    folders = tuple(images)
    require_folders(folders)
    in_coco = {
        str(item["image_id"]): item["coco_id"]
        for item in dicts(list(json_items(image_data)) if image_data else [])
        if item.get("coco_id") and "image_id" in item
    }
    for number, item in enumerate(json_items(regions)):
        fields = item if isinstance(item, dict) else {}
        listed = dicts(fields.get("regions"))
        image = fields.get("id") or next((region.get("image_id") for region in listed), None)
        name = f"{image}.jpg" if image is not None else f"{regions.name}[{number}]"
        picture_id = f"coco:{in_coco[str(image)]}" if str(image) in in_coco else f"visual_genome:{image}"
        yield Row(name, under(folders, name), [region.get("phrase") for region in listed], picture_id)
