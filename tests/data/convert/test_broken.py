"""`simla prepare` over a deliberately broken data set: the good is kept, the rest counted, nothing else touched."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from simla_ds.data.convert.in_place import check_in_place
from simla_ds.data.convert.settings import Settings
from simla_ds.data.convert.writer import convert
from simla_ds.data.sample import read_picture
from simla_ds.data.shards import ShardFiles, find_shards, open_shard
from tests.data.broken import broken_samples, broken_shards
from tests.data.convert.samples import dropped, put, read


def surroundings(folder):
    """Every file below a folder with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("side", [0, 24])  # as they are; decoded, made smaller, encoded
def test_broken_shards_are_written_anew(tmp_path, side):
    usable, reasons = broken_shards(tmp_path / "in/shards")
    before = surroundings(tmp_path)
    settings = Settings(shard_size=5, shorter_side=side)
    manifest = convert(
        "img2dataset", {"shards": str(tmp_path / "in/shards")}, tmp_path / "out", settings, workers=2, progress=False
    )
    assert manifest["dropped"] == dict(reasons)
    assert manifest["kept"] == len(usable)
    assert {fields["source"].partition(":")[2] for _, fields in read(tmp_path / "out")} == usable
    assert all(read_picture({"jpg": data}).mode == "RGB" for data, _ in read(tmp_path / "out"))
    outside = {path: data for path, data in surroundings(tmp_path).items() if tmp_path / "out" not in path.parents}
    assert outside == before
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_broken_shards_are_checked_where_they_are(tmp_path):
    usable, reasons = broken_shards(tmp_path / "shards")
    before = surroundings(tmp_path)
    manifest = check_in_place(str(tmp_path / "shards"), workers=1, progress=False)
    assert manifest["dropped"] == dict(reasons)
    files = ShardFiles([open_shard(path) for path in find_shards(str(tmp_path / "shards"))])
    assert {index.key(i) for index in files.shards for i in range(len(index))} == usable
    after = surroundings(tmp_path)
    assert {path: after[path] for path in before} == before
    assert {path.name for path in after.keys() - before.keys() if path.suffix != ".npz"} == {
        "manifest.json",
        "dropped.jsonl",
    }


def test_a_tar_that_has_changed_is_judged_again(tmp_path):
    broken_shards(tmp_path / "shards")
    first = find_shards(str(tmp_path / "shards"))[0]
    whole = check_in_place(str(tmp_path / "shards"), workers=1, progress=False)
    os.replace(find_shards(str(tmp_path / "shards"))[1], first)
    changed = check_in_place(first, workers=1, progress=False)
    assert changed["rows"] < whole["rows"]
    assert len(open_shard(first)) == changed["kept"]


def test_a_broken_folder(tmp_path):
    """The same samples as files; texts come from .txt files here, so those with a json have none."""
    usable, unusable = broken_samples()
    expected: Counter[str] = Counter()
    kept = set()
    verdicts = {key: (members, "") for key, members in usable.items()} | unusable
    for number, (members, reason) in enumerate(verdicts.values()):
        for extension, data in members.items():
            put(tmp_path / f"in/{number:02d}.{extension}", data)
        if "txt" not in members:
            expected["caption missing"] += 1
        elif reason:
            expected[reason] += 1
        else:
            kept.add(f"{number:02d}")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/away.jpg").symlink_to("/nowhere")
    expected["caption missing"] += 1
    manifest = convert("folder", {"images": tmp_path / "in"}, tmp_path / "out", workers=1, progress=False)
    assert manifest["dropped"] == dict(expected)
    assert {fields["source"].partition(".")[0] for _, fields in read(tmp_path / "out")} == kept
    assert len(dropped(tmp_path / "out")) == sum(expected.values())


def test_memory_stays_bounded(tmp_path):
    """Pictures and texts of 200 MB, bombs among them, in a process that may use 160 MiB more than it starts with."""
    usable, unusable = broken_samples()
    for number in range(4):
        put(tmp_path / f"in/good{number}.jpg", usable["rotated"]["jpg"])
        put(tmp_path / f"in/good{number}.txt", "good")
        put(tmp_path / f"in/bomb{number}.png", unusable["bomb" if number % 2 else "liar"][0]["png"])
        put(tmp_path / f"in/bomb{number}.txt", "bomb")
    for name in ("large.jpg", "text.txt"):
        with open(tmp_path / "in" / name, "wb") as file:
            file.truncate(200 << 20)
    put(tmp_path / "in/large.txt", "large")
    put(tmp_path / "in/text.jpg", usable["rotated"]["jpg"])
    code = (
        "import resource, sys\n"
        "from simla_ds.cli import main\n"
        "import simla_ds.data.convert.writer, tqdm, webdataset.writer\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "paths = ['--images', sys.argv[1], '--out', sys.argv[2]]\n"
        "status = main(['prepare', 'folder', *paths, '--workers', '1', '--quiet'])\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 << 10\n"
        "sys.exit(status)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "in", tmp_path / "out"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert Counter(reason for _, reason in dropped(tmp_path / "out")) == {
        "picture too large": 5,
        "caption too large": 1,
    }
