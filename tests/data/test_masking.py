"""Masks: the published generator's statistics on its grid, sane ones on every grid, BERT's 80/10/10 for tokens."""

import numpy as np
import pytest

from simla_ds.data.masking import block_mask, mask_tokens

SPECIAL = (0, 1, 2, 3, 4)
MASK = 4


def draw_blocks(grid, ratio, count):
    rng = np.random.default_rng(0)
    return np.stack([block_mask(grid, ratio, rng) for _ in range(count)])


def masked(ids, seed, probability=0.15, vocabulary_size=720):
    return mask_tokens(
        np.array(ids),
        np.random.default_rng(seed),
        special=SPECIAL,
        mask_id=MASK,
        vocabulary_size=vocabulary_size,
        probability=probability,
    )


def test_block_masks_have_the_published_statistics():
    hidden = draw_blocks(16, 75 / 256, 2000).sum(axis=1)
    assert hidden.max() == 75
    assert 55 <= hidden.min() <= 70  # 64 over the 500 draws of the reference
    assert abs(hidden.mean() - 74.3) < 0.3


def test_block_masks_are_blocks():
    masks = draw_blocks(16, 75 / 256, 50).reshape(-1, 16, 16)
    beside = (masks[:, :, 1:] & masks[:, :, :-1]).sum() / masks.sum()
    assert beside > 0.75  # scattered patches: 0.29


@pytest.mark.parametrize("grid", [2, 3, 4, 8, 14, 24])  # 2: the smallest that can be masked in part; 8: 128 px
@pytest.mark.parametrize("ratio", [0.01, 75 / 256, 0.6, 0.99])
def test_block_masks_scale_with_the_grid(grid, ratio):
    hidden = draw_blocks(grid, ratio, 100).sum(axis=1)
    target = min(max(round(ratio * grid * grid), 1), grid * grid - 1)
    assert hidden.min() >= 1
    assert hidden.max() <= target
    if ratio < 0.5:
        assert hidden.mean() > 0.9 * target


def test_a_single_patch_cannot_be_masked():
    with pytest.raises(ValueError, match="patch_size"):
        block_mask(1, 0.3, np.random.default_rng(0))


def test_tokens_are_masked_as_bert_masks_them():
    ids = np.arange(5, 720).repeat(100)
    changed, chosen = masked(ids, 0)
    assert abs(chosen.mean() - 0.15) < 0.005
    assert (changed[~chosen] == ids[~chosen]).all()
    as_mask, kept = (changed == MASK)[chosen].mean(), (changed == ids)[chosen].mean()
    assert abs(as_mask - 0.8) < 0.02
    assert abs(kept - 0.1) < 0.02
    random = changed[chosen & (changed != MASK) & (changed != ids)]
    assert np.isin(np.arange(5, 720), random).mean() > 0.7  # about 1,070 draws from 715 words
    assert not np.isin(random, SPECIAL).any()
    assert random.max() < 720


def test_special_tokens_are_never_chosen():
    for seed in range(50):
        changed, chosen = masked([2, 10, 1, 11, 4, 3, 0, 0], seed, probability=0.9)
        assert not chosen[[0, 2, 4, 5, 6, 7]].any()
        assert (changed[~chosen] == np.array([2, 10, 1, 11, 4, 3, 0, 0])[~chosen]).all()


def test_every_caption_with_a_word_gets_a_label():
    counts = np.zeros(3)
    for seed in range(300):
        _, chosen = masked([2, 10, 11, 12, 3], seed, probability=0.001)
        assert chosen.sum() == 1
        counts += chosen[1:4]
    assert counts.min() > 70  # 100 each
    assert masked([2, 10, 3], 0)[1].tolist() == [False, True, False]
    assert not masked([2, 3], 0)[1].any()  # an empty caption
    assert not masked([2, 1, 3], 0)[1].any()  # nothing but [UNK]


def test_specials_spread_over_the_vocabulary_are_skipped():
    for seed in range(200):
        changed, _ = mask_tokens(
            np.full(20, 3),
            np.random.default_rng(seed),
            special=(0, 4, 5, 9),
            mask_id=9,
            vocabulary_size=10,
            probability=0.9,
        )
        assert set(changed.tolist()) <= {1, 2, 3, 6, 7, 8, 9}
