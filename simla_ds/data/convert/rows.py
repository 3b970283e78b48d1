"""What a source yields: where a picture is and what is said about it, nothing read or checked yet."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simla_ds.data.sample import Reason, SkipSample
from simla_ds.data.shards import MAX_MEMBER_BYTES, most_bytes

_READ = 1 << 20
_LARGEST_ITEM = 256 << 20


@dataclass(frozen=True)
class Row:
    """A picture in a file, and its captions."""

    name: str
    """What the source calls it; stands beside the reason when it is dropped."""
    picture: tuple[str, ...] | bytes
    """Paths to look for it, the first that exists is read; or the file's content."""
    captions: Any
    """A string or a list of strings; anything else is found out when the row is read."""
    image_id: str | int | None = None
    """Equal for rows that show the same picture."""

    def members(self) -> Mapping[str, bytes | None]:
        """Return it as a shard would hold it: json and, if there is one, the picture. Raises SkipSample."""
        try:
            text = json.dumps({"caption": self.captions, "image_id": self.image_id}).encode()
        except TypeError:  # a table's column of bytes or dates
            raise SkipSample("caption not text") from None
        members: dict[str, bytes | None] = {"json": text}
        if isinstance(self.picture, bytes):
            return members | {"jpg": self.picture}
        for path in self.picture:
            try:
                return members | {"jpg": read_file(path)}
            except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a null byte in the name
                continue
            except OSError:
                raise SkipSample("picture unreadable") from None
        return members


@dataclass(frozen=True)
class TarRow:
    """A sample of a tar that is there already."""

    name: str
    path: str
    parts: dict[str, tuple[int, int]]
    """Offset and bytes of each member by its extension."""
    problem: Reason | None = None
    """Why it can't be read, known beforehand: it stands for what a damaged tar has lost."""

    def members(self) -> Mapping[str, bytes | None]:
        """Return {extension: bytes}; None for members above shards.most_bytes. Raises SkipSample."""
        if self.problem:
            raise SkipSample(self.problem)
        try:
            with open(self.path, "rb") as file:
                return {
                    extension: os.pread(file.fileno(), size, offset) if size <= most_bytes(extension) else None
                    for extension, (offset, size) in self.parts.items()
                }
        except OSError:
            raise SkipSample("sample unreadable") from None


AnyRow = Row | TarRow


def read_file(path: str) -> bytes | None:
    """Content of a regular file; None above MAX_MEMBER_BYTES. OSError for anything else: a pipe would wait for ever."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        return file.read() if status.st_size <= MAX_MEMBER_BYTES else None


def under(folders: tuple[Path, ...], name: Any) -> tuple[str, ...]:
    """Paths of a file in each of the folders; none when the name is no text or climbs out of them."""
    if not isinstance(name, str) or not name:
        return ()
    relative = os.path.normpath(name)
    if os.path.isabs(relative) or relative.split(os.sep)[0] == "..":
        return ()
    return tuple(os.path.join(folder, relative) for folder in folders)


def dicts(items: Any) -> list[dict]:
    """Return the items of a list of JSON objects; an empty one for what is no object, so that numbers stay right."""
    return [item if isinstance(item, dict) else {} for item in items] if isinstance(items, list) else []


def require_folders(folders: tuple[Path, ...]) -> None:
    """Raise ValueError, naming it, when one of the folders of pictures is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"--images {folder} is no folder; give the folder that the pictures' names start from")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds. ValueError, naming the file, when it is broken."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return json.load(file, object_hook=_without_tokens)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is no whole JSON file ({error}); fetch it again") from None


def json_items(path: Path) -> Iterator[Any]:
    """Yield the items of a JSON file that is one list, without holding all of it. ValueError when it is broken."""
    decoder, text, position, wanted = json.JSONDecoder(), "", 0, _READ
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        text = file.read(_READ).lstrip("\ufeff \t\r\n")
        if not text.startswith("["):
            raise ValueError(f"{path} is not a JSON list; this source reads [{{...}}, {{...}}]")
        position = 1
        while True:
            position = _skip(text, position, " \t\r\n,")
            if text[position : position + 1] == "]":
                return
            try:
                item, position = decoder.raw_decode(text, position)
                wanted = _READ
            except RecursionError:
                raise ValueError(f"{path} is nested too deeply to be a list of annotations") from None
            except json.JSONDecodeError as error:
                more = file.read(wanted) if len(text) - position < _LARGEST_ITEM else ""
                if not more:
                    raise ValueError(f"{path} is no whole JSON file ({error.msg}); fetch it again") from None
                text, position, wanted = text[position:] + more, 0, 2 * wanted
                continue
            yield item


def _skip(text: str, position: int, letters: str) -> int:
    while position < len(text) and text[position] in letters:
        position += 1
    return position


def _without_tokens(fields: dict) -> dict:
    fields.pop("tokens", None)  # Karpathy's files hold each caption a second time, in words
    return fields
