"""The tasks' table: which runs there are, what they are given, and what is printed of them."""

import json

from benchmarks.tasks import LEARNT, Job, commonest_per_question, jobs, sizes_of, table
from simla_ds.downstream.config import FinetuneConfig
from simla_ds.parsing import parse_config


def test_each_seed_runs_every_task_and_way_before_the_next():
    found = list(jobs(list(LEARNT), ["pretrained", "text"], 2))
    assert [job.name for job in found[:7]] == [
        *("vqa/pretrained/0", "vqa/text/0", "nlvr2/pretrained/0", "nlvr2/text/0", "snli_ve/pretrained/0"),
        *("snli_ve/text/0", "retrieval/pretrained/0"),
    ]
    assert len(found) == 2 * 8


def test_runs_are_given_keys_that_fine_tuning_knows_and_from_scratch_the_models_sizes(tmp_path):
    sizes = {"vision": {"width": 96, "layers": 3, "heads": 4}, "stream": {"width": 96, "shared": True}}
    (tmp_path / "config.json").write_text(json.dumps({"model": {**sizes, "projection_size": 32}}))
    assert ("--model.vision.layers", "3") in zip(sizes_of(tmp_path)[::2], sizes_of(tmp_path)[1::2], strict=True)
    given = Job("vqa", "scratch", 4).arguments(tmp_path, tmp_path, tmp_path / "run", 640)
    config, _ = parse_config(given, FinetuneConfig, "tasks", "")
    assert (config.model.vision.layers, config.model.projection_size, config.init.checkpoint) == (3, 32, "")
    assert (config.task, config.inputs, config.train.seed, config.train.samples) == ("vqa", "both", 4, 640)
    given = Job("nlvr2", "text", 0).arguments(tmp_path, tmp_path, tmp_path / "run", 640)
    config, _ = parse_config(given, FinetuneConfig, "tasks", "")
    assert (config.inputs, config.init.checkpoint) == ("text", str(tmp_path))


def test_the_table_has_means_ranges_and_a_guess():
    results = {f"vqa/pretrained/{seed}": {"accuracy": 50.0 + seed, "majority": 30.0} for seed in range(3)}
    row = next(line for line in table(results).splitlines() if line.startswith("| vqa"))
    assert row == "| vqa | accuracy | 51.0 (50.0 to 52.0) |  |  |  | 30.0 |"


def test_the_guess_knows_the_kind_of_question():
    entries = [
        {"question_type": kind, "answer": answer} for kind, answer in (("a", "x"), ("a", "x"), ("a", "y"), ("b", "z"))
    ]
    assert commonest_per_question(entries, [{"entry": n} for n in range(4)]) == 75.0
