"""Safetensors files written as a stream, and tensors cut in pieces over several of them.

    write_tensors           one file, one tensor in memory at a time
    write_pieces, Pieces    DIR/index.json and DIR/rank_00000.safetensors ...: each rank writes the ranges of flattened
                            tensors that it owns, anyone reads any range

Nothing here knows ranks' communication or DeepSpeed. All pieces are float32.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "index.json"
_DTYPES = {torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a small file at once. OSError when it cannot be written, as for any other file."""
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # no OSError, though it wraps one
        raise OSError(f"{path}: {error}") from error


def write_tensors(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor_of: Callable[[str], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write tensors of one dtype, asking for each when it is its turn; return what a manifest says of the file.

    The hash is of what was meant to be written, so that a disk which changed it is found out.

    Raises:
        ValueError: a tensor has another shape or dtype than was announced.
        OSError: the disk is full, say; what was written stays.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    digest = hashlib.blake2b(digest_size=16)
    with path.open("wb") as file:
        for content in (len(text).to_bytes(8, "little"), text):
            digest.update(content)
            file.write(content)
        for name, shape in shapes.items():
            tensor = tensor_of(name)
            if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
                raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, announced as {shape} {dtype}")
            content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        return {"bytes": file.tell(), "blake2b": digest.hexdigest()}


@dataclass(frozen=True)
class Piece:
    """A range of a flattened tensor."""

    tensor: str
    shape: tuple[int, ...]
    """Of the whole."""
    start: int
    values: Tensor
    """(count,) float32 on any device."""


@dataclass
class Listing:
    """What one rank wrote: the file's place in a manifest, and which ranges it holds."""

    file: str
    entry: dict[str, Any]
    ranges: list[tuple[str, tuple[int, ...], int, int]] = field(default_factory=list)
    """(tensor, shape of the whole, first element, number of elements)."""


def write_pieces(folder: Path, rank: int, pieces: list[Piece]) -> Listing:
    """Write a rank's pieces. The index is written from all ranks' listings, by write_index."""
    keyed = {f"{piece.tensor}@{piece.start}": piece for piece in pieces}
    file = f"rank_{rank:05d}.safetensors"
    shapes = {key: (piece.values.numel(),) for key, piece in keyed.items()}
    entry = write_tensors(folder / file, shapes, lambda key: keyed[key].values)
    return Listing(file, entry, [(p.tensor, tuple(p.shape), p.start, p.values.numel()) for p in pieces])


def write_index(folder: Path, listings: list[Listing]) -> None:
    """Write the index of all ranks' pieces. RuntimeError unless they cover each tensor exactly once."""
    tensors: dict[str, dict[str, Any]] = {}
    for listing in listings:
        for tensor, shape, start, count in listing.ranges:
            entry = tensors.setdefault(tensor, {"shape": list(shape), "pieces": []})
            entry["pieces"].append([start, count, listing.file])
    for name, entry in tensors.items():
        entry["pieces"].sort()
        end = 0
        for start, count, _ in entry["pieces"]:
            if start != end:
                raise RuntimeError(f"{name} was written with a gap or an overlap between elements {end} and {start}")
            end += count
        if end != prod(entry["shape"]):
            raise RuntimeError(f"only {end} of the {prod(entry['shape'])} elements of {name} were written")
    (folder / INDEX).write_text(json.dumps(tensors))


class Pieces(Mapping[str, Tensor]):
    """Tensors by name, read whole or in part; files are opened when they are needed first."""

    def __init__(self, folder: Path, prefix: str = ""):
        """prefix: show only tensors whose name begins so, without it."""
        self.folder, self.prefix = folder, prefix
        index = json.loads((folder / INDEX).read_text())
        self._entries = {name.removeprefix(prefix): e for name, e in index.items() if name.startswith(prefix)}
        self._files: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries  # Mapping's own would read the tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.read(name, 0, prod(self.shape(name))).view(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return tuple(self._entries[name]["shape"])

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Return elements start to start + count of a flattened tensor, in new memory."""
        values = torch.empty(count)
        for first, number, file in self._entries[name]["pieces"]:
            low, high = max(first, start), min(first + number, start + count)
            if low < high:
                piece = self._file(file).get_slice(f"{self.prefix}{name}@{first}")
                values[low - start : high - start].copy_(piece[low - first : high - first])
        return values

    def _file(self, name: str) -> Any:
        if name not in self._files:
            self._files[name] = safe_open(self.folder / name, "pt")
        return self._files[name]
