"""Saving where the disk does not want to, and round trips of one process. Layouts: test_zero_teacher.py."""

import json
import resource
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from simla_ds.engine import distributed
from simla_ds.engine.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from simla_ds.engine.distributed import Ranks, all_or_none
from simla_ds.engine.zero_teacher import EngineSource
from simla_ds.objectives import FeatureQueue
from simla_ds.teacher import Teacher
from tests.tiny import make_task, run_config

RANKS = Ranks(0, 0, 1, torch.device("cpu"))


class Run:
    """What a checkpoint is made of, with AdamW as at stage 0 in fp32."""

    def __init__(self, seed: int):
        torch.manual_seed(seed)
        self.model = make_task(run_config()).model
        self.queue = FeatureQueue(8, 16)
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.engine: Any = SimpleNamespace(
            module=SimpleNamespace(model=self.model), optimizer=optimizer, gradient_accumulation_steps=lambda: 1
        )
        self.teacher = Teacher(self.model, dropout=False).follow(EngineSource(self.engine))

    def step(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.engine.optimizer.step()

    def save(self, folder, step: int):
        parts = self.engine, self.teacher, self.queue
        return save_checkpoint(folder, *parts, {"step": step, "samples_seen": step}, RANKS)

    def load(self, path) -> None:
        load_checkpoint(path, self.engine, self.teacher, self.queue, RANKS)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No process group: this rank is all there are."""
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value])
    for name, stand_in in (("gather_objects", lambda value: [value]), ("broadcast_object", lambda value: value)):
        monkeypatch.setattr(f"simla_ds.engine.checkpoint.{name}", stand_in)


@contextmanager
def disk_for(size: int):
    """Let no file grow beyond size bytes: writing fails in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_another_run_goes_on_as_the_one_that_saved(tmp_path):
    mine, other = Run(1), Run(2)
    mine.step()
    path = mine.save(tmp_path, 1)
    other.step()
    other.load(path)
    for run in (mine, other):
        torch.manual_seed(3)
        run.step()
    for a, b in zip(mine.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert all(torch.equal(value, other.teacher.master[name]) for name, value in mine.teacher.master.items())


@pytest.mark.parametrize("size", [0, 1000, 50_000])  # nothing; a header; in the midst of the weights
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path, size):
    run = Run(1)
    before = run.save(tmp_path / "checkpoints", 1)
    run.step()
    with disk_for(size), pytest.raises(OSError, match=r"step_00000002 could not be saved, earlier .* File too large"):
        run.save(tmp_path / "checkpoints", 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_00000001"]
    assert find_checkpoint(tmp_path, "auto", RANKS) == before


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"could not be saved, earlier checkpoints are kept: .*Not a directory"):
        Run(1).save(tmp_path / "file" / "checkpoints", 1)


def test_one_rank_that_cannot_write_ends_the_save_on_all(monkeypatch):
    monkeypatch.setattr(distributed, "gather_objects", lambda value: [value, OSError("rank 1's disk is full")])
    with pytest.raises(OSError, match="rank 1's disk is full"):
        all_or_none(lambda: "written")


def test_a_checkpoint_of_another_model_is_refused_by_the_parameter(tmp_path):
    run = Run(1)
    path = run.save(tmp_path, 1)
    index = path / "weights" / "index.json"
    content = json.loads(index.read_text())
    content["weight/match_head.bias"]["shape"] = [1]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the checkpoint's weight/match_head.bias is \(1,\), this model's \(2,\)"):
        run.load(path)
