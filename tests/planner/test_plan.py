"""Rows of a plan: what fits, how fast, how much is sent; and the command."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.step_sizes import SIZES, changed
from simla_ds.cli import main
from simla_ds.planner.cards import CARDS, GIB
from simla_ds.planner.memory import LAYOUTS, Zero, count_parameters, plan_memory
from simla_ds.planner.operations import recomputed_operations, step_operations
from simla_ds.planner.plan import ASSUMED, RESERVED, Hardware, make_plan
from simla_ds.planner.shape import StepShape
from simla_ds.planner.speed import bytes_sent, step_seconds

ROOT = Path(__file__).resolve().parents[2]
CONFIG = changed(SIZES["full"], train__batch_size=32)
HARDWARE = Hardware(card=CARDS["A100-40"], cards=4)
PARAMETERS = count_parameters(CONFIG.model)


@pytest.fixture(scope="module")
def plan():
    return make_plan(CONFIG, HARDWARE, LAYOUTS, pairs=1_000_000)


def test_the_largest_batch_fits_and_one_pair_more_does_not(plan):
    room = HARDWARE.card.memory - RESERVED
    for row in plan.rows:
        peaks = []
        for batch in (row.largest, row.largest + 1):
            train = replace(CONFIG.train, batch_size=batch, activation_checkpointing=row.checkpointing)
            config = replace(CONFIG, train=train)
            peaks.append(plan_memory(config, StepShape.expected(config), row.zero, 4, 2, PARAMETERS).peak)
        assert peaks[0] <= room < peaks[1]
        assert row.fits == (row.memory.peak <= room) == (row.largest >= 32)


def test_a_card_that_is_too_small_gets_no_speed():
    small = Hardware(card=replace(CARDS["24GB"], memory=4 * GIB), cards=1)
    (row, recomputing) = make_plan(CONFIG, small, [Zero(stage=0)]).rows
    assert not row.fits
    assert (row.largest, row.pairs_per_second, row.seconds) == (0, 0.0, None)
    assert recomputing.largest == 0
    tight = Hardware(card=replace(CARDS["24GB"], memory=12 * GIB), cards=1)
    (row, _) = make_plan(CONFIG, tight, [Zero(stage=0)]).rows
    assert 2 <= row.batch == row.largest < 32  # the speed is of what fits


def test_days_follow_from_operations_peak_utilisation_and_links(plan):
    row = next(row for row in plan.rows if row.zero.stage == 2 and not row.zero.offload_optimizer)
    compute = step_operations(CONFIG, StepShape.expected(CONFIG)) / (312e12 * 0.35)
    assert row.seconds.compute == pytest.approx(compute)
    assert row.seconds.communication == pytest.approx(row.sent.total / 300e9)
    assert row.pairs_per_second == pytest.approx(32 * 4 / row.seconds.total)
    assert row.days == pytest.approx(1_000_000 / row.pairs_per_second / 86_400)


def test_recomputing_costs_about_a_fifth_of_the_student_and_teacher(plan):
    shape = StepShape.expected(CONFIG)
    assert recomputed_operations(CONFIG, shape) / step_operations(CONFIG, shape) == pytest.approx(0.24, abs=0.04)


@pytest.mark.parametrize(("stage", "numbers"), [(0, 2 * 4), (1, 2 * 4 + 2 + 2), (2, 2 * 4 + 2 + 2)])
def test_a_ring_sends_so_many_bytes_of_each_parameter(stage, numbers):
    """float32 gradients reduced everywhere, bf16 weights gathered, and the teacher's."""
    sent = bytes_sent(CONFIG, Zero(stage=stage), 4, 2, PARAMETERS)
    assert sent.total - sent.features == pytest.approx(0.75 * numbers * PARAMETERS.total)
    assert bytes_sent(CONFIG, Zero(stage=stage), 1, 2, PARAMETERS).total == 0


def test_stage_3_reduces_to_the_owner_and_gathers_the_teachers_layers_at_every_forward():
    sent = bytes_sent(CONFIG, Zero(stage=3), 4, 2, PARAMETERS)
    assert sent.gradients == pytest.approx(0.75 * 4 * PARAMETERS.total)
    assert sent.weights == pytest.approx(0.75 * 2 * PARAMETERS.total)
    layers = PARAMETERS.encoder + 3 * PARAMETERS.stream  # text, text over image, image over text
    assert sent.teacher == pytest.approx(0.75 * 2 * (PARAMETERS.outside + layers))


def test_weights_that_do_not_stay_whole_are_gathered_twice():
    once, twice = (bytes_sent(CONFIG, Zero(stage=3, live=live), 4, 2, PARAMETERS).weights for live in (10**9, 0))
    assert twice == 2 * once


def test_other_nodes_are_further_away():
    at = [
        step_seconds(CONFIG, StepShape.expected(CONFIG), Zero(stage=2), CARDS["H100"], nodes, 8, 2, PARAMETERS, 0.4)
        for nodes in (1, 2)
    ]
    assert at[0].compute == at[1].compute
    assert at[0].communication * 9 == pytest.approx(at[1].communication)  # 450 and 50 GB/s


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"objectives__fidelity": "official"}, "objectives.fidelity official .* an upper bound"),
        ({"objectives__psl__weight": 0.0}, "objectives.psl.weight 0"),
        ({"train__passes": "plain"}, "train.passes plain"),
        ({"model__stream__shared": False}, "model.stream.shared false .* an upper bound"),
        ({"objectives__itm__negatives": "global"}, "objectives.itm.negatives global .* a lower bound"),
        ({"objectives__xmm__text_keys": "encoded"}, "objectives.xmm.text_keys encoded .* a lower bound"),
    ],
)
def test_a_step_that_the_formulas_do_not_describe_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        make_plan(changed(CONFIG, **change), HARDWARE, LAYOUTS)


BASE = ["plan", "--config", "launch/recipes/simla_base.yaml", "--card", "H100"]


def test_the_command_prints_a_table(capsys, monkeypatch, project_root):
    monkeypatch.chdir(project_root)
    assert main([*BASE, "--nodes", "2", "--markdown", "--pairs", "1000000", "--train.batch_size", "16"]) == 0
    out = capsys.readouterr().out
    assert "238.3 M parameters, bf16, 2 node(s) x 8 card(s)" in out
    assert "16 pairs a card" in out
    assert "computed and nothing measured" in out
    assert "Vocabulary assumed: 30,522 words" in out
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 * len(LAYOUTS)
    assert len({line.count("|") for line in table}) == 1


def test_the_command_prints_numbers_of_one_file(capsys, monkeypatch, project_root):
    monkeypatch.chdir(project_root)
    assert main([*BASE, "--json", "--deepspeed", "ds_configs/zero3.json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["computed"] is True
    assert [row["zero"]["stage"] for row in found["rows"]] == [3, 3]
    assert found["rows"][0]["peak"] > found["rows"][1]["peak"] > 0


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--train.batchsize", "3"], "did you mean --train.batch_size"),
        (["--cards", "0"], "must be a whole number above 0"),
        (["--utilisation", "1.5"], "at most 1"),
        (["--deepspeed", "README.md"], "README.md is not JSON"),
        (["--deepspeed", "nothing.json"], "nothing.json"),
        (["--deepspeed", "ds_configs/zero3_hpz.json"], "second copy of the weights of zero_hpz_partition_size 8"),
    ],
)
def test_wrong_use_is_a_line_and_status_2(capsys, monkeypatch, project_root, more, words):
    monkeypatch.chdir(project_root)
    try:
        status = main([*BASE, *more])
    except SystemExit as error:
        status = error.code
    assert status == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_a_number_of_words_that_is_given_counts_beside_an_assumed_number_of_codes():
    vocabulary = replace(CONFIG.model.vocabulary, size=90_000, visual_size=0)
    found = [
        make_plan(replace(CONFIG, model=replace(CONFIG.model, vocabulary=words)), HARDWARE, LAYOUTS)
        for words in (vocabulary, replace(vocabulary, visual_size=ASSUMED.visual_size))
    ]
    assert found[0].rows == found[1].rows


def test_what_a_file_leaves_to_deepspeed_is_deepspeeds_default():
    auto = {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": "auto"}
    assert Zero.of({"zero_optimization": auto}) == Zero.of({"zero_optimization": {"stage": 2}})


def test_the_command_knows_every_card(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert ",".join(CARDS) in capsys.readouterr().out.replace("\n", "").replace(" ", "")


def test_other_commands_still_refuse_what_they_do_not_know(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["doctor", "--train.batch_size", "3"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --train.batch_size 3" in capsys.readouterr().err


def test_the_table_of_the_launchers_readme_is_what_the_command_prints(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # away from a data/scenes with tokenisers of its own
    readme = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`simla (plan .* --markdown)`", readme)
    assert main(command.replace("launch/", f"{ROOT}/launch/").split()) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert printed == [line for line in readme.split(command)[1].splitlines() if line.startswith("|")]
