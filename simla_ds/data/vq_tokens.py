"""A small trained VQ tokeniser (van den Oord et al. 2017): codes of patches as their surroundings show them.

Encoder and decoder add a little convolutional network to the plain patches, so that it begins where a patch codebook
is and learns what neighbours tell: the encoder which code gives back most, the decoder how codes side by side look.
B pictures, G side of the patch grid, P = G * G tokens in row-major order, K codes, as data.visual_tokens.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Self

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn import functional as F

from simla_ds.data.visual_tokens import PATCH, check_view, nearest

KIND = "vq"
COLOURS = 3 * PATCH**2
"""Numbers of a patch, and width of a code."""
_WEIGHTS = "vq.safetensors"


class Neighbourhood(nn.Module):
    """(B, 48, G, G) patches plus what a convolutional network makes of them and those around; at first nothing."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        widths = [COLOURS, *[width] * layers]
        convolutions = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
        self.layers = nn.ModuleList(convolutions)
        self.last = nn.Conv2d(width, COLOURS, 1)
        for weight in self.last.parameters():
            nn.init.zeros_(weight)

    def forward(self, patches: Tensor) -> Tensor:
        """(B, 48, G, G) to the same."""
        x = patches
        for layer in self.layers:
            x = F.gelu(layer(x))
        return patches + self.last(x)


class VqTokens(nn.Module):
    """Nearest of K codes to each patch of the encoder."""

    codes: Tensor
    """(K, 48) float32."""

    def __init__(self, codes: int, grid: int, width: int):
        """codes: K; grid: G; width: of both convolutional networks."""
        super().__init__()
        self.view_size, self.vocabulary_size, self.width = PATCH * grid, codes, width
        self.encoder, self.decoder = Neighbourhood(width, 2), Neighbourhood(width, 3)
        self.register_buffer("codes", torch.zeros(codes, COLOURS))

    @torch.no_grad()
    def forward(self, view: Tensor) -> Tensor:
        """(B, 3, V, V) floats in [0, 1] to (B, P) int64 ids."""
        check_view(view, self.view_size)
        with torch.autocast(view.device.type, enabled=False):  # rounded features would pick other codes
            encoded = self.encode(view.float()).permute(0, 2, 3, 1)
        return nearest(encoded.reshape(-1, COLOURS), self.codes)[0].view(len(view), -1)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        """(B, P) int64 ids to the pictures they stand for, (B, 3, V, V)."""
        grid = self.view_size // PATCH
        quantised = self.codes[ids].transpose(1, 2).reshape(len(ids), COLOURS, grid, grid)
        return self.paint(quantised).clamp(0, 1)

    def encode(self, view: Tensor) -> Tensor:
        """(B, 3, V, V) to what is compared with the codes, (B, 48, G, G)."""
        return self.encoder(F.pixel_unshuffle(view, PATCH))

    def paint(self, quantised: Tensor) -> Tensor:
        """(B, 48, G, G) codes in their places to pictures, (B, 3, V, V)."""
        return F.pixel_shuffle(self.decoder(quantised), PATCH)

    def save(self, folder: Path) -> None:
        """Write vq.safetensors and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / _WEIGHTS))
        settings = {
            "kind": KIND,
            "grid": self.view_size // PATCH,
            "view_size": self.view_size,
            "patch": PATCH,
            "codes": self.vocabulary_size,
            "width": self.width,
        }
        (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path, config: dict[str, int]) -> Self:
        """Load what `save` wrote; ValueError where the weights are not those of config.json."""
        tokens = cls(config["codes"], config["grid"], config["width"])
        try:
            load_model(tokens, str(folder / _WEIGHTS))
        except (OSError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise ValueError(f"data.visual_tokenizer={folder}: {reason}; prepare it again") from error
        return tokens.eval().requires_grad_(False)
