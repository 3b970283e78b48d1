"""Annotation files: everything that is wrong is told at once."""

import json

import pytest

from simla_ds.downstream.annotations import BadAnnotations, read_annotations
from simla_ds.downstream.evaluation import write_predictions
from simla_ds.downstream.grounding import Grounding
from simla_ds.downstream.nlvr2 import Nlvr2
from simla_ds.downstream.retrieval_tuning import Retrieval
from simla_ds.downstream.snli_ve import SnliVe
from simla_ds.downstream.tasks import load_annotations
from simla_ds.downstream.vqa import Vqa, answer_list

GOOD = {
    "vqa": {"image": "a.jpg", "question": "what?", "question_id": 1, "answer": ["net"] * 10},
    "nlvr2": {"images": ["a.jpg", "b.jpg"], "sentence": "two dogs", "label": "True"},
    "snli_ve": {"image": "a", "sentence": "a dog", "label": "neutral"},
    "retrieval": {"image": "a.jpg", "caption": ["a dog", "a cat"]},
    "grounding": {"image": "a.jpg", "text": "the dog", "box": [1, 2, 3, 4], "size": [9, 9]},
}
TASKS = {"vqa": Vqa, "nlvr2": Nlvr2, "snli_ve": SnliVe, "retrieval": Retrieval, "grounding": Grounding}


@pytest.fixture
def read(tmp_path):
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"picture")

    def read(entries):
        file = tmp_path / "entries.json"
        file.write_text(json.dumps(entries))
        return read_annotations(file, None)

    return read


def problems(task, annotations, train=False):
    with pytest.raises(BadAnnotations) as caught:
        TASKS[task]().checked(annotations, train=train)
    return caught.value


@pytest.mark.parametrize("task", GOOD)
def test_an_entry_of_the_documented_format_passes(task, read):
    checked = TASKS[task]().checked(read([GOOD[task]]), train=True)
    assert len(checked.entries) == (2 if task == "retrieval" else 1)  # a row per caption


def test_a_null_is_as_if_an_optional_key_were_not_there(read):
    entries = [{**GOOD["retrieval"], "image": name, "image_id": None} for name in ("a.jpg", "b.jpg")]
    rows = Retrieval().checked(read(entries), train=True).entries
    assert [row["image_id"] for row in rows] == ["a.jpg", "a.jpg", "b.jpg", "b.jpg"]
    assert Grounding().checked(read([{**GOOD["grounding"], "proposals": None}]), train=False)


def test_an_answer_list_leaves_out_what_is_no_text():
    assert answer_list([{"answer": ["net", 2]}, {"answer": [{"answer": "net"}]}, {"answer": "net"}], 10) == ["net"]


def test_predictions_are_written_whatever_characters_entries_hold(read, tmp_path):
    annotations = read([{**GOOD["vqa"], "question": "half of a pair \ud83d"}])
    write_predictions(tmp_path / "out.jsonl", annotations, [{"entry": 0, "answer": "n\u00e9t"}])
    said = json.loads((tmp_path / "out.jsonl").read_text())
    assert (said["answer"], said["given"]["question"]) == ("n\u00e9t", "half of a pair \ud83d")


def test_json_lines_are_read_as_a_list(read, tmp_path):
    entries = read([GOOD["vqa"], GOOD["vqa"]]).entries
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + "\n")
    assert load_annotations("vqa", str(tmp_path / "lines.jsonl")).entries == entries
    said = [{**GOOD["vqa"], "question": "a line\u2028separator?"}]
    (tmp_path / "lines.jsonl").write_text(json.dumps(said[0], ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert load_annotations("vqa", str(tmp_path / "lines.jsonl")).entries == said
    (tmp_path / "lines.jsonl").write_text('{"image": ')
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_annotations("vqa", str(tmp_path / "lines.jsonl"))


@pytest.mark.parametrize(
    ("task", "change", "told"),
    [
        ("vqa", {"image": "c.jpg"}, "picture c.jpg is missing"),
        ("vqa", {"question": None}, "key 'question' must hold text, not null"),
        ("vqa", {"question_id": "1"}, "key 'question_id' must hold a number"),
        ("vqa", {"answer": []}, "key 'answer' must hold a text or a list of texts"),
        ("nlvr2", {"images": ["a.jpg"]}, "key 'images' must hold the names of two pictures"),
        ("nlvr2", {"label": True}, "key 'label' must hold text, not true"),
        ("nlvr2", {"label": "true"}, "label 'true' is none of False, True"),
        ("snli_ve", {"image": "c"}, "picture c.jpg is missing"),
        ("snli_ve", {"label": "yes"}, "label 'yes' is none of contradiction, neutral, entailment"),
        ("grounding", {"box": [1, 2, 3]}, "key 'box' must hold 4 numbers"),
        ("grounding", {"proposals": [[1, 2, 0, 4]]}, "key 'proposals' must hold boxes of 4 numbers with a size"),
        ("retrieval", {"caption": ["a dog", 3]}, "key 'caption' must hold a text or a list of texts"),
    ],
)
def test_a_wrong_entry_is_named_with_its_number(task, change, told, read):
    other = {"question_id": 0} if task == "vqa" else {}
    error = problems(task, read([{**GOOD[task], **other}, {**GOOD[task], **change}]))
    assert error.problems == [f"entry 1: {told}"]


def test_a_missing_key_is_named(read):
    for task, entry in GOOD.items():
        for key in entry:
            changed = {name: value for name, value in entry.items() if name != key}
            if key != "answer":
                assert f"{key!r}" in problems(task, read([changed])).problems[0]


def test_twenty_problems_are_shown_and_the_others_counted(read):
    error = problems("snli_ve", read([{**GOOD["snli_ve"], "image": f"{number}"} for number in range(25)]))
    assert len(error.problems) == 25
    assert len(str(error).splitlines()) == 22
    assert "25 problem(s)" in str(error)
    assert "and 5 more" in str(error)


def test_an_id_that_is_there_twice_is_named_once(read):
    assert problems("vqa", read([GOOD["vqa"]] * 3)).problems == ["entry 1: id 1 is there twice"]


def test_questions_without_answers_can_be_evaluated_but_not_learnt_from(read):
    entry = {key: value for key, value in GOOD["vqa"].items() if key != "answer"}
    assert Vqa().checked(read([entry]), train=False).entries == [entry]
    assert "answer" in problems("vqa", read([entry]), train=True).problems[0]


@pytest.mark.parametrize(("content", "told"), [("{}", "not one dict"), ("[]", "no entries"), ("[1]", "other things")])
def test_a_file_that_is_no_list_of_entries_is_refused(content, told, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=told):
        read_annotations(tmp_path / "x.json", None)


def test_one_class_only_is_said(read):
    assert "all 2 entries have the label 'neutral'" in SnliVe().remarks(read([GOOD["snli_ve"]] * 2))[0]
    assert SnliVe().remarks(read([GOOD["snli_ve"], {**GOOD["snli_ve"], "label": "entailment"}])) == []
