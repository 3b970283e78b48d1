"""Positions of a patch grid at another resolution than they were trained at: one way for files and for networks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resample(table: Tensor, patches: int) -> Tensor:
    """Return [CLS]'s row and a square grid of positions, (1 + old, D), for another grid: (1 + patches, D).

    Bicubic in float32, not antialiased, as ALBEF and SIMLA resample for fine-tuning. The same table if it fits.

    Raises ValueError where the rows are not [CLS] and a square grid.
    """
    trained = len(table) - 1
    if trained == patches:
        return table
    old, new = round(trained**0.5), round(patches**0.5)
    if old * old != trained:
        raise ValueError(f"{len(table)} rows, not [CLS] and a square grid")
    grid = table[1:].T.reshape(1, -1, old, old).float()
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False).to(table.dtype)
    return torch.cat([table[:1], grid.flatten(2)[0].T])
