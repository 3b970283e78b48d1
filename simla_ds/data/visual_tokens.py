"""Pictures to visual-token ids, the targets of XMM: a patch codebook, a trained VQ, or the DALL-E dVAE's encoder.

B pictures, V side of the tokeniser's view in pixels, G side of the patch grid, P = G * G tokens in row-major order.
The grid is the image encoder's, so that token p describes what patch p shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

PATCH = 4
"""Side in pixels of a codebook patch: 48 numbers with three colours."""
DALLE_PATCH = 8
"""Side in pixels of what one DALL-E token stands for."""
_KIND = "patch_codebook"
_FIT_PATCHES = 131_072
"""Patches that k-means looks at; more change the centres little."""
_CHUNK = 16_384
"""Patches compared with all codes at a time, which bounds memory."""
_ITERATIONS = 20


class VisualTokenizer(Protocol):
    """What the training step needs of a visual tokeniser; frozen."""

    view_size: int
    """V, side of the view it reads, in pixels."""
    vocabulary_size: int
    """Number of visual tokens."""

    def __call__(self, view: Tensor) -> Tensor:
        """(B, 3, V, V) floats in [0, 1] to (B, P) int64 ids."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """Move its weights; return itself."""
        ...


class PatchCodebook:
    """Nearest of a list of fitted 4 x 4 pixel patches."""

    def __init__(self, codes: Tensor, grid: int):
        """codes: (K, 48) float32, each a patch as (3, 4, 4) flattened; grid: G."""
        self.codes = codes.float()
        self.view_size = PATCH * grid
        self.vocabulary_size = len(codes)

    def __call__(self, view: Tensor) -> Tensor:
        """(B, 3, V, V) floats in [0, 1] to (B, P) int64 ids."""
        check_view(view, self.view_size)
        patches = _patches(view.float())
        return nearest(patches.flatten(0, 1), self.codes)[0].view(patches.shape[:2])

    def decode(self, ids: Tensor) -> Tensor:
        """(B, P) int64 ids to the pictures they stand for, (B, 3, V, V)."""
        size = self.view_size
        return F.fold(self.codes[ids].transpose(1, 2), (size, size), kernel_size=PATCH, stride=PATCH)

    def save(self, folder: Path) -> None:
        """Write codebook.safetensors and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"codes": self.codes}, folder / "codebook.safetensors")
        size, codes = self.view_size, self.vocabulary_size
        settings = {"kind": _KIND, "grid": size // PATCH, "view_size": size, "patch": PATCH, "codes": codes}
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

    def to(self, device: torch.device | str) -> Self:
        """Move the codes; return itself."""
        self.codes = self.codes.to(device)
        return self


class DalleTokens:
    """The 8,192 tokens of DALL-E's dVAE, through transformers.FlavaImageCodebook from a local folder."""

    def __init__(self, folder: str | Path, grid: int):
        from transformers import FlavaImageCodebook  # seconds, and not needed for a patch codebook

        load: Any = FlavaImageCodebook.from_pretrained  # its annotation forgets output_loading_info
        model, report = load(str(folder), local_files_only=True, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:
            raise ValueError(
                f"data.visual_tokenizer={folder} lacks {len(report['missing_keys'])} weight(s) of the image codebook, "
                f"such as {min(report['missing_keys'])}; give the folder of a complete FlavaImageCodebook"
            )
        self.model = model.eval().requires_grad_(False)
        self.view_size = DALLE_PATCH * grid
        self.vocabulary_size = model.config.vocab_size

    @torch.no_grad()
    def __call__(self, view: Tensor) -> Tensor:
        """(B, 3, V, V) floats in [0, 1] to (B, P) int64 ids."""
        check_view(view, self.view_size)
        with torch.autocast(view.device.type, enabled=False):  # rounded logits would pick other tokens
            return self.model.get_codebook_indices(0.8 * view.float() + 0.1).flatten(1)

    def to(self, device: torch.device | str) -> Self:
        """Move the encoder; return itself."""
        self.model.to(device)
        return self


def load_visual_tokenizer(folder: str | Path, grid: int) -> VisualTokenizer:
    """Load what folder/config.json describes, for a grid of grid x grid patches.

    Raises ValueError when the folder holds no known tokeniser, or one fitted for another grid.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"data.visual_tokenizer={folder} has no readable config.json; give the folder of a patch codebook or VQ "
            "(from `simla prepare`) or of a FlavaImageCodebook (from `simla import`)"
        ) from error
    from simla_ds.data.vq_tokens import KIND, VqTokens  # which builds on this module

    if config.get("kind") in (_KIND, KIND):
        if config["grid"] != grid:
            raise ValueError(
                f"data.visual_tokenizer={folder} was fitted for {config['grid']} x {config['grid']} patches, the model "
                f"has {grid} x {grid}; set data.visual_tokenizer to one of grid {grid}, or "
                f"model.vision.image_size to {config['grid']} x model.vision.patch_size"
            )
        if config["kind"] == KIND:
            return VqTokens.load(folder, config)
        codes = load_file(folder / "codebook.safetensors")["codes"]
        if codes.shape != (config["codes"], 3 * PATCH**2):
            raise ValueError(
                f"data.visual_tokenizer={folder}: codebook.safetensors holds {tuple(codes.shape)}, config.json says "
                f"{(config['codes'], 3 * PATCH**2)}; prepare it again"
            )
        return PatchCodebook(codes, grid)
    if config.get("model_type") == "flava_image_codebook":
        return DalleTokens(folder, grid)
    raise ValueError(
        f"data.visual_tokenizer={folder}/config.json is of no known kind (kind={config.get('kind')}, "
        f"model_type={config.get('model_type')}); expected {_KIND}, {KIND} or flava_image_codebook"
    )


def fit_codebook(views: Iterable[Tensor], *, codes: int, grid: int, seed: int) -> PatchCodebook:
    """Fit codes patches by k-means to views.

    views: (3, V, V) floats in [0, 1] with V = 4 * grid. Deterministic by seed. Raises ValueError when the views are of
    another size or hold fewer patches than codes.
    """
    generator = torch.Generator().manual_seed(seed)
    patches = _sample_patches(views, grid, generator)
    if len(patches) < codes:
        raise ValueError(f"{len(patches)} patches cannot make {codes} visual tokens; give more pictures or fewer codes")
    return PatchCodebook(_kmeans(patches, codes, generator), grid)


def check_view(view: Tensor, size: int) -> None:
    """Raise ValueError unless view is (..., 3, size, size)."""
    if view.shape[-3:] != (3, size, size):
        raise ValueError(f"the visual tokeniser reads (B, 3, {size}, {size}), got {tuple(view.shape)}")


def _patches(view: Tensor) -> Tensor:
    """(B, 3, V, V) to (B, P, 48)."""
    return F.unfold(view, kernel_size=PATCH, stride=PATCH).transpose(1, 2)


def _sample_patches(views: Iterable[Tensor], grid: int, generator: torch.Generator) -> Tensor:
    """(N, 48) of the views' patches in random order, at most _FIT_PATCHES of them."""
    kept = []
    for view in views:
        check_view(view, PATCH * grid)
        kept.append(_patches(view.float()[None])[0])
    patches = torch.cat(kept) if kept else torch.empty(0, 3 * PATCH**2)
    return patches.index_select(0, torch.randperm(len(patches), generator=generator)[:_FIT_PATCHES])


def _kmeans(patches: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """(N, 48), in random order, to (codes, 48) centres: k-means++ on a part, then Lloyd's iterations on all.

    A centre that loses all its patches is put on one of those that fit their centre worst.
    """
    centres = _spread_start(patches[: 16 * codes], codes, generator)
    previous = None
    for _ in range(_ITERATIONS):
        index, distance = nearest(patches, centres)
        if previous is not None and torch.equal(index, previous):
            break
        previous = index
        counts = torch.bincount(index, minlength=codes)
        sums = torch.zeros_like(centres, dtype=torch.float64).index_add_(0, index, patches.double())
        centres = (sums / counts.clamp(min=1)[:, None]).float()
        dead = (counts == 0).nonzero().flatten()
        worst = distance.topk(len(dead)).indices
        centres[dead] = patches.index_select(0, worst)
    return centres


def _spread_start(patches: Tensor, codes: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre drawn by its squared distance to those so far.

    Plain backgrounds make many patches alike; a plain random sample would waste codes on them.
    """
    chosen = [int(torch.randint(len(patches), (1,), generator=generator))]
    distance = (patches - patches[chosen[0]]).square().sum(1)
    for _ in range(codes - 1):
        weights = distance if distance.sum() > 0 else torch.ones_like(distance)  # fewer kinds of patches than codes
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
        distance = torch.minimum(distance, (patches - patches[chosen[-1]]).square().sum(1))
    return patches.index_select(0, torch.tensor(chosen))


def nearest(patches: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 48), (K, 48) to the nearest code of each patch, (N,) int64, and its squared distance, (N,)."""
    parts = [_nearest_of_chunk(chunk, codes) for chunk in patches.split(_CHUNK)]
    return torch.cat([index for index, _ in parts]), torch.cat([distance for _, distance in parts])


def _nearest_of_chunk(patches: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(patches.device.type, enabled=False):
        scores = torch.addmm(codes.square().sum(1), patches, codes.T, alpha=-2)
    lowest = scores.min(1)
    return lowest.indices, (lowest.values + patches.square().sum(1)).clamp(min=0)
