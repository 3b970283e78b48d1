"""Large indexes of shards in one file that all processes of a machine map, so that its memory holds them once.

An index has some 70 bytes a sample. Eight ranks that each hold that of 400 million samples would need 230 GB; mapped,
it is 29 GB of the page cache, which the system may drop and read again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

from simla_ds.data.shards import ARRAYS, Shard

FROM = 1 << 30
"""Bytes of indexes above which they go through a file: some 15 million samples."""
UNUSED = 7 * 86400.0
"""Seconds after which the file of other shards is removed."""
_ALIGNED = 8
_NOTHING = np.empty(0, np.int64)


def share(shards: Iterable[Shard], folder: Path) -> list[Shard]:
    """Return the shards as they are, or, when their indexes are large, with arrays (read-only) of a file in folder.

    The file is named by its content: processes that have the same shards map the same one. What is mapped stays as it
    is whatever becomes of the folder. Raises OSError naming data.cache_dir when the file cannot be written, and
    whatever getting a shard raises.
    """
    following, kept, held = iter(shards), [], 0
    for shard in following:
        kept.append(shard)
        held += sum(getattr(shard, name).nbytes for name in ARRAYS)
        if held > FROM:
            return list(_through_file(chain(kept, following), folder))
    return kept


def _through_file(shards: Iterable[Shard], folder: Path) -> Iterator[Shard]:
    heads: list[tuple[Shard, list[tuple[int, np.dtype, tuple[int, ...]]]]] = []
    digest, end = blake2b(digest_size=16), 0
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        temporary = NamedTemporaryFile(dir=folder, suffix=".new")  # noqa: SIM115  the next block removes it
    with temporary as file:
        for shard in shards:
            places = []
            for array in (getattr(shard, name) for name in ARRAYS):
                content = array.tobytes() + bytes(-array.nbytes % _ALIGNED)
                digest.update(content)
                with _writing(folder):
                    file.write(content)
                places.append((end, array.dtype, array.shape))
                end += len(content)
            heads.append((replace(shard, **dict.fromkeys(ARRAYS, _NOTHING)), places))
        path = folder / f"{digest.hexdigest()}.index"
        with _writing(folder), contextlib.suppress(FileExistsError):
            file.flush()
            os.fsync(file.fileno())  # or a machine that fails could leave a name with other content
            os.link(file.name, path)
    os.utime(path)
    _remove_unused(folder)
    with open(path, "rb") as opened:
        content = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    for head, places in heads:
        arrays = (np.ndarray(shape, dtype, content, start) for start, dtype, shape in places)
        yield replace(head, **dict(zip(ARRAYS, arrays, strict=True)))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{folder}: the index of the shards cannot be written ({error.strerror or error}); set data.cache_dir to a "
            "disk with room for 70 bytes a sample"
        ) from error


def _remove_unused(folder: Path) -> None:
    for path in folder.glob("*.index"):
        with contextlib.suppress(FileNotFoundError):  # another process has done so
            if time.time() - path.stat().st_mtime > UNUSED:
                path.unlink()
