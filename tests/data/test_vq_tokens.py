"""The VQ's network: begins as plain patches, and comes back from its folder as it was."""

import json
import sys

import pytest
import torch

from simla_ds.data.visual_tokens import PatchCodebook, load_visual_tokenizer
from simla_ds.data.vq_tokens import VqTokens

GRID, CODES = 4, 12


@pytest.fixture
def tokens():
    torch.manual_seed(0)
    tokens = VqTokens(CODES, GRID, width=8)
    tokens.codes.copy_(torch.rand(CODES, 48))
    return tokens


def views(count=5, seed=3):
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def shake(tokens):
    """Give weights values, as training does."""
    for weight in tokens.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    return tokens


def test_untrained_it_is_the_patch_codebook_of_its_codes(tokens):
    codebook = PatchCodebook(tokens.codes, GRID)
    ids = tokens(views())
    assert (ids.shape, ids.dtype) == ((5, GRID * GRID), torch.int64)
    assert torch.equal(ids, codebook(views()))
    assert torch.equal(tokens.decode(ids), codebook.decode(ids))


def test_trained_a_token_depends_on_the_patches_around(tokens):
    shake(tokens)
    view = views(1)
    encoded = tokens.encode(view)
    view[0, :, 4:8, 12:16] = 0.0  # row 1, column 3
    changed = (tokens.encode(view) - encoded).abs().amax((0, 1)) > 0
    assert changed[1, 3]
    assert changed[1, 2]
    assert not changed[:, 0].any()  # two 3 x 3 convolutions reach two patches


def test_a_saved_one_gives_the_same_tokens_without_the_library_that_trained_it(tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)  # importing it fails
    shake(tokens).save(tmp_path)
    loaded = load_visual_tokenizer(tmp_path, GRID)
    assert isinstance(loaded, VqTokens)
    assert (loaded.view_size, loaded.vocabulary_size) == (16, CODES)
    assert not loaded.training
    assert not any(weight.requires_grad for weight in loaded.parameters())
    ids = tokens(views())
    assert torch.equal(loaded(views()), ids)
    assert torch.equal(loaded.decode(ids), tokens.decode(ids))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "vq.safetensors"]  # no pickle
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loaded(views()), ids)


def test_another_grid_another_view_and_weights_of_another_make_are_refused(tokens, tmp_path):
    tokens.save(tmp_path)
    with pytest.raises(ValueError, match=r"was fitted for 4 x 4 patches, the model has 8 x 8"):
        load_visual_tokenizer(tmp_path, 8)
    with pytest.raises(ValueError, match=r"reads \(B, 3, 16, 16\), got"):
        tokens(torch.zeros(1, 3, 32, 32))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "codes": CODES + 1}))
    with pytest.raises(ValueError, match=r"^data\.visual_tokenizer=.*codes.*prepare it again$") as caught:
        load_visual_tokenizer(tmp_path, GRID)
    assert "\n" not in str(caught.value)
    (tmp_path / "vq.safetensors").unlink()
    with pytest.raises(ValueError, match=r"^data\.visual_tokenizer=.*prepare it again$"):
        load_visual_tokenizer(tmp_path, GRID)
