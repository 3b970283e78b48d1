"""Views: one geometry for both, photometric changes in one only, sides that are named are never swapped."""

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from simla_ds.data.sample import decode_picture, open_picture
from simla_ds.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    GEOMETRIC,
    OPERATIONS,
    PHOTOMETRIC,
    WHOLE,
    EvalTransform,
    Geometry,
    TrainTransform,
    draw_crop,
    make_views,
    normalise,
)

GRID = 8


def transform(**changes):
    settings = {
        "image_size": 128,
        "visual_view_size": 64,
        "crop_scale": (0.5, 1.0),
        "flip": 0.5,
        "augment_ops": 2,
        "augment_magnitude": 7,
    }
    return TrainTransform(**{**settings, **changes})


def marked(column, row, size=256):
    """Black, with one red patch of an 8 x 8 grid."""
    picture = Image.new("RGB", (size, size))
    side = size // GRID
    picture.paste((255, 0, 0), (column * side, row * side, (column + 1) * side, (row + 1) * side))
    return picture


def redness_by_patch(view):
    """(64,) share of each patch that is red; the grey filled in at the borders is not."""
    side = view.shape[1] // GRID
    red = (view[0].astype(float) - view[1]) / 255
    return red.reshape(GRID, side, GRID, side).mean(axis=(1, 3)).reshape(-1)


@pytest.mark.parametrize("sizes", [(128, 64), (128, 128), (64, 112)], ids=str)
@pytest.mark.parametrize("name", [*GEOMETRIC, "flip", "crop"])
def test_a_marked_patch_keeps_its_index_in_both_views(name, sizes):
    rng = np.random.default_rng(0)
    for strength in (-1.0, -0.7, 0.3, 1.0):
        column, row = rng.integers(2, 6, size=2)
        geometry = {
            "flip": Geometry((0, 0, 1, 1), flip=True),
            "crop": Geometry((0.1 + strength / 12, 0.05, 0.85, 0.9), flip=strength > 0),
        }.get(name, Geometry((0, 0, 1, 1), False, ((name, strength),)))
        view, visual = make_views(marked(column, row), geometry, *sizes)
        first, second = redness_by_patch(view), redness_by_patch(visual)
        assert first.max() > 0.3
        assert np.abs(first - second).max() < 0.05  # resampling at other resolutions
        assert first.argmax() == second.argmax() or np.diff(np.sort(first))[-1] < 0.05


def test_random_views_agree_patch_by_patch():
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)).resize(
        (320, 240), Image.Resampling.BICUBIC
    )
    without_photometry = transform(augment_ops=3)
    for _ in range(60):
        drawn = without_photometry.draw(320, 240, "", rng)
        geometry = Geometry(drawn.box, drawn.flip, tuple(op for op in drawn.operations if op[0] in GEOMETRIC))
        view, visual = make_views(smooth, geometry, 128, 64)
        assert visual is not None
        small = view.reshape(3, GRID, 16, GRID, 16).mean(axis=(2, 4))
        assert (
            np.abs(small - visual.reshape(3, GRID, 8, GRID, 8).mean(axis=(2, 4))).max() < 10
        )  # one row at a grey border


@pytest.mark.parametrize("same_size", [True, False])
@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_photometric_operations_leave_the_visual_view_alone(name, same_size):
    noise = np.random.default_rng(0).integers(40, 180, (64, 64, 3), dtype=np.uint8)
    picture, visual_size = Image.fromarray(noise), 64 if same_size else 32
    plain_view, plain_visual = make_views(picture, WHOLE, 64, visual_size)
    view, visual = make_views(picture, Geometry(WHOLE.box, False, ((name, 0.7),)), 64, visual_size)
    assert (visual == plain_visual).all()
    assert (view == plain_view).all() == (name == "Identity")


def test_operations_have_the_official_strengths():
    grey = Image.new("RGB", (256, 256), (100, 100, 100))
    assert make_views(grey, Geometry(WHOLE.box, False, (("Brightness", 0.7),)), 256, 0)[0].max() == 136  # factor 1.36
    assert GEOMETRIC["ShearX"](0.7)[1] == pytest.approx(0.21)
    assert GEOMETRIC["TranslateY"](-0.7)[5] * 256 == pytest.approx(-7)
    cos, sin = GEOMETRIC["Rotate"](0.7)[0], GEOMETRIC["Rotate"](0.7)[3]
    assert np.degrees(np.arctan2(sin, cos)) == pytest.approx(21)
    shifted, _ = make_views(marked(4, 4), Geometry(WHOLE.box, False, (("TranslateX", 0.7),)), 256, 0)
    assert shifted[0, 140].argmax() == 128 - 7
    assert (shifted[:, :, -7:] == 128).all()  # grey where nothing was
    corner = make_views(marked(0, 0), Geometry(WHOLE.box, False, (("Rotate", 1.0),)), 256, 0)[0]
    assert (corner[:, 0, 0] == 128).all()


def test_operations_are_drawn_evenly_and_applied_half_the_time():
    rng, drawn = np.random.default_rng(0), []
    for _ in range(4000):
        drawn += transform().draw(64, 64, "", rng).operations
    assert abs(len(drawn) - 4000) < 200  # 2 draws, each applied with p 0.5
    for name in OPERATIONS:
        strengths = [strength for other, strength in drawn if other == name]
        assert abs(len(strengths) - 400) < 80
        assert set(strengths) == ({0.7, -0.7} if name in GEOMETRIC else {0.7})


def test_captions_that_name_a_side_are_never_flipped():
    rng = np.random.default_rng(0)
    always = transform(flip=1.0)
    for caption in ("a dog left of a cat", "Right", "the leftmost boat", "on the right-hand side", "a left,right turn"):
        assert not any(always.draw(64, 64, caption, rng).flip for _ in range(50)), caption
    for caption in ("a bright kite", "", "upright copyright"):
        assert all(always.draw(64, 64, caption, rng).flip for _ in range(50)), caption
    flips = [transform().draw(64, 64, "a cat", rng).flip for _ in range(2000)]
    assert abs(np.mean(flips) - 0.5) < 0.04


def test_flips_mirror_the_picture():
    whole, _ = make_views(marked(1, 2), WHOLE, 64, 0)
    mirrored, _ = make_views(marked(1, 2), Geometry(WHOLE.box, True), 64, 0)
    assert (mirrored == whole[:, :, ::-1]).all()


@pytest.mark.parametrize("size", [(640, 480), (100, 100), (1, 1), (3000, 10)])  # the last: no crop fits
def test_crops_lie_inside_and_have_the_asked_area_and_aspect(size):
    rng = np.random.default_rng(0)
    boxes = np.array([draw_crop(size[0], size[1], (0.2, 1.0), rng) for _ in range(500)])
    left, top, right, bottom = boxes.T
    assert boxes.min() >= 0
    assert boxes.max() <= 1 + 1e-12
    if min(size) < 100:
        assert (right > left).all()
        return
    areas, aspects = (right - left) * (bottom - top), (right - left) * size[0] / ((bottom - top) * size[1])
    assert areas.min() > 0.19
    assert 0.72 < aspects.min() < 0.78
    assert 1.28 < aspects.max() < 1.36
    assert abs(np.log(aspects).mean()) < 0.1


def test_a_crop_of_the_whole_area_is_the_whole_picture():
    rng = np.random.default_rng(0)
    assert all(draw_crop(*size, (1.0, 1.0), rng) == WHOLE.box for size in ((640, 427), (100, 100), (20, 900)))


def jpeg(picture, orientation=1):
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    picture.save(buffer, "JPEG", quality=95, subsampling=0, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_decoded_small_gives_the_views_of_the_whole(monkeypatch, orientation):
    """The same draws, hence the same crop in the picture's own pixels, from a half, a quarter or an eighth of it."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 255, (4, 5, 3), dtype=np.uint8))
    whole = noise.resize((2001, 1501), Image.Resampling.BICUBIC)  # not a multiple of 8
    stored = whole.transpose(Image.Transpose.ROTATE_90) if orientation == 6 else whole
    data, sides = jpeg(stored, orientation), set()

    def watched(picture, room):
        decoded = decode_picture(picture, room)
        smaller = round(2001 / decoded.width)
        sides.add(smaller)
        assert smaller <= max(1, 1.01 * math.sqrt(2001 * 1501) / room)  # or a crop would be enlarged for it
        return decoded

    for seed in range(30):
        views = transform(crop_scale=(0.02, 1.0), augment_ops=0)
        expected = views(whole, "", np.random.default_rng(seed))
        with monkeypatch.context() as patch:
            patch.setattr("simla_ds.data.transforms.decode_picture", watched)
            found = views(open_picture(data), "", np.random.default_rng(seed))
        for mine, other in zip(found, expected, strict=True):
            assert mine is not None
            assert np.abs(mine.astype(int) - other).mean() < 2  # half a pixel and the compression
    assert {2, 4, 8} <= sides


@pytest.mark.parametrize("size", [(1, 1), (5, 3000), (3000, 5), (64, 64)])
def test_any_size_of_picture_gives_views(size):
    picture, rng = Image.new("RGB", size, (10, 20, 30)), np.random.default_rng(0)
    for _ in range(20):
        view, visual = transform()(picture, "", rng)
        assert visual is not None
        assert (view.shape, visual.shape, view.dtype) == ((3, 128, 128), (3, 64, 64), np.uint8)


def test_eval_views_are_plain_resizes_and_draw_nothing():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 96, 3), dtype=np.uint8))
    rng = np.random.default_rng(0)
    view, visual = EvalTransform(image_size=32, visual_view_size=0)(picture, "", rng)
    expected = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(view - expected.astype(int)).max() <= 1  # another resizer's rounding
    assert visual is None
    assert rng.random() == np.random.default_rng(0).random()


def test_normalising_agrees_with_the_definition():
    views = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    assert normalise(views).dtype == torch.float32
    assert (normalise(views) - (views.double() / 255 - mean) / std).abs().max() < 1e-6


def test_views_follow_from_the_generator_alone():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 96, 3), dtype=np.uint8))
    first, again = (transform()(picture, "", np.random.default_rng(5)) for _ in range(2))
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()
