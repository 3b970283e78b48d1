"""The image encoder against plain tensor functions in float64."""

import copy

import numpy as np
import pytest
import torch
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from simla_ds.model.vision import ImageEncoder
from tests import reference_step
from tests.tiny import VISION, spread_weights

SIZES = {"patch": 8, "vit_depth": 2, "vit_heads": 4}


@pytest.fixture
def encoder() -> ImageEncoder:
    """Return a tiny float64 encoder with weights of order one."""
    model = ImageEncoder(VISION)
    spread_weights(model)
    return model.double()


def bicubic(grid: Tensor, size: int, a: float = -0.75) -> Tensor:
    """Resample (old, old, D) to (size, size, D): Keys' cubic, the border repeated."""
    old = grid.shape[0]
    weights = np.zeros((size, old))
    for i in range(size):
        point = (i + 0.5) * old / size - 0.5
        for k in range(int(np.floor(point)) - 1, int(np.floor(point)) + 3):
            x = abs(point - k)
            inner, outer = (a + 2) * x**3 - (a + 3) * x**2 + 1, a * (x**3 - 5 * x**2 + 8 * x - 4)
            weights[i, min(max(k, 0), old - 1)] += inner if x < 1 else outer if x < 2 else 0.0
    w = torch.from_numpy(weights)
    return torch.einsum("io,jp,opd->ijd", w, w, grid)


def make_images(side: int, seed: int = 0) -> Tensor:
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_mask_token_replaces_patches_before_positions_are_added(encoder: ImageEncoder):
    masked = torch.zeros(3, 9, dtype=torch.bool)
    masked[0, [0, 4]] = masked[1] = True  # some, all, none
    wanted = reference_step.vision(dict(encoder.state_dict()), "", make_images(24), SIZES, masked)
    torch.testing.assert_close(encoder(make_images(24), masked), wanted, atol=1e-12, rtol=0)
    # all patches hidden: what is left is positions, so that patches still differ
    assert (wanted[1, 1:] - wanted[1, 1]).abs().amax(-1)[1:].min() > 0.1
    torch.testing.assert_close(encoder(make_images(24))[2], encoder(make_images(24), masked)[2], atol=1e-12, rtol=0)


def test_hidden_pixels_reach_nothing(encoder: ImageEncoder):
    masked = torch.zeros(3, 9, dtype=torch.bool)
    masked[:, 5] = True  # row 1, column 2 of the 3 x 3 grid
    image, other = make_images(24), make_images(24)
    other[:, :, 8:16, 16:24] += 10
    torch.testing.assert_close(encoder(image, masked), encoder(other, masked), atol=1e-12, rtol=0)
    assert (encoder(image) - encoder(other)).abs().max() > 0.1
    image.requires_grad_()
    (gradient,) = torch.autograd.grad(encoder(image, masked).square().sum(), image)
    assert not gradient[:, :, 8:16, 16:24].any()
    assert gradient[:, :, :8, :8].any()


@pytest.mark.parametrize("grid", [2, 5, 6])  # smaller; larger, odd; twice the trained 3 x 3
def test_positions_at_another_resolution_are_a_bicubic_resample(encoder: ImageEncoder, grid: int):
    state = dict(encoder.state_dict())
    trained = state["pos_embed"]
    resampled = bicubic(trained[0, 1:].view(3, 3, -1), grid).flatten(0, 1)
    state["pos_embed"] = torch.cat([trained[:, :1], resampled[None]], dim=1)
    wanted = reference_step.vision(state, "", make_images(8 * grid), SIZES)
    # resampled in float32
    torch.testing.assert_close(encoder(make_images(8 * grid)), wanted, atol=1e-5, rtol=0)


def test_a_mask_at_another_resolution_hides_the_patch_it_names(encoder: ImageEncoder):
    masked = torch.zeros(3, 25, dtype=torch.bool)
    masked[:, 7] = True  # row 1, column 2 of 5 x 5
    image, other = make_images(40), make_images(40)
    other[:, :, 8:16, 16:24] += 10
    torch.testing.assert_close(encoder(image, masked), encoder(other, masked), atol=1e-12, rtol=0)


def test_clean_and_masked_pictures_in_one_pass_equal_two_passes(encoder: ImageEncoder):
    """Values and the gradients of every parameter; the patch embedding is shared."""
    image, masked = make_images(24), torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    results = []
    for together in (False, True):
        encoder.zero_grad()
        if together:
            tokens = encoder(image, masked, keep_clean=True)
        else:
            tokens = torch.cat([encoder(image), encoder(image, masked)])
        tokens.pow(3).sum().backward()
        results.append(
            (tokens.detach(), {n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None})
        )
    (two, gradients), (one, merged) = results
    torch.testing.assert_close(one, two, atol=1e-12, rtol=0)
    assert merged.keys() == gradients.keys() == dict(encoder.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(merged[name], gradient, atol=1e-9, rtol=1e-9, msg=name)


def test_with_visible_patches_only_hidden_ones_are_neither_seen_nor_computed(encoder: ImageEncoder):
    image, mask = make_images(24), torch.zeros(3, 9, dtype=torch.bool)
    mask[0, [0, 4, 8]] = mask[1, [1, 2, 3]] = mask[2, [6, 7]] = True  # one picture hides less than the others
    encoder.visible_patches = 6
    out = encoder(image, mask)
    seen = ~mask
    seen[2, 8] = False  # and its last patch is left out as well
    for row in range(3):
        tokens = encoder._pos_embed(encoder.patch_embed(image[row : row + 1]))
        kept = [0, *(seen[row].nonzero()[:, 0] + 1).tolist()]
        alone = encoder.norm(encoder.blocks(tokens[:, kept]))
        torch.testing.assert_close(out[row, kept], alone[0])
    torch.testing.assert_close(out[:, 1:][~seen], encoder.mask_token[0].expand(9, -1))


def test_with_visible_patches_only_clean_pictures_are_whole(encoder: ImageEncoder):
    image, mask = make_images(24), torch.arange(9).expand(3, 9) < 3
    clean = encoder(image)
    encoder.visible_patches = 6
    both = encoder(image, mask, keep_clean=True)
    torch.testing.assert_close(both[:3], clean)
    torch.testing.assert_close(both[3:], encoder(image, mask))


def test_a_mask_that_hides_more_than_its_aim_leaks_nothing(encoder: ImageEncoder):
    image, mask = make_images(24), torch.arange(9).expand(3, 9) < 5
    encoder.visible_patches = 6  # of which only four are visible
    other = image.clone()
    other[:, :, :8] = 7.0  # the first three patches, all hidden
    torch.testing.assert_close(encoder(other, mask), encoder(image, mask))


def first_attention(encoder: ImageEncoder) -> Attention:
    block = encoder.blocks[0]
    assert isinstance(block, Block)
    assert isinstance(block.attn, Attention)
    return block.attn


def test_half_precision_on_a_cpu_attends_and_learns_as_float32_does():
    """There attention is the project's own: SDPA's backward is slow in half precision."""
    torch.manual_seed(0)
    exact = ImageEncoder(VISION)
    spread_weights(exact)
    half = copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(half.state_dict())  # the same rounded weights
    images, found = make_images(24).bfloat16(), []
    for model in (exact, half):
        tokens = model(images.to(model.mask_token.dtype))
        tokens.float().square().mean().backward()
        attention = first_attention(model)
        found.append([tokens, attention.qkv.weight.grad, attention.proj.weight.grad])
    for wanted, got in zip(*found, strict=True):
        assert (got.float() - wanted).norm() < 0.03 * wanted.norm()


def test_timm_sees_to_masks_in_half_precision_too():
    attention = first_attention(ImageEncoder(VISION).bfloat16())
    x = torch.randn(2, 5, VISION.width, generator=torch.Generator().manual_seed(0)).bfloat16()
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    by_timm = Attention.forward(attention, x, attn_mask=causal)
    torch.testing.assert_close(attention(x, attn_mask=causal), by_timm, atol=0, rtol=0)
    torch.testing.assert_close(attention(x, attn_mask=None, is_causal=True), by_timm, atol=0.02, rtol=0.02)
    assert (attention(x) - by_timm).abs().max() > 0.01
