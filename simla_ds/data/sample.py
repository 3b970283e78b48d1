"""One sample: a picture in RGB and the captions that describe it, or the named reason why it cannot be used."""

from __future__ import annotations

import io
import json
import re
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np
from PIL import Image

from simla_ds.data.shards import MAX_TEXT_BYTES, PICTURES

MAX_PIXELS = 64_000_000
"""Pictures with more pixels are not decoded (a decompression bomb, or a scan that would take 200 MB)."""

Reason = Literal[
    "picture missing",
    "picture empty",
    "picture truncated",
    "picture too large",
    "picture unreadable",
    "caption missing",
    "caption empty",
    "caption not text",
    "caption not UTF-8",
    "caption too large",
    "caption json broken",
    "sample unreadable",
    "shard truncated",
    "shard unreadable",
    "shard empty",
    "shard changed",
]
"""Every reason to skip a sample or the rest of a shard, as they are counted in metrics.jsonl."""
REASONS: tuple[Reason, ...] = get_args(Reason)

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # none that runs other programs, as EPS does
_SCALED = ("JPEG", "MPO")
"""Formats that can be decoded at a half, a quarter or an eighth of their size."""
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SAYS_SOMETHING = re.compile(r"[^\s,.'!?\"()*#:;~/-]")  # what clean_caption leaves something of
_DELETED = str.maketrans("-/", "  ", ",.'!?\"()*#:;~")
_SPACES = re.compile(r"\s{2,}")


class SkipSample(Exception):
    """A sample that cannot be used."""

    def __init__(self, reason: Reason):
        super().__init__(reason)
        self.reason: Reason = reason


@dataclass(frozen=True)
class Record:
    """What a sample says besides its picture."""

    captions: tuple[str, ...]
    """At least one, uncleaned."""
    sample_id: int
    """Hash of the key and its source, non-negative."""
    image_id: int
    """Hash of the json's image_id, or sample_id where there is none."""
    image_name: str | None = None
    """The json's image_id itself, what is no UTF-8 in it replaced."""


def read_record(key: str, members: Mapping[str, bytes | None], salt: int = 0) -> Record:
    """Captions and ids from a sample's json (`caption`: str or list of str; `image_id`) or else its txt.

    Captions of white space and punctuation alone are left out: they are equal for every picture.
    salt: of the sample's source, for sources may use the same keys and ids for other things. An image_id that says
    whose it is, as "coco:139", means the same picture in all of them.
    Raises SkipSample.
    """
    captions, image_id = None, None
    if "json" in members:
        try:
            fields = json.loads(_text(members["json"]))
        except (ValueError, RecursionError):  # ValueError: no JSON, or a number of thousands of digits
            raise SkipSample("caption json broken") from None
        if isinstance(fields, dict):
            captions, image_id = fields.get("caption"), fields.get("image_id")
    if captions is None and "txt" in members:
        captions = _text(members["txt"])
    if captions is None or captions == []:
        raise SkipSample("caption missing")
    captions = [captions] if isinstance(captions, str) else captions
    if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
        raise SkipSample("caption not text")
    try:
        "".join(captions).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, escaped in the json
        raise SkipSample("caption not UTF-8") from None
    captions = [caption for caption in captions if _SAYS_SOMETHING.search(caption)]
    if not captions:
        raise SkipSample("caption empty")
    sample_id = stable_hash(key) ^ salt
    if image_id is None:
        return Record(tuple(captions), sample_id, sample_id)
    name = str(image_id).encode("utf-8", "replace").decode()
    return Record(tuple(captions), sample_id, stable_hash(name) ^ (0 if ":" in name else salt), name)


def read_picture(members: Mapping[str, bytes | None], room: float = 0) -> Image.Image:
    """The sample's picture in RGB, upright; the first frame of an animation; transparency over white.

    room: a JPEG may be decoded at a half, quarter or eighth as long as the square root of its pixels stays >= room
    (libjpeg's scaled DCT, much faster); 0: always whole.
    Raises SkipSample.
    """
    return decode_picture(open_picture(picture_bytes(members)), room)


def picture_bytes(members: Mapping[str, bytes | None]) -> bytes:
    """Content of the sample's picture file. Raises SkipSample."""
    extension = next((extension for extension in PICTURES if extension in members), None)
    if extension is None:
        raise SkipSample("picture missing")
    data = members[extension]
    if data is None:
        raise SkipSample("picture too large")
    if not data:
        raise SkipSample("picture empty")
    return data


def open_picture(data: bytes) -> Image.Image:
    """The picture by its header, not decoded: its format, mode and size as stored. Raises SkipSample."""
    with _errors_as_reasons():
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        raise SkipSample("picture too large")
    return picture


def decode_picture(picture: Image.Image, room: float = 0) -> Image.Image:
    """Decode what open_picture returned, as read_picture does. Raises SkipSample."""
    with _errors_as_reasons():
        return upright_rgb(picture, room)


@contextmanager
def _errors_as_reasons() -> Iterator[None]:
    """Raise SkipSample for whatever Pillow raises."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half-readable metadata; bombs are refused by their size
            yield
    except (Image.DecompressionBombError, MemoryError):
        raise SkipSample("picture too large") from None
    except (EOFError, struct.error):
        raise SkipSample("picture truncated") from None
    except Exception as error:  # Pillow's plug-ins raise SyntaxError, IndexError and others on bad files
        truncated = any(word in str(error) for word in ("truncated", "broken data stream", "Truncated"))
        raise SkipSample("picture truncated" if truncated else "picture unreadable") from None


def clean_caption(text: str, max_words: int) -> str:
    """Normalise a caption as the official implementation does (ALBEF's pre_caption) and keep its first max_words.

    Lower case; , . ' ! ? " ( ) * # : ; ~ deleted; - and / to a space; <person> to person; runs of two or more white
    spaces to one space.
    """
    text = text.lower().translate(_DELETED).replace("<person>", "person")
    text = _SPACES.sub(" ", text).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:max_words])


def stable_hash(text: str) -> int:
    """A non-negative int64 that is the same in every process and on every machine."""
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "little") >> 1


def upright_size(picture: Image.Image) -> tuple[int, int]:
    """Width and height that what open_picture returned will have when decoded whole. Raises SkipSample."""
    with _errors_as_reasons():
        if picture.format not in _SCALED:
            picture.load()  # its header may not know yet how it is turned; TIFFs turn themselves
        turned = picture.format != "TIFF" and _orientation(picture) in (5, 6, 7, 8)
    return (picture.height, picture.width) if turned else picture.size


def _text(data: bytes | None) -> str:
    if data is None or len(data) > MAX_TEXT_BYTES:
        raise SkipSample("caption too large")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SkipSample("caption not UTF-8") from None


def upright_rgb(picture: Image.Image, room: float) -> Image.Image:
    if room and picture.format in _SCALED:
        shrink = min((picture.width * picture.height) ** 0.5 / room, 8.0)
        if shrink >= 2:
            picture.draft("RGB", (int(picture.width / shrink), int(picture.height / shrink)))
    picture.load()
    rgb, turn = _to_rgb(picture), _UPRIGHT.get(_orientation(picture))
    if turn is None:
        return rgb
    upright = rgb.transpose(turn)
    upright.info = {}  # the orientation is in there, in EXIF or XMP: who gets this picture must not turn it again
    return upright


def _orientation(picture: Image.Image) -> int:
    try:
        return picture.getexif().get(_ORIENTATION, 1)
    except Exception:  # broken metadata says nothing about the pixels
        return 1


def _to_rgb(picture: Image.Image) -> Image.Image:
    """Eight-bit RGB from any mode."""
    if picture.mode == "RGB" and "transparency" not in picture.info:
        return picture
    if picture.mode.startswith(("I", "F")):  # 16 bits, in one of Pillow's 16- or 32-bit modes, or TIFF's floats
        values = np.asarray(picture).astype(np.float32)
        scale = 255.0 if picture.mode == "F" and values.max(initial=0) <= 1 else 255.0 / 65535.0
        return Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data:
        layered = picture.convert("RGBA")
        paper = Image.new("RGBA", layered.size, "white")
        return Image.alpha_composite(paper, layered).convert("RGB")
    return picture.convert("RGB")
