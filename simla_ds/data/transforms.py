"""From an RGB picture to the encoder's view and the visual tokeniser's view, which show the same thing at every place.

Crop, flip and the geometric operations of RandAugment (shear, translate, rotate) are drawn once and applied to both
views; photometric operations (contrast, brightness, sharpness) change the encoder's view only. Operations and
strengths are those of the official implementation (REFERENCE: ALBEF's RandomAugment(2, 7)), on uint8.
Translation is scaled with the picture: magnitude / 256 of its side, the official 7 pixels at 256 px and magnitude 7.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torch.nn import functional as F

from simla_ds.config import Config
from simla_ds.data.sample import decode_picture, upright_size

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_GREY = (128, 128, 128)
_SIDED = re.compile(r"\b(left|right)", re.IGNORECASE)  # also leftmost, right-hand; a few words too many do no harm
_MIN_ASPECT, _MAX_ASPECT = 3 / 4, 4 / 3

Affine = tuple[float, float, float, float, float, float]
"""x_in = a x + b y + c, y_in = d x + e y + f, from a place in the new picture to one in the old, sides of length 1."""


def _shear_x(amount: float) -> Affine:
    return (1, 0.3 * amount, 0, 0, 1, 0)


def _shear_y(amount: float) -> Affine:
    return (1, 0, 0, 0.3 * amount, 1, 0)


def _translate_x(amount: float) -> Affine:
    return (1, 0, 10 / 256 * amount, 0, 1, 0)


def _translate_y(amount: float) -> Affine:
    return (1, 0, 0, 0, 1, 10 / 256 * amount)


def _rotate(amount: float) -> Affine:
    cos, sin = math.cos(math.radians(30 * amount)), math.sin(math.radians(30 * amount))
    return (cos, -sin, (1 - cos + sin) / 2, sin, cos, (1 - cos - sin) / 2)  # about the centre


def _identity(picture: Image.Image, strength: float) -> Image.Image:
    return picture


def _autocontrast(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.autocontrast(picture)


def _equalize(picture: Image.Image, strength: float) -> Image.Image:
    return ImageOps.equalize(picture)


def _brightness(picture: Image.Image, strength: float) -> Image.Image:
    return ImageEnhance.Brightness(picture).enhance(0.1 + 1.8 * strength)


def _sharpness(picture: Image.Image, strength: float) -> Image.Image:
    return ImageEnhance.Sharpness(picture).enhance(0.1 + 1.8 * strength)


GEOMETRIC: dict[str, Callable[[float], Affine]] = {
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateX": _translate_x,
    "TranslateY": _translate_y,
    "Rotate": _rotate,
}
"""The affine map of each operation for a strength in [-1, 1]; applied to both views."""
PHOTOMETRIC: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": _identity,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Brightness": _brightness,
    "Sharpness": _sharpness,
}
"""Each operation for a strength in [0, 1]; applied to the encoder's view."""
OPERATIONS = (*PHOTOMETRIC, *GEOMETRIC)


@dataclass(frozen=True)
class Geometry:
    """Everything that was drawn for one picture."""

    box: tuple[float, float, float, float]
    """Left, top, right, bottom of the crop, as shares of the picture's sides."""
    flip: bool
    operations: tuple[tuple[str, float], ...] = ()
    """Names of OPERATIONS with their strength, in [-1, 1] for geometric and [0, 1] for photometric ones."""


WHOLE = Geometry(box=(0.0, 0.0, 1.0, 1.0), flip=False)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random views of a picture: crop, flip, RandAugment."""

    image_size: int
    """S, side of the encoder's view in pixels."""
    visual_view_size: int
    """V, side of the visual tokeniser's view; 0: none is made."""
    crop_scale: tuple[float, float]
    flip: float
    augment_ops: int
    augment_magnitude: int

    def draw(self, width: int, height: int, caption: str, rng: np.random.Generator) -> Geometry:
        """Draw crop, flip and operations for a picture of width x height pixels described by caption."""
        box = draw_crop(width, height, self.crop_scale, rng)
        flip = rng.random() < self.flip and not _SIDED.search(caption)  # the draw is made either way
        strength = self.augment_magnitude / 10
        operations = []
        for _ in range(self.augment_ops):
            name = OPERATIONS[int(rng.integers(len(OPERATIONS)))]
            applied, mirrored = rng.random(2) < 0.5
            if applied:
                operations.append((name, -strength if mirrored and name in GEOMETRIC else strength))
        return Geometry(box, bool(flip), tuple(operations))

    def __call__(
        self, picture: Image.Image, caption: str, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the views, uint8 (3, S, S) and (3, V, V) or None, of what sample.open_picture returned.

        Drawn for the whole picture; a JPEG is then decoded no larger than its crop needs. Raises SkipSample.
        """
        width, height = upright_size(picture)
        geometry = self.draw(width, height, caption, rng)
        left, top, right, bottom = geometry.box
        shrink = min((right - left) * width, (bottom - top) * height) / max(self.image_size, self.visual_view_size)
        decoded = decode_picture(picture, room=math.sqrt(width * height) / shrink)
        return make_views(decoded, geometry, self.image_size, self.visual_view_size)


@dataclass(frozen=True, kw_only=True)
class EvalTransform:
    """The whole picture, resized without keeping its aspect (the official test transform)."""

    image_size: int
    visual_view_size: int

    def __call__(
        self, picture: Image.Image, caption: str, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the views, uint8 (3, S, S) and (3, V, V) or None. Nothing is drawn. Raises SkipSample."""
        return make_views(decode_picture(picture), WHOLE, self.image_size, self.visual_view_size)


def draw_crop(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """A crop as torchvision's RandomResizedCrop draws it: area uniform in scale, aspect log-uniform in 3/4 to 4/3,
    corners at whole pixels.

    Returns shares of the sides. After ten draws that don't fit: the largest central crop with an aspect in range; where
    scale is (1, 1) the whole picture, whatever its aspect.
    """
    draws = rng.random((10, 4))
    if scale[0] == 1:
        return WHOLE.box
    areas = width * height * (scale[0] + (scale[1] - scale[0]) * draws[:, 0])
    aspects = np.exp(math.log(_MIN_ASPECT) + math.log(_MAX_ASPECT / _MIN_ASPECT) * draws[:, 1])
    widths, heights = np.rint(np.sqrt(areas * aspects)), np.rint(np.sqrt(areas / aspects))
    fits = (widths >= 1) & (widths <= width) & (heights >= 1) & (heights <= height)
    if fits.any():
        first = int(fits.argmax())
        wide, high = float(widths[first]), float(heights[first])
        left, top = (width - wide + 1) * draws[first, 2] // 1, (height - high + 1) * draws[first, 3] // 1
    else:
        wide, high = min(width, round(height * _MAX_ASPECT)), min(height, round(width / _MIN_ASPECT))
        left, top = (width - wide) // 2, (height - high) // 2
    return left / width, top / height, (left + wide) / width, (top + high) / height


def make_views(
    picture: Image.Image, geometry: Geometry, image_size: int, visual_view_size: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """The encoder's view (3, S, S) and the visual tokeniser's (3, V, V), uint8; None when visual_view_size is 0."""
    crop = _crop(picture, geometry.box)
    view = _resize(crop, image_size, geometry.flip)
    if visual_view_size in (0, image_size):
        visual = view if visual_view_size else None
    else:
        visual = _resize(crop, visual_view_size, geometry.flip)
    return _operate(view, visual, geometry.operations) if geometry.operations else (view, visual)


def _operate(
    planes: np.ndarray, visual_planes: np.ndarray | None, operations: tuple[tuple[str, float], ...]
) -> tuple[np.ndarray, np.ndarray | None]:
    view = _picture(planes)
    visual = view if visual_planes is planes else None if visual_planes is None else _picture(visual_planes)
    for name, strength in operations:
        if name in GEOMETRIC:
            affine, before = GEOMETRIC[name](strength), view
            view = _warp(view, affine)
            if visual is before:  # no photometric operation has parted them yet
                visual = view
            elif visual is not None:
                visual = _warp(visual, affine)
        else:
            view = PHOTOMETRIC[name](view, strength)
    planes = _planes(view)
    if visual is None:
        return planes, None
    return planes, planes if visual is view else _planes(visual)


def normalise(views: Tensor) -> Tensor:
    """Encoder views uint8 (B, 3, S, S) to float32, with CLIP's mean and deviation per colour."""
    mean, std = _statistics(views.device)
    return views.float().sub_(mean).div_(std)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """CLIP's mean and deviation of pixels of 0 to 255, (3, 1, 1) each; kept, since copying them makes a GPU wait."""
    mean, std = (torch.tensor(values).view(3, 1, 1) * 255 for values in (CLIP_MEAN, CLIP_STD))
    return mean.to(device), std.to(device)


def _crop(picture: Image.Image, box: tuple[float, float, float, float]) -> Tensor:
    """(1, 3, height, width) uint8; of a picture that was decoded small, to the nearest of its pixels."""
    left, top, right, bottom = (round(share * side) for share, side in zip(box, picture.size * 2, strict=True))
    pixels = np.array(picture.crop((left, top, max(right, left + 1), max(bottom, top + 1))))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _resize(crop: Tensor, size: int, flip: bool) -> np.ndarray:
    """Bicubic with antialiasing: Pillow's result to a level of 255, where there is AVX2 in a quarter of its time."""
    view = F.interpolate(crop, (size, size), mode="bicubic", antialias=True)[0]
    return (view.flip(2) if flip else view).numpy()


def _warp(view: Image.Image, affine: Affine) -> Image.Image:
    a, b, c, d, e, f = affine
    pixels = (a, b, c * view.width, d, e, f * view.height)
    return view.transform(
        view.size, Image.Transform.AFFINE, pixels, resample=Image.Resampling.BILINEAR, fillcolor=_GREY
    )


def _picture(planes: np.ndarray) -> Image.Image:
    return Image.merge("RGB", [Image.fromarray(plane) for plane in planes])


def _planes(view: Image.Image) -> np.ndarray:
    return np.ascontiguousarray(np.asarray(view).transpose(2, 0, 1))


def make_transform(config: Config, visual_view_size: int, *, train: bool) -> TrainTransform | EvalTransform:
    """Return what a run does to its pictures. visual_view_size: side of the visual tokeniser's view, 0 for none."""
    image_size, data = config.model.vision.image_size, config.data
    if not train:
        return EvalTransform(image_size=image_size, visual_view_size=visual_view_size)
    return TrainTransform(
        image_size=image_size,
        visual_view_size=visual_view_size,
        crop_scale=data.crop_scale,
        flip=data.flip,
        augment_ops=data.augment_ops,
        augment_magnitude=data.augment_magnitude,
    )
