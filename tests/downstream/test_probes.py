"""Pair probes: published formats, scores against one pair at a time, measures by hand; scenes' false captions false."""

import json
import re
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from PIL import Image

from launch import evaluate as programme
from simla_ds.data.scenes.prepare import prepare_scenes
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream.annotations import BadAnnotations
from simla_ds.downstream.probes import ARO_LEFT_OUT, load_probes, measures, probe_folder, read_probes, score_probes
from simla_ds.downstream.scene_swaps import KINDS, OPPOSITE
from simla_ds.hub import SimlaProcessor, load_model_folder, save_model_folder
from simla_ds.model.simla import Simla
from tests.tiny import model_config, spread_weights

RIGHT, WRONG = "a red dog on a hill", "a blue dog on a hill"
FILES = {
    "winoground.jsonl": [
        {"id": 0, "image_0": "a", "image_1": "b.jpg", "caption_0": RIGHT, "caption_1": WRONG, "collapsed_tag": "Object"}
    ],
    "aro.json": [
        {"image_path": "a.png", "true_caption": RIGHT, "false_caption": WRONG, "relation_name": "on"}
        | {"bbox_x": 2, "bbox_y": 4, "bbox_w": 12, "bbox_h": 10}
    ],
    "swap_att.json": {"0": {"filename": "a.png", "caption": RIGHT, "negative_caption": WRONG}},
    "color.json": [["a.png", {"POS": [RIGHT], "NEG": [WRONG, "a green dog"]}]],
    "ours.json": [{"images": ["a.png"], "captions": [RIGHT, WRONG], "kind": "mine"}],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("probes")
    train_tokenizer([RIGHT, WRONG, "a green dog"] * 3, out / "tokenizer", 60)
    vocabulary = replace(TextTokenizer(out / "tokenizer").vocabulary, visual_size=20)
    model = spread_weights(Simla(replace(model_config(), vocabulary=vocabulary)))
    save_model_folder(model, out / "model", out / "tokenizer")
    for name, size in (("a.png", (24, 20)), ("b.jpg", (30, 24))):
        Image.effect_noise(size, 90).convert("RGB").save(out / name)
    for name, content in FILES.items():
        lines = "\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)
        (out / name).write_text(lines)
    return out


@pytest.mark.parametrize(
    ("name", "images", "captions", "kind"),
    [
        ("winoground.jsonl", ["a.png", "b.jpg"], 2, "Object"),
        ("aro.json", ["a.png"], 2, "on"),
        ("swap_att.json", ["a.png"], 2, "swap_att"),
        ("color.json", ["a.png"], 3, "color"),
        ("ours.json", ["a.png"], 2, "mine"),
    ],
)
def test_published_files_are_read(folder, name, images, captions, kind):
    (entry,) = load_probes(str(folder / name)).entries
    assert (entry["images"], len(entry["captions"]), entry["kind"]) == (images, captions, kind)
    assert entry["captions"][0] == RIGHT


@pytest.mark.parametrize("name", FILES)
def test_scores_are_those_of_one_picture_and_caption_at_a_time(folder, name):
    probes = load_probes(str(folder / name))
    (entry,) = probes.entries
    model, _ = load_model_folder(folder / "model")
    processor = SimlaProcessor.from_pretrained(folder / "model")
    (said,) = score_probes(model, processor, probes)
    for i, image in enumerate(entry["images"]):
        picture = Image.open(folder / image).convert("RGB")
        if name == "aro.json":
            picture = picture.crop((2, 4, 14, 14))
        for c, caption in enumerate(entry["captions"]):
            inputs = processor(picture, caption)
            with torch.no_grad():
                mask = inputs["attention_mask"].bool()
                features = model.features(inputs["pixel_values"], inputs["input_ids"], mask)
                fused, _ = model.text_over_image(inputs["input_ids"], mask, features.image_tokens)
                match = model.match_head(fused[:, 0])[0, 1]
            assert said["itc"][i][c] == pytest.approx(float(features.image_feature @ features.text_feature.T), abs=1e-5)
            assert said["itm"][i][c] == pytest.approx(float(match), abs=1e-4)


def test_measures_agree_with_winogrounds_definition():
    """Text: each picture's caption wins; image: each caption's picture wins; group: both. Level is not right."""
    cases = [
        ([[2, 1], [1, 2]], (True, True)),
        ([[2, 1], [3, 4]], (True, False)),  # caption 0 scores higher with picture 1
        ([[2, 3], [0, 4]], (False, True)),
        ([[1, 1], [0, 2]], (False, True)),
        ([[0, 1], [1, 0]], (False, False)),
    ]
    entries = [{"kind": "x"}] * len(cases)
    found = measures(entries, [{"entry": n, "itc": s, "itm": [[1, 0], [0, 1]]} for n, (s, _) in enumerate(cases)])
    text, image = zip(*(told for _, told in cases), strict=True)
    assert found["itc/accuracy"] == 100 * sum(text) / 5
    assert found["itc/image"] == 100 * sum(image) / 5
    assert found["itc/group"] == 20.0
    assert found["itm/group"] == found["itm/kind/x"] == 100.0


def test_a_wrong_caption_among_several_makes_a_probe_wrong_and_macro_is_the_mean_over_kinds():
    entries = [{"kind": "a"}, {"kind": "a"}, {"kind": "b"}]
    scores = [[[3.0, 1.0, 2.0]], [[3.0, 1.0, 4.0]], [[1.0, 2.0]]]
    found = measures(entries, [{"entry": n, "itc": s, "itm": s} for n, s in enumerate(scores)])
    assert found["itc/accuracy"] == pytest.approx(100 / 3)
    assert (found["itc/kind/a"], found["itc/kind/b"], found["itc/macro"]) == (50.0, 0.0, 25.0)
    assert (found["probes"], found["probes/a"]) == (3.0, 2.0)


def test_macro_of_aro_is_over_the_kinds_that_its_authors_count(tmp_path):
    pair = {"image_path": "a.png", "true_caption": RIGHT, "false_caption": WRONG}

    def macro(entries, right):
        (tmp_path / "aro.json").write_text(json.dumps(entries))
        scores = [[[2.0, 1.0]] if told else [[1.0, 2.0]] for told in right]
        said = [{"entry": n, "itc": s, "itm": s} for n, s in enumerate(scores)]
        return measures(read_probes(tmp_path / "aro.json", None).entries, said)

    assert len(ARO_LEFT_OUT) == 157
    assert all(name == " ".join(name.split()) for name in ARO_LEFT_OUT)
    relations = ["on", "on", "under", "parked in front of", "on top of"]
    found = macro([pair | {"relation_name": name} for name in relations], [True, False, False, True, True])
    assert found["itc/accuracy"] == 60.0
    assert found["itc/macro"] == 50.0  # on 50, under 0, on top of 100; one of four is left out
    colours = [["red", "blue"]] * 24 + [["big", "old"]] * 25
    found = macro([pair | {"attributes": colour} for colour in colours], [True] * 44 + [False] * 5)
    assert found["itc/kind/red_blue"] == 100.0
    assert found["itm/macro"] == found["itm/kind/big_old"] == 80.0  # 24 probes are too few to count
    assert "itc/macro" not in macro([pair | {"relation_name": "near"}], [True])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([{"images": ["no.png"], "captions": [RIGHT, WRONG]}], "entry 0: picture no.png is missing"),
        ([{"images": ["a.png"], "captions": [RIGHT]}], "1 caption(s) for 1 picture(s)"),
        ([{"filename": "a.png", "negative_caption": WRONG}], "all of them texts"),
        ([{"something": 1}], "none of the keys"),
        ([], "must hold probes"),
    ],
)
def test_bad_files_are_told_with_status_2(folder, capsys, monkeypatch, content, told):
    (folder / "bad.json").write_text(json.dumps(content))
    arguments = ["--task", "probes", "--model", str(folder / "model"), "--annotations", str(folder / "bad.json")]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
    assert programme.main() == 2
    assert told in capsys.readouterr().err


def test_all_bad_entries_are_told_at_once(folder):
    wrong = [{"images": ["no.png"], "captions": [RIGHT, WRONG]}, {"images": ["a.png"], "captions": [RIGHT, 3]}]
    (folder / "bad.json").write_text(json.dumps(wrong))
    with pytest.raises(BadAnnotations, match=r"2 problem\(s\)"):
        load_probes(str(folder / "bad.json"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("data") / "scenes"
    prepare_scenes(
        out, train=160, shard_size=160, codebook_size=16, vocabulary_size=600, splits={}, workers=1, progress=False
    )
    return load_probes(str(out / "train"))


def test_scenes_false_captions_differ_by_what_their_kind_says(scenes):
    assert Counter(entry["kind"] for entry in scenes.entries).keys() == KINDS.keys()
    for entry in scenes.entries:
        right, wrong = (
            [word for word in re.findall(r"[\w-]+", c) if word not in ("a", "an")] for c in entry["captions"]
        )
        assert right != wrong
        if entry["kind"].endswith("swapped"):
            assert Counter(right) == Counter(wrong)
        elif entry["kind"] != "noun_replaced":  # nouns may have several words
            changed = [(r, w) for r, w in zip(right, wrong, strict=True) if r != w]
            assert len(changed) == 1
            assert entry["kind"] == "attribute_replaced" or OPPOSITE[changed[0][0]] == changed[0][1]


def test_scenes_false_captions_are_false(scenes):
    """The wrong caption's "COLOUR NAME" or "NAME" is nothing in the scene, or a claim has its two things exchanged."""
    checked = Counter()
    for entry in scenes.entries:
        scene = json.loads(scenes.pictures.members(entry["images"][0])["json"])
        things = {f"{thing['colour']} {thing['name']}" for thing in scene["objects"]}
        names = [thing["name"] for thing in scene["objects"]]
        wrong = entry["captions"][1]
        if entry["kind"] in ("attribute_replaced", "attribute_swapped"):
            said = [f"{c} {n}" for n in names for c in COLOURS if re.search(rf"\b{c} {re.escape(n)}\b", wrong)]
            assert set(said) - things
            checked[entry["kind"]] += 1
        elif entry["kind"] == "noun_replaced":
            assert sum(wrong.count(name) for name in names) < sum(entry["captions"][0].count(name) for name in names)
            assert scene["background"]["kind"] == "plain"
            checked[entry["kind"]] += 1
        elif entry["kind"] == "relation_swapped":
            claimed = [set(c[1:]) for c in scene["claims"] if c[0] in ("left of", "above", "bigger")]
            right, phrases = entry["captions"][0], scene["phrases"]
            exchanged = [
                {*one["objects"], *other["objects"]}
                for one, other in combinations(phrases, 2)
                if wrong == right[: one["span"][0]] + other["text"] + right[one["span"][1] : other["span"][0]]
                + one["text"] + right[other["span"][1] :]
            ]  # fmt: skip
            assert len(exchanged) == 1
            assert exchanged[0] in claimed
            checked[entry["kind"]] += 1
    assert min(checked.values()) > 4, checked


COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "gray", "white")


def test_one_call_gives_accuracy_by_kind_for_both_scores(folder, tmp_path, scenes):
    file = tmp_path / "probes.json"
    file.write_text(json.dumps(FILES["ours.json"] * 2))
    found = probe_folder(folder / "model", str(file), str(folder))
    assert {"itc/accuracy", "itm/accuracy", "itc/kind/mine", "itm/kind/mine"} < found.keys()
    assert found["probes"] == 2.0
