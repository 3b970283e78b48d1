"""Visual tokens: one code per patch in row-major order, fitted the same every time, DALL-E's codes unchanged."""

import json
import re

import pytest
import torch

from simla_ds.data.visual_tokens import DalleTokens, PatchCodebook, fit_codebook, load_visual_tokenizer

GRID, CODES = 4, 12


def coloured_views(count=60, grid=GRID, seed=0):
    """Pictures whose 4 x 4 px patches each have one of 12 colours, with a little noise; and the colours' numbers."""
    generator = torch.Generator().manual_seed(seed)
    palette = torch.tensor([[r, g, b] for r in (0.1, 0.9) for g in (0.1, 0.9) for b in (0.05, 0.5, 0.95)])
    number = torch.randint(12, (count, grid, grid), generator=generator)
    view = palette[number].permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (view + 0.02 * torch.rand(view.shape, generator=generator)).clamp(0, 1), number.flatten(1)


@pytest.fixture(scope="module")
def codebook(tmp_path_factory):
    out = tmp_path_factory.mktemp("codebook")
    fit_codebook(iter(coloured_views()[0]), codes=CODES, grid=GRID, seed=0).save(out)
    return out


def test_a_codebook_finds_the_patches_that_pictures_are_made_of(codebook):
    view, number = coloured_views(seed=1)
    ids = load_visual_tokenizer(codebook, GRID)(view)
    assert (ids.shape, ids.dtype) == ((60, GRID * GRID), torch.int64)
    pairs = set(zip(number.flatten().tolist(), ids.flatten().tolist(), strict=True))
    assert len(pairs) == 12, "each colour has a code of its own, at its own place in row-major order"


def test_token_p_describes_patch_p(codebook):
    tokenizer = load_visual_tokenizer(codebook, GRID)
    view = torch.zeros(1, 3, 16, 16)
    plain = tokenizer(view)
    view[0, :, 4:8, 12:16] = 1.0  # row 1, column 3
    assert (tokenizer(view) != plain).flatten().nonzero().flatten().tolist() == [1 * GRID + 3]


def test_codes_are_the_nearest_by_exact_distance(codebook):
    tokenizer = load_visual_tokenizer(codebook, GRID)
    assert isinstance(tokenizer, PatchCodebook)
    view = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    patches = torch.stack(
        [view[:, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].flatten(1) for r in range(GRID) for c in range(GRID)], dim=1
    )
    truth = (patches.double()[:, :, None] - tokenizer.codes.double()).square().sum(-1).argmin(-1)
    assert torch.equal(tokenizer(view), truth)


def test_fitting_twice_gives_the_same_bytes_and_another_seed_does_not(codebook, tmp_path):
    for name, seed in (("same", 0), ("other", 1)):
        fit_codebook(coloured_views()[0], codes=CODES, grid=GRID, seed=seed).save(tmp_path / name)
    same, other, first = (
        folder / "codebook.safetensors" for folder in (tmp_path / "same", tmp_path / "other", codebook)
    )
    assert same.read_bytes() == first.read_bytes() != other.read_bytes()
    assert json.loads((codebook / "config.json").read_text()) == {
        "kind": "patch_codebook", "grid": GRID, "view_size": 16, "patch": 4, "codes": CODES,
    }  # fmt: skip


def test_no_code_dies_when_most_patches_are_plain(tmp_path):
    view, _ = coloured_views(count=200)
    view[:, :, 4:] = 0.5  # three quarters of each picture are one plain background
    fit_codebook(view, codes=CODES + 1, grid=GRID, seed=0).save(tmp_path)
    assert load_visual_tokenizer(tmp_path, GRID)(view).unique().numel() == CODES + 1


def test_pictures_with_fewer_kinds_of_patches_than_codes_are_fitted(tmp_path):
    fit_codebook(torch.zeros(3, 3, 16, 16), codes=5, grid=GRID, seed=0).save(tmp_path)
    tokenizer = load_visual_tokenizer(tmp_path, GRID)
    assert isinstance(tokenizer, PatchCodebook)
    assert tokenizer.codes.shape == (5, 48)
    assert torch.isfinite(tokenizer.codes).all()
    assert tokenizer(torch.zeros(1, 3, 16, 16)).unique().numel() == 1


def test_a_codebook_says_its_sizes_and_moves(codebook):
    tokenizer = load_visual_tokenizer(codebook, GRID)
    assert isinstance(tokenizer, PatchCodebook)
    assert (tokenizer.view_size, tokenizer.vocabulary_size) == (16, CODES)
    assert tokenizer.to("cpu") is tokenizer


@pytest.fixture(scope="module")
def dalle_folder(tmp_path_factory):
    """A FlavaImageCodebook of random weights, narrow for speed; its layers are those of the published one."""
    from transformers import FlavaImageCodebook, FlavaImageCodebookConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dalle")
    model = FlavaImageCodebook(FlavaImageCodebookConfig(hidden_size=8, vocab_size=64))
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    centre = model(torch.rand(4, 3, 64, 64)).mean(dim=(0, 2, 3))  # or one random code would win everywhere
    model.state_dict()["blocks.output.conv.bias"].sub_(centre)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("grid", [4, 16])  # 32 px; 128 px, as the paper
def test_dalle_tokens_are_the_codes_of_a_direct_call(dalle_folder, grid):
    from transformers import FlavaImageCodebook

    tokenizer = load_visual_tokenizer(dalle_folder, grid)
    assert isinstance(tokenizer, DalleTokens)
    assert (tokenizer.view_size, tokenizer.vocabulary_size) == (8 * grid, 64)
    view = torch.rand(2, 3, 8 * grid, 8 * grid, generator=torch.Generator().manual_seed(0))
    direct = FlavaImageCodebook.from_pretrained(dalle_folder).eval()
    expected = direct.get_codebook_indices(view * 0.8 + 0.1)  # DALL-E's map_pixels with epsilon 0.1
    ids = tokenizer(view)
    assert (expected.shape, ids.dtype) == ((2, grid, grid), torch.int64)
    assert ids.unique().numel() > 3  # else equal codes would say little
    assert torch.equal(ids, expected.reshape(2, -1))


def test_dalle_tokens_are_frozen_and_full_precision_under_autocast(dalle_folder):
    tokenizer = DalleTokens(dalle_folder, GRID)
    assert not tokenizer.model.training
    assert not any(weight.requires_grad for weight in tokenizer.model.parameters())
    view = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = tokenizer(view)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer(view), expected)


def test_missing_dalle_weights_are_an_error_and_not_random_codes(dalle_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(dalle_folder / "model.safetensors")
    del weights["blocks.output.conv.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((dalle_folder / "config.json").read_text())
    with pytest.raises(ValueError, match=r"data\.visual_tokenizer=.* lacks 1 weight.*blocks\.output\.conv\.weight"):
        load_visual_tokenizer(tmp_path, GRID)


def test_a_grid_that_does_not_fit_is_refused_with_both_numbers(codebook):
    with pytest.raises(ValueError, match=r"data\.visual_tokenizer=.* 4 x 4 patches, the model has 8 x 8"):
        load_visual_tokenizer(codebook, 8)


def test_a_view_of_another_size_is_refused(codebook, tmp_path):
    with pytest.raises(ValueError, match=re.escape("(B, 3, 16, 16), got (1, 3, 32, 32)")):
        load_visual_tokenizer(codebook, GRID)(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=re.escape("got (3, 8, 8)")):
        fit_codebook([torch.zeros(3, 8, 8)], codes=2, grid=GRID, seed=0)


def test_folders_without_a_known_tokenizer_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^data\.visual_tokenizer=.*no readable config\.json"):
        load_visual_tokenizer(tmp_path, GRID)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type=bert"):
        load_visual_tokenizer(tmp_path, GRID)


def test_too_few_patches_are_refused_with_both_numbers(tmp_path):
    with pytest.raises(ValueError, match="32 patches cannot make 64 visual tokens"):
        fit_codebook(torch.zeros(2, 3, 16, 16), codes=64, grid=GRID, seed=0)
    assert not any(tmp_path.iterdir())
