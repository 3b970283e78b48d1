"""`simla visualize`: a picture beside itself under its heat map."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from simla_ds.cli import main
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.hub import save_model_folder
from simla_ds.model.simla import Simla
from simla_ds.visualize import overlay, visualize
from tests.tiny import model_config, spread_weights


@pytest.fixture
def folder(tmp_path):
    train_tokenizer(["a red dog on a hill"] * 3, tmp_path / "tokenizer", 60)
    vocabulary = replace(TextTokenizer(tmp_path / "tokenizer").vocabulary, visual_size=20)
    model = spread_weights(Simla(replace(model_config(), vocabulary=vocabulary)))
    save_model_folder(model, tmp_path / "model", tmp_path / "tokenizer")
    Image.new("RGB", (60, 40), "navy").save(tmp_path / "picture.jpg")
    return tmp_path


def test_a_png_is_written_with_the_picture_and_its_map(folder, capsys):
    out = folder / "heat.png"
    command = ["visualize", str(folder / "picture.jpg"), "a red dog", "--model", str(folder / "model")]
    assert main([*command, "--out", str(out)]) == 0
    assert "matches with probability" in capsys.readouterr().out
    sheet = Image.open(out)
    assert (sheet.format, sheet.size) == ("PNG", (768, 256))
    left, right = np.asarray(sheet)[:, :384], np.asarray(sheet)[:, 384:]
    assert np.ptp(left.reshape(-1, 3), axis=0).max() <= 4  # one colour, but for JPEG's rounding
    assert np.ptp(right.reshape(-1, 3), axis=0).max() > 100


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_device_is_the_one_asked_for(folder, capsys, monkeypatch, device):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    command = ["visualize", str(folder / "picture.jpg"), "a red dog", "--model", str(folder / "model")]
    status = main([*command, "--out", str(folder / "heat.png"), "--device", device])
    assert status == (0 if device == "cpu" else 2)
    assert ("no CUDA card" in capsys.readouterr().err) == (device == "cuda")


@pytest.mark.gpu
def test_a_card_draws_the_same_map(folder):
    paths = folder / "model", folder / "picture.jpg", "a red dog"
    on_card, on_cpu = (visualize(*paths, folder / f"{d}.png", device=d) for d in ("cuda", "cpu"))
    assert on_card == pytest.approx(on_cpu, abs=1e-3)


def test_the_hottest_place_is_the_reddest():
    heat = np.zeros((8, 8), dtype=np.float32)
    heat[2, 5] = 1
    red = np.asarray(overlay(Image.new("RGB", (8, 8), "white"), heat)).astype(int)
    redness = red[..., 0] - red[..., 1]
    assert np.unravel_index(redness.argmax(), redness.shape) == (2, 5)
    assert (redness == 0).sum() == 63


@pytest.mark.parametrize(
    ("change", "told"), [(["--layer", "9"], "layers 0 to 1"), (["--model", "nowhere"], "nowhere is no model folder")]
)
def test_wrong_use_is_one_line_and_status_2(folder, capsys, change, told):
    command = ["visualize", str(folder / "picture.jpg"), "a red dog", "--model", str(folder / "model"), *change]
    assert main([*command, "--out", str(folder / "heat.png")]) == 2
    assert told in capsys.readouterr().err
    assert not (folder / "heat.png").exists()
