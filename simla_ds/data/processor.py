"""From pictures and captions to a model's inputs, by what its folder says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from simla_ds.config import ModelConfig, VocabularyConfig
from simla_ds.data.sample import SkipSample, clean_caption, read_picture, upright_rgb
from simla_ds.data.text import TextTokenizer
from simla_ds.data.transforms import CLIP_MEAN, CLIP_STD, WHOLE, make_views

PREPROCESSOR = "preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


class SimlaProcessor:
    """From pictures and captions to the model's inputs, exactly as evaluation during training makes them.

    Not one of transformers' processors: theirs would read a "[MASK]" in a caption as the special token and resize with
    other rounding. Build it with from_pretrained.
    """

    def __init__(self, tokenizer: TextTokenizer, settings: dict[str, Any]):
        self.tokenizer = tokenizer
        self.image_size, self.max_words = int(settings["image_size"]), int(settings["max_words"])
        self.mean, self.std = (torch.tensor(settings[k]).view(3, 1, 1) * 255 for k in ("image_mean", "image_std"))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> SimlaProcessor:
        """Read a model folder (or its teacher's). ValueError when files are missing or don't belong to the model."""
        folder = Path(folder)
        described, settings = read_json(folder / "config.json"), read_json(folder / PREPROCESSOR)
        try:
            vocabulary = VocabularyConfig(**described["model"]["vocabulary"])
            tokenizer = TextTokenizer(folder, max_tokens=int(settings["max_tokens"]), add_sep=vocabulary.add_sep)
            _require_same_vocabulary(folder, tokenizer.vocabulary, vocabulary)
            return cls(tokenizer, settings)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder} has settings this version does not read: {error!r}") from error

    def __call__(
        self,
        images: Image.Image | str | Path | Sequence[Image.Image | str | Path] | None = None,
        text: str | Sequence[str] | None = None,
    ) -> BatchFeature:
        """Return pixel_values (I, 3, S, S) float32; input_ids and attention_mask (T, L) int64; what was given of them.

        Pictures are Pillow images or paths. ValueError when one can't be read.
        """
        inputs: dict[str, Tensor] = {}
        if images is not None:
            listed = [images] if isinstance(images, (Image.Image, str, Path)) else images
            views = torch.stack([torch.from_numpy(self._view(image)) for image in listed])
            inputs["pixel_values"] = (
                views.float().sub_(self.mean).div_(self.std)
            )  # as transforms.normalise, with this folder's values
        if text is not None:
            captions = [text] if isinstance(text, str) else text
            rows = [torch.tensor(self.tokenizer.encode(clean_caption(c, self.max_words))[0]) for c in captions]
            pad = self.tokenizer.vocabulary.pad
            inputs["input_ids"] = pad_sequence(rows, batch_first=True, padding_value=pad)
            masks = [torch.ones_like(row) for row in rows]
            inputs["attention_mask"] = pad_sequence(masks, batch_first=True)
        return BatchFeature(inputs)

    def _view(self, image: Image.Image | str | Path) -> np.ndarray:
        """(3, S, S) uint8, the whole picture."""
        try:
            if isinstance(image, Image.Image):
                picture = upright_rgb(image, room=0)
            else:
                picture = read_picture({"png": Path(image).read_bytes()})  # the format is told by the bytes
        except (SkipSample, OSError) as error:
            raise ValueError(f"{image} cannot be used: {error}") from error
        return make_views(picture, WHOLE, self.image_size, 0)[0]


def save_processor(config: ModelConfig, tokenizer: Path, target: Path, max_words: int, max_tokens: int) -> None:
    """Write into target what SimlaProcessor.from_pretrained reads. ValueError when the tokenizer isn't the model's."""
    _require_same_vocabulary(tokenizer, TextTokenizer(tokenizer).vocabulary, config.vocabulary)
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, target / name)
    settings = {
        "image_size": config.vision.image_size,
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
        "max_words": max_words,
        "max_tokens": max_tokens,
    }
    (target / PREPROCESSOR).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _require_same_vocabulary(source: Path, given: VocabularyConfig, wanted: VocabularyConfig) -> None:
    """Refuse a tokenizer with other ids than the model was built for (ValueError)."""
    given = replace(given, visual_size=wanted.visual_size, add_sep=wanted.add_sep)
    for name, value in asdict(given).items():
        if value != getattr(wanted, name):
            raise ValueError(
                f"the tokenizer in {source} has vocabulary.{name}={value}, the model {getattr(wanted, name)}: "
                "give the tokenizer it was trained with"
            )


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a model folder's JSON file; ValueError when it isn't there or isn't JSON."""
    if not file.is_file():
        raise ValueError(f"{file.parent} is no model folder: {file.name} is missing")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
