"""A codebook for shards of one's own: what its tokens give back, and the command that fits it."""

import re
import sys

import pytest
import torch

from simla_ds.cli import main
from simla_ds.data.fit_tokens import fit_vq, psnr_of, read_views, reconstruction
from simla_ds.data.shards import write_shards
from simla_ds.data.visual_tokens import PatchCodebook, fit_codebook, load_visual_tokenizer
from simla_ds.data.vq_tokens import VqTokens
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


def smooth_views(count, seed):
    """Pictures that are planes of colour, in any direction: what one patch shows tells what the next one does."""
    generator = torch.Generator().manual_seed(seed)
    ramp = torch.linspace(-1, 1, 4 * GRID)
    slope = torch.rand(count, 2, 3, 1, 1, generator=generator) - 0.5
    height = torch.rand(count, 3, 1, 1, generator=generator)
    return ((height + slope[:, 0] * ramp[:, None] + slope[:, 1] * ramp).clamp(0, 1) * 255).round().to(torch.uint8)


def test_a_trained_vq_gives_back_more_than_a_codebook_of_as_many_codes():
    seen, unseen = smooth_views(200, 0), smooth_views(60, 1)
    codebook = fit_codebook(seen.float() / 255, codes=24, grid=GRID, seed=0)
    vq = fit_vq(seen, codes=24, grid=GRID, steps=150, seed=0)
    plain, trained = (reconstruction(tokens, unseen) for tokens in (codebook, vq))
    assert trained["psnr"] > plain["psnr"] + 0.7
    assert trained["codes_used"] > 0.9
    before = torch.random.get_rng_state()
    once, twice, other = (fit_vq(unseen, codes=16, grid=GRID, steps=1, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(once.codes, twice.codes)
    assert not torch.equal(once.codes, other.codes)


def test_the_command_trains_a_vq_or_says_what_it_lacks(tmp_path, capsys, monkeypatch):
    write_shards(good(12), tmp_path / "shards", 20)
    command = ["prepare", "visual-tokenizer", str(tmp_path / "shards"), "--kind", "vq", "--grid", "4", "--steps", "3"]
    assert main([*command, "--codes", "8", "--out", str(tmp_path / "tokens")]) == 0
    assert re.search(r"tokens: \d+\.\d\d dB on pictures left out", capsys.readouterr().out)
    assert isinstance(load_visual_tokenizer(tmp_path / "tokens", 4), VqTokens)
    assert main([*command, "--codes", "999", "--out", str(tmp_path / "none")]) == 2
    assert "176 patches cannot make 999 visual tokens" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    assert main([*command, "--out", str(tmp_path / "none")]) == 2
    assert "pip install 'simla_ds[data]'" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
