"""Write the embedded data to a folder: shards of every split, the tokenizer, the visual tokens, a page to look at.

    OUT/{train,val,test,test_vendor,test_concept,test_pairing}/shard-000000.tar ...
    OUT/tokenizer/   OUT/visual_tokens/   OUT/contact_sheet.png   OUT/ATTRIBUTION.md   OUT/manifest.json

Everything is made in a folder beside OUT that is renamed when whole, so OUT is either complete or not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from simla_ds import __version__
from simla_ds.data.convert.processes import in_order
from simla_ds.data.scenes.compose import make_sample
from simla_ds.data.scenes.contact_sheet import contact_sheet
from simla_ds.data.scenes.kit import KIT
from simla_ds.data.scenes.splits import SPLITS

SPLIT_SIZES = {"val": 500, "test": 1000, "test_vendor": 500, "test_concept": 500, "test_pairing": 500}
"""Scenes per split other than train, for which the caller says."""
LICENCE = (
    "Scenes are made from drawings and photos under Apache-2.0, CC BY 4.0, MIT, CC0-1.0 and the public domain; "
    "ATTRIBUTION.md beside this file has the credits to keep with published pictures."
)
COMPOSER = 1
"""Goes up when the same options give other scenes."""
CODEBOOK_SCENES = 2000
"""Train scenes that the visual tokens are fitted to: 64 patches each are plenty for 512 codes."""
SHEET_SCENES = {"train": 12, "val": 6, "test": 6, "test_vendor": 6, "test_concept": 6, "test_pairing": 6}

Sample = tuple[str, dict[str, bytes]]


@dataclass(frozen=True, kw_only=True)
class SceneOptions:
    """What decides the bytes that are written."""

    train: int = 20_000
    """Scenes in train."""
    seed: int = 0
    """Another seed, other scenes; the held-out things, sets, photos and colour pairs stay."""
    size: int = 128
    """Side of the pictures in pixels."""
    shard_size: int = 1000
    """Scenes per shard."""
    grid: int = 8
    """Visual tokens per side."""
    codebook_size: int = 512
    """Visual tokens to choose from."""
    vocabulary_size: int = 2000
    """Word pieces at most; the things' names alone are about 700 words."""
    splits: dict[str, int] = field(default_factory=lambda: dict(SPLIT_SIZES))
    """Scenes in each other split; one that is left out is not written."""

    def __post_init__(self) -> None:
        for name in ("train", "shard_size", "grid", "codebook_size", "vocabulary_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"scenes {name} must be at least 1, got {getattr(self, name)}")
        if self.size < 64:
            raise ValueError(f"scenes size must be at least 64 pixels to show small things, got {self.size}")
        unknown = sorted(set(self.splits) - set(SPLIT_SIZES))
        if unknown:
            raise ValueError(f"scenes splits has {unknown}; the splits beside train are {sorted(SPLIT_SIZES)}")
        if any(count < 0 for count in self.splits.values()):
            raise ValueError(f"scenes splits must not be negative, got {self.splits}")

    def counts(self) -> dict[str, int]:
        """Return scenes per split that is written, train first."""
        wanted = {"train": self.train} | self.splits
        return {name: wanted[name] for name in SPLITS if wanted.get(name)}


def prepare_scenes(out: Path | str, *, workers: int | None = None, progress: bool = True, **options) -> dict:
    """Compose the data set into `out` and return its manifest; `options` are the fields of SceneOptions.

    workers: processes (None: one per core of this process; 1: none beside this one); they change nothing but speed.
    A folder already made with the same options is left as it is. Raises FileExistsError when `out` holds anything
    else, ValueError on impossible options.
    """
    out, chosen = Path(out), SceneOptions(**options)
    done = _already_made(out, chosen)
    if done:
        return done
    workers = workers or len(os.sched_getaffinity(0))
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    work.chmod(0o755)
    try:
        manifest = _make(work, chosen, workers, progress)
        try:
            work.rename(out)  # onto nothing or an empty folder; anything else is an error
        except OSError:
            done = _already_made(out, chosen)  # by another process, meanwhile
            if done is None:
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _identity(options: SceneOptions) -> dict:
    return {"composer": COMPOSER, "options": asdict(options)}


def _already_made(out: Path, options: SceneOptions) -> dict | None:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    path = out / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    wanted = _identity(options)
    if {name: manifest.get(name) for name in wanted} == wanted:
        return manifest
    raise FileExistsError(f"{out} exists and was not made with these options; name another folder or remove it")


def _make(work: Path, options: SceneOptions, workers: int, progress: bool) -> dict:
    from simla_ds.data.text import train_tokenizer  # torch comes with these: workers and tests go without it
    from simla_ds.data.visual_tokens import fit_codebook

    collected = _Collector()
    counts = options.counts()
    shards = _write_splits(work, counts, options, collected, workers, progress)
    train_tokenizer(collected.captions["train"], work / "tokenizer", options.vocabulary_size)
    views = _views(collected.train_pictures, 4 * options.grid)
    codebook = fit_codebook(views, codes=options.codebook_size, grid=options.grid, seed=options.seed)
    codebook.save(work / "visual_tokens")
    contact_sheet(collected.sheet).save(work / "contact_sheet.png")
    shutil.copyfile(KIT / "LICENSES" / "ATTRIBUTION.md", work / "ATTRIBUTION.md")
    manifest = _identity(options) | {
        "counts": counts,
        "repeated_captions": {name: len(said) - len(set(said)) for name, said in collected.captions.items()},
        "licence": LICENCE,
        "versions": {"simla_ds": __version__, "pillow": PIL.__version__, "numpy": np.__version__},
        "sha256": {str(path.relative_to(work)): _sha256(path) for path in shards},
    }
    (work / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


class _Collector:
    """Keeps, of the samples passing by on their way to the shards, what is needed once they are all written."""

    def __init__(self) -> None:
        self.captions: dict[str, list[str]] = {}
        self.train_pictures: list[bytes] = []
        self.sheet: list[Sample] = []

    def watch(self, split: str, samples: Iterator[Sample]) -> Iterator[Sample]:
        captions = self.captions.setdefault(split, [])
        for number, (key, members) in enumerate(samples):
            captions.append(json.loads(members["json"])["caption"])
            if split == "train" and number < CODEBOOK_SCENES:
                self.train_pictures.append(members["jpg"])
            if number < SHEET_SCENES[split]:
                self.sheet.append((key, members))
            yield key, members


def _write_splits(
    work: Path, counts: dict[str, int], options: SceneOptions, collected: _Collector, workers: int, progress: bool
) -> list[Path]:
    """Write the shards of every split, composing in `workers` processes; return their paths."""
    from simla_ds.data.shards import write_shards

    scenes = ((name, number, options.seed, options.size) for name, count in counts.items() for number in range(count))
    written: list[Path] = []
    with contextlib.closing(in_order(_compose, scenes, workers)) as composed:
        samples = _reporting(composed, sum(counts.values()), progress)
        for name, count in counts.items():
            own = collected.watch(name, islice(samples, count))
            written += write_shards(own, work / name, options.shard_size)
    return written


def _compose(scenes: list[tuple[str, int, int, int]]) -> list[Sample]:
    return [make_sample(*scene) for scene in scenes]


def _reporting(samples: Iterator[Sample], total: int, progress: bool) -> Iterator[Sample]:
    """Pass samples on under a progress bar; a line every tenth of the way where there is no terminal to draw on."""
    if progress and sys.stderr.isatty():
        from tqdm import tqdm

        yield from tqdm(samples, total=total, desc="scenes", unit="scene")
        return
    for number, sample in enumerate(samples, start=1):
        if progress and number * 10 // total > (number - 1) * 10 // total:
            print(f"scenes: {number} of {total}", file=sys.stderr, flush=True)
        yield sample


def _views(pictures: list[bytes], side: int) -> Iterator:
    """Yield (3, side, side) tensors in [0, 1], as the visual tokeniser will see the pictures."""
    import torch

    for data in pictures:
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        yield torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
