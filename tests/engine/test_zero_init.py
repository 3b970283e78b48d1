"""Networks built in parts are those built whole, and take the memory of parts. Under the real launcher, on CPU.

In `make test` test_stages.py trains networks built in parts against whole ones, at stages 0 to 3.
"""

import json

import pytest

from benchmarks.peak_memory import fresh_environment
from tests.engine.launching import launch
from tests.engine.runs import losses, scenes
from tests.model.test_pretrained import save_bert, save_vit

pytestmark = [pytest.mark.launcher, pytest.mark.slow]

BUILT = ("scratch", "files", "AnswerNetwork", "PairNetwork", "EntailmentNetwork", "AssignmentNetwork")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("built")


@pytest.fixture(scope="module")
def report(folder):
    save_bert(folder / "bert")
    save_vit(folder / "vit.safetensors", img_size=48)  # positions are resampled
    arguments = (str(folder), str(scenes(folder)), str(folder / "report.json"))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in fresh_environment().items():
            patch.setenv(name, value)
        done = launch("tests.engine.workers.built", *arguments, ranks=2, timeout=400)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("which", BUILT)
def test_start_weights_and_draws_are_those_of_a_network_built_whole(report, which):
    found = report[which]
    assert found["same_names"]
    assert found["same_draws"]
    assert not found["different"]
    assert found["buffers"] == 0  # nothing would move or share one


@pytest.mark.parametrize("which", BUILT)
def test_afterwards_each_rank_has_its_share_and_nothing_else(report, which):
    found = report[which]
    assert found["whole_afterwards"] == 0
    for share in found["shares"]:
        assert 0.5 <= share / found["parameters"] < 0.501  # odd ones are padded
    assert found["same_groups"]


def test_building_takes_the_memory_of_a_share_and_of_one_parameter(report):
    memory = report["memory"]
    size, largest = memory["parameters_mib"], memory["largest_mib"]
    assert min(memory["whole"]) > size
    assert max(memory["parts"]) < size / 2 + 2 * largest + 20  # gathered, and cut


def test_a_run_at_stage_3_is_bit_for_bit_the_one_whose_model_was_whole_first(report, folder):
    found = report["training"]
    assert not found["different"]
    assert found["moved"] > 90
    parts, whole = (losses(folder / "runs" / how) for how in ("parts", "whole"))
    assert set(parts) == {1, 2, 3}
    assert parts == whole


def test_an_error_within_comes_out_and_leaves_nothing_behind(report):
    assert report["failing"] == {"said": "a file is missing", "numel": 15}
