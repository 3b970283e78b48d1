"""The large recipes at their full depth and a fraction of their width, under ZeRO-3 on CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from simla_ds.parsing import parse_config
from simla_ds.planner.memory import count_parameters
from simla_ds.planner.plan import ASSUMED
from tests.engine.launching import ROOT, launch
from tests.engine.runs import losses, scenes

RECIPES = ROOT / "launch" / "recipes"


@pytest.mark.parametrize(("name", "billions"), [("simla_large", 0.76), ("simla_huge", 2.0)])
def test_a_recipe_is_as_large_as_it_says(name: str, billions: float):
    config, _ = parse_config(["--config", str(RECIPES / f"{name}.yaml")])
    assert count_parameters(replace(config.model, vocabulary=ASSUMED)).total == pytest.approx(1e9 * billions, rel=0.01)
    assert config.model.vision.grid == 16  # as many patches as the dVAE has tokens


def narrow(recipe: str) -> list[str]:
    """Return keys of a recipe at width 32, on the scenes' 8 x 8 patches; depth and checkpointing stay."""
    config, _ = parse_config(["--config", str(RECIPES / f"{recipe}.yaml")])
    side = 8 * config.model.vision.patch_size
    return [
        *("--config", str(RECIPES / f"{recipe}.yaml"), "--model.vision.image_size", str(side)),
        *("--model.vision.width", "32", "--model.vision.heads", "2", "--model.stream.width", "32"),
        *("--model.stream.heads", "2", "--model.stream.intermediate_size", "64", "--objectives.itc.queue_size", "0"),
    ]


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("recipe", ["simla_large", "simla_huge"])
def test_steps_at_full_depth_with_and_without_the_second_copy_in_each_node(tmp_path: Path, recipe: str):
    settings = json.loads((ROOT / "ds_configs" / "zero3_hpz.json").read_text())
    settings["zero_optimization"]["zero_hpz_partition_size"] = 2  # the two ranks are a node
    hierarchical = tmp_path / "hpz.json"
    hierarchical.write_text(json.dumps(settings))
    keys = [*narrow(recipe), "--data.train", str(scenes(tmp_path)), "--data.workers", "0", "--train.steps", "2"]
    keys += ["--train.log_every", "1", "--train.precision", "fp32", "--eval.every", "0", "--train.batch_size", "2"]
    files = {"zero3": ROOT / "ds_configs" / "zero3.json", "hpz": hierarchical}
    runs = {str(tmp_path / name): [*keys, "--deepspeed", str(file)] for name, file in files.items()}
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = launch("tests.engine.workers.fits", str(tmp_path / "runs.json"), ranks=2, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    plain, twice = (losses(tmp_path / name) for name in files)
    assert set(plain) == set(twice) == {1, 2}
    for step, found in plain.items():
        assert twice[step] == pytest.approx(found, rel=1e-5)
    assert plain[1]["loss/mlm"] != plain[2]["loss/mlm"]
