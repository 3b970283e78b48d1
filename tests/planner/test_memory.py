"""Bytes of a rank: by formula, and as the real trainer holds them under DeepSpeed's launcher."""

import json
from dataclasses import replace
from typing import Any

import pytest

from benchmarks import memory as measured
from benchmarks.step_sizes import SIZES
from simla_ds.planner.memory import FULL, LAYOUTS, Zero, count_parameters, plan_memory
from simla_ds.planner.shape import StepShape
from tests.engine.runs import scenes

CONFIG = SIZES["full"]
SHAPE = StepShape.expected(CONFIG)
PARAMETERS = count_parameters(CONFIG.model)


def plan(zero: Zero, ranks: int = 8, size: int = 2, **train: Any):
    config = replace(CONFIG, train=replace(CONFIG.train, **train))
    return plan_memory(config, SHAPE, zero, ranks, size, PARAMETERS)


def test_the_layouts_are_those_of_ds_configs(project_root):
    files = [json.loads(file.read_text()) for file in (project_root / "ds_configs").glob("zero?*.json")]
    assert {Zero.of(file) for file in files if "zero_hpz_partition_size" not in file["zero_optimization"]} == {
        zero if zero.stage else replace(zero, bucket=500_000_000) for zero in LAYOUTS
    }


def test_the_base_model_has_its_238_million_parameters():
    assert PARAMETERS.total == pytest.approx(238.3e6, rel=1e-3)
    assert PARAMETERS.encoder == 12 * (12 * 768**2 + 13 * 768)
    assert 0.8 < (PARAMETERS.encoder + PARAMETERS.stream) / PARAMETERS.total < 0.9


def test_the_teachers_master_and_the_optimizer_fall_with_the_ranks():
    for stage in (1, 2, 3):
        one, eight = (plan(Zero(stage=stage), ranks).parts for ranks in (1, 8))
        for part in ("teacher", "optimizer"):
            assert eight[part] == pytest.approx(one[part] / 8)
    whole = plan(Zero(stage=0), 8).parts
    assert whole["teacher"] == FULL * PARAMETERS.total
    assert whole["teacher copy"] == 2 * PARAMETERS.total
    assert plan(Zero(stage=3), 8).parts["teacher copy"] == 2 * PARAMETERS.outside


def test_every_saving_saves():
    peaks = [plan(Zero(stage=stage)).peak for stage in range(4)]
    assert peaks[0] > peaks[1] > peaks[2]
    assert plan(Zero(stage=3)).resident < plan(Zero(stage=2)).resident
    assert plan(Zero(stage=2), activation_checkpointing=True).peak < plan(Zero(stage=2)).peak
    offloaded = plan(Zero(stage=2, offload_optimizer=True))
    assert offloaded.peak < plan(Zero(stage=2)).peak
    assert offloaded.host == pytest.approx(5 * FULL * PARAMETERS.total / 8)  # weights, moments, teacher, gradients


@pytest.mark.launcher
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_the_real_trainer_holds_what_is_planned(tmp_path):
    """At the stage that splits everything; weights, optimizer, teacher and activations weigh about the same."""
    train = scenes(tmp_path)
    (found,) = measured.run([measured.Case("wide", measured.WIDE, stage=3, ranks=2)], train.parent, tmp_path)
    assert found["resident_planned"] == pytest.approx(found["resident"], rel=0.15), found
    assert found["peak_planned"] == pytest.approx(found["peak"], rel=0.15), found
    assert found["peak_rss"] > 0.5 * (found["peak"] - found["resident"])


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.timeout(3600)
def test_every_case_of_the_benchmark_is_within_15_percent(tmp_path):
    train = scenes(tmp_path)
    for case in measured.CASES:
        (found,) = measured.run([case], train.parent, tmp_path)
        assert found["resident_planned"] == pytest.approx(found["resident"], rel=0.15), found
        assert found["peak_planned"] == pytest.approx(found["peak"], rel=0.15), found
