"""Model folders out of checkpoints."""

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from simla_ds.config import Config, DataConfig
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream.config import FinetuneConfig
from simla_ds.engine import tensor_files
from simla_ds.engine.export import export_checkpoint
from simla_ds.hub import SimlaModel, SimlaProcessor
from simla_ds.model.simla import Simla
from tests.engine.checkpoints import write_checkpoint
from tests.tiny import model_config

WITHOUT_DEEPSPEED = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ImportError(name)
sys.meta_path.insert(0, Blocker())
from simla_ds.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, Simla, Simla]:
    """A checkpoint, its student and its teacher."""
    tokenizer = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["a red ball on a blue box", "two dogs"] * 3, tokenizer, 60)
    vocabulary = replace(TextTokenizer(tokenizer).vocabulary, visual_size=20)
    model = replace(model_config(), vocabulary=vocabulary)
    config = Config(model=model, data=DataConfig(tokenizer=str(tokenizer), max_words=9))
    networks = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        networks.append(Simla(model))
    checkpoint = tmp_path_factory.mktemp("run") / "checkpoints" / "step_00000007"
    checkpoint.parent.mkdir()
    write_checkpoint(checkpoint, config, *(dict(network.named_parameters()) for network in networks))
    return checkpoint, networks[0], networks[1]


def test_the_command_makes_folders_of_student_and_teacher_without_deepspeed(tmp_path, saved):
    checkpoint, *networks = saved
    command = [sys.executable, "-c", WITHOUT_DEEPSPEED, "export", str(checkpoint), "--out", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, network in zip((tmp_path / "model", tmp_path / "model" / "teacher"), networks, strict=True):
        loaded = SimlaModel.from_pretrained(folder)
        for name, value in network.named_parameters():
            assert torch.equal(loaded.model.get_parameter(name), value)
        assert loaded.config.training == {"step": 7, "samples_seen": 56}
        assert SimlaProcessor.from_pretrained(folder).max_words == 9
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_is_gone_is_asked_for_and_nothing_is_written(tmp_path, saved):
    with pytest.raises(ValueError, match=r"nowhere.* is not there; give its folder with --tokenizer"):
        export_checkpoint(saved[0], tmp_path / "model", tmp_path / "nowhere")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_network_is_refused_and_nothing_is_written(tmp_path, saved):
    weights = dict(saved[1].named_parameters())
    del weights[next(iter(weights))]
    (tmp_path / "run").mkdir()
    config = Config(model=saved[1].config, data=DataConfig(tokenizer=str(tmp_path)))
    write_checkpoint(tmp_path / "run" / "step_1", config, weights, weights)
    with pytest.raises(ValueError, match=r" None, its model \("):
        export_checkpoint(tmp_path / "run" / "step_1", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_checkpoint_of_a_task_with_a_network_of_its_own_is_refused(tmp_path, saved):
    config = FinetuneConfig(task="vqa", model=saved[1].config)
    write_checkpoint(tmp_path / "step_1", config, *(dict(network.named_parameters()) for network in saved[1:]))
    with pytest.raises(ValueError, match="is of the task vqa: its run's best/ and final/ are its model folders"):
        export_checkpoint(tmp_path / "step_1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_tensor_at_a_time_is_in_memory(tmp_path, saved, monkeypatch):
    """Every tensor that is read is gone before the next one but one is."""
    alive, most = [], 0
    read = tensor_files.Pieces.__getitem__

    def counted(self, name):
        nonlocal most
        value = read(self, name)
        alive.append(weakref.ref(value))
        most = max(most, sum(reference() is not None for reference in alive))
        return value

    monkeypatch.setattr(tensor_files.Pieces, "__getitem__", counted)
    export_checkpoint(saved[0], tmp_path / "model")
    assert len(alive) == 2 * len(list(saved[1].parameters()))
    assert most <= 2
