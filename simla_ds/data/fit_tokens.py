"""Visual tokens for pictures of one's own: a patch codebook fitted to shards, and how well it gives pictures back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from simla_ds.data.sample import SkipSample, read_picture
from simla_ds.data.shards import ShardFiles, find_shards, open_shard
from simla_ds.data.transforms import WHOLE, make_views
from simla_ds.data.visual_tokens import PATCH, PatchCodebook, fit_codebook

_BATCH = 64
_HELD_OUT = 0.1
"""Share of the pictures that reconstruction is measured on."""


def psnr_of(error: float) -> float:
    """Mean squared error of values in [0, 1] as peak signal-to-noise ratio, decibels."""
    return -10 * math.log10(max(error, 1e-12))


def reconstruction(tokens: PatchCodebook, views: Tensor) -> dict[str, float]:
    """How well views (N, 3, V, V) uint8 come back from their tokens: `psnr` in dB, and the share of codes in use."""
    error, used = 0.0, set()
    for batch in views.split(_BATCH):
        wanted = batch.float() / 255
        ids = tokens(wanted)
        used |= set(ids.unique().tolist())
        error += float((tokens.decode(ids) - wanted).square().mean()) * len(batch) / len(views)
    return {"psnr": psnr_of(error), "codes_used": len(used) / tokens.vocabulary_size}


def read_views(shards: str, size: int, count: int) -> Tensor:
    """(N, 3, size, size) uint8: up to `count` whole pictures, evenly spread over the shards. Raises ValueError."""
    files = ShardFiles([open_shard(path) for path in find_shards(shards, "SHARDS")])
    places = [(shard, i) for shard, index in enumerate(files.shards) for i in range(len(index))]
    views = []
    for number in np.linspace(0, len(places), min(count, len(places)), endpoint=False).astype(int):
        try:
            views.append(make_views(read_picture(files.read(*places[number])), WHOLE, size, 0)[0])
        except SkipSample:
            continue
    if len(views) < 2:
        raise ValueError(f"SHARDS={shards} has {len(views)} usable picture(s); a tokeniser needs thousands")
    return torch.from_numpy(np.stack(views))


def prepare_visual_tokenizer(
    shards: str, out: Path, *, grid: int, codes: int, pictures: int, seed: int
) -> dict[str, float]:
    """Fit a patch codebook to pictures of shards and write its folder; return `reconstruction` of a tenth left out.

    Raises FileExistsError when `out` holds something, ValueError when there are too few pictures.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    views = read_views(shards, PATCH * grid, pictures)
    views = views[torch.randperm(len(views), generator=torch.Generator().manual_seed(seed))]
    left_out = max(1, int(len(views) * _HELD_OUT))
    codebook = fit_codebook((view.float() / 255 for view in views[left_out:]), codes=codes, grid=grid, seed=seed)
    codebook.save(out)
    return reconstruction(codebook, views[:left_out])
