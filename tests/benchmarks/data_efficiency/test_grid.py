"""What a grid file may say, and which cells it makes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.data_efficiency.command import main
from benchmarks.data_efficiency.grid import Cell, Data, Grid, read_grid
from benchmarks.data_efficiency.sets import SETS
from simla_ds.data.scenes.prepare import SceneOptions
from simla_ds.data.shards import write_shards
from simla_ds.parsing import parse_config

GRIDS = sorted((Path(__file__).resolve().parents[3] / "grids").glob("*.yaml"))


def grid(**changes: Any) -> Grid:
    block = {"objectives": ["itc", "simla"], "fractions": [0.1, 1.0], "seeds": [0, 1]}
    given: dict[str, Any] = {"name": "g", "config": {}, "data": Data(scenes={"train": 20}), "cells": [block], **changes}
    return Grid(**given)


def test_an_unfinished_grid_has_all_sets_of_its_first_seed():
    assert [cell.name for cell in grid().all_cells[:4]] == ["itc-1-0", "simla-1-0", "itc-0.1-0", "simla-0.1-0"]
    assert [cell.seed for cell in grid().all_cells] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ({"objectives": ["clip"]}, "unknown 'clip'; the choices are albef, itc, itc+itm+mlm"),
        ({"fractions": [2]}, "2 is no share of the data; give 0.02"),
        ({"seeds": ["a"]}, "a is no seed"),
        ({"variants": ["official"]}, "unknown 'official'"),
        ({"fraction": [1.0]}, "has fraction; known are objectives, variants, fractions, seeds"),
    ],
)
def test_what_a_block_of_cells_must_not_say_is_named_with_the_choices(block: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said.replace("+", r"\+")):
        grid(cells=[{"objectives": ["itc"], "fractions": [1.0], "seeds": [0], **block}])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("clip-1-0", "no objectives 'clip' in this grid; it has itc, simla"),
        ("itc-0.3-0", "no fraction '0.3' in this grid; it has 0.1, 1"),
        ("itc-1-7", "no seed '7'"),
        ("itc", "no fraction ''"),
    ],
)
def test_a_cell_that_is_not_there_is_named_with_the_choices(name: str, said: str):
    with pytest.raises(ValueError, match=said):
        grid().find(name)
    assert grid().find("simla-0.1-1") == Cell("simla", 0.1, 1)


def test_rows_stay_comparable_when_cells_are_added_and_not_when_the_shared_configuration_changes():
    one = grid()
    assert one.shared_hash == replace(one, cells=[{**one.cells[0], "seeds": [0, 1, 2]}]).shared_hash
    assert one.shared_hash != replace(one, config={"optim": {"learning_rate": 0.1}}).shared_hash
    assert one.shared_hash != replace(one, data=Data(scenes={"train": 21})).shared_hash


def test_what_a_set_was_tuned_to_is_its_own_and_a_variant_has_the_last_word():
    slow, fast = {"optim": {"learning_rate": 0.1}}, {"optim": {"learning_rate": 0.4}}
    tuned = grid(config={"optim": {"learning_rate": 0.2}}, sets={"simla": fast}, variants={"slow": slow})
    rates = [
        tuned.settings(Cell(name, 1.0, 0, variant))["optim"]["learning_rate"]
        for name, variant in (("itc", ""), ("simla", ""), ("simla", "slow"))
    ]
    assert rates == [0.2, 0.4, 0.1]
    with pytest.raises(ValueError, match="sets: unknown 'clip'; the choices are albef"):
        grid(sets={"clip": fast})


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_every_cell_of_the_grids_that_are_shipped_is_a_configuration_that_trains(file: Path, tmp_path: Path):
    shipped, enabled = read_grid(file), {}
    for cell in {replace(cell, seed=0, fraction=1.0) for cell in shipped.all_cells}:
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(shipped.settings(cell)))
        config, _ = parse_config(["--config", str(recipe)])
        enabled[cell.objectives] = config.objectives.enabled
        assert config.model.stream.shared == (cell.objectives != "albef")
    for name, objectives in enabled.items():
        said = {"albef": "itc+itm+mlm", "simla": "itc+itm+mlm+xmm+psl"}.get(name, name)
        assert "+".join(objectives) == said


def test_the_scenes_grid_is_six_sets_three_fractions_three_seeds_and_the_official_arithmetic():
    cells = read_grid(next(file for file in GRIDS if file.stem == "scenes")).all_cells
    assert len(cells) == 57
    assert {cell.objectives for cell in cells} == set(SETS)
    assert {cell.fraction for cell in cells if cell.variant == "official"} == {1.0}


@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_a_smoke_run_has_every_set_and_variant_once_and_can_be_run_anywhere(file: Path, tmp_path: Path):
    shipped = read_grid(file)
    smoke = shipped.smoke()
    assert [cell.group for cell in smoke.all_cells] == list(dict.fromkeys(cell.group for cell in shipped.all_cells))
    assert smoke.name != shipped.name
    scenes = SceneOptions(**smoke.data.scenes)
    assert {name: scenes.splits[name] for name in smoke.measure.splits} == dict.fromkeys(smoke.measure.splits, 24)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(smoke.settings(smoke.all_cells[0])))
    config, _ = parse_config(["--config", str(recipe)])
    assert config.model.vision.grid == scenes.grid
    assert config.train.batch_size * config.train.grad_accumulation * smoke.launch.ranks <= scenes.train
    assert config.train.samples <= scenes.train
    paths = (config.data.train, config.data.tokenizer, config.data.visual_tokenizer)
    assert set(paths) | {config.init.text, config.init.vision, config.init.checkpoint} == {""}


def test_a_bad_grid_file_is_one_line_and_exit_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for text, said in (
        ("cells: [", "is no YAML"),
        ("seeds: 3", "has seeds; known are name"),
        ("name: a", "config, cells missing"),
        ("", "it holds no keys"),
    ):
        (tmp_path / "grid.yaml").write_text(text)
        assert main(["--grid", str(tmp_path / "grid.yaml")]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    assert main(["--grid", str(tmp_path / "none.yaml")]) == 2


def test_a_split_that_the_data_lack_is_told_before_anything_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_shards([("a", {"jpg": b"", "txt": b"a dog"})], tmp_path / "train", 5)
    shards = str(tmp_path / "train")
    grid = {"name": "mine", "config": {}, "data": {"train": shards, "test": {"coco": shards}}}
    grid["cells"] = [{"objectives": ["itc"], "fractions": [1.0], "seeds": [0]}]
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid))
    folders = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
    assert main(["--grid", str(tmp_path / "grid.yaml"), *folders]) == 2
    said = "measure.splits: no test, test_vendor, test_pairing in this grid's data, which have coco"
    assert said in capsys.readouterr().err
