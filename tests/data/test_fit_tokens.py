"""A codebook for shards of one's own: what its tokens give back, and the command that fits it."""

import re

import pytest
import torch

from simla_ds.cli import main
from simla_ds.data.fit_tokens import psnr_of, read_views, reconstruction
from simla_ds.data.shards import write_shards
from simla_ds.data.visual_tokens import PatchCodebook, fit_codebook, load_visual_tokenizer
from tests.data.test_loader import good
from tests.data.test_visual_tokens import CODES, GRID, coloured_views


def test_pictures_come_back_from_their_own_tokens():
    codebook = fit_codebook(coloured_views()[0], codes=CODES, grid=GRID, seed=0)
    view = coloured_views(seed=1)[0]
    given_back = codebook.decode(codebook(view))
    assert (given_back - view).abs().max() < 0.03  # the noise
    found = reconstruction(codebook, (view * 255).round().to(torch.uint8))
    assert found["psnr"] == pytest.approx(psnr_of(float((given_back - view).square().mean())), abs=0.3)
    assert found["codes_used"] == 1.0
    few = fit_codebook(coloured_views()[0], codes=2, grid=GRID, seed=0)
    assert reconstruction(few, (view * 255).round().to(torch.uint8))["psnr"] < found["psnr"] - 10


def test_the_command_makes_a_folder_to_train_with(tmp_path, capsys):
    write_shards(good(40, bad=[3]), tmp_path / "shards", 20)
    out = tmp_path / "tokens"
    command = ["prepare", "visual-tokenizer", str(tmp_path / "shards"), "--out", str(out), "--grid", "4"]
    assert main([*command, "--codes", "8"]) == 0
    assert re.search(r"tokens: \d+\.\d\d dB on pictures left out, \d+% of the codes used", capsys.readouterr().out)
    loaded = load_visual_tokenizer(out, 4)
    assert isinstance(loaded, PatchCodebook)
    assert (loaded.vocabulary_size, loaded.view_size) == (8, 16)
    assert len(read_views(str(tmp_path / "shards"), 16, 4000)) == 39
    assert len(read_views(str(tmp_path / "shards"), 16, 10)) == 10
    for arguments, told in (
        (command, "is not empty: name a new folder"),
        ([*command[:4], str(tmp_path / "x"), "--codes", "9999"], "cannot make 9999 visual tokens"),
    ):
        assert main(arguments) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
