"""Damage of every kind to every file of a checkpoint is found and named."""

import shutil
from pathlib import Path

import pytest
import torch

from simla_ds.config import Config
from simla_ds.engine import checkpoint
from simla_ds.engine.checkpoint_folder import DamagedCheckpoint, candidates, check_whole, prune_checkpoints, publish
from simla_ds.engine.distributed import Ranks
from tests.engine.checkpoints import write_checkpoint

FILES = ("weights/rank_00000.safetensors", "weights/rank_00001.safetensors", "weights/index.json")
FILES += ("queue.safetensors", "state.json", "MANIFEST.json")


def truncate(content: bytes) -> bytes:
    return content[:-1]


def zero(content: bytes) -> bytes:
    return bytes(len(content))


def empty(_: bytes) -> bytes:
    return b""


def flip(content: bytes) -> bytes:
    """One bit, in the middle."""
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder with two checkpoints, step_00000001 and step_00000002."""
    for step in (1, 2):
        tensors = {"a": torch.randn(3, 4), "b": torch.randn(5)}
        write_checkpoint(tmp_path / "checkpoints" / f"step_{step:08d}", Config(), tensors, tensors)
    return tmp_path / "checkpoints"


def found(folder: Path, resume: str, monkeypatch) -> Path | None:
    monkeypatch.setattr(checkpoint, "broadcast_object", lambda value: value)  # no process group here
    monkeypatch.setattr(checkpoint, "gather_objects", lambda value: [value])
    return checkpoint.find_checkpoint(folder.parent, resume, Ranks(0, 0, 1, torch.device("cpu")))


def test_the_list_of_files_is_complete(folder):
    newest = folder / "step_00000002"
    assert {str(file.relative_to(newest)) for file in newest.rglob("*") if file.is_file()} == set(FILES)


@pytest.mark.parametrize("damage", [truncate, zero, empty, flip, None], ids=lambda d: d.__name__ if d else "missing")
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(folder, monkeypatch, capsys, name, damage):
    newest = folder / "step_00000002"
    check_whole(newest)
    assert found(folder, "auto", monkeypatch) == newest
    victim = newest / name
    if damage is None:
        victim.unlink()
    else:
        victim.write_bytes(damage(victim.read_bytes()))
    assert found(folder, "auto", monkeypatch) == folder / "step_00000001"
    line = capsys.readouterr().err
    assert line.startswith(f"passing over {newest}: ")
    assert line.count("\n") == 1
    assert name in line
    with pytest.raises(DamagedCheckpoint, match=r"(?s).*" + name.rsplit("/", 1)[-1]):
        found(folder, str(newest), monkeypatch)


def test_no_flipped_bit_of_the_manifest_is_overlooked(folder):
    """It is the one file that no other vouches for."""
    newest = folder / "step_00000002"
    content = (newest / "MANIFEST.json").read_bytes()
    for bit in range(8 * len(content)):
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        (newest / "MANIFEST.json").write_bytes(damaged)
        with pytest.raises(DamagedCheckpoint):
            check_whole(newest)


def test_ranks_that_share_the_checking_look_at_every_file(folder):
    newest = folder / "step_00000002"
    (newest / "state.json").unlink()
    complaints = 0
    for rank in range(3):
        try:
            check_whole(newest, rank, 3)
        except DamagedCheckpoint:
            complaints += 1
    assert complaints == 1


def test_pruning_keeps_the_newest_and_drops_half_written_ones(folder):
    (folder / ".step_00000003.partial").mkdir()
    prune_checkpoints(folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == ["latest", "step_00000002"]


def test_a_run_that_went_back_keeps_what_it_saves_and_goes_on_from_there(tmp_path):
    for step in (100, 400, 500, 200):  # resumed at 100 by its path, then saved 200
        (tmp_path / "partial").mkdir()
        publish(tmp_path / "partial", tmp_path / f"step_{step:08d}")
    assert [int(path.name[5:]) for path in candidates(tmp_path, "auto")] == [200, 100, 500, 400]
    prune_checkpoints(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.glob("step_*")) == ["step_00000100", "step_00000200"]


def test_a_checkpoint_that_cannot_be_deleted_now_does_not_end_the_run(folder, monkeypatch, capsys):
    remove = shutil.rmtree

    def busy(path, *_):
        if path.name == "step_00000001":
            raise OSError(39, "Directory not empty", ".nfs0001")
        remove(path)

    (folder / ".step_00000003.partial").mkdir()
    monkeypatch.setattr(shutil, "rmtree", busy)
    prune_checkpoints(folder, 1)
    assert sorted(path.name for path in folder.glob("*step_*")) == ["step_00000001", "step_00000002"]
    assert not (folder / ".step_00000003.partial").exists()
    assert "step_00000001 is left there for now" in capsys.readouterr().err
    monkeypatch.undo()
    prune_checkpoints(folder, 1)
    assert [path.name for path in folder.glob("step_*")] == ["step_00000002"]
