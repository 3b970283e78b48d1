"""The tasks on scenes: true, and balanced so that text alone, or a picture alone, does not win."""

import json
from collections import Counter, defaultdict

import pytest

from simla_ds.data.scenes.prepare import prepare_scenes
from simla_ds.data.shards import write_shards
from simla_ds.data.text import TextTokenizer
from simla_ds.downstream.scenes import scene_annotations
from simla_ds.downstream.tasks import make_task

TASKS = ("vqa", "nlvr2", "snli_ve", "retrieval", "grounding")
DRAWN_BY_NOBODY = ("retrieval", "grounding")  # captions and phrases are the scenes' own
WORDS = {"left of": ("left of", 0), "right of": ("left of", 1), "above": ("above", 0), "below": ("above", 1)}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "scenes"
    prepare_scenes(
        out,
        train=240,
        shard_size=120,
        codebook_size=16,
        vocabulary_size=600,
        splits={},
        workers=1,
        progress=False,
    )
    return out


@pytest.fixture(scope="module")
def entries(scenes):
    return {task: scene_annotations(task, str(scenes / "train")) for task in TASKS}


def records(annotations):
    return {key: json.loads(annotations.pictures.members(key)["json"]) for key in annotations.pictures.places}


@pytest.mark.parametrize("task", TASKS)
def test_entries_are_of_the_tasks_documented_format_and_repeatable(task, scenes, entries):
    downstream = make_task(task, TextTokenizer(scenes / "tokenizer"))
    assert downstream.checked(entries[task], train=True).entries
    assert scene_annotations(task, str(scenes / "train")).entries == entries[task].entries
    assert (
        scene_annotations(task, str(scenes / "train"), seed=1).entries != entries[task].entries
        or task in DRAWN_BY_NOBODY
    )


def test_answers_are_true(entries):
    truth, kinds = records(entries["vqa"]), Counter()
    for entry in entries["vqa"].entries:
        scene, question, answer = truth[entry["image"]], entry["question"].rstrip("?"), entry["answer"]
        names = [thing["name"] for thing in scene["objects"]]
        if question.startswith("is there"):
            name = question.removesuffix(" in the picture").split(" ", 3)[3]
            assert answer == ("yes" if name in names else "no")
            kinds["existence", answer] += 1
        elif question.startswith("what colour"):
            name = question.removeprefix("what colour is the ")
            assert [thing["colour"] for thing in scene["objects"] if thing["name"] == name] == [answer]
            kinds["colour"] += 1
        elif question.startswith("how many"):
            assert answer == str(len(names))
            kinds["count", answer] += 1
        else:
            words = next(words for words in WORDS if f" {words} the " in question)
            first, second = question.removeprefix("is the ").split(f" {words} the ")
            relation, turned = WORDS[words]
            i, j = (names.index(name) for name in ((second, first) if turned else (first, second)))
            assert answer == ("yes" if [relation, i, j] in scene["relations"] else "no")
            kinds["position"] += 1
    assert kinds["existence", "yes"] == kinds["existence", "no"] > 50
    assert kinds["position"] > 50
    assert kinds["colour"] > 20
    assert len({count for kind, count in kinds.items() if kind[0] == "count"}) == 1


def test_whether_there_is_a_thing_is_asked_as_often_where_there_is_one_as_where_not(entries):
    answers = defaultdict(Counter)
    for entry in entries["vqa"].entries:
        if entry["question"].startswith("is there"):
            answers[entry["question"]][entry["answer"]] += 1
    assert all(count["yes"] == count["no"] for count in answers.values())


def test_statements_are_true_of_one_order_of_their_pictures_and_false_of_the_other(entries):
    truth, seen = records(entries["nlvr2"]), defaultdict(list)
    for entry in entries["nlvr2"].entries:
        first, second = ([thing["name"] for thing in truth[key]["objects"]] for key in entry["images"])
        if "shows" in entry["sentence"]:
            true = entry["sentence"].removeprefix("the first picture shows ").split(" ", 1)[1] in first
        else:
            true = (len(first) > len(second)) == ("more" in entry["sentence"])
        assert entry["label"] == str(true)
        seen[entry["sentence"]].append(true)
        seen[tuple(entry["images"])].append(true)
    assert len(seen) > 100
    assert all(sum(labels) * 2 == len(labels) for labels in seen.values())  # neither text nor pictures tell


def test_hypotheses_have_their_label_and_each_words_have_each_label_equally_often(entries):
    truth, labels = records(entries["snli_ve"]), defaultdict(Counter)
    for entry in entries["snli_ve"].entries:
        scene, sentence = truth[entry["image"].removesuffix(".jpg")], entry["sentence"]
        names = [thing["name"] for thing in scene["objects"]]
        words = next((words for words in WORDS if f" is {words} the " in sentence), None)
        if words is None:
            name, colour = sentence.removeprefix("the ").rsplit(" is ", 1)
            own = {thing["colour"] for thing in scene["objects"] if thing["name"] == name}
            wanted = "neutral" if not own else "entailment" if own == {colour} else "contradiction"
            assert entry["label"] == wanted
            labels["colour"][entry["label"]] += 1
            continue
        first, second = sentence.removeprefix("the ").split(f" is {words} the ")
        relation, turned = WORDS[words]
        i, j = (names.index(name) for name in ((second, first) if turned else (first, second)))
        wanted = "neutral"
        if [relation, i, j] in scene["relations"]:
            wanted = "entailment"
        elif [relation, j, i] in scene["relations"]:
            wanted = "contradiction"
        assert entry["label"] == wanted
        labels[words][entry["label"]] += 1
    assert len(labels) == 5
    assert all(len(set(count.values())) == 1 and len(count) == 3 for count in labels.values())


def test_expressions_name_one_thing_and_have_its_box(entries):
    truth = records(entries["grounding"])
    for entry in entries["grounding"].entries:
        things = truth[entry["image"]]["objects"]
        (thing,) = [thing for thing in things if thing["box"] == entry["box"]]
        assert thing["name"] in entry["text"]
        assert entry["proposals"] == [thing["box"] for thing in things]


def test_shards_that_are_no_scenes_are_refused(tmp_path):
    write_shards([("a", {"jpg": b"x", "json": b'{"caption": "a dog"}'})], tmp_path, 10)
    with pytest.raises(ValueError, match="sample a is no scene"):
        scene_annotations("vqa", str(tmp_path))
