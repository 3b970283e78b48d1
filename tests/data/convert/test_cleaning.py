"""Filters: each drops what it says, nothing else, and stands in the manifest whether it is on or off."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from simla_ds.cli import main
from simla_ds.data.convert.cleaning import CaptionFilter, in_language, modern, reference
from simla_ds.data.convert.duplicates import Fingerprint, Seen
from simla_ds.data.convert.settings import Settings
from simla_ds.data.convert.writer import convert
from simla_ds.data.sample import clean_caption
from simla_ds.data.shards import ShardWriter, write_shards
from tests.data.convert.samples import dropped, jpeg, put, read


def reason(caption, **settings):
    return CaptionFilter(Settings(**settings))(caption)[1]


def test_reference_cleans_as_the_loader_does_but_does_not_cut():
    raw = 'A man, riding/driving a T-bone.. <person> isn\'t   "OK"\n'
    assert reference(raw) == "a man riding driving a t bone person isnt ok"
    assert reference("w " * 200).split() == ["w"] * 200
    assert clean_caption(reference(raw), 30) == clean_caption(raw, 30)


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("A Dog, isn't it?", "A Dog, isn't it?"),
        ("schÃ¶n &amp; gut", "schön & gut"),
        ("  two\t lines \n", "two lines"),
        ('<p class="x">A <b>dog</b></p>', "A dog"),
        ("<person> holds 3 < 5 balls", "<person> holds 3 < 5 balls"),
        ("see https://example.org/a?b=c or www.example.org now", "see or now"),
        ("zero\u200bwidth\u0007", "zerowidth"),
        ("e\u0301tude", "étude"),
    ],
)
def test_modern_mends_text_and_keeps_case_and_punctuation(raw, cleaned):
    assert modern(raw) == cleaned


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("Stock photo of a dog", True),
        ("IMG_2041.JPG", True),
        ("dsc00123", True),
        ("photo 12", True),
        ("sunset-over-sea.jpeg", True),
        ("© 2019 all the dogs", True),
        ("Image may contain: person", True),
        ("a photo of a dog", False),
        ("a man takes a picture", False),
        ("a logo on a van", False),
        ("two dogs", False),
    ],
)
def test_boilerplate(caption, expected):
    assert (reason(caption, drop_boilerplate=True) == "caption boilerplate") == expected
    assert reason(caption) == ""


def test_only_captions_clearly_in_another_language_are_dropped():
    english = ["a dog", "man in red", "two cats", "zebra grazing", "pizza", "a man riding a wave on a surfboard"]
    others = ["ein Hund läuft über die Wiese", "un chien court dans l'herbe", "собака бежит", "Casa en venta en Madrid"]
    assert [in_language(caption, "en") for caption in english + others] == [True] * 6 + [False] * 4
    assert in_language(others[0], "de")
    assert reason(others[0], language="en") == "caption in another language"


def test_lengths_are_words_after_normalising():
    assert reason("a, b", min_words=3) == "caption too short"
    assert reason("a - b c", min_words=3, captions="reference") == ""
    assert reason("a b c d", max_words=3) == "caption too long"
    assert reason("<br/>", captions="modern") == "caption empty"


def prepare(folder, out, *arguments):
    assert (
        main(
            [
                "prepare",
                "folder",
                "--images",
                str(folder),
                "--out",
                str(out),
                "--workers",
                "1",
                "--quiet",
                *map(str, arguments),
            ]
        )
        == 0
    )
    return json.loads((out / "manifest.json").read_text())


def test_filters_drop_what_they_say_and_are_recorded(tmp_path):
    sizes = {"good": (60, 40), "small": (60, 19), "long": (90, 29), "silent": (60, 40)}
    for number, (name, size) in enumerate(sizes.items()):
        put(tmp_path / f"in/{name}.jpg", jpeg(number, *size))
        put(tmp_path / f"in/{name}.txt", "stock photo" if name == "silent" else "a small dog\nIMG_0001.jpg\ndog")
    assert prepare(tmp_path / "in", tmp_path / "all")["kept"] == 4
    asked = ("--min-side", 20, "--max-aspect", 3, "--drop-boilerplate", "--min-words", 2)
    manifest = prepare(tmp_path / "in", tmp_path / "some", *asked)
    assert manifest["dropped"] == {"caption boilerplate": 1, "picture too long": 1, "picture too small": 1}
    assert manifest["captions_dropped"] == {"caption boilerplate": 1, "caption too short": 1}
    assert [fields["caption"] for _, fields in read(tmp_path / "some")] == ["a small dog"]
    recorded = manifest["settings"]
    assert (recorded["min_side"], recorded["max_aspect"], recorded["drop_boilerplate"]) == (20, 3, True)
    assert (recorded["language"], recorded["duplicates"], recorded["against"]) == ("", "off", [])


def varied(data, **options):
    """The same picture as another file: smaller, a little blurred, encoded worse."""
    picture = Image.open(io.BytesIO(data))
    buffer = io.BytesIO()
    picture = picture.resize((picture.width * 2 // 3, picture.height * 2 // 3)).filter(ImageFilter.GaussianBlur(1))
    picture.save(buffer, "JPEG", quality=60)
    return buffer.getvalue()


@pytest.fixture
def repeated(tmp_path):
    """Pictures 0 to 5; 6 is the file of 0, 7 looks like 1."""
    originals = [jpeg(i, 300, 200) for i in range(6)]
    for number, data in enumerate([*originals, originals[0], varied(originals[1])]):
        put(tmp_path / f"in/{number}.jpg", data)
        put(tmp_path / f"in/{number}.txt", f"picture {number}")
    return tmp_path / "in"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("off", []),
        ("exact", [("6.jpg", "picture twice")]),
        ("near", [("6.jpg", "picture twice"), ("7.jpg", "picture looks like another")]),
    ],
)
def test_duplicates(tmp_path, repeated, kind, expected):
    prepare(repeated, tmp_path / "out", "--duplicates", kind)
    assert dropped(tmp_path / "out") == expected


def test_pictures_of_an_evaluation_set_are_dropped_by_look_and_by_id(tmp_path, repeated):
    evaluation = [
        ("a", {"jpg": varied(jpeg(2, 300, 200)), "txt": b"other words"}),
        ("b", {"jpg": jpeg(99, 300, 200), "json": b'{"caption": "another picture", "image_id": "4.jpg"}'}),
        ("c", {"jpg": b"broken", "txt": b"of no use"}),
    ]
    write_shards(evaluation, tmp_path / "test", 10)
    manifest = prepare(repeated, tmp_path / "out", "--against", tmp_path / "test")
    assert manifest["dropped"] == {"picture in evaluation set": 2}
    assert [name for name, _ in dropped(tmp_path / "out")] == ["2.jpg", "4.jpg"]


def test_captions_of_one_picture_are_no_duplicates(tmp_path):
    put(tmp_path / "0.jpg", jpeg(0))
    entries = [{"image": "0.jpg", "caption": f"caption {i}", "image_id": 7} for i in range(3)]
    options = {"annotations": [put(tmp_path / "a.json", entries)], "images": tmp_path}
    settings = Settings(duplicates="near")
    assert convert("albef-json", options, tmp_path / "out", settings, workers=1, progress=False)["kept"] == 3


def test_a_stopped_run_remembers_the_pictures_it_has_seen(tmp_path, repeated, monkeypatch):
    settings = Settings(duplicates="near", shard_size=2)

    def make(out):
        return convert("folder", {"images": repeated}, out, settings, workers=1, progress=False)

    whole = make(tmp_path / "whole")
    add = ShardWriter.add

    def stop(self, key, members):
        if key == "000000005":
            raise KeyboardInterrupt
        add(self, key, members)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "out")
    assert make(tmp_path / "out") == whole
    assert (whole["kept"], len(whole["shards"])) == (6, 3)


def test_near_looks_are_found_through_bands_exactly_as_by_comparing_all():
    rng = np.random.default_rng(0)
    looks = [int(value) for value in rng.integers(0, 1 << 63, 200, dtype=np.uint64)]
    for distance in (0, 1, 4, 7, 15):
        seen = Seen(distance)
        for number, look in enumerate(looks):
            seen.add(Fingerprint(file=number, look=look, image=-1))
        for flips in range(distance + 3):
            for look in looks[:40]:
                bits = rng.choice(64, flips, replace=False)
                other = look ^ sum(1 << int(bit) for bit in bits)
                expected = any((other ^ known).bit_count() <= distance for known in looks)
                assert seen.same_look(Fingerprint(-1, other, -1)) == expected


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--language", "xx"], "--language xx is none of"),
        (["--max-aspect", "0.5"], "--max-aspect must be 1 or more"),
        (["--min-words", "5", "--max-words", "3"], "--max-words 3 is less than --min-words 5"),
        (["--near-distance", "16"], "--near-distance must be 0 to 15"),
        (["--against", "nowhere"], "--against='nowhere' matches no shards"),
    ],
)
def test_impossible_settings_are_one_clear_line(tmp_path, capsys, option, said):
    put(tmp_path / "in/0.jpg", jpeg(0))
    put(tmp_path / "in/0.txt", "a dog")
    arguments = ["prepare", "folder", "--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--quiet"]
    assert main([*arguments, "--workers", "1", *option]) == 2
    assert said in capsys.readouterr().err


def test_filters_that_change_samples_need_new_shards(tmp_path, capsys):
    write_shards([("0", {"jpg": jpeg(0), "txt": b"a dog"}), ("1", {"jpg": jpeg(0), "txt": b"cat"})], tmp_path, 5)
    check = ["prepare", "img2dataset", "--shards", str(tmp_path), "--quiet", "--workers", "1"]
    assert main([*check, "--captions", "modern"]) == 2
    assert "name a folder with --out" in capsys.readouterr().err
    assert main([*check, "--min-words", "2"]) == 0
    assert [reason for _, reason in dropped(tmp_path)] == ["caption too short"]
    assert main([*check, "--duplicates", "exact"]) == 0
    assert [reason for _, reason in dropped(tmp_path)] == ["picture twice"]
