"""Small collections in the published formats, and what shards made of them hold."""

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from simla_ds.data.shards import ShardFiles, find_shards, open_shard


def jpeg(number, width=60, height=40, **options):
    """A picture of noise that follows from its number, as a JPEG."""
    colours = np.random.default_rng(number).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def put(path: Path, content):
    """Write bytes, text or JSON to a file, folders made on the way; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def put_csv(path: Path, rows, delimiter=","):
    """Write rows, the first of them names, as a table."""
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows(rows)
    return put(path, buffer.getvalue())


def put_tar(path: Path, members):
    """Write (name, bytes) as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def read(folder: Path):
    """Every sample of a folder of shards: (picture's bytes, fields of the json)."""
    files = ShardFiles([open_shard(path) for path in find_shards(str(folder))])
    found = []
    for shard, index in enumerate(files.shards):
        for i in range(len(index)):
            members = files.read(shard, i)
            text = members.pop("json")
            assert text is not None
            found.append((next(iter(members.values())), json.loads(text)))
    return found


def dropped(folder: Path):
    """(name, reason) of every dropped row."""
    lines = [json.loads(line) for line in (folder / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["name"], line["reason"]) for line in lines]
