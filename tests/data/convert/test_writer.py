"""What all sources share: shards of a chosen size, resizing, equal bytes whatever happens on the way."""

import fcntl
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from simla_ds.data.convert.processes import in_order
from simla_ds.data.convert.settings import Settings
from simla_ds.data.convert.writer import convert
from simla_ds.data.shards import open_shard
from tests.data.convert.samples import jpeg, put, read


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """200 pictures with captions, every tenth cut off."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(200):
        data = jpeg(i, 300, 200)
        put(folder / f"{i:03d}.jpg", data[: len(data) // 2] if i % 10 == 9 else data)
        put(folder / f"{i:03d}.txt", f"picture {i}")
    return folder


def make(pictures, out, workers=1, **settings):
    return convert(
        "folder", {"images": pictures}, out, Settings(shard_size=25, **settings), workers=workers, progress=False
    )


def files(folder: Path):
    """Every file but the indexes, which hold the time of their tar."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.suffix != ".npz"}


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    make(pictures, out, shorter_side=100)
    return out


def test_the_manifest_is_true(pictures, undisturbed):
    manifest = json.loads((undisturbed / "manifest.json").read_text())
    assert manifest["options"] == {"images": str(pictures)}
    assert manifest["settings"]["shorter_side"] == 100
    assert (manifest["rows"], manifest["kept"], manifest["captions"]) == (200, 180, 180)
    assert manifest["dropped"] == {"picture truncated": 20}
    assert [shard["samples"] for shard in manifest["shards"].values()] == [25] * 7 + [5]
    for name, shard in manifest["shards"].items():
        data = (undisturbed / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert (undisturbed / f"{name}.index.npz").is_file()
    assert os.listdir(undisturbed.parent) == ["out"]
    lines = (undisturbed / "dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == [*range(9, 200, 10)]


def test_two_processes_write_the_same_bytes(pictures, undisturbed, tmp_path):
    make(pictures, tmp_path / "out", workers=2, shorter_side=100)
    assert files(tmp_path / "out") == files(undisturbed)


def test_a_killed_run_goes_on_where_it_stopped_and_ends_with_the_same_bytes(pictures, undisturbed, tmp_path):
    out, part = tmp_path / "out", tmp_path / "out.partial"
    options = ["--out", str(out), "--shard-size", "25", "--shorter-side", "100", "--workers", "2", "--quiet"]
    command = [sys.executable, "-m", "simla_ds.cli", "prepare", "folder", "--images", str(pictures), *options]
    process = subprocess.Popen(command)
    while len(list(part.glob("*.record.json"))) < 2:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < deadline, "a worker outlived the process that was killed"
        time.sleep(0.01)
    (part / ".shard-000009.tar.123").write_bytes(b"half written")
    kept = {path.name: path.stat().st_mtime_ns for path in part.glob("*.tar")}
    assert len(kept) >= 2
    subprocess.run(command, check=True)
    assert files(out).keys() == files(undisturbed).keys()
    assert {name: data for name, data in files(out).items() if name != "manifest.json"} == {
        name: data for name, data in files(undisturbed).items() if name != "manifest.json"
    }
    mine, theirs = (json.loads((folder / "manifest.json").read_text()) for folder in (out, undisturbed))
    assert mine | {"options": 0} == theirs | {"options": 0}
    whole = [name for name, at in kept.items() if (out / name).stat().st_mtime_ns == at]
    assert len(whole) >= 2, "whole shards were written again"
    assert not part.exists()


def test_other_options_than_those_of_the_stopped_or_finished_run_are_refused(pictures, undisturbed, tmp_path):
    before = (undisturbed / "manifest.json").stat().st_mtime_ns
    make(pictures, undisturbed, shorter_side=100)  # made already
    assert (undisturbed / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="settings was"):
        make(pictures, undisturbed, shorter_side=90)
    with pytest.raises(FileExistsError, match=r"it has no manifest.json"):
        make(pictures, put(tmp_path / "mine/precious.txt", "mine").parent)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["precious.txt"]


def test_a_second_run_of_the_same_output_is_kept_out(pictures, tmp_path):
    part = tmp_path / "out.partial"
    part.mkdir()
    with open(part / "lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FileExistsError, match="another process is writing"):
            make(pictures, tmp_path / "out")


def test_pictures_are_made_smaller_by_their_shorter_side(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    sizes = {"wide": (640, 480), "tall": (300, 900), "small": (90, 200), "line": (2000, 120)}
    for name, (width, height) in sizes.items():
        put(tmp_path / f"in/{name}.jpg", jpeg(0, width, height))
        put(tmp_path / f"in/{name}.txt", name)
    put(tmp_path / "in/turned.jpg", jpeg(0, 600, 300, exif=exif))
    put(tmp_path / "in/turned.txt", "turned")
    make(tmp_path / "in", tmp_path / "out", shorter_side=100)
    found = {fields["caption"]: data for data, fields in read(tmp_path / "out")}
    made = {name: Image.open(io.BytesIO(data)).size for name, data in found.items()}
    assert made == {
        "wide": (133, 100),
        "tall": (100, 300),
        "small": (90, 200),
        "line": (1667, 100),
        "turned": (100, 200),
    }
    assert found["small"] == jpeg(0, 90, 200)  # not encoded a second time


def test_a_file_is_called_what_it_is(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30), "red").save(buffer, "PNG")
    put(tmp_path / "in/lie.jpg", buffer.getvalue())
    put(tmp_path / "in/lie.txt", "a png")
    make(tmp_path / "in", tmp_path / "out")
    assert set(open_shard(str(tmp_path / "out/shard-000000.tar")).sample(0)) == {"png", "json"}


def test_nothing_usable_is_an_error_and_can_be_mended(tmp_path):
    put(tmp_path / "in/0.jpg", b"")
    put(tmp_path / "in/0.txt", "a dog")
    with pytest.raises(ValueError, match=r"none of 1 rows is usable \(picture empty: 1\)"):
        make(tmp_path / "in", tmp_path / "out")
    put(tmp_path / "in/0.jpg", jpeg(0))
    assert make(tmp_path / "in", tmp_path / "out")["kept"] == 1


def test_nothing_waits_for_pipes_or_reads_devices(tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in/pipe.jpg")
    (tmp_path / "in/zero.jpg").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "good"):
        put(tmp_path / f"in/{name}.txt", name)
    put(tmp_path / "in/good.jpg", jpeg(0))
    manifest = make(tmp_path / "in", tmp_path / "out")
    assert manifest["dropped"] == {"picture unreadable": 2}


def _double(chunk):
    if 333 in chunk:
        os.kill(os.getpid(), signal.SIGKILL)
    return [2 * item for item in chunk]


def test_results_come_in_order_from_a_bounded_number_under_way():
    taken = 0

    def items():
        nonlocal taken
        for item in range(300):
            taken = item + 1
            yield item

    results = in_order(_double, items(), 2)
    for item in range(300):
        assert next(results) == 2 * item
        assert taken - item <= 5 * 16
    assert next(results, None) is None


def test_a_worker_that_is_killed_is_said_in_one_line():
    with pytest.raises(OSError, match="start again, with fewer --workers"):
        list(in_order(_double, range(400), 2))
