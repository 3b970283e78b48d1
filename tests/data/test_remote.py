"""Remote shards: the same batches as from local ones, over a server that fails, in a cache that stays small."""

import os
import shlex
import shutil
import threading
from collections import Counter
from dataclasses import replace

import pytest

from simla_ds.data.loader import PairDataset
from simla_ds.data.remote import ShardCache, open_shards
from simla_ds.data.sample import stable_hash
from simla_ds.data.shards import ShardFiles, find_shards, open_shard, write_shards
from tests.data.loopback import serving
from tests.data.test_loader import COUNT, good, ids, keys, loader, same, take


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("simla_ds.data.remote.FIRST_WAIT", 0.01)


@pytest.fixture
def shards(tmp_path):
    """53 samples in 8 shards, with indexes."""
    paths = write_shards(good(), tmp_path / "shards", 7)
    for path in paths:
        open_shard(str(path))
    return tmp_path / "shards"


def remote(spec, tmp_path, monkeypatch, gigabytes=1.0, tries=4, **changes):
    """A loader of these shards; the tiny configuration of test_loader with a cache of its own."""
    import tests.data.test_loader as local

    plain = local.config

    def with_cache(folder, **others):
        made = plain(folder, **others)
        data = replace(made.data, cache_dir=str(tmp_path / "cache"), cache_gb=gigabytes, fetch_tries=tries)
        return replace(made, data=data)

    with monkeypatch.context() as patched:
        patched.setattr(local, "config", with_cache)
        return loader(spec, **changes)


NAMES = "/shard-{000000..000007}.tar"


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_of_local_shards_over_a_failing_server(shards, tmp_path, monkeypatch, workers):
    plan = {
        ("shard-000000.tar", 0): "500",
        ("shard-000000.tar", 1): "cut",
        ("shard-000003.tar", 0): "cut",
        ("shard-000004.tar", 0): "slow",
        ("shard-000005.tar.index.npz", 0): "500",
        ("shard-000007.tar", 0): "500",
    }
    with serving(shards, plan) as (address, faults):
        source = remote(address + NAMES, tmp_path, monkeypatch, workers=workers)
        found = take(source, 20)
        source.close()
    assert all(same(first, second) for first, second in zip(found, take(loader(str(shards)), 20), strict=True))
    assert (faults.met["500"], faults.met["cut"], faults.met["slow"]) == (3, 2, 1)
    assert source.retried == 5
    assert not source.skipped
    assert faults.requests["shard-000001.tar"] == 1  # then it is in the cache


def test_shards_without_an_index_are_read_once_for_it(shards, tmp_path, monkeypatch):
    for path in shards.glob("*.npz"):
        path.unlink()
    with serving(shards) as (address, faults):
        first = ids(take(remote(address + NAMES, tmp_path, monkeypatch), 11))
        again = ids(take(remote(address + NAMES, tmp_path, monkeypatch), 11))
    assert Counter(first[:COUNT]) == keys()
    assert again == first
    assert {count for name, count in faults.requests.items() if name.endswith(".tar")} == {1}


def test_the_cache_stays_within_its_limit(shards, tmp_path, monkeypatch):
    sizes = [path.stat().st_size for path in shards.glob("*.tar")]
    limit = 3 * max(sizes)
    with serving(shards) as (address, faults):
        source = remote(address + NAMES, tmp_path, monkeypatch, gigabytes=limit / 1e9)
        assert isinstance(source.dataset, PairDataset)
        source.dataset.files.keep_open = 1
        found = []
        for _ in range(22):
            found += ids(take(source, 1))
            copies = list((tmp_path / "cache").glob("*.tar"))
            assert sum(path.stat().st_size for path in copies) <= limit
    assert Counter(found[:COUNT]) == keys()
    assert sum(count for name, count in faults.requests.items() if name.endswith(".tar")) > 8  # some came twice


def test_a_shard_that_cannot_be_had_is_skipped_sample_by_sample(shards, tmp_path, monkeypatch):
    plan = {("shard-000002.tar", number): "500" for number in range(1000)}
    with serving(shards, plan) as (address, _):
        source = remote(address + NAMES, tmp_path, monkeypatch, tries=2, batch_size=COUNT - 7)
        found = ids(take(source, 1))
    assert Counter(found) == keys(bad=range(14, 21))
    assert source.skipped.keys() <= {"sample unreadable"}
    assert source.retried >= 1


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_has_changed_is_fetched_again_with_a_line(shards, tmp_path, monkeypatch, capsys, indexed):
    if not indexed:
        for path in shards.glob("*.npz"):
            path.unlink()
    with serving(shards) as (address, faults):
        before = ids(take(remote(address + NAMES, tmp_path, monkeypatch), 11))
        for path in (shards / "shard-000003.tar", shards / "shard-000003.tar.index.npz"):
            path.unlink(missing_ok=True)
        other = ((f"9{key}", members) for key, members in list(good())[21:28])
        (changed,) = write_shards(other, tmp_path / "other", 7)
        changed.rename(shards / "shard-000003.tar")
        os.utime(shards / "shard-000003.tar", (1, 1))
        if indexed:
            open_shard(str(shards / "shard-000003.tar"))
        capsys.readouterr()
        after = ids(take(remote(address + NAMES, tmp_path, monkeypatch), 11))
    expected = keys(bad=range(21, 28)) + Counter(stable_hash(f"9{i:04d}") for i in range(21, 28))
    assert Counter(before[:COUNT]) == keys()
    assert Counter(after[:COUNT]) == expected
    said = capsys.readouterr().err
    assert "shard-000003.tar is not what was fetched before" in said
    assert said.count("fetched again") == 1
    assert faults.requests["shard-000003.tar"] == 2
    assert faults.requests["shard-000004.tar"] == 1


def test_a_shard_that_changes_during_a_run_is_refused(shards, tmp_path, monkeypatch):
    with serving(shards) as (address, _):
        source = remote(address + NAMES, tmp_path, monkeypatch, batch_size=COUNT - 7)
        os.utime(shards / "shard-000003.tar", (1, 1))  # not yet fetched
        found = ids(take(source, 1))
    assert Counter(found) == keys(bad=range(21, 28))
    assert source.skipped.keys() <= {"shard changed"}


def test_a_server_that_is_not_there_is_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"after 2 tries") as error:
        remote("http://127.0.0.1:9/shard-000000.tar", tmp_path, monkeypatch, tries=2)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_not_asked_for_again(shards, tmp_path, monkeypatch):
    with serving(shards) as (address, faults), pytest.raises(FileNotFoundError):
        remote(address + "/none.tar", tmp_path, monkeypatch)
    assert faults.requests["none.tar"] <= 1


def test_the_output_of_a_command_is_a_shard(shards, tmp_path, monkeypatch):
    spec = f"pipe:cat {shlex.quote(str(shards))}" + NAMES
    found = take(remote(spec, tmp_path, monkeypatch), 11)
    assert all(same(first, second) for first, second in zip(found, take(loader(str(shards)), 11), strict=True))
    with pytest.raises(OSError, match="ended with status 3"):
        remote("pipe:exit 3", tmp_path, monkeypatch, tries=1)


def test_processes_that_want_the_same_shard_fetch_it_once(shards, tmp_path):
    with serving(shards, {("shard-000000.tar", 0): "slow"}) as (address, faults):
        caches = [ShardCache(tmp_path / "cache", 10**9, 3) for _ in range(4)]
        threads = [threading.Thread(target=cache.fetch, args=(f"{address}/shard-000000.tar",)) for cache in caches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert faults.requests["shard-000000.tar"] == 1
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1


def test_a_copy_that_is_put_out_stays_readable_for_who_has_it_open(shards, tmp_path):
    with serving(shards) as (address, _):
        cache = ShardCache(tmp_path / "cache", 1, 3)  # no more than one at a time
        files = ShardFiles([*open_shards([f"{address}/shard-{i:06d}.tar" for i in range(2)], cache)], cache=cache)
        first = files.read(0, 0)
        files.read(1, 0)
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
        assert files.read(0, 0) == first


def test_folders_and_globs_are_listed(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for name in ("b/1.tar", "b/0.tar", "b/0.tar.index.npz", "b/2.txt"):
        system.pipe(f"/listed/{name}", b"")
    expected = ["memory:///listed/b/0.tar", "memory:///listed/b/1.tar"]
    assert [
        name.replace("memory:////", "memory:///") for name in find_shards("memory://listed/b/", remote=True)
    ] == expected
    assert len(find_shards("memory://listed/b/1*.tar", remote=True)) == 1
    with pytest.raises(ValueError, match="matches no shards"):
        find_shards("memory://listed/none/", remote=True)
    assert find_shards("s3://bucket/{0..1}.tar", remote=True) == ["s3://bucket/0.tar", "s3://bucket/1.tar"]


def test_a_command_that_gave_no_shard_once_is_asked_again(shards, tmp_path):
    answer = tmp_path / "answer"
    answer.write_bytes(b"<html>503</html>" * 100)
    url = f"pipe:cat {shlex.quote(str(answer))}"

    def samples():
        return len(ShardCache(tmp_path / "cache", 10**9, 1).index(url))

    assert samples() == 0
    shutil.copy(shards / "shard-000000.tar", answer)
    assert samples() == 7


def test_a_run_keeps_the_shard_that_it_indexed_when_another_run_finds_a_new_one(shards, tmp_path):
    with serving(shards) as (address, _):
        url = f"{address}/shard-000000.tar"

        def opened():
            cache = ShardCache(tmp_path / "cache", 10**9, 3)
            return ShardFiles([cache.index(url)], 1, cache)

        first = opened()
        expected = first.read(0, 0)
        first._open.clear()  # as if other shards had been read since
        for name in ("shard-000000.tar", "shard-000000.tar.index.npz"):
            shutil.copy(shards / name.replace("0.tar", "1.tar"), shards / name)
        os.utime(shards / "shard-000000.tar", (1, 1))
        (shards / "shard-000000.tar.index.npz").unlink()
        second = opened()
        assert second.read(0, 0) != expected
        assert first.read(0, 0) == expected
