"""Visual tokens for pictures of one's own, fitted to shards: a patch codebook or a VQ, and how well they give back."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from simla_ds.data.sample import SkipSample, read_picture
from simla_ds.data.shards import ShardFiles, find_shards, open_shard
from simla_ds.data.transforms import WHOLE, make_views
from simla_ds.data.visual_tokens import PATCH, PatchCodebook, fit_codebook
from simla_ds.data.vq_tokens import COLOURS, VqTokens

_BATCH = 64
_WIDTH = 96
"""Of a VQ's convolutions."""
_LEARNING_RATE = 2e-3
_HELD_OUT = 0.1
"""Share of the pictures that reconstruction is measured on."""


def psnr_of(error: float) -> float:
    """Mean squared error of values in [0, 1] as peak signal-to-noise ratio, decibels."""
    return -10 * math.log10(max(error, 1e-12))


def reconstruction(tokens: PatchCodebook | VqTokens, views: Tensor) -> dict[str, float]:
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
    shards: str,
    out: Path,
    *,
    kind: Literal["codebook", "vq"],
    grid: int,
    codes: int,
    pictures: int,
    steps: int,
    seed: int,
) -> dict[str, float]:
    """Fit a tokeniser to pictures of shards and write its folder; return `reconstruction` of a tenth left out.

    Raises FileExistsError when `out` holds something, ValueError when there are too few pictures.
    """
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty: name a new folder")
    views = read_views(shards, PATCH * grid, pictures)
    views = views[torch.randperm(len(views), generator=torch.Generator().manual_seed(seed))]
    left_out = max(1, int(len(views) * _HELD_OUT))
    tokens: PatchCodebook | VqTokens
    if kind == "vq":
        tokens = fit_vq(views[left_out:], codes=codes, grid=grid, steps=steps, seed=seed)
    else:
        tokens = fit_codebook((view.float() / 255 for view in views[left_out:]), codes=codes, grid=grid, seed=seed)
    tokens.save(out)
    return reconstruction(tokens, views[:left_out])


def fit_vq(views: Tensor, *, codes: int, grid: int, steps: int, seed: int) -> VqTokens:
    """Train a VQ tokeniser on views (N, 3, V, V) uint8: squared error of pixels in [0, 1], and commitment.

    Codes begin at k-means centres of patches, follow running means, and are drawn anew where hardly a patch is nearest
    (van den Oord et al. 2017, appendix A.1; Razavi et al. 2019). Deterministic by seed. Raises ValueError when the
    views hold fewer patches than codes, or vector-quantize-pytorch is missing.
    """
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        raise ValueError("--kind vq needs vector-quantize-pytorch: pip install 'simla_ds[data]'") from None
    if len(views) * grid**2 < codes:
        raise ValueError(f"{len(views) * grid**2} patches cannot make {codes} visual tokens; give more pictures")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokens = VqTokens(codes, grid, _WIDTH)
        quantise = VectorQuantize(
            dim=COLOURS,
            codebook_size=codes,
            decay=0.99,
            kmeans_init=True,
            kmeans_iters=20,
            threshold_ema_dead_code=2,
            commitment_weight=0.25,
            accept_image_fmap=True,
            rotation_trick=False,  # without: the papers' straight-through gradient
        )
        with torch.no_grad():  # k-means over eight patches a code
            quantise(tokens.encode(views[: -(-8 * codes // grid**2)].float() / 255))
        optimizer = torch.optim.AdamW(list(tokens.parameters()), lr=_LEARNING_RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, steps, pct_start=0.05)
        for _ in tqdm(range(steps), unit="step", disable=not sys.stderr.isatty()):
            wanted = views.index_select(0, torch.randint(len(views), (_BATCH,))).float() / 255
            quantised, _, commitment = quantise(tokens.encode(wanted))
            loss = F.mse_loss(tokens.paint(quantised), wanted) + commitment.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        tokens.codes.copy_(quantise.codebook)
    return tokens.eval().requires_grad_(False)
