"""Heat maps for people: where in a picture the model finds what a text says.  (`simla visualize`)"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from simla_ds.data.processor import SimlaProcessor
from simla_ds.data.sample import read_picture
from simla_ds.downstream.grounding import heat_maps, upsample
from simla_ds.hub import load_model_folder

SHOWN_SIDE = 384
"""Pixels of the longer side at least: scenes have 128."""


def visualize(folder: Path, image: Path, text: str, out: Path, layer: int | None = None, device: str = "auto") -> float:
    """Write the picture beside itself under its heat map as a PNG; return the probability that the text matches.

    device: as hub.load_model_folder's. Raises ValueError: no model folder, an unreadable picture, a layer without
    cross-attention.
    """
    model, _ = load_model_folder(folder, device=device)
    inputs = SimlaProcessor.from_pretrained(folder)(image, text).to(next(model.parameters()).device)
    batch = {
        "image": inputs["pixel_values"],
        "input_ids": inputs["input_ids"],
        "text_mask": inputs["attention_mask"].bool(),
    }
    if layer is not None and not 0 <= layer < len(model.stream.layers):
        raise ValueError(f"--layer {layer}: the model has layers 0 to {len(model.stream.layers) - 1}")
    maps, _ = heat_maps(model, batch, layer)
    with torch.no_grad():
        fused, _ = model.text_over_image(batch["input_ids"], batch["text_mask"], model.image_encoder(batch["image"]))
        probability = float(model.match_head(fused[:, 0]).float().softmax(-1)[0, 1])
    picture = read_picture({"png": image.read_bytes()})  # as the model saw it: upright
    scale = max(1.0, SHOWN_SIDE / max(picture.size))
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    sheet = Image.new("RGB", (2 * picture.width, picture.height))
    sheet.paste(picture, (0, 0))
    sheet.paste(overlay(picture, upsample(maps[0].cpu(), *picture.size).numpy()), (picture.width, 0))
    sheet.save(out, "PNG")
    return probability


def overlay(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """Lay heat (height, width) over a picture of that size: red where it is hottest, grey where it is not."""
    low, high = float(heat.min()), float(heat.max())
    share = ((heat - low) / max(high - low, 1e-12))[..., None]
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    colour = np.array([255.0, 40.0, 0.0], dtype=np.float32)
    return Image.fromarray((grey * (1 - 0.7 * share) + colour * 0.7 * share).clip(0, 255).astype(np.uint8))
