"""Shards that are elsewhere (http, S3 and whatever fsspec reads, or the output of a command), through a local cache.

The exact global order needs every shard's index at the start and any sample at any time. So indexes are fetched first
(`simla prepare` leaves one beside each shard) or made once from the whole shard and kept; shards come when the order
reaches them and stay, least recently used first out, within a limit. All processes of a machine share the cache.
What a server says of a shard (bytes, ETag or date) is kept with its index: one that has changed is fetched again at the
next start; one that changes during a run is refused, since the index is of the old one. A shard that cannot be had is
said once and left alone for a while by all processes, since each of its samples would ask for it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from simla_ds.data.shards import (
    INDEX_VERSION,
    REMOTE,
    SelectionOutdated,
    Shard,
    index_tar,
    is_pattern,
    load_index,
    open_shard,
    save_index,
)

T = TypeVar("T")
FIRST_WAIT, LONGEST_WAIT = 0.2, 30.0
"""Seconds before the second try, and at most; doubled each time, with chance so that ranks do not come back at once."""
COOL_OFF = 300.0
"""Seconds for which a shard that could not be had is not asked for again."""
STALL = 60.0
"""Seconds without a byte after which an http server is given up; a whole shard may take as long as it does."""
_AT_ONCE = 8


def open_shards(paths: list[str], cache: ShardCache) -> Iterator[Shard]:
    """Indexes of local and remote shards, fetched several at a time. Raises OSError when one can't be had."""

    def opened(path: str) -> Shard:
        return cache.index(path) if path.startswith(REMOTE) else open_shard(path)

    with ThreadPoolExecutor(_AT_ONCE) as pool:  # file systems of clusters are as slow to answer as servers
        yield from pool.map(opened, paths)


class ShardChanged(OSError):
    """A shard is not the one that was indexed."""


class ShardCache:
    """Local copies of remote shards, at most `limit` bytes of them. Safe to copy into worker processes."""

    def __init__(self, folder: Path, limit: int, tries: int):
        self.folder, self.limit, self.tries = folder, limit, tries
        self.retried = 0
        """Fetches that failed and were tried again, in this process."""
        self._stamps: dict[str, dict[str, Any]] = {}
        """What index() found."""

    def index(self, url: str) -> Shard:
        """Index of a remote shard, of what is there now. Raises OSError when it can't be had in `tries` tries, and
        ValueError when samples were chosen of another shard.
        """
        kept = self._path(url).with_suffix(".index.npz")
        kept.parent.mkdir(parents=True, exist_ok=True)
        with _locked(kept.with_suffix(".lock")):
            self._failure(url).unlink(missing_ok=True)  # an earlier run's
            stamp = self._ask(url)
            found = load_index(str(kept), url, {"version": INDEX_VERSION, **stamp})
            self._stamps[url] = stamp
            if found is None:
                if kept.is_file():
                    print(f"{url} is not what was fetched before ({stamp}): fetched again", file=sys.stderr)
                self._copy(url).unlink(missing_ok=True)
                found = self._new_index(url, kept, stamp)
                if url.startswith("pipe:") and (found.problem or not len(found)):  # a command may have failed quietly
                    self._copy(url).unlink(missing_ok=True)
                    kept.unlink(missing_ok=True)
                else:
                    save_index(str(kept), found, {"version": INDEX_VERSION, **stamp})
        return replace(found, path=url)

    def _new_index(self, url: str, kept: Path, stamp: dict[str, Any]) -> Shard:
        """The index beside the shard where there is one of this very shard, or else made from the shard."""
        if not url.startswith("pipe:"):
            with contextlib.suppress(FileNotFoundError, PermissionError):  # most shards have none: it is made below
                self._retry(lambda: _download(_index_url(url), kept))
                if (found := load_index(str(kept), url)) is not None:  # one without samples is one, too
                    there = stamp.get("bytes", found.tar_bytes)
                    if found.tar_bytes in (0, there):
                        return found
                    kept.unlink()
                    differs = f"{_index_url(url)} is of a shard of {found.tar_bytes} bytes, the one there has {there}"
                    if found.note:
                        raise SelectionOutdated(
                            f"{differs}: its choice of samples is lost; run `simla prepare` on the shard again and "
                            "upload both, or delete the index to use all samples"
                        )
                    print(f"{differs}: read anew from the shard", file=sys.stderr)
        return index_tar(str(self.fetch(url)))

    def _ask(self, url: str) -> dict[str, Any]:
        """What tells whether a shard is still the same; nothing of a command, or of a server that does not say."""
        return {} if url.startswith("pipe:") else self._retry(lambda: _stamp(url))

    def fetch(self, url: str) -> Path:
        """Path of the local copy, fetched when there is none. Raises OSError when it can't be had in `tries` tries, and
        ShardChanged when it is not what index() found; for COOL_OFF seconds then at once, and for this run when it has
        changed or is not there.

        Open it at once: it may be put out later, which does not disturb those who have it open.
        """
        path = self._copy(url)
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(self._path(url).with_suffix(".lock")):  # one process fetches, the others wait for it
            if path.is_file():
                os.utime(path)
            else:
                self._raise_known_failure(url)
                try:
                    self._require_unchanged(url)
                    self._retry(lambda: _download(url, path))
                    try:
                        self._require_unchanged(url)
                    except OSError:
                        path.unlink()
                        raise
                except OSError as error:
                    self._remember_failure(url, error)
                    raise
                self._put_out(path)
        return path

    def _require_unchanged(self, url: str) -> None:
        if url in self._stamps and self._ask(url) != self._stamps[url]:
            raise ShardChanged(f"{url} has changed since this run began")

    def _failure(self, url: str) -> Path:
        """Where all processes find why a shard could not be had."""
        return self._path(url).with_suffix(".failed")

    def _raise_known_failure(self, url: str) -> None:
        """Raise again what the last fetch raised, if it is too early to ask again. Call with the shard's lock."""
        try:
            known = json.loads(self._failure(url).read_bytes())
        except (FileNotFoundError, ValueError):  # none, or cut off by a full disk
            return
        of_this_run = known["stamp"] == self._stamps.get(url)  # other runs may share the cache
        if of_this_run and (known["until"] is None or time.time() < known["until"]):
            raise ShardChanged(known["error"]) if known["changed"] else OSError(known["error"])

    def _remember_failure(self, url: str, error: OSError) -> None:
        """Say it and keep it. Call with the shard's lock."""
        lasting = isinstance(error, (ShardChanged, FileNotFoundError, PermissionError))
        cause = "not found" if isinstance(error, FileNotFoundError) else error
        again = "in this run" if lasting else f"for {COOL_OFF:.0f} s"
        print(f"{url} cannot be had, not asked for again {again}: {cause}", file=sys.stderr, flush=True)
        known = {
            "stamp": self._stamps.get(url),
            "changed": isinstance(error, ShardChanged),
            "until": None if lasting else time.time() + COOL_OFF,
            "error": f"{url}: {cause}",
        }
        with contextlib.suppress(OSError):  # the disk may be full
            self._failure(url).write_text(json.dumps(known))

    def _path(self, url: str) -> Path:
        """What the names of all that is kept of a shard begin with."""
        return self.folder / blake2b(url.encode(), digest_size=16).hexdigest()

    def _copy(self, url: str) -> Path:
        """The local copy of what index() found: of another version another file, which another run may read."""
        stamp = json.dumps(self._stamps.get(url, {}), sort_keys=True).encode()
        return self._path(url).with_suffix(f".{blake2b(stamp, digest_size=8).hexdigest()}.tar")

    def _retry(self, fetch: Callable[[], T]) -> T:
        wait = FIRST_WAIT
        for left in reversed(range(self.tries)):
            try:
                return fetch()
            except (FileNotFoundError, PermissionError, ValueError):  # asking again changes nothing
                raise
            except Exception as error:  # fsspec's file systems raise errors of the libraries below them
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise OSError(
                        f"{self.folder} is full ({error.strerror}): lower data.cache_gb, {self.limit / 1e9:g} GB now, "
                        "or set data.cache_dir to a larger disk"
                    ) from error
                if getattr(error, "status", 0) in (401, 403):  # of an http server
                    raise PermissionError(" ".join(str(error).split())) from error
                if not left:
                    raise OSError(f"{' '.join(str(error).split())} (after {self.tries} tries)") from error
            self.retried += 1
            time.sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, LONGEST_WAIT)
        raise AssertionError("the last try returns or raises")

    def _put_out(self, keep: Path) -> None:
        """Remove the copies used longest ago until the rest is within the limit; `keep` stays."""
        with _locked(self.folder / "eviction.lock"):
            copies = []
            for path in self.folder.glob("*.tar"):
                with contextlib.suppress(FileNotFoundError):  # another process put it out
                    copies.append((path.stat().st_mtime_ns, path.stat().st_size, path))
            surplus = sum(size for _, size, _ in copies) - self.limit
            for _, size, path in sorted(copies):
                if surplus <= 0:
                    return
                if path != keep:
                    path.unlink(missing_ok=True)
                    surplus -= size


def listing(url: str) -> list[str]:
    """The shards in a remote folder or behind a remote glob, sorted. Raises OSError when it can't be read."""
    system, path = _system(url)
    pattern = path if is_pattern(url) else f"{path.rstrip('/')}/*.tar"
    try:
        return [system.unstrip_protocol(found) for found in sorted(system.glob(pattern))]
    except Exception as error:  # of whichever library is below
        raise OSError(f"{url} cannot be listed: {' '.join(str(error).split())}") from error


def _index_url(url: str) -> str:
    """Where the index of a remote shard is; what follows ? in an http address stays at its end."""
    if not url.startswith(("http://", "https://")):
        return f"{url}.index.npz"
    path, mark, query = url.partition("?")
    return f"{path}.index.npz{mark}{query}"


def _stamp(url: str) -> dict[str, Any]:
    """Bytes and ETag (or date) of a remote file, as far as its server says them. Raises whatever goes wrong."""
    system, path = _system(url)
    system.invalidate_cache()
    try:
        info = system.info(path)
    except FileNotFoundError as error:  # fsspec's word over http for whatever went wrong
        if error.__cause__ is None or getattr(error.__cause__, "status", 0) in (404, 410):
            raise
        raise error.__cause__ from None
    tags = (info.get(name) for name in ("ETag", "etag", "Last-Modified", "LastModified", "mtime", "created"))
    said = {"bytes": info.get("size"), "tag": next((str(tag) for tag in tags if tag), None)}
    return {name: value for name, value in said.items() if value is not None}


def _download(url: str, path: Path) -> None:
    """Fetch into a file that is there when it is whole. Raises whatever goes wrong."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed: the lock on this shard is ours
        left.unlink(missing_ok=True)
    try:
        if url.startswith("pipe:"):
            with open(temporary, "wb") as file:
                ran = subprocess.run(url[len("pipe:") :], shell=True, stdout=file, stderr=subprocess.PIPE, check=False)
            if ran.returncode:
                raise OSError(f"{url} ended with status {ran.returncode}: {ran.stderr.decode(errors='replace')[-200:]}")
        else:
            system, remote = _system(url)
            system.get_file(remote, str(temporary))  # one request; a body that breaks off is an error
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {}
    try:
        if url.startswith("s3://"):  # tries are counted here, so none are made below
            options = {"config_kwargs": {"retries": {"max_attempts": 0}}}
        elif url.startswith(("http://", "https://")):  # its default ends every request after 300 s
            from aiohttp import ClientTimeout

            options = {"client_kwargs": {"timeout": ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)}}
        system, path = url_to_fs(url, **options)
    except ImportError as error:
        raise ValueError(f"{url}: {error}; pip install 'simla_ds[data]'") from None
    if hasattr(system, "retries"):
        system.retries = 1
    return system, path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
