"""The headers of a tar, one after the other; unlike tarfile, this says where a damaged one breaks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

_BLOCK = 512


class Damaged(Exception):
    """The tar ends or breaks within `name`."""

    def __init__(self, reason: str, name: str = ""):
        self.reason, self.name = reason, name


def walk(file: BinaryIO, end: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, offset, bytes) of the regular files of a tar of `end` bytes (ustar, GNU, pax). Raises Damaged."""
    position, override = 0, {}
    while True:
        file.seek(position)
        header = file.read(_BLOCK)
        if len(header) < _BLOCK:
            raise Damaged("shard truncated")
        if not header.rstrip(b"\0"):
            return
        size = _number(header[124:136])
        if size is None or _number(header[148:156]) != sum(header[:148]) + sum(header[156:]) + 8 * 32:
            raise Damaged("shard unreadable")
        size = _decimal(override["size"]) if "size" in override else size
        if size is None or size < 0:  # to go back would never end
            raise Damaged("shard unreadable")
        name, data = override.get("path") or _name(header), position + _BLOCK
        if data + size > end:
            raise Damaged("shard truncated", name)
        position = data + -(-size // _BLOCK) * _BLOCK
        kind = header[156:157]
        if kind == b"L":
            override["path"] = file.read(min(size, 1 << 16)).rstrip(b"\0").decode("utf-8", "replace")
        elif kind == b"x":
            override.update(_pax_records(file.read(min(size, 1 << 20))))
        elif kind not in (b"g", b"K"):
            override = {}
            if kind in (b"0", b"\0", b"7"):
                yield name, data, size


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return name.decode("utf-8", "replace")


def _number(field: bytes) -> int | None:
    """A number of a tar header: octal digits, or big-endian bytes after 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0", 1)[0].strip() or b"0", 8)
    except ValueError:
        return None


def _decimal(text: str) -> int | None:
    """A number of a pax header."""
    return int(text) if text.isdecimal() and len(text) < 20 else None


def _pax_records(data: bytes) -> dict[str, str]:
    """path and size of a pax header: records of the form `LENGTH KEY=VALUE\\n`."""
    records = {}
    while data:
        length, _, _ = data.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(data):
            raise Damaged("shard unreadable")
        key, _, value = data[len(length) + 1 : int(length) - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        data = data[int(length) :]
    return {key: records[key] for key in ("path", "size") if key in records}
