"""Indexes in a file that processes share: the same samples, one file, nothing of it in a process's own memory."""

import os
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from simla_ds.data.shards import ARRAYS, ShardFiles, index_tar, open_shard, write_shards
from simla_ds.data.shared_index import UNUSED, share
from tests.data.test_shards import pairs


@pytest.fixture
def shards(tmp_path):
    """30 samples in three shards, and behind them a tar that is none."""
    paths = write_shards(pairs(30), tmp_path / "shards", 10)
    (tmp_path / "none.tar").write_bytes(b"no tar" * 200)
    return [*(open_shard(str(path)) for path in paths), index_tar(str(tmp_path / "none.tar"))]


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr("simla_ds.data.shared_index.FROM", 0)


def test_small_indexes_stay_where_they_are(shards, tmp_path):
    assert all(a is b for a, b in zip(share(shards, tmp_path / "indexes"), shards, strict=True))
    assert not (tmp_path / "indexes").exists()


@pytest.mark.parametrize("above", [0, 500, 1500])  # from the first shard on, or a later one
def test_large_ones_are_mapped_from_one_file_with_equal_samples(shards, tmp_path, monkeypatch, above):
    monkeypatch.setattr("simla_ds.data.shared_index.FROM", above)
    first, second = (share(iter(shards), tmp_path / "indexes") for _ in range(2))
    (file,) = (tmp_path / "indexes").iterdir()  # one, and nothing temporary
    assert file.stat().st_size >= sum(getattr(shard, name).nbytes for shard in shards for name in ARRAYS)
    file.unlink()  # what is mapped stays
    whole = ShardFiles(shards)
    for found in (first, second):
        mapped = ShardFiles(found)
        assert [(len(a), a.path, a.problem) for a in found] == [(len(b), b.path, b.problem) for b in shards]
        for number, shard in enumerate(shards):
            assert [found[number].key(i) for i in range(len(shard))] == [shard.key(i) for i in range(len(shard))]
            assert [mapped.read(number, i) for i in range(len(shard))] == [
                whole.read(number, i) for i in range(len(shard))
            ]
            for name in ARRAYS:
                array = getattr(found[number], name)
                assert not array.flags.owndata
                assert not array.flags.writeable
                assert array.dtype == getattr(shard, name).dtype


@pytest.mark.usefixtures("at_once")
def test_other_shards_have_another_file_and_one_unused_for_long_goes(shards, tmp_path):
    folder = tmp_path / "indexes"
    share(shards, folder)
    (old,) = folder.iterdir()
    share(shards[:2], folder)
    assert len(list(folder.iterdir())) == 2
    long_ago = time.time() - UNUSED - 60
    os.utime(old, (long_ago, long_ago))
    share(shards[:2], folder)
    assert old not in folder.iterdir()
    share(shards, folder)
    os.utime(old, (long_ago, long_ago))
    share(shards, folder)  # used now
    assert old.is_file()


@pytest.mark.usefixtures("at_once")
def test_a_folder_without_room_is_one_clear_line_and_nothing_is_left(shards, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simla_ds.data.shared_index.os.fsync", full)
    with pytest.raises(OSError, match=r"indexes: .*cannot be written \(No space left on device\); set data.cache_dir"):
        share(shards, tmp_path / "indexes")
    assert list((tmp_path / "indexes").iterdir()) == []


@pytest.mark.usefixtures("at_once")
def test_a_shard_that_cannot_be_had_is_said_as_such(shards, tmp_path):
    def had():
        yield shards[0]
        raise OSError("s3://bucket/1.tar: no answer (after 8 tries)")

    with pytest.raises(OSError, match=r"^s3://bucket/1.tar: no answer"):
        share(had(), tmp_path / "indexes")
    assert list((tmp_path / "indexes").iterdir()) == []


@pytest.mark.usefixtures("at_once")
def test_memory_of_the_process_does_not_hold_a_mapped_index(tmp_path):
    (path,) = write_shards(pairs(2), tmp_path / "shards", 10)
    small = open_shard(str(path))
    large = [replace(small, members=np.full((1 << 20, 3), 7))]  # 24 MiB
    held = weakref.ref(large[0].members)
    (found,) = share(large, tmp_path / "indexes")
    del large
    assert held() is None  # nothing else keeps the array that was read
    assert (found.members == 7).all()  # all of its pages have been asked for
    file, anonymous = _mapping(found.members.ctypes.data)
    assert file == str(next((tmp_path / "indexes").iterdir()))
    assert anonymous == 0


def _mapping(address: int) -> tuple[str, int]:
    """The file that this process maps at an address, and how many bytes of the mapping are its own memory.

    The process's memory as a whole would tell less: the allocator may keep what is freed for the next array.
    """
    file, inside = "", False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split(maxsplit=5)
        if not first.endswith(":"):  # a mapping's head; its figures follow, one a line
            begin, end = (int(bound, 16) for bound in first.split("-"))
            inside, file = begin <= address < end, rest[-1]
        elif inside and first == "Anonymous:":
            return file, int(rest[0]) << 10
    raise LookupError(f"no mapping holds {address:#x}")
