"""Composed scenes: what is said of them is true of them, and no split shows what another holds out."""

import io
import json
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from simla_ds.data.scenes.captions import MAX_WORDS
from simla_ds.data.scenes.colours import TARGETS, colours_to_try, is_held_out_pair, recoloured, share_called
from simla_ds.data.scenes.compose import compose, make_sample, render
from simla_ds.data.scenes.kit import kit, opaque_pixels
from simla_ds.data.scenes.layout import SIDES, iou
from simla_ds.data.scenes.splits import SPLITS
from simla_ds.data.scenes.templates import BY_MENTIONS, TEMPLATES

SIZE = 128
COUNT = 80  # a leak in one scene of 25 would show in this many with odds of 20 to 1


@pytest.fixture(scope="module")
def records() -> dict[str, list[dict]]:
    """Return the JSON of the first scenes of every split."""
    return {
        split: [json.loads(make_sample(split, index, 0, SIZE)[1]["json"]) for index in range(COUNT)] for split in SPLITS
    }


@pytest.fixture(scope="module")
def everything(records) -> list[dict]:
    return [record for split in records.values() for record in split]


def middle(box):
    return box[0] + box[2] / 2, box[1] + box[3] / 2


def test_a_scene_is_the_same_bytes_in_whatever_order_it_is_made():
    forwards = [make_sample("test", index, 3, SIZE) for index in (4, 5, 6)]
    backwards = [make_sample("test", index, 3, SIZE) for index in (6, 5, 4)]
    assert forwards == backwards[::-1]
    assert make_sample("test", 4, 4, SIZE) != forwards[0]


@pytest.mark.parametrize("size", [64, 100, 224])  # the smallest allowed, one that divides by nothing, a ViT's
def test_pictures_and_boxes_follow_the_size(size):
    for index in range(6):
        members = make_sample("train", index, 0, size)[1]
        record, picture = json.loads(members["json"]), Image.open(io.BytesIO(members["jpg"]))
        assert (picture.size, picture.mode, record["size"]) == ((size, size), "RGB", size)
        for x, y, width, height in (thing["box"] for thing in record["objects"]):
            assert x >= 0
            assert y >= 0
            assert x + width <= size
            assert y + height <= size


def test_no_caption_or_image_id_is_shared(records, everything):
    cleaned = {split: {re.sub(r"[^a-z0-9]", "", r["caption"]) for r in rows} for split, rows in records.items()}
    for one, other in combinations(cleaned, 2):
        assert not cleaned[one] & cleaned[other]
    assert len({record["image_id"] for record in everything}) == len(everything)


def test_photos_come_from_the_split_and_its_subjects_from_no_other(records):
    shown = {
        split: {row["background"]["photo"] for row in rows if row["background"]["kind"] == "photo"}
        for split, rows in records.items()
    }
    for split, photos in shown.items():
        assert photos
        assert photos <= set(kit().backgrounds[SPLITS[split].photos])
    subjects = {name: {kit().photos[file].subject for file in files} for name, files in kit().backgrounds.items()}
    for one, other in combinations(subjects, 2):
        assert not subjects[one] & subjects[other]


def test_held_out_things_sets_and_pairs_are_where_they_belong_and_nowhere_else(records):
    held_out, new_vendors = set(kit().held_out), set(kit().held_out_vendors)
    for split, rows in records.items():
        for row in rows:
            shown = {thing["concept"] for thing in row["objects"]}
            vendors = {thing["vendor"] for thing in row["objects"]}
            pairs = [is_held_out_pair(t["colour"], t["concept"]) for t in row["objects"] if t["turned"]]
            assert bool(shown & held_out) == (split == "test_concept")
            assert vendors <= new_vendors if split == "test_vendor" else not vendors & new_vendors
            assert any(pairs) == (split == "test_pairing")


def test_what_a_split_is_about_is_said(records):
    for split, about in (("test_concept", is_new_thing), ("test_pairing", is_new_pair)):
        for row in records[split]:
            told = [p for p in row["phrases"] if len({row["objects"][i]["concept"] for i in p["objects"]}) == 1]
            assert any(about(row["objects"][p["objects"][0]], p["text"]) for p in told), row["caption"]


def is_new_thing(thing, text):
    concept = kit().concepts[thing["concept"]]
    return concept.id in kit().held_out and (concept.name in text or concept.plural in text)


def is_new_pair(thing, text):
    return thing["turned"] and is_held_out_pair(thing["colour"], thing["concept"]) and thing["colour"] in text.split()


def test_held_out_pairs_are_enough_and_their_colours_and_things_are_trained_otherwise():
    vendors, seen = kit().train_vendors, kit().seen
    tried = [(v, c, colour) for v in vendors for c in seen[::4] for colour in colours_to_try(v, c)]
    pairs = {(colour, c) for v, c, colour in tried if recoloured(v, c, colour)}
    held = {pair for pair in pairs if is_held_out_pair(*pair)}
    assert 0.1 < len(held) / len(pairs) < 0.3
    assert {colour for colour, _ in pairs - held} == set(TARGETS)


def test_phrases_are_where_the_caption_has_them_and_their_boxes_hold_their_objects(everything):
    for row in everything:
        for phrase in row["phrases"]:
            start, end = phrase["span"]
            assert row["caption"][start:end] == phrase["text"]
            boxes = [row["objects"][i]["box"] for i in phrase["objects"]] or [[0, 0, SIZE, SIZE]]
            left, top = min(box[0] for box in boxes), min(box[1] for box in boxes)
            right, bottom = max(box[0] + box[2] for box in boxes), max(box[1] + box[3] for box in boxes)
            assert phrase["box"] == [left, top, right - left, bottom - top]


def test_phrases_name_their_objects_truly(everything):
    for row in everything:
        for phrase in row["phrases"]:
            words = phrase["text"].split()
            if not phrase["objects"]:
                assert phrase["text"] == row["background"]["name"]
            elif words[-1] not in ("thing", "things"):
                first = row["objects"][phrase["objects"][0]]
                concept = kit().concepts[first["concept"]]
                several = len(phrase["objects"]) > 1
                name = concept.plural if several else concept.name
                assert phrase["text"].endswith(name)
                said = set(words[1 : len(words) - len(name.split())])
                assert said <= {first["colour"], first["size"], "big" if first["size"] == "large" else None}
                assert words[0] in (("two", "three") if several else ("a", "an", "some", "the"))


def test_no_phrase_could_mean_another_object(everything):
    for row in everything:
        told = {tuple(p["objects"]): p["text"] for p in row["phrases"] if p["objects"]}
        for (one, a), (other, b) in combinations(enumerate(row["objects"]), 2):
            if a["concept"] != b["concept"]:
                assert not kit().confusable(a["concept"], b["concept"])
                continue
            alike = (a["colour"], a["size"]) == (b["colour"], b["size"])
            assert not alike or not {(one,), (other,)} & set(told)  # a group: one phrase for all of it
            word = "colour" if a["colour"] != b["colour"] else "size"
            for index, thing in () if alike else ((one, a), (other, b)):
                text = set(told.get((index,), "").split())
                set_apart = {thing[word], "big" if thing[word] == "large" else thing[word]}
                set_apart |= {"the", "thing"}  # "the kite in the middle", "one other thing"
                assert not text or text & set_apart, row["caption"]


def test_nothing_shown_could_be_part_of_the_photo(everything):
    for row in everything:
        hidden = kit().may_contain[row["background"].get("may_contain", "outdoor")]
        if row["background"]["kind"] == "photo":
            assert not {thing["concept"] for thing in row["objects"]} & hidden


AHEAD = {  # words between two phrases: (axis, the first phrase is ahead along it)
    " to the left of ": (0, True), " on the left of ": (0, True), " is left of ": (0, True),
    " to the right of ": (0, False), " is to the right of ": (0, False), " on the right of ": (0, False),
    " above ": (1, True), " is above ": (1, True), " up above ": (1, True),
    " below ": (1, False), " is below ": (1, False), " underneath ": (1, False),
}  # fmt: skip


def test_the_sentence_itself_is_true_of_the_boxes(everything):
    """Read the caption's own words, not the claims stored with it."""
    read = Counter()
    for row in everything:
        for one, other in zip(row["phrases"], row["phrases"][1:], strict=False):
            words = row["caption"][one["span"][1] : other["span"][0]]
            if words in AHEAD:
                axis, first = AHEAD[words]
                assert (middle(one["box"])[axis] < middle(other["box"])[axis]) == first, row["caption"]
                read[words] += 1
        for phrase in row["phrases"]:
            after = row["caption"][phrase["span"][1] :]
            match = re.match(
                r"( is| are)? (?:on|at|in|near) the (top|bottom|upper|lower|left|right)( left| right)?", after
            )
            if phrase["objects"] and match and " of " not in after[: match.end() + 4]:
                for place in (match[2], (match[3] or "").strip()):
                    assert is_at(middle(phrase["box"]), place), row["caption"]
                    read[place] += 1
    assert len(read) > 15


def is_at(point, place):
    x, y = (value - SIZE / 2 for value in point)
    sides = {"top": -y, "upper": -y, "bottom": y, "lower": y, "left": -x, "right": x, "": 1}
    return sides[place] > 0


def test_claims_and_relations_agree(everything):
    seen = Counter()
    for row in everything:
        known = {tuple(relation) for relation in row["relations"]}
        for word, *rest in row["claims"]:
            seen[word] += 1
            if word in ("left of", "above"):
                assert (word, *rest) in known
            elif word == "next to":
                assert (word, *sorted(rest)) in known
            elif word == "between":
                assert (word, rest[0], *sorted(rest[1:])) in known
            elif word == "count":
                assert rest == [len(row["objects"])]
            elif word == "bigger":
                assert [row["objects"][i]["size"] for i in rest] == ["large", "small"]
            else:
                assert word == "at"
    assert set(seen) == {"left of", "above", "next to", "between", "count", "bigger", "at"}


def test_relations_are_plain_to_see(everything):
    for row in everything:
        for word, *indices in row["relations"]:
            boxes = [row["objects"][index]["box"] for index in indices]
            if word == "between":
                (x, y), (ax, ay), (bx, by) = map(middle, boxes)
                assert min(ax, bx) < x < max(ax, bx) or min(ay, by) < y < max(ay, by)
            elif word in ("left of", "above"):
                axis = int(word == "above")
                assert middle(boxes[1])[axis] - middle(boxes[0])[axis] >= 0.18 * SIZE


def test_size_words_are_plain_to_see(everything):
    for row in everything:
        longest = {size: [max(t["box"][2:]) for t in row["objects"] if t["size"] == size] for size in SIDES}
        assert bool(longest["small"]) == bool(longest["large"])
        if longest["small"]:
            assert not longest["medium"]
            assert min(longest["large"]) >= 1.35 * max(longest["small"])


def test_things_are_large_enough_and_hardly_overlap(everything):
    for row in everything:
        boxes = [thing["box"] for thing in row["objects"]]
        assert 2 <= len(boxes) <= 4
        assert all(33 <= max(box[2:]) <= 62 for box in boxes)
        assert all(iou(a, b) <= 0.1 for a, b in combinations(boxes, 2))


def test_captions_are_short_varied_and_name_the_background_often(records, everything):
    lengths = [len(row["caption"].split()) for row in everything]
    assert max(lengths) <= MAX_WORDS < 30
    assert np.mean([8 <= length <= 22 for length in lengths]) > 0.7
    said = [any(not phrase["objects"] for phrase in row["phrases"]) for row in everything]
    assert 0.5 < np.mean(said) < 0.9
    all_named = [
        {i for p in row["phrases"] for i in p["objects"]} == {*range(len(row["objects"]))} for row in everything
    ]
    assert 0.4 < np.mean(all_named) < 0.9
    for rows in records.values():
        assert len({row["caption"] for row in rows}) >= 0.97 * len(rows)
    assert len(TEMPLATES) > 50
    assert all(len(BY_MENTIONS[count]) > 5 for count in BY_MENTIONS)


def test_boxes_are_tight_around_the_pasted_pixels():
    for index in range(25):
        plan, _ = compose("train", index, 0, SIZE)
        for thing in plan.things:
            alone = type(plan)(plan.background, (thing,), (), None)
            empty = type(plan)(plan.background, (), (), None)
            changed = np.abs(np.asarray(render(alone, SIZE)).astype(int) - np.asarray(render(empty, SIZE))).max(2) > 4
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            x, y, width, height = thing.box
            assert columns[0] >= x
            assert columns[-1] < x + width
            assert rows[0] >= y
            assert rows[-1] < y + height
            if plan.background.photo is None:  # on a photo a drawing may happen to be of its ground's colour
                assert columns[-1] - columns[0] >= 0.85 * width - 2
                assert rows[-1] - rows[0] >= 0.85 * height - 2


def test_a_turned_drawing_has_the_colour_it_is_called_by():
    tried = 0
    for vendor in kit().vendors:
        for concept in kit().seen[::23]:
            for colour in colours_to_try(vendor, concept):
                turned, original = recoloured(vendor, concept, colour), kit().sprite(vendor, concept)
                if turned is None:
                    continue
                assert turned.getchannel("A").tobytes() == original.getchannel("A").tobytes()
                assert share_called(opaque_pixels(turned), colour) >= 0.6
                tried += 1
    assert tried > 50
