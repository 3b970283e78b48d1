"""The tasks on scenes: true, and balanced so that text alone, or a picture alone, does not win."""

import json
from collections import Counter, defaultdict

import pytest

from simla_ds.data.scenes.prepare import prepare_scenes
from simla_ds.data.shards import write_shards
from simla_ds.data.text import TextTokenizer
from simla_ds.downstream.scenes import QUESTIONS, scene_annotations
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
        colours = [thing["colour"] for thing in scene["objects"]]
        kind = entry["question_type"]
        kinds[kind, answer] += 1
        if kind == "thing":
            name = question.removeprefix("is there ").removesuffix(" in the picture").split(" ", 1)[1]
            assert answer == ("yes" if name in names else "no")
        elif kind == "colour":
            colour = question.removeprefix("is there ").split(" ")[1]
            assert answer == ("yes" if colour in colours else "no")
            assert answer == "yes" or scene["background"]["kind"] == "plain"
            assert answer == "yes" or colour not in scene["background"]["colour"]
        elif kind == "thing_colour":
            name = question.removeprefix("what colour is the ")
            assert [thing["colour"] for thing in scene["objects"] if thing["name"] == name] == [answer]
        elif kind == "place_colour":
            place = question.rsplit(" ", 1)[1]
            axis, first = int(place in ("top", "bottom")), place in ("left", "top")
            ends = sorted(scene["objects"], key=lambda thing: thing["box"][axis] + thing["box"][axis + 2] / 2)
            assert (ends[0] if first else ends[-1])["colour"] == answer
        elif kind == "background":
            assert answer == scene["background"]["colour"]
        elif kind == "count":
            assert answer == ("two", "three", "four")[len(names) - 2]
        else:
            words = next(words for words in WORDS if f" {words} the " in question)
            first, second = question.removeprefix("is the ").split(f" {words} the ")
            relation, turned = WORDS[words]
            i, j = (names.index(name) for name in ((second, first) if turned else (first, second)))
            assert answer == ("yes" if [relation, i, j] in scene["relations"] else "no")
    asked = Counter(kind for kind, _ in kinds.elements())
    assert set(asked) == set(QUESTIONS)
    assert max(asked.values()) <= 120  # half the scenes: no kind outweighs the others
    assert min(asked.values()) > 20
    assert len({count for kind, count in kinds.items() if kind[0] == "count"}) == 1
    assert kinds["thing", "yes"] == kinds["thing", "no"]
    assert kinds["colour", "yes"] == kinds["colour", "no"]


def test_whether_there_is_a_thing_is_asked_as_often_where_there_is_one_as_where_not(entries):
    answers = defaultdict(Counter)
    for entry in entries["vqa"].entries:
        if entry["question"].startswith("is there"):
            answers[entry["question"]][entry["answer"]] += 1
    assert all(count["yes"] == count["no"] for count in answers.values())


def test_statements_are_true_of_one_order_of_their_pictures_and_false_of_the_other(entries):
    truth, seen = records(entries["nlvr2"]), defaultdict(list)
    for entry in entries["nlvr2"].entries:
        one = truth[entry["images"][0]]
        first, second = ([thing["name"] for thing in truth[key]["objects"]] for key in entry["images"])
        if entry["sentence"].endswith(" background"):
            colour = entry["sentence"].removeprefix("the first picture has ").removesuffix(" background")
            true = one["background"]["colour"] == colour.split(" ", 1)[1]
        elif entry["sentence"].endswith(" thing"):
            colour = entry["sentence"].removesuffix(" thing").rsplit(" ", 1)[1]
            true = colour in [thing["colour"] for thing in one["objects"]]
        elif "shows" in entry["sentence"]:
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
        if sentence.endswith(("small", "large")):
            _, colour, _, _, said = sentence.split()
            sizes = [thing["size"] for thing in scene["objects"] if thing["colour"] == colour]
            assert "medium" not in sizes
            assert entry["label"] == ("neutral" if not sizes else "entailment" if sizes == [said] else "contradiction")
            labels[sentence][entry["label"]] += 1
            continue
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
    assert len(labels) > 10
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


def test_too_few_scenes_to_ask_about_are_refused_with_their_number(scenes):
    with pytest.raises(ValueError, match=r"2 scenes of .* make no example for vqa; give 24 or more"):
        scene_annotations("vqa", str(scenes / "train"), limit=2)
