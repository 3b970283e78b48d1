"""Remote shards that cannot be had: asked for once, said once, never taken for another."""

import errno
import os

import pytest

from simla_ds.data.remote import ShardCache, ShardChanged, open_shards
from simla_ds.data.shards import SelectionOutdated, ShardFiles, find_shards, index_tar, open_shard, store_selection
from tests.data.loopback import serving
from tests.data.test_shards import make_tar

NAME = "shard.tar"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("simla_ds.data.remote.FIRST_WAIT", 0.01)


@pytest.fixture
def folder(tmp_path):
    """A shard of four samples with its index."""
    (tmp_path / "shards").mkdir()
    put(tmp_path / "shards", 4)
    open_shard(str(tmp_path / "shards" / NAME))
    return tmp_path / "shards"


def put(folder, samples, size=4000):
    make_tar(folder / NAME, [(f"{i}.{kind}", bytes(size)) for i in range(samples) for kind in ("jpg", "txt")])


def opened(url, tmp_path, tries=2):
    """The files as one process has them."""
    cache = ShardCache(tmp_path / "cache", 10**9, tries)
    return ShardFiles([*open_shards([url], cache)], cache=cache)


def test_a_dead_shard_is_asked_for_once_by_all_processes(folder, tmp_path, monkeypatch, capsys):
    with serving(folder, {(NAME, number): "500" for number in range(100)}) as (address, faults):
        processes = [opened(f"{address}/{NAME}", tmp_path) for _ in range(2)]
        for files in processes:
            for sample in range(4):
                with pytest.raises(OSError, match=r"500.* \(after 2 tries\)"):
                    files.read(0, sample)
        assert faults.requests[NAME] == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert f"{address}/{NAME} cannot be had, not asked for again for 300 s: 500" in said
        now = os.times().elapsed
        monkeypatch.setattr("simla_ds.data.remote.time.time", lambda: now + 10**10)
        with pytest.raises(OSError, match="after 2 tries"):
            processes[0].read(0, 0)
        assert faults.requests[NAME] == 4  # the server may be up again


def test_a_new_run_asks_again(folder, tmp_path):
    with serving(folder, {(NAME, 0): "500"}) as (address, _):
        with pytest.raises(OSError, match="after 1 tries"):
            opened(f"{address}/{NAME}", tmp_path, tries=1).read(0, 0)
        assert opened(f"{address}/{NAME}", tmp_path, tries=1).read(0, 0)["jpg"] == bytes(4000)


def test_a_shard_that_changes_during_a_run_is_not_even_fetched(folder, tmp_path, capsys):
    with serving(folder) as (address, faults):
        files = opened(f"{address}/{NAME}", tmp_path)
        os.utime(folder / NAME, (1, 1))
        for sample in range(4):
            with pytest.raises(ShardChanged, match=f"{NAME} has changed since this run began"):
                files.read(0, sample)
        assert faults.requests[NAME] == 0
        assert "not asked for again in this run" in (said := capsys.readouterr().err)
        assert said.count("\n") == 1
        other = opened(f"{address}/{NAME}", tmp_path)  # a run that begins now has the new one
        assert other.read(0, 0)["jpg"] == bytes(4000)


def test_a_shard_that_goes_away_is_said_once(folder, tmp_path, capsys):
    with serving(folder) as (address, faults):
        files = opened(f"{address}/{NAME}", tmp_path)
        (folder / NAME).unlink()
        for sample in range(4):
            with pytest.raises(OSError, match=NAME):
                files.read(0, sample)
        assert faults.requests[NAME] <= 1
    said = capsys.readouterr().err
    assert "not asked for again in this run: not found" in said
    assert said.count("\n") == 1


def test_a_full_disk_is_said_as_such(folder, tmp_path, monkeypatch, capsys):
    with serving(folder) as (address, _):
        files = opened(f"{address}/{NAME}", tmp_path)
        tries = []

        def full(*_):
            tries.append(1)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr("simla_ds.data.remote._download", full)
        for sample in range(4):
            with pytest.raises(OSError, match="No space left on device"):
                files.read(0, sample)
    assert len(tries) == 1
    assert (
        f"{tmp_path / 'cache'} is full (No space left on device): lower data.cache_gb, 1 GB" in capsys.readouterr().err
    )


def test_only_a_silent_server_is_given_up_not_a_slow_one(folder, tmp_path, monkeypatch):
    from aiohttp import ClientTimeout
    from fsspec.implementations.http import HTTPFileSystem

    HTTPFileSystem.clear_instance_cache()  # or a session of an earlier test would be used
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", ClientTimeout(total=0.1))
    with serving(folder, {(NAME, number): "slow" for number in range(2)}) as (address, faults):  # takes 0.2 s
        files = opened(f"{address}/{NAME}", tmp_path, tries=1)
        monkeypatch.setattr("simla_ds.data.remote.STALL", 0.01)
        monkeypatch.setattr(files.cache, "_require_unchanged", lambda url: None)
        with pytest.raises(OSError, match="after 1 tries"):
            files.read(0, 0)
        monkeypatch.undo()
        monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", ClientTimeout(total=0.1))
        HTTPFileSystem.clear_instance_cache()
        assert opened(f"{address}/{NAME}", tmp_path, tries=1).read(0, 0)["jpg"] == bytes(4000)
        assert faults.met["slow"] == 2


def test_an_index_beside_another_shard_is_not_believed(folder, tmp_path, capsys):
    put(folder, 6)
    with serving(folder) as (address, _):
        assert len(opened(f"{address}/{NAME}", tmp_path).shards[0]) == 6
    said = capsys.readouterr().err
    sizes = index_size, tar_size = 40960, (folder / NAME).stat().st_size
    assert index_size != tar_size
    assert "{}.index.npz is of a shard of {} bytes, the one there has {}".format(NAME, *sizes) in said


def test_a_choice_of_no_samples_is_one(folder, tmp_path):
    store_selection(index_tar(str(folder / NAME)), [], "all of them are in the test set")
    with serving(folder) as (address, _):
        (shard,) = opened(f"{address}/{NAME}", tmp_path).shards
    assert (len(shard), shard.note) == (0, "all of them are in the test set")


def test_a_choice_of_samples_of_another_shard_is_refused(folder, tmp_path):
    store_selection(index_tar(str(folder / NAME)), [1, 2], "without those of the test set")
    with serving(folder) as (address, _):
        assert len(opened(f"{address}/{NAME}", tmp_path / "a").shards[0]) == 2
        put(folder, 6)
        for _ in range(2):
            with pytest.raises(SelectionOutdated, match=f"{NAME}.index.npz is of a shard of .* choice of samples"):
                opened(f"{address}/{NAME}", tmp_path / "b")


def test_an_http_query_is_no_pattern(folder, tmp_path):
    with serving(folder) as (address, faults):
        url = f"{address}/{NAME}?download=true"
        assert find_shards(url, remote=True) == [url]
        assert opened(url, tmp_path).read(0, 3)["txt"] == bytes(4000)
    assert faults.requests == {f"{NAME}.index.npz?download=true": 1, f"{NAME}?download=true": 1}
