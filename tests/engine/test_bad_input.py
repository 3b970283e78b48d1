"""Bad input gives one clear line and exit status 2, and nothing is written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from simla_ds.config import (
    Config,
    ContrastiveConfig,
    CrossModalConfig,
    DataConfig,
    ModelConfig,
    ObjectivesConfig,
    StreamConfig,
    TrainConfig,
)
from simla_ds.downstream.config import FinetuneConfig, FinetuneData, FinetuneInit
from simla_ds.engine import build, finetune
from simla_ds.engine.checkpoint import find_checkpoint
from simla_ds.engine.distributed import Ranks
from tests.engine.launching import ROOT
from tests.engine.runs import MODEL, scenes

RANKS = Ranks(0, 0, 1, torch.device("cpu"))


def test_a_queue_larger_than_a_quarter_of_the_data_is_refused_with_both_numbers():
    config = Config(objectives=ObjectivesConfig(itc=ContrastiveConfig(queue_size=26)))
    build.check_sizes(config, 104)
    with pytest.raises(ValueError, match=r"queue_size=26 .* 103 training pairs.*<= 25"):
        build.check_sizes(config, 103)


def test_captions_longer_than_the_position_table_are_refused():
    stream = StreamConfig(max_positions=128)
    config = Config(data=DataConfig(max_tokens=129), model=ModelConfig(stream=stream))
    with pytest.raises(ValueError, match=r"data.max_tokens=129 .*max_positions=128"):
        build.check_sizes(config, 10**6)


def test_too_little_disk_for_the_checkpoints_is_refused_with_both_sizes(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**40, 0, 2**30))
    config = Config(output=str(tmp_path / "run"), train=TrainConfig(keep_checkpoints=2))
    build.check_disk(config, 10**6)
    with pytest.raises(ValueError, match=r"1\.0 GiB free, .*need about 5\.0 GiB"):
        build.check_disk(config, 10**8)
    assert not (tmp_path / "run").exists()
    for step in (1, 2):  # a run that is resumed has room for one more, and needs no other
        (tmp_path / "run" / "checkpoints" / f"step_{step}").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"need about 1\.7 GiB beside the 2 that are there"):
        build.check_disk(config, 10**8)
    build.check_disk(config, 5 * 10**7)


def test_a_checkpoint_of_other_sizes_is_refused_with_the_field_and_both_numbers():
    config = Config()
    theirs = asdict(config.model)
    build.same_model(config, theirs, Path("step_1"))
    theirs["stream"]["layers"] = 12
    with pytest.raises(ValueError, match=r"model\.stream\.layers=12, this run has 6"):
        build.same_model(config, theirs, Path("step_1"))


def test_a_fresh_start_over_checkpoints_is_refused(tmp_path, monkeypatch):
    # no process group here
    monkeypatch.setattr("simla_ds.engine.checkpoint.broadcast_object", lambda value: value)
    monkeypatch.setattr("simla_ds.engine.checkpoint.gather_objects", lambda value: [value])
    assert find_checkpoint(tmp_path, "none", RANKS) is None
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"already holds 1 checkpoint\(s\), newest step_00000004"):
        find_checkpoint(tmp_path, "none", RANKS)
    with pytest.raises(ValueError, match=r"nowhere is no whole checkpoint: MANIFEST.json is missing"):
        find_checkpoint(tmp_path, str(tmp_path / "nowhere"), RANKS)
    assert find_checkpoint(tmp_path, "auto", RANKS) is None  # the damaged one is passed over


@pytest.fixture
def composed(monkeypatch):
    """Stand in for the composer of scenes; collect the folders and numbers of training scenes that are asked for."""
    asked = []

    def prepare(root, *, train, **_):
        asked.append((str(root), train))
        for split in ("train", "val"):
            (root / split).mkdir(parents=True)
            (root / split / "shard-000000.tar").touch()
        (root / "manifest.json").touch()

    monkeypatch.setattr("simla_ds.data.scenes.prepare.prepare_scenes", prepare)
    for module in (build, finetune):
        monkeypatch.setattr(module, "broadcast_object", lambda value: value)  # no process group here
    return asked


def test_a_wrong_model_folder_is_told_before_a_scene_is_composed(composed, tmp_path):
    config = FinetuneConfig(
        init=FinetuneInit(checkpoint=str(tmp_path / "nomodel")), data=FinetuneData(scenes_dir=str(tmp_path / "scenes"))
    )
    with pytest.raises(ValueError, match="nomodel"):
        finetune.build_finetuning(config, RANKS, torch.float32, nullcontext())
    assert composed == []


def test_fine_tuning_has_the_scenes_composed_that_it_uses_unless_there_are_some(composed, tmp_path):
    folder = tmp_path / "scenes"
    config = FinetuneConfig(data=FinetuneData(scenes_dir=str(folder), scenes_used=40, scenes_train=100))
    assert finetune._with_data(config, RANKS).data.train == f"{folder}_40/train"
    assert composed == [(f"{folder}_40", 40)]
    build._prepare_scenes(folder, 100, 128, 8, RANKS)  # as pretraining does
    taken = finetune._with_data(config, RANKS).data
    assert (taken.train, taken.val, taken.visual_tokenizer) == (str(folder / "train"), str(folder / "val"), "")
    assert len(composed) == 2


def test_remote_shards_need_a_visual_tokenizer_only_where_it_is_read():
    data = DataConfig(train="http://host/{000..001}.tar", tokenizer="words")
    with pytest.raises(ValueError, match=r"data\.visual_tokenizer must be a local folder"):
        build.with_data_paths(Config(data=data), RANKS)
    without = ObjectivesConfig(xmm=CrossModalConfig(weight=0))
    assert build.with_data_paths(Config(data=data, objectives=without), RANKS).data.visual_tokenizer == ""


BAD = {
    "no shards match": ("pretrain.py", ["--data.train", "missing/{000..001}.tar"], r"data\.train"),
    "a JSON that contradicts the recipe": ("pretrain.py", ["--deepspeed", "contradiction.json"], r"16.*4"),
    "a batch of one with ITM": ("pretrain.py", ["--train.batch_size", "1"], r"train\.batch_size=1"),
    "annotations without a key": (
        "finetune.py",
        [
            "--task",
            "vqa",
            "--data.train",
            "bad.jsonl",
            "--data.val",
            "bad.jsonl",
            "--data.tokenizer",
            "scenes/tokenizer",
        ],
        r"(?s)entry 0: key 'answer' must hold a text or a list of texts.*entry 1: key 'question' is missing",
    ),
}
"""What is wrong: the programme, its further arguments, what it must say."""


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> dict[str, tuple[Path, int, str]]:
    """What is wrong -> the run's folder, exit status, what went to stderr; in one process."""
    folder = tmp_path_factory.mktemp("refused")
    train = scenes(folder)
    (folder / "contradiction.json").write_text('{"train_micro_batch_size_per_gpu": 16}')
    (folder / "bad.jsonl").write_text('{"image": "a.jpg", "question": "what?"}\n{"image": "b.jpg"}\n')
    tiny = [*MODEL, "--data.train", str(train), "--data.workers", "0", "--train.batch_size", "4"]
    outputs = [folder / f"run{number}" for number in range(len(BAD))]
    commands = [
        [programme, *tiny, *arguments, "--output", str(output)]
        for (programme, arguments, _), output in zip(BAD.values(), outputs, strict=True)
    ]
    (folder / "commands.json").write_text(json.dumps(commands))
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.workers.refused", str(folder / "commands.json")],
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(done.stdout.splitlines()[-1])
    return {name: (output, *answer) for name, output, answer in zip(BAD, outputs, answers, strict=True)}


@pytest.mark.launcher
@pytest.mark.parametrize("name", BAD)
def test_a_training_command_says_what_is_wrong_and_writes_nothing(refused, name):
    output, status, said = refused[name]
    assert status == 2, said[-2000:]
    assert said.count("error:") == 1, said[-2000:]
    assert re.search(BAD[name][2], said.split("error:")[1]), said[-2000:]
    assert "Traceback" not in said
    assert not output.exists()


@pytest.mark.launcher
def test_a_misspelt_key_ends_the_process_with_status_2(tmp_path):
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), "--model.vision.widht", "32"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    (error,) = [line for line in done.stderr.splitlines() if "error:" in line]
    assert "model.vision.width" in error
    assert not list(tmp_path.iterdir())
