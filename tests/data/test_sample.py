"""Samples: every kind of picture to upright RGB, every kind of caption, and a named reason for what cannot be used."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simla_ds.data import sample
from simla_ds.data.sample import REASONS, SkipSample, clean_caption, read_picture, read_record, stable_hash, upright_rgb
from tests.data.broken import bomb

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def quarters(size=64):
    """A picture whose quarters are red, green / blue, white."""
    picture = Image.new("RGB", (size, size), RED)
    half = size // 2
    for colour, corner in ((GREEN, (half, 0)), (BLUE, (0, half)), (WHITE, (half, half))):
        picture.paste(colour, (*corner, corner[0] + half, corner[1] + half))
    return picture


def encoded(picture, kind, **options):
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def corners(picture):
    """Colours in the middle of the four quarters, rounded to 0, 128 or 255."""
    width, height = picture.size
    places = [(width // 4, height // 4), (3 * width // 4, height // 4), (width // 4, 3 * height // 4)]
    values = np.array([picture.getpixel(place) for place in [*places, (3 * width // 4, 3 * height // 4)]])
    return [tuple(row) for row in np.select([values < 40, values > 215], [0, 255], 128).tolist()]


def reason(members):
    with pytest.raises(SkipSample) as skip:
        read_picture(members)
    return skip.value.reason


def caption_reason(members):
    with pytest.raises(SkipSample) as skip:
        read_record("key", members)
    return skip.value.reason


@pytest.mark.parametrize(
    ("extension", "data"),
    [
        ("jpg", encoded(quarters(), "JPEG", quality=95, subsampling=0)),
        ("jpeg", encoded(quarters().convert("CMYK"), "JPEG", quality=95)),
        ("png", encoded(quarters(), "PNG")),
        ("png", encoded(quarters().quantize(4), "PNG")),
        ("webp", encoded(quarters(), "WEBP", lossless=True)),
        ("gif", encoded(quarters(), "GIF", save_all=True, append_images=[Image.new("RGB", (64, 64), BLUE)] * 3)),
        ("webp", encoded(quarters(), "WEBP", lossless=True, save_all=True, append_images=[Image.new("RGB", (64, 64))])),
        ("png", encoded(quarters(), "PNG", save_all=True, append_images=[Image.new("RGB", (64, 64))])),
        ("tif", encoded(quarters(), "TIFF")),
        ("jpg", encoded(quarters(), "MPO", quality=95, subsampling=0, save_all=True, append_images=[quarters()])),
        ("jpg", encoded(quarters(), "PNG")),  # the extension lies
    ],
    ids=[
        "jpeg",
        "cmyk",
        "png",
        "palette",
        "webp",
        "animated gif",
        "animated webp",
        "animated png",
        "tiff",
        "phone",
        "misnamed",
    ],
)
def test_every_kind_of_picture_becomes_rgb(extension, data):
    picture = read_picture({extension: data})
    assert (picture.mode, picture.size) == ("RGB", (64, 64))
    assert corners(picture) == [RED, GREEN, BLUE, WHITE]


def test_sixteen_bits_keep_their_brightness():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).repeat(4).reshape(32, 32)
    picture = read_picture({"png": encoded(Image.fromarray(ramp), "PNG")})
    assert picture.mode == "RGB"
    assert np.abs(np.asarray(picture)[..., 0].astype(int) - (ramp / 257.0)).max() <= 0.51


def test_transparency_lies_over_white():
    layered = quarters().convert("RGBA")
    layered.putalpha(Image.new("L", (64, 64), 255))
    layered.paste((0, 0, 0, 0), (0, 0, 32, 32))
    expected = [WHITE, GREEN, BLUE, WHITE]
    assert corners(read_picture({"png": encoded(layered, "PNG")})) == expected
    palette = quarters().quantize(4)
    first = palette.getpixel((0, 0))
    assert corners(read_picture({"png": encoded(palette, "PNG", transparency=first)})) == expected
    assert corners(read_picture({"gif": encoded(palette, "GIF", transparency=first)})) == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(orientation):
    stored = quarters(64).resize((64, 32))
    turn = {
        2: 0,
        3: 3,
        4: 1,
        5: 5,
        6: 2,
        7: 6,
        8: 4,
    }  # the transpose that makes the stored picture from the upright one
    if orientation in turn:
        stored = stored.transpose(Image.Transpose(turn[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = read_picture({"jpg": encoded(stored, "JPEG", quality=95, subsampling=0, exif=exif)})
    assert picture.size == (64, 32)
    assert corners(picture) == [RED, GREEN, BLUE, WHITE]
    assert corners(upright_rgb(picture, 0)) == [RED, GREEN, BLUE, WHITE]  # nor is it turned twice


def test_broken_exif_does_no_harm():
    assert read_picture({"jpg": encoded(quarters(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff")}).size == (64, 64)


def test_large_jpegs_are_decoded_small_when_there_is_room():
    data = encoded(quarters(1024), "JPEG")
    assert read_picture({"jpg": data}).size == (1024, 1024)
    assert read_picture({"jpg": data}, room=600).size == (1024, 1024)
    assert read_picture({"jpg": data}, room=500).size == (512, 512)
    assert read_picture({"jpg": data}, room=130).size == (256, 256)
    assert corners(read_picture({"jpg": data}, room=130)) == [RED, GREEN, BLUE, WHITE]


def test_what_is_no_whole_picture_has_a_reason():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    assert reason({"txt": b"a cat"}) == "picture missing"
    assert reason({"jpg": b""}) == "picture empty"
    assert reason({"jpg": b"<html>404 not found</html>"}) == "picture unreadable"
    assert reason({"png": bomb()}) == "picture too large"
    assert reason({"png": bomb(9_000)}) == "picture too large"  # between our limit and Pillow's
    assert reason({"jpg": None}) == "picture too large"  # a member that was not read for its size
    for kind in ("JPEG", "PNG", "GIF"):
        data = encoded(noise, kind)
        assert reason({"jpg": data[: len(data) // 2]}) == "picture truncated", kind
    data = encoded(noise, "WEBP")
    assert reason({"webp": data[: len(data) // 2]}) in ("picture truncated", "picture unreadable")


def test_random_damage_never_raises_anything_but_a_reason():
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"):
        whole = np.frombuffer(encoded(quarters(32), kind), dtype=np.uint8)
        for _ in range(40):
            damaged = whole.copy()
            damaged[rng.integers(len(damaged), size=4)] = rng.integers(256, size=4)
            try:
                assert read_picture({"jpg": damaged.tobytes()}).mode == "RGB"
            except SkipSample:
                continue


def test_captions_come_from_json_or_text():
    record = read_record("k", {"json": json.dumps({"caption": "A cat", "image_id": 7}).encode()})
    assert record.captions == ("A cat",)
    assert (record.sample_id, record.image_id) == (stable_hash("k"), stable_hash("7"))
    record = read_record("k", {"json": json.dumps({"caption": ["a", "b"]}).encode(), "txt": b"unused"})
    assert record.captions == ("a", "b")
    assert record.image_id == record.sample_id
    assert read_record("k", {"txt": "\ufeffein Hündchen 🐶".encode()}).captions == ("ein Hündchen 🐶",)
    assert read_record("k", {"txt": b"from text", "json": b'{"url": "x", "caption": null}'}).captions == ("from text",)
    assert read_record("k", {"json": b'{"caption": ["", " ?! ", "a dog"]}'}).captions == ("a dog",)
    assert read_record("k", {"json": b'{"caption": "a", "image_id": 7}'}).image_name == "7"


def test_captions_that_cannot_be_used_have_a_reason():
    assert caption_reason({"jpg": b""}) == "caption missing"
    assert caption_reason({"json": b'{"url": "x"}'}) == "caption missing"
    assert caption_reason({"json": b'{"caption": []}'}) == "caption missing"
    assert caption_reason({"json": b"[1, 2]"}) == "caption missing"
    assert caption_reason({"json": b'{"caption": 5}'}) == "caption not text"
    assert caption_reason({"json": b'{"caption": ["a", 5]}'}) == "caption not text"
    assert caption_reason({"json": b'{"caption": "a'}) == "caption json broken"
    assert caption_reason({"json": b"[" * 100_000}) == "caption json broken"
    assert caption_reason({"txt": "Gr\u00fc\u00dfe".encode("latin-1")}) == "caption not UTF-8"
    assert caption_reason({"json": '{"caption": "Gr\u00fc\u00dfe"}'.encode("latin-1")}) == "caption not UTF-8"
    assert caption_reason({"json": b'{"caption": "half \\ud83d of a dog"}'}) == "caption not UTF-8"
    assert caption_reason({"txt": None}) == "caption too large"
    assert caption_reason({"txt": b"a " * (2 << 20) + b"b"}) == "caption too large"
    for nothing in ("", " \t\n", "?!", " - / ...", "\ufeff"):
        assert caption_reason({"txt": nothing.encode()}) == "caption empty"
        assert clean_caption(nothing.strip("\ufeff"), 30).strip() == ""


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ('A man, riding/driving a T-bone.. <person> isn\'t   "OK"\n', "a man riding driving a t bone person isnt ok"),
        (" Hello  world ! \n", "hello world"),
        ("x - y", "x y"),
        ("a lone\ttab stays", "a lone\ttab stays"),
        ("two \t lines\n\n", "two lines"),
        ("", ""),
        ("?!", ""),
        ("the [MASK] and [SEP] ids", "the [mask] and [sep] ids"),
        ("🐶🐶", "🐶🐶"),
    ],
)
def test_cleaning_follows_the_official_table(raw, cleaned):
    assert clean_caption(raw, 30) == cleaned


def test_cleaning_keeps_the_first_words():
    assert clean_caption("w " * 10_000, 30) == " ".join(["w"] * 30)


def test_hashes_are_stable_and_not_negative():
    assert stable_hash("000017") == 9_002_219_866_497_712_269
    hashes = [stable_hash(str(i)) for i in range(10_000)]
    assert len(set(hashes)) == len(hashes)
    assert min(hashes) >= 0
    assert max(hashes) < 2**63


def test_reasons_are_the_ones_that_are_raised():
    source = Path(sample.__file__).read_text()
    raised = {line.split('SkipSample("')[1].split('"')[0] for line in source.splitlines() if 'SkipSample("' in line}
    assert raised <= set(REASONS)


def test_a_source_has_keys_and_ids_of_its_own_but_for_pictures_of_a_named_collection():
    def read(image_id, salt):
        return read_record("7", {"json": json.dumps({"caption": "a dog", "image_id": image_id}).encode()}, salt)

    for image_id, alike in ((139, False), ("139", False), (None, False), ("coco:139", True)):
        first, other = read(image_id, 5), read(image_id, 6)
        assert first.sample_id != other.sample_id
        assert (first.image_id == other.image_id) is alike, image_id


def test_an_image_id_that_is_no_utf8_can_be_written():
    record = read_record("7", {"json": b'{"caption": "a dog", "image_id": "caf\\udce9"}'})
    assert (record.image_name or "").encode() == b"caf?"
