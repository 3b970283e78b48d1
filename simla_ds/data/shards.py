"""WebDataset shards on local disk: writing them reproducibly, finding them, and reading any sample of one.

A shard is a tar; consecutive members that share the part of their name before the first dot are one sample
(`000017.jpg` and `000017.json`: key `000017`). Nothing is ever extracted or unpickled: an index of names, offsets and
sizes is built from the tar headers and members are read in place, so links and `../` names have no effect.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from simla_ds.data.tar_headers import Damaged, walk

if TYPE_CHECKING:
    from simla_ds.data.remote import ShardCache

PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions read as the picture, the first present one wins."""
TEXTS = ("json", "txt")
"""Extensions read as the caption."""
MAX_MEMBER_BYTES = 64 << 20
"""Larger members are not read, so that memory stays bounded."""
MAX_TEXT_BYTES = 4 << 20
"""Nor are larger texts: a json of this size takes ten times as much once it is parsed."""
REMOTE = ("pipe:", "http://", "https://", "s3://", "gs://", "az://", "hf://", "memory://")
"""How names of shards begin that have to be fetched."""

INDEX_VERSION = 1
ARRAYS = ("names", "name_ends", "member_ends", "members")
"""Of a Shard."""


class ShardWriter:
    """Writes one shard under a temporary name and renames it when whole; equal samples give equal bytes.

    A context: leaving it by an exception removes what was written.
    """

    def __init__(self, path: Path):
        from webdataset.writer import TarWriter  # torch comes with it: who only reads starts in a tenth of the time

        self.path, self._temporary = path, path.with_name(f".{path.name}.{os.getpid()}")
        self._tar = TarWriter(str(self._temporary), encoder=False, mtime=0, user="simla", group="simla")

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample: {extension: bytes}."""
        self._tar.write({"__key__": key, **members})

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._tar.close()
            if kind is None:
                os.replace(self._temporary, self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


def shard_name(number: int) -> str:
    """File name of a shard that this project writes."""
    return f"shard-{number:06d}.tar"


def write_shards(samples: Iterable[tuple[str, dict[str, bytes]]], folder: Path, shard_size: int) -> list[Path]:
    """Write (key, {extension: bytes}) samples as folder/shard-000000.tar, ...; equal samples give equal bytes.

    shard_size: samples per shard. Each shard is written under a temporary name and renamed when whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, samples = [], iter(samples)
    for first in samples:
        with ShardWriter(folder / shard_name(len(written))) as shard:
            for key, members in chain([first], islice(samples, shard_size - 1)):
                shard.add(key, members)
        written.append(shard.path)
    return written


def find_shards(spec: str, key: str = "data.train", remote: bool = False) -> list[str]:
    """Paths of the shards that spec names: a folder, a file, a glob or a brace pattern; sorted.

    remote: addresses of shards elsewhere, and folders and globs of them, are meant too; refused otherwise.
    Raises ValueError, naming the configuration key, when nothing matches or a file of a brace pattern is missing.
    """
    from webdataset.shardlists import expand_urls

    if spec.startswith(REMOTE):
        if not remote:
            raise ValueError(f"{key}={spec}: only training and its evaluation fetch shards; copy them to a folder")
        return _find_remote(spec, key, expand_urls)
    expanded = os.path.expanduser(spec)
    if os.path.isdir(expanded):
        found = glob.glob(os.path.join(glob.escape(expanded), "*.tar"))
    elif is_pattern(expanded):
        found = glob.glob(expanded)
    else:
        names = expand_urls(expanded) if expanded else []
        found = [name for name in names if os.path.isfile(name)]
        if found and len(found) < len(names):
            there = set(found)
            missing = next(name for name in names if name not in there)
            lost = len(names) - len(found)
            raise ValueError(f"{key}={spec}: {lost} of {len(names)} shards are missing, first {missing}")
    if not found:
        raise ValueError(f"{key}={spec!r} matches no shards; give a folder with .tar files, a file or a brace pattern")
    return sorted(found)


def _find_remote(spec: str, key: str, expand_urls: Callable[[str], list[str]]) -> list[str]:
    """Addresses as they are, braces expanded; of a folder (ending in /) or a glob what is there."""
    if spec.startswith("pipe:") or not (spec.endswith("/") or is_pattern(spec)):
        return sorted(expand_urls(spec))
    from simla_ds.data.remote import listing

    found = listing(spec)
    if not found:
        raise ValueError(f"{key}={spec!r} matches no shards")
    return found


def is_pattern(spec: str) -> bool:
    """Whether a name is a glob. In an http address `?` begins the query."""
    return any(letter in spec for letter in ("*[" if spec.startswith(("http://", "https://")) else "*?["))


@dataclass(frozen=True)
class Shard:
    """Index of one tar, as arrays so that millions of samples stay small and are shared by forked workers."""

    path: str
    names: np.ndarray
    """(bytes,) uint8: the keys, one after the other, UTF-8."""
    name_ends: np.ndarray
    """(n,) int64: where each key ends in names."""
    member_ends: np.ndarray
    """(n,) int64: where each sample's rows end in members."""
    members: np.ndarray
    """(m, 3) int64: number of the extension, offset in the tar, bytes."""
    extensions: tuple[str, ...]
    problem: str
    """Empty, or why samples are missing: "shard truncated", "shard unreadable", "shard empty"."""
    note: str = ""
    """What was stored with the index by whoever chose its samples; empty when all samples are in it."""
    tar_bytes: int = 0
    """Size of the tar that a stored index was made of; 0: not known."""

    def __len__(self) -> int:
        return len(self.name_ends)

    def key(self, i: int) -> str:
        """Name of sample i."""
        start = self.name_ends[i - 1] if i else 0
        return self.names[start : self.name_ends[i]].tobytes().decode("utf-8", "replace")

    def sample(self, i: int) -> dict[str, tuple[int, int]]:
        """{extension: (offset, bytes)} of sample i."""
        start = self.member_ends[i - 1] if i else 0
        rows = self.members[start : self.member_ends[i]].tolist()
        return {self.extensions[extension]: (offset, size) for extension, offset, size in rows}


class SelectionOutdated(ValueError):
    """The choice of samples kept with an index was made of another tar."""


def open_shard(path: str) -> Shard:
    """Index of a tar: from PATH.index.npz when that is of this very tar, else from the headers, and then kept there.

    A choice of samples stands in that file only, so it is never lost: copying a tar changes its time, and where size
    and headers show the same samples the choice holds; else SelectionOutdated is raised. Of a file that holds no sample
    nothing is kept: it may be no tar at all.
    """
    try:
        stamp = _stamp(path)
    except OSError:
        return _to_shard(path, [], "shard unreadable")
    shard = load_index(_sidecar(path), path, stamp)
    if shard is None:
        shard = index_tar(path)
        stored = load_index(_sidecar(path), path)
        if stored is not None and stored.note:
            _require_same_tar(stored, shard, stamp["bytes"])
            shard = stored
        if len(shard):
            with contextlib.suppress(OSError):  # where the folder cannot be written, the headers are read each time
                save_index(_sidecar(path), shard, stamp)
    return shard


def _require_same_tar(selection: Shard, now: Shard, tar_bytes: int) -> None:
    """Raise SelectionOutdated unless the chosen samples are where they were, in a tar of the same size."""
    places = {(now.key(i), *sorted(now.sample(i).items())) for i in range(len(now))}
    chosen = [(selection.key(i), *sorted(selection.sample(i).items())) for i in range(len(selection))]
    moved = sum(place not in places for place in chosen)
    if tar_bytes != selection.tar_bytes:
        difference = f"the tar has {tar_bytes} bytes, had {selection.tar_bytes}"
    elif moved:
        difference = f"{moved} of the {len(chosen)} chosen samples are not where they were"
    elif places and not chosen:
        difference = "none of its samples was chosen, so that nothing shows whether it is the same"
    else:
        return
    raise SelectionOutdated(
        f"{selection.path} is not the tar that its samples were chosen of ({difference}): run `simla prepare` on it "
        f"again, or delete {_sidecar(selection.path)} to use all {len(now)} samples"
    )


def load_index(file: str, path: str, stamp: Mapping[str, Any] | None = None) -> Shard | None:
    """The stored index of the tar at `path`; None when there is none, or of another version, or with another stamp."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            header = json.loads(stored["header"].tobytes())
            if all(header[name] == value for name, value in (stamp or {"version": INDEX_VERSION}).items()):
                arrays = {name: stored[name] for name in ARRAYS}
                extensions, note = tuple(header["extensions"]), header.get("note", "")
                problem, tar_bytes = header["problem"], header.get("bytes", 0)
                _require_sound(arrays, extensions)
                return Shard(path, **arrays, extensions=extensions, problem=problem, note=note, tar_bytes=tar_bytes)
    except (OSError, EOFError, KeyError, ValueError, TypeError, MemoryError, zipfile.BadZipFile, zlib.error):
        pass  # none, half-written by another program, or no index of ours: who serves a shard may serve anything
    return None


def _require_sound(arrays: Mapping[str, np.ndarray], extensions: tuple[str, ...]) -> None:
    """Raise ValueError unless the arrays are what Shard says, so that every sample can be looked up."""
    names, name_ends, member_ends, members = (arrays[name] for name in ARRAYS)
    for ends, most in ((name_ends, len(names)), (member_ends, len(members))):
        if ends.dtype != np.int64 or ends.ndim != 1 or (np.diff(ends, prepend=0, append=most) < 0).any():
            raise ValueError("ends are not in order")
    if len(name_ends) != len(member_ends) or names.dtype != np.uint8 or members.dtype != np.int64:
        raise ValueError("arrays do not go together")
    if members.shape != (len(members), 3) or (members < 0).any() or (members[:, 0] >= len(extensions)).any():
        raise ValueError("members are not (extension, offset, bytes)")


def store_selection(shard: Shard, chosen: Iterable[int], note: str) -> None:
    """Keep an index beside the tar with only the chosen samples: open_shard then knows no others of this tar.

    note: why, as Shard.note. Raises OSError where the folder cannot be written.
    """
    samples = [(shard.key(i), shard.sample(i)) for i in chosen]
    selected = _to_shard(shard.path, samples, shard.problem, note or "selection")
    save_index(_sidecar(shard.path), selected, _stamp(shard.path))


def index_tar(path: str) -> Shard:
    """Index of a tar from its headers. Of a tar cut in the middle, the whole samples before the cut."""
    samples: list[tuple[str, dict[str, tuple[int, int]]]] = []
    problem = cut_key = ""
    try:
        with open(path, "rb") as file:
            for name, offset, size in walk(file, os.fstat(file.fileno()).st_size):
                key, extension = _split(name)
                if not extension:
                    continue
                if not samples or samples[-1][0] != key or extension in samples[-1][1]:
                    samples.append((key, {}))
                samples[-1][1][extension] = (offset, size)
    except Damaged as damage:
        problem, cut_key = damage.reason, _split(damage.name)[0]
    except OSError:
        problem = "shard unreadable"
    if problem and samples:
        key, last = samples[-1]
        if key == cut_key or not (set(last) & set(PICTURES) and set(last) & set(TEXTS)):
            samples.pop()
    if not problem and not samples:
        problem = "shard empty"
    return _to_shard(path, samples, problem)


class ShardFiles:
    """Reads members of shards by position, keeping the last files open. Safe to copy into worker processes."""

    def __init__(self, shards: list[Shard], keep_open: int = 32, cache: ShardCache | None = None):
        """cache: where remote shards are had from."""
        self.shards, self.cache = shards, cache
        self.keep_open = keep_open
        self._open: OrderedDict[int, int] = OrderedDict()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self):
        for descriptor in self._open.values():
            os.close(descriptor)

    @property
    def retried(self) -> int:
        """Fetches of remote shards that failed and were tried again, in this process."""
        return 0 if self.cache is None else self.cache.retried

    def read(self, shard: int, i: int) -> dict[str, bytes | None]:
        """Picture and texts of a sample by extension; None for members above most_bytes."""
        index = self.shards[shard].sample(i)
        picture = next((extension for extension in PICTURES if extension in index), None)
        wanted = [name for name in (picture, *TEXTS) if name is not None and name in index]
        descriptor = self._descriptor(shard)
        read: dict[str, bytes | None] = {}
        for name in wanted:
            offset, size = index[name]
            read[name] = os.pread(descriptor, size, offset) if size <= most_bytes(name) else None
        return read

    def _descriptor(self, shard: int) -> int:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            path = self.shards[shard].path
            if self.cache is not None and path.startswith(REMOTE):
                path = self.cache.fetch(path)
            self._open[shard] = os.open(path, os.O_RDONLY)
            if len(self._open) > self.keep_open:
                os.close(self._open.popitem(last=False)[1])
        return self._open[shard]


def most_bytes(extension: str) -> int:
    """Size above which a member with this extension is not read."""
    return MAX_TEXT_BYTES if extension in TEXTS else MAX_MEMBER_BYTES


def _split(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a member, split at the base name's first dot; no extension: not of a sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return (folder + slash + stem, extension.lower()) if stem else (name, "")


def _to_shard(path: str, samples: list[tuple[str, dict[str, tuple[int, int]]]], problem: str, note: str = "") -> Shard:
    keys = [key.encode() for key, _ in samples]
    number: dict[str, int] = {}
    rows = [
        (number.setdefault(name, len(number)), offset, size)
        for _, members in samples
        for name, (offset, size) in members.items()
    ]
    return Shard(
        path,
        names=np.frombuffer(b"".join(keys), dtype=np.uint8),
        name_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
        member_ends=np.cumsum([len(members) for _, members in samples], dtype=np.int64),
        members=np.array(rows, dtype=np.int64).reshape(-1, 3),
        extensions=tuple(number),
        problem=problem,
        note=note,
    )


def _sidecar(path: str) -> str:
    return f"{path}.index.npz"


def _stamp(path: str) -> dict[str, int]:
    """What tells whether a stored index is of this very tar. Raises OSError."""
    status = os.stat(path)
    return {"version": INDEX_VERSION, "bytes": status.st_size, "mtime_ns": status.st_mtime_ns}


def save_index(file: str, shard: Shard, stamp: Mapping[str, Any] | None = None) -> None:
    """Write an index under a temporary name, then rename. stamp: what load_index is to find. Raises OSError."""
    temporary = f"{file}.{os.getpid()}"
    said = {"extensions": shard.extensions, "problem": shard.problem, "note": shard.note}
    header = json.dumps({**(stamp or {"version": INDEX_VERSION}), **said}).encode()
    arrays = {name: getattr(shard, name) for name in ARRAYS}
    try:
        with open(temporary, "wb") as opened:
            np.savez(opened, header=np.frombuffer(header, dtype=np.uint8), **arrays)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
