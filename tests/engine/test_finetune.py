"""Fine-tuning through the real launcher: best weights, predictions, an early end, resuming, and what is refused."""

import json
import math
from contextlib import nullcontext
from typing import get_args

import pytest
import torch

from launch import evaluate as programme
from simla_ds.data.processor import SimlaProcessor
from simla_ds.downstream.config import FinetuneConfig, TaskName
from simla_ds.downstream.tasks import make_task
from simla_ds.downstream.vqa import AnswerNetwork
from simla_ds.engine.distributed import Ranks
from simla_ds.engine.finetune import _network, build_finetuning
from simla_ds.hub import load_model_folder
from simla_ds.model.simla import Simla
from simla_ds.parsing import parse_config
from tests.engine.launching import ROOT, fit_all, launch
from tests.engine.runs import MODEL, records, scenes
from tests.tiny import model_config

pytestmark = pytest.mark.launcher

SCRIPT = ROOT / "launch/finetune.py"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("data"), val=24)  # fewer make no question


def keys(*arguments, data, task="vqa", stage=2):
    given = ["--task", task, "--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json"), "--data.train", str(data)]
    given += [] if "--model" in arguments else MODEL
    given += ["--data.workers", "0", "--train.batch_size", "8", "--train.precision", "fp32"]
    return [*given, "--train.log_every", "1", "--train.checkpoint_every", "2", *arguments]


def finetune(*arguments, output, ranks=2, **options):
    return launch(SCRIPT, *keys(*arguments, **options), "--output", str(output), ranks=ranks)


def measured(run):
    return {line["step"]: line["eval/accuracy"] for line in records(run) if "eval/accuracy" in line}


def test_a_run_keeps_its_best_weights_with_predictions_and_ends_early(data, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    done = finetune(
        *("--train.steps", "12", "--eval.every", "1", "--eval.patience", "2", "--optim.learning_rate", "1e-7"),
        data=data,
        output=run,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    accuracy = measured(run)
    assert max(accuracy) < 12, accuracy  # at that rate nothing gets better
    assert "no better eval/accuracy" in done.stderr
    assert {line["step"] for line in records(run) if "loss/vqa" in line} == set(range(1, max(accuracy) + 1))

    best = [json.loads(line) for line in (run / "best/predictions.jsonl").read_text().splitlines()]
    assert [line["entry"] for line in best] == list(range(len(best)))  # of both ranks, in order, once each
    right = sum(line["answer"] == line["given"]["answer"] for line in best)
    assert 100 * right / len(best) == pytest.approx(max(accuracy.values()))

    network, _ = load_model_folder(run / "best", AnswerNetwork)
    assert network.language_head.decoder.weight is network.decoder.embeddings.word.weight
    options = ["--task", "vqa", "--model", str(run / "best"), "--data", str(data.parent / "val")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *options, "--json", str(tmp_path / "out.json")])
    assert programme.main() == 0
    assert json.loads((tmp_path / "out.json").read_text())["accuracy"] == pytest.approx(max(accuracy.values()))
    monkeypatch.setattr("sys.argv", ["evaluate.py", *options, "--task", "nlvr2"])
    assert programme.main() == 2
    assert "holds a model for 'vqa', not for 'nlvr2'" in capsys.readouterr().err


def test_every_task_trains(data, tmp_path):
    steps = ("--train.steps", "2", "--eval.every", "0")
    fit_all({tmp_path / task: keys(*steps, data=data, task=task) for task in get_args(TaskName)}, ranks=2)
    for task in get_args(TaskName):
        logged = [line["loss"] for line in records(tmp_path / task) if "loss" in line]
        assert len(logged) == 2
        assert all(math.isfinite(loss) and loss > 0 for loss in logged)
        assert (tmp_path / task / "final/model.safetensors").is_file()
        assert SimlaProcessor.from_pretrained(tmp_path / task / "final").max_words == (50 if task == "vqa" else 30)


def test_another_number_of_words_than_a_task_keeps_is_refused(data):
    config, _ = parse_config(keys("--data.max_words", "40", data=data), FinetuneConfig)
    with pytest.raises(ValueError, match=r"data\.max_words=40: vqa keeps 50 words of a text"):
        build_finetuning(config, Ranks(0, 0, 1, torch.device("cpu")), torch.float32, nullcontext())


@pytest.mark.slow  # three launches
def test_a_resumed_run_goes_on_as_the_whole_one_at_stage_3(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    common = ("--eval.every", "2", "--eval.patience", "0", "--train.samples", "64")
    options = {"data": data, "task": "snli_ve", "stage": 3, "ranks": 1}
    for steps, run in (("4", whole), ("2", parts), ("4", parts)):
        done = finetune("--train.steps", steps, "--optim.schedule", "constant", *common, output=run, **options)
        assert done.returncode == 0, done.stderr[-3000:]
    losses = [{line["step"]: line["loss"] for line in records(run) if "loss" in line} for run in (whole, parts)]
    assert losses[0] == losses[1]
    assert set(losses[0]) == {1, 2, 3, 4}


@pytest.mark.slow  # two launches
def test_nlvr2_starts_from_text_assignment(data, tmp_path):
    first, second = tmp_path / "assignment", tmp_path / "nlvr2"
    steps = ("--train.steps", "2", "--eval.every", "1")
    done = finetune(*steps, task="text_assignment", data=data, output=first)
    assert done.returncode == 0, done.stderr[-3000:]
    assert max(measured(first)) == 2
    done = finetune(*steps, "--model", str(first / "final"), task="nlvr2", data=data, output=second)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "pretrained weights loaded" in done.stderr


def test_pretraining_s_own_network_is_trained_on_with_its_dropout():
    """Retrieval and grounding go on with it as it is; a folder's model is loaded in eval mode elsewhere."""
    pretrained = Simla(model_config())
    config = FinetuneConfig(task="retrieval", model=pretrained.config)
    network = _network(make_task("retrieval", None), config, (Simla, pretrained.state_dict()))
    assert all(module.training for module in network.modules())
    assert torch.equal(network.get_parameter("match_head.weight"), pretrained.match_head.weight)
