"""`prepare_scenes`: a whole folder or none, the same bytes however it is made."""

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from simla_ds.data.scenes import prepare
from simla_ds.data.scenes.prepare import prepare_scenes

SMALL: dict[str, Any] = {
    "train": 60,
    "seed": 5,
    "shard_size": 40,
    "codebook_size": 16,
    "vocabulary_size": 300,
    "splits": {"val": 6, "test_vendor": 6},
    "progress": False,
}


def members(path: Path) -> dict[str, bytes]:
    """Return every member of a tar by name."""
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member)
            assert file is not None, f"{member.name} is not a plain file"
            found[member.name] = file.read()
    return found


def files_of(folder):
    """Return every file but the manifest with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "out"
    return out, prepare_scenes(out, workers=1, **SMALL)


def test_the_folder_is_complete_and_the_manifest_true(prepared):
    out, manifest = prepared
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == {"train": 60, "val": 6, "test_vendor": 6}
    assert manifest["options"]["seed"] == 5
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert sorted(manifest["sha256"]) == sorted(str(path.relative_to(out)) for path in out.rglob("*.tar"))
    assert sorted(p.name for p in (out / "train").glob("*.tar")) == ["shard-000000.tar", "shard-000001.tar"]
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    for name in ("tokenizer/tokenizer.json", "visual_tokens/config.json", "contact_sheet.png", "ATTRIBUTION.md"):
        assert (out / name).stat().st_size > 0
    first = members(out / "train" / "shard-000000.tar")
    assert list(first)[:2] == ["train_0000000.jpg", "train_0000000.json"]
    assert len(first) == 80


def test_two_workers_write_the_same_bytes(prepared, tmp_path):
    prepare_scenes(tmp_path / "again", workers=2, **SMALL)
    assert files_of(tmp_path / "again") == files_of(prepared[0])


def test_a_scene_does_not_depend_on_how_many_are_made(prepared, tmp_path):
    fewer = SMALL | dict[str, Any](train=20, splits={"val": 3})
    prepare_scenes(tmp_path / "fewer", workers=1, **fewer)
    whole = members(prepared[0] / "train" / "shard-000000.tar")
    part = members(tmp_path / "fewer" / "train" / "shard-000000.tar")
    assert part == {name: whole[name] for name in part}
    assert (
        members(tmp_path / "fewer" / "val" / "shard-000000.tar").items()
        <= members(prepared[0] / "val" / "shard-000000.tar").items()
    )


def test_a_finished_folder_is_kept_and_a_foreign_one_refused(prepared, tmp_path):
    out, manifest = prepared
    before = (out / "manifest.json").stat().st_mtime_ns
    assert prepare_scenes(out, workers=1, **SMALL) == manifest
    assert (out / "manifest.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="not made with these options"):
        prepare_scenes(out, workers=1, **(SMALL | dict[str, Any](seed=6)))
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(FileExistsError, match="name another folder"):
        prepare_scenes(tmp_path, workers=1, **SMALL)


def test_nothing_is_left_of_a_run_that_fails(tmp_path, monkeypatch):
    def break_down(samples):
        raise RuntimeError("disk full")

    monkeypatch.setattr(prepare, "contact_sheet", break_down)
    with pytest.raises(RuntimeError, match="disk full"):
        prepare_scenes(tmp_path / "out", workers=1, **SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train": 0}, "train must be at least 1"),
        ({"size": 32}, "at least 64 pixels"),
        ({"splits": {"dev": 5}}, "splits beside train"),
        ({"splits": {"val": -1}}, "negative"),
    ],
)
def test_impossible_options_are_refused(tmp_path: Path, wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        prepare_scenes(tmp_path / "out", workers=1, **{**SMALL, **wrong})
