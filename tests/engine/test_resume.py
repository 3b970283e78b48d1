"""Killed and resumed, a run goes on as if nothing had happened. Through the real launcher, on CPU."""

import json
import os
import shutil
import signal

import pytest
import torch
import yaml
from safetensors.torch import load_file

from simla_ds.engine.export import export_checkpoint
from simla_ds.engine.tensor_files import Pieces
from simla_ds.hub import SimlaModel
from tests.engine.launching import ROOT, launch, launching, wait_for
from tests.engine.runs import keys, losses, records, scenes

pytestmark = pytest.mark.launcher

SCRIPT = ROOT / "launch" / "pretrain.py"
# dropout and the ramp of alpha stay on: both must go on where they were
RUN = ["--train.steps", "8", "--train.checkpoint_every", "4", "--train.batch_size", "4", "--deepspeed"]
RUN += [str(ROOT / "ds_configs" / "zero2.json"), "--eval.every", "8", "--eval.samples", "8", "--eval.rerank", "2"]
RUN += ["--train.diagnose_every", "4", "--optim.schedule", "constant"]  # no rate depends on where a run is to end


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scenes(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    done = launch(SCRIPT, *keys(data, *RUN), "--output", str(run), ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def test_a_killed_run_resumes_with_bit_identical_losses(tmp_path, data, undisturbed):
    run = tmp_path / "run"
    arguments = keys(data, *RUN, "--output", str(run))
    # many steps, so that the kill comes before the end
    with launching(SCRIPT, *arguments, "--train.steps", "400", ranks=2) as process:
        wait_for((run / "checkpoints" / "step_00000004").exists, process, 240)
        os.killpg(process.pid, signal.SIGKILL)
    for late in sorted((run / "checkpoints").glob("step_*"))[1:]:
        assert late.name != "step_00000400"
        shutil.rmtree(late)  # a later checkpoint may have been finished by then
    done = launch(SCRIPT, *arguments, "--resume", "auto", ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed from" in done.stderr
    assert "step 4" in done.stderr
    assert losses(run) == losses(undisturbed)
    assert list(losses(run)) == list(range(1, 9))


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(tmp_path, data, undisturbed):
    """Two ranks' checkpoint with one flipped bit, end to end; every file and kind: test_checkpoint_folder.py."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoints", run / "checkpoints")
    newest, before = (run / "checkpoints" / f"step_{step:08d}" for step in (8, 4))
    victim = newest / "weights" / "rank_00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = launch(SCRIPT, *keys(data, *RUN, "--output", str(run)), "--resume", "auto", ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if "passing over" in line]
    assert line.startswith(f"passing over {newest}: ")
    assert "weights/rank_00001.safetensors" in line
    assert f"resumed from {before} at step 4 of 8" in done.stderr
    assert losses(run) == {step: values for step, values in losses(undisturbed).items() if step > 4}
    ends = [folder / "checkpoints" / "step_00000008" / "weights" for folder in (run, undisturbed)]
    mine, wanted = map(Pieces, ends)
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in mine.items())


def test_a_run_folder_holds_what_the_readme_says(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names == {"config.yaml", "environment.json", "metrics.jsonl", "tensorboard", "csv", "checkpoints", "final"}
    assert yaml.safe_load((undisturbed / "config.yaml").read_text())["train"]["batch_size"] == 4
    assert json.loads((undisturbed / "environment.json").read_text())["world_size"] == 2
    training = [record for record in records(undisturbed) if "loss" in record]
    assert {"step", "samples_seen", "lr", "grad_norm", "samples_per_second", "peak_memory_mb", "data_wait"} <= set(
        training[0]
    )
    shares = [record for record in records(undisturbed) if "gradient_share/image_cls/itc" in record]
    assert [record["step"] for record in shares] == [4, 8]
    for place in ("image_cls", "fused_cls"):
        measured = {name: value for name, value in shares[0].items() if name.startswith(f"gradient_share/{place}/")}
        assert len(measured) == 5
        assert sum(measured.values()) == pytest.approx(1.0)
    evaluated = [record["step"] for record in records(undisturbed) if "eval/student/loss/itc" in record]
    assert evaluated == [0, 8]
    assert (undisturbed / "checkpoints" / "latest").read_text().strip() == "step_00000008"
    assert not list((undisturbed / "checkpoints").glob(".*.partial"))
    for folder in ("final", "final/teacher"):
        assert SimlaModel.from_pretrained(undisturbed / folder).model.config.stream.width == 32


def test_exporting_the_last_checkpoint_gives_the_final_folders(tmp_path, undisturbed):
    export_checkpoint(undisturbed / "checkpoints" / "step_00000008", tmp_path / "model")
    for folder in (".", "teacher"):
        exported, final = (
            load_file(base / folder / "model.safetensors") for base in (tmp_path / "model", undisturbed / "final")
        )
        assert exported.keys() == final.keys()
        assert all(torch.equal(value, final[name]) for name, value in exported.items())
        for name in ("config.json", "preprocessor_config.json", "tokenizer.json"):
            assert (tmp_path / "model" / folder / name).read_text() == (
                undisturbed / "final" / folder / name
            ).read_text()
