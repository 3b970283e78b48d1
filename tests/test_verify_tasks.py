"""`simla verify` on recorded fine-tuning steps: they agree, and every known misreading does not."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from simla_ds import verify_tasks
from simla_ds.downstream import base, classification, nlvr2, retrieval_tuning, vqa
from simla_ds.model.rows import Rows
from simla_ds.objectives.itm import ImageTextMatching
from simla_ds.verify import verify_reference

DATA = Path(__file__).parent / "data"
COMPARED = {"retrieval": 18, "vqa": 11, "nlvr": 10, "ve": 10}


def compare(folder: Path, tmp_path: Path, **options) -> tuple[bool, dict[str, bool]]:
    out = tmp_path / "comparison.json"
    verdict = verify_reference(folder, json_out=out, **options)
    return verdict, {row["name"]: row["holds"] for row in json.loads(out.read_text())}


@pytest.mark.parametrize("name", COMPARED)
def test_a_recorded_step_verifies(name, tmp_path):
    verdict, rows = compare(DATA / name, tmp_path)
    assert verdict
    assert len(rows) == COMPARED[name]


def test_retrieval_verifies_with_plain_passes_too(tmp_path):
    assert compare(DATA / "retrieval", tmp_path, passes="plain")[0]


def only_the_own_pair(patch):
    original = retrieval_tuning.retrieval_objectives
    patch.setattr(
        retrieval_tuning, "retrieval_objectives", lambda o: replace(original(o), itc=replace(o.itc, positives="pair"))
    )


def wrong_negatives(patch):
    draw = ImageTextMatching.draw_negatives
    patch.setattr(ImageTextMatching, "draw_negatives", lambda *args: draw(*args)[::-1])


def untied(patch):
    class Untied(nlvr2.PairStream):
        def __init__(self, config):
            super().__init__(config)
            for number in range(7, 18, 2):
                self.cross_attention(number).key = deepcopy(self.cross_attention(number).key)

    patch.setattr(nlvr2, "PairStream", Untied)


def one_picture_only(patch):
    first_rows = nlvr2.PairStream.first_rows
    patch.setattr(nlvr2.PairStream, "first_rows", lambda self, x, rows, p: first_rows(self, x, rows, [p[0], p[0]]))


def seeing_what_follows(patch):
    of = Rows.of
    patch.setattr(vqa.Rows, "of", lambda mask, index=None, causal=False: of(mask, index))


def teacher_counts(patch):
    patch.setitem(verify_tasks.KINDS, "vqa", vqa.Vqa)


def no_teacher(patch):
    loss = base.distilled_class_loss
    patch.setattr(classification, "distilled_class_loss", lambda s, t, labels, alpha: loss(s, t, labels, 0.0))


@pytest.mark.parametrize(
    ("name", "mutation", "wrong"),
    [
        ("retrieval", only_the_own_pair, "loss.ita"),
        ("retrieval", wrong_negatives, "loss.itm"),
        ("nlvr", untied, "grad.text_encoder.encoder.layer.16.crossattention.self.key.weight"),
        ("nlvr", one_picture_only, "loss.total"),
        ("vqa", seeing_what_follows, "loss.total"),
        ("vqa", teacher_counts, "loss.total"),
        ("ve", no_teacher, "loss.total"),
    ],
)
def test_a_misreading_is_found(name, mutation, wrong, tmp_path, monkeypatch):
    mutation(monkeypatch)
    verdict, rows = compare(DATA / name, tmp_path)
    assert not verdict
    assert not rows[wrong]


def test_the_momentum_on_top_of_config_json_holds(tmp_path):
    """`model.momentum` is another number in these recordings."""
    shutil.copytree(DATA / "ve", tmp_path / "ve")
    description = json.loads((tmp_path / "ve/config.json").read_text())
    description["momentum"] = description["model"]["momentum"]
    (tmp_path / "ve/config.json").write_text(json.dumps(description))
    assert not compare(tmp_path / "ve", tmp_path)[0]


def test_sizes_that_are_not_those_of_the_weights_are_refused(tmp_path):
    shutil.copytree(DATA / "nlvr", tmp_path / "nlvr")
    description = json.loads((tmp_path / "nlvr/config.json").read_text())
    description["model"]["bert_layers"] = 8
    (tmp_path / "nlvr/config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"sizes of config\.json"):
        compare(tmp_path / "nlvr", tmp_path)
