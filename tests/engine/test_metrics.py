"""Alarms and metrics.jsonl."""

import json

import pytest

from simla_ds.config import Config
from simla_ds.engine.metrics import Alarms, Metrics


class Monitor:
    """Stands in for DeepSpeed's, whose files test_resume.py looks at."""

    def __init__(self):
        self.events = []

    def write_events(self, events):
        self.events += events


def healthy(**changes: float) -> dict:
    record = {"step": 900, "samples_seen": 30_000, "loss": 5.0, "loss/itm": 0.4, "temperature": 0.05}
    return {**record, "image_feature_spread": 0.6, "text_feature_spread": 0.5, "visual_codes_used": 0.9, **changes}


@pytest.mark.parametrize(
    ("changes", "alarm"),
    [
        ({"loss/itm": 0.6365}, "itm_stuck"),  # the entropy of one right in three
        ({"loss/itm": 0.6931}, "itm_stuck"),  # guessing
        ({"temperature": 0.001}, "temperature_at_bound"),
        ({"temperature": 0.5}, "temperature_at_bound"),
        ({"image_feature_spread": 0.001}, "image_features_collapsed"),
        ({"text_feature_spread": 0.001}, "text_features_collapsed"),
        ({"visual_codes_used": 0.05}, "dead_codes"),
    ],
)
def test_each_symptom_raises_its_alarm_once(changes, alarm):
    alarms = Alarms(Config())
    assert alarms.check(healthy()) == []
    assert [found["alarm"] for found in alarms.check(healthy(**changes))] == [alarm]
    assert alarms.check(healthy(**changes)) == []


def test_a_young_run_is_not_called_stuck_or_collapsed():
    young = healthy(**{"samples_seen": 1_000, "loss/itm": 0.64, "text_feature_spread": 0.001})
    assert Alarms(Config()).check(young) == []


def test_a_resumed_run_drops_what_was_written_after_its_checkpoint(tmp_path):
    lines = [{"step": step, "samples_seen": step} for step in (1, 2, 3, 4)]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 5, "cut')
    metrics = Metrics(tmp_path, Monitor(), total_steps=6, first_step=2, active=True)
    metrics.write({"step": 3, "samples_seen": 3, "loss": float("nan")})
    metrics.close()
    written = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [1, 2, 3]
    assert written[-1]["loss"] == "nan"


def test_numbers_go_to_the_monitor_and_words_do_not(tmp_path):
    monitor = Monitor()
    metrics = Metrics(tmp_path, monitor, total_steps=6, first_step=0, active=True)
    metrics.write({"step": 1, "samples_seen": 32, "loss": 2.5, "alarm": "itm_stuck", "skipped": {"caption missing": 1}})
    metrics.close()
    assert monitor.events == [("loss", 2.5, 32)]
