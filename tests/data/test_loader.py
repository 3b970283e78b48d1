"""The loader: every good sample once per epoch, in one global order, whatever the workers, ranks, resumes, damage."""

import io
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from simla_ds.config import (
    Config,
    DataConfig,
    MatchingConfig,
    ModelConfig,
    ObjectivesConfig,
    SourceConfig,
    TrainConfig,
    VisionConfig,
    VocabularyConfig,
)
from simla_ds.data.batch import as_floats
from simla_ds.data.loader import PairDataset, PairLoader, StalledData, eval_batches
from simla_ds.data.order import EpochOrder, Stream, WeightedOrder
from simla_ds.data.sample import clean_caption, stable_hash
from simla_ds.data.shards import find_shards, write_shards
from simla_ds.data.text import TextTokenizer
from simla_ds.types import Batch
from tests.data.broken import broken_shards

COUNT = 53  # a prime: epochs end inside batches, and ranks and batches never divide it
SIZE, VIEW = 32, 16
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # 4 workers on 2 cores, on purpose


class Words:
    """A word's id is its length: enough of a tokeniser to follow captions through the loader."""

    vocabulary = VocabularyConfig(size=60)

    def encode(self, caption):
        words = caption.split()[:20]
        return [2, *(5 + min(len(word), 50) for word in words), 3], [-1, *range(len(words)), -1]


def picture(i):
    colours = np.random.default_rng(i).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(colours).resize((50, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def good(count=COUNT, bad=()):
    for i in range(count):
        caption = json.dumps({"caption": [f"a dog number {i}", f"{i} cats"], "image_id": i // 2}).encode()
        yield f"{i:04d}", {"jpg": b"" if i in bad else picture(i), "json": caption}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """53 good samples in 8 shards."""
    folder = tmp_path_factory.mktemp("good")
    write_shards(good(), folder, shard_size=7)
    return str(folder)


BAD = (0, 3, 4, 17, 30, 31, 32, 33, 52)


@pytest.fixture(scope="module")
def shards_with_bad(tmp_path_factory):
    """The same, nine of them without a picture's bytes."""
    folder = tmp_path_factory.mktemp("bad")
    write_shards(good(bad=BAD), folder, shard_size=7)
    return str(folder)


def config(folder, **changes):
    return Config(
        objectives=ObjectivesConfig(itm=MatchingConfig(weight=0)),  # allows batches of one
        model=ModelConfig(vision=VisionConfig(image_size=SIZE, patch_size=8)),
        data=DataConfig(train=folder, workers=changes.pop("workers", 0), shuffle_window=3),
        train=TrainConfig(batch_size=changes.pop("batch_size", 5), seed=changes.pop("seed", 0)),
        **changes,
    )


def loader(folder, rank=0, world_size=1, **changes):
    return PairLoader(config(folder, **changes), Words(), VIEW, rank, world_size)


def ids(batches):
    return torch.cat([batch["sample_id"] for batch in batches]).tolist()


def keys(count=COUNT, bad=()):
    return Counter(stable_hash(f"{i:04d}") for i in range(count) if i not in bad)


def take(source, batches) -> list[dict]:
    return [next(source) for _ in range(batches)]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def interleaved(folder, world_size, samples, **changes):
    """Sample ids in global order: sample g from rank g mod world_size."""
    ranks = [loader(folder, rank, world_size, **changes) for rank in range(world_size)]
    streams = [ids(take(source, -(-samples // (5 * world_size)))) for source in ranks]
    for source in ranks:
        source.close()
    return [streams[g % world_size][g // world_size] for g in range(samples)]


# --- order -----------------------------------------------------------------------------------------------------------


def test_each_epoch_is_another_permutation_and_follows_from_the_seed():
    order = EpochOrder([7, 0, 3, 12, 5], window=2, seed=1)
    epochs = [[order.locate(epoch * 27 + position) for position in range(27)] for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == [(shard, i) for shard, size in enumerate([7, 0, 3, 12, 5]) for i in range(size)]
    assert len({tuple(epoch) for epoch in epochs}) == 4
    again = EpochOrder([7, 0, 3, 12, 5], window=2, seed=1)
    assert [again.locate(g) for g in reversed(range(108))] == [
        place for epoch in reversed(epochs) for place in epoch[::-1]
    ]
    assert [EpochOrder([7, 0, 3, 12, 5], 2, seed=2).locate(g) for g in range(27)] != epochs[0]


def test_batches_of_a_shared_index_are_the_same(shards_with_bad, tmp_path, monkeypatch):
    wanted = take(loader(shards_with_bad), 12)
    monkeypatch.setattr("simla_ds.data.shared_index.FROM", 100)
    for workers in (0, 2):
        asked = config(shards_with_bad, workers=workers)
        asked = replace(asked, data=replace(asked.data, cache_dir=str(tmp_path)))
        source = PairLoader(asked, Words(), VIEW)
        assert all(map(same, take(source, 12), wanted))
        source.close()
    assert len(list((tmp_path / "indexes").iterdir())) == 1


def test_only_a_window_of_shards_is_read_at_a_time():
    order = EpochOrder([10] * 12, window=3, seed=0)
    for start in range(0, 120, 30):
        assert len({order.locate(g)[0] for g in range(start, start + 30)}) == 3


def test_what_is_left_when_ranks_have_run_apart():
    stream = Stream().resumed([9, 4, 8])  # of three ranks: 0, 3, 6 and 1 and 2, 5 were read
    assert stream == Stream((4, 7, 8), 9)
    assert [stream.global_index(j) for j in range(5)] == [4, 7, 8, 9, 10]
    assert [stream.element(g) for g in (4, 8, 9, 10)] == [0, 2, 3, 4]
    assert stream.resumed([8, 7]) == Stream((7, 8), 9)  # of two ranks: 4 was read
    assert stream.resumed([10, 7]) == Stream((7, 9), 10)  # 4, 8 were read


def test_what_is_left_is_exact_however_often_the_number_of_ranks_changes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        stream, read = Stream(), []
        for _ in range(4):
            world = int(rng.integers(1, 5))
            counts = rng.integers(0, 9, size=world)
            read += [stream.global_index(r + world * k) for r in range(world) for k in range(counts[r])]
            stream = stream.resumed([stream.global_index(r + world * int(counts[r])) for r in range(world)])
        rest = [stream.global_index(j) for j in range(200 - len(read))]
        assert sorted(read + rest) == list(range(200))
        assert rest == sorted(rest)


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_three_epochs_are_exactly_once_in_the_same_order_for_any_workers_and_ranks(shards, workers):
    expected = interleaved(shards, 1, 3 * COUNT)
    for world_size in (1, 2) if workers < 4 else (2,):
        found = interleaved(shards, world_size, 3 * COUNT, workers=workers)
        assert found == expected
    epochs = [expected[i * COUNT : (i + 1) * COUNT] for i in range(3)]
    assert all(Counter(epoch) == keys() for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert interleaved(shards, 1, COUNT, seed=1) != epochs[0]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_batches_are_bit_equal_for_any_number_of_workers(shards_with_bad, workers):
    alone, helped = loader(shards_with_bad), loader(shards_with_bad, workers=workers)
    for first, second in zip(take(alone, 12), take(helped, 12), strict=True):
        assert same(first, second)
    assert helped.skipped == alone.skipped
    helped.close()


def test_the_loader_draws_nothing_from_torchs_global_generator(shards):
    torch.manual_seed(3)
    expected = torch.rand(1)
    for workers in (0, 1):
        source = loader(shards, workers=workers)
        torch.manual_seed(3)
        next(source)
        assert torch.rand(1) == expected
        source.close()


# --- several sources -------------------------------------------------------------------------------------------------

OTHERS = 24  # keys 0000 to 0023, as the first source has them too


@pytest.fixture(scope="module")
def sources(shards, tmp_path_factory):
    """53 and 24 good samples; 2 to 1 where weights are asked for."""
    folder = tmp_path_factory.mktemp("other")
    write_shards(good(OTHERS), folder, shard_size=5)

    def made(weights=(2.0, 1.0)):
        named = zip(("first", "other"), (shards, str(folder)), weights, strict=True)
        return {name: SourceConfig(shards=path, weight=weight) for name, path, weight in named}

    return made


def mixed(sources, rank=0, world_size=1, **changes):
    settings = config("", **changes)
    settings = replace(settings, data=replace(settings.data, sources=sources))
    return PairLoader(settings, Words(), VIEW, rank, world_size)


def read_in_order(sources, world_size, samples, state=None, **changes):
    """(source, sample id) in global order, and the state after them."""
    ranks = [mixed(sources, rank, world_size, **changes) for rank in range(world_size)]
    streams = []
    for loader in ranks:
        if state:
            loader.load_state(state)
        batches = take(loader, -(-samples // (5 * world_size)))
        streams.append(list(zip(torch.cat([b["source"] for b in batches]).tolist(), ids(batches), strict=True)))
    end = json.loads(json.dumps(ranks[0].state_dict([loader.local_position() for loader in ranks])))
    for loader in ranks:
        loader.close()
    return [streams[g % world_size][g // world_size] for g in range(samples)], end


def of_source(name, count):
    return Counter(stable_hash(f"{i:04d}") ^ stable_hash(name) for i in range(count))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_sources_without_weights_make_epochs_that_hold_every_sample_once(sources, workers):
    once = sources((0.0, 0.0))
    expected, _ = read_in_order(once, 1, 3 * (COUNT + OTHERS))
    for world_size in (1, 2):
        assert read_in_order(once, world_size, len(expected), workers=workers)[0] == expected
    for epoch in range(3):
        part = expected[epoch * (COUNT + OTHERS) : (epoch + 1) * (COUNT + OTHERS)]
        for number, (name, count) in enumerate((("first", COUNT), ("other", OTHERS))):
            assert Counter(key for source, key in part if source == number) == of_source(name, count)


@pytest.mark.parametrize("workers", [1, 3])
def test_weighted_sources_have_their_share_and_each_its_own_epochs(sources, workers):
    samples = 5 * 120
    expected, end = read_in_order(sources(), 1, samples)
    assert read_in_order(sources(), 2, samples, workers=workers)[0] == expected
    for number, (name, count) in enumerate((("first", COUNT), ("other", OTHERS))):
        own = [key for source, key in expected if source == number]
        for epoch in range(len(own) // count):
            assert Counter(own[epoch * count : (epoch + 1) * count]) == of_source(name, count)
    half, state = read_in_order(sources(), 2, samples // 2, workers=workers)
    assert half + read_in_order(sources(), 1, samples // 2, state)[0] == expected
    changed = mixed(sources((1.0, 1.0)))
    with pytest.raises(ValueError, match=r"data.sources: .*'weight': 1.0.* now, .*'weight': 2.0.* in the checkpoint"):
        changed.load_state(end)


def test_proportions_are_exact_and_positions_need_no_history():
    orders = [EpochOrder([40, 17], 2, seed) for seed in (1, 2, 3)]
    order = WeightedOrder(orders, [3.0, 1.5, 0.1], seed=0)
    places = [order.locate(g) for g in range(20 * WeightedOrder.BLOCK)]
    source = np.array([shard // 2 for shard, _ in places])
    for count in (WeightedOrder.BLOCK, 7 * WeightedOrder.BLOCK, len(source)):
        found = np.bincount(source[:count], minlength=3) / count
        assert (
            np.abs(found - np.array([3.0, 1.5, 0.1]) / 4.6).max() <= 2 / count
        )  # rounded down, to the heaviest's good
    assert 0 < source[:64].mean() < 1  # mixed within a block, not one after the other
    for number in range(3):
        own = [(shard - 2 * number, i) for shard, i in places if shard // 2 == number]
        assert own == [orders[number].locate(k) for k in range(len(own))]
    again = WeightedOrder(orders, [3.0, 1.5, 0.1], seed=0)
    assert [again.locate(g) for g in (12_345, 3, 19_999)] == [places[g] for g in (12_345, 3, 19_999)]
    other = WeightedOrder(orders, [3.0, 1.5, 0.1], seed=1)
    assert [other.locate(g) for g in range(100)] != places[:100]


def test_a_source_without_samples_is_refused_by_name(sources, tmp_path):
    write_shards(good(9, bad=range(9)), tmp_path, 9)
    (tmp_path / "shard-000000.tar").write_bytes(b"\0" * 1024)
    empty = {**sources(), "empty": SourceConfig(shards=str(tmp_path), weight=1.0)}
    with pytest.raises(ValueError, match=r"data.sources.empty: none of 1 shards holds a sample"):
        mixed(empty)
    missing = {**sources(), "gone": SourceConfig(shards="/nowhere", weight=1.0)}
    with pytest.raises(ValueError, match=r"data.sources.gone='/nowhere' matches no shards"):
        mixed(missing)


# --- resuming --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [0, 1, 9, 25])  # the start; a few; inside epoch 0; inside epoch 2
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_at_the_same_world_size_goes_on_bit_equal(shards_with_bad, batches, workers):
    source = loader(shards_with_bad, workers=workers)
    take(source, batches)
    state = json.loads(json.dumps(source.state_dict()))
    resumed = loader(shards_with_bad, workers=workers)
    resumed.load_state(state)
    before = Counter(source.skipped)
    for first, second in zip(take(source, 8), take(resumed, 8), strict=True):
        assert same(first, second)
    assert source.skipped - before == resumed.skipped
    assert source.local_position() == resumed.local_position()
    source.close()
    resumed.close()


@pytest.mark.parametrize("worlds", [(2, 1), (1, 3), (3, 2, 4, 1), (2, 2, 1)], ids=str)
@pytest.mark.parametrize("bad", [(), BAD], ids=["good", "with bad"])
def test_resuming_at_another_world_size_reads_every_sample_once_per_epoch(shards, shards_with_bad, bad, worlds):
    folder = shards_with_bad if bad else shards
    state: dict = {}
    read: list[int] = []
    for world_size in worlds:
        ranks = [loader(folder, rank, world_size, batch_size=3) for rank in range(world_size)]
        for source in ranks:
            if state:
                source.load_state(state)
        for source in ranks:
            read += ids(take(source, 4))
        state = json.loads(json.dumps(ranks[0].state_dict([source.local_position() for source in ranks])))
    last = loader(folder, batch_size=1)
    last.load_state(state)
    epochs = 1 + max(state["next"]) // COUNT
    while last.local_position() < epochs * COUNT:
        read += ids(take(last, 1))
    surplus = len(read) - epochs * (COUNT - len(bad))
    assert 0 <= surplus <= 1  # the last batch may have had to cross into the next epoch
    read = read[: len(read) - surplus]
    assert Counter(read) == Counter(dict.fromkeys(keys(bad=bad), epochs))


def test_a_state_of_other_data_or_order_is_refused_with_both_numbers(shards, tmp_path):
    state = loader(shards).state_dict()
    write_shards(good(40), tmp_path, 7)
    with pytest.raises(ValueError, match="40 now, 53 in the checkpoint"):
        loader(str(tmp_path)).load_state(state)
    with pytest.raises(ValueError, match=r"train.seed: 1 now, 0 in the checkpoint"):
        loader(shards, seed=1).load_state(state)
    write_shards(good(), tmp_path / "cut anew", shard_size=14)
    with pytest.raises(ValueError, match=r"cut anew: 4 shards, 53 samples, .* now, 8 shards, 53 samples, .* in the ch"):
        loader(str(tmp_path / "cut anew")).load_state(state)
    with pytest.raises(ValueError, match="all 2 ranks"):
        loader(shards, 0, 2).state_dict()


# --- bad data --------------------------------------------------------------------------------------------------------


def test_bad_samples_are_counted_and_good_ones_all_used(shards_with_bad):
    source = loader(shards_with_bad, batch_size=11)
    assert Counter(ids(take(source, 4))) == keys(bad=BAD)
    assert source.skipped["picture empty"] == source.local_position() - 44
    take(source, 4)
    assert source.skipped["picture empty"] == source.local_position() - 88
    assert source.skipped.keys() == {"picture empty"}


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_over_a_deliberately_broken_data_set(tmp_path, workers, bert_vocabulary):
    folder = tmp_path / "shards"
    usable, reasons = broken_shards(folder)
    tokenizer = TextTokenizer(bert_vocabulary)
    source = PairLoader(config(str(folder), batch_size=len(usable), workers=workers), tokenizer, VIEW)
    batch = next(source)
    source.close()
    assert Counter(batch["sample_id"].tolist()) == Counter(stable_hash(key) for key in usable)
    assert source.skipped <= reasons  # some bad ones may follow the last good one
    assert isinstance(source.dataset, PairDataset)
    epoch = source.dataset.__getitems__(list(range(source.epoch_size)))
    of_shards = Counter({"shard truncated": 1, "shard empty": 2, "shard unreadable": 1})
    assert Counter(result for _, result in epoch.results if isinstance(result, str)) + of_shards == reasons
    assert of_shards <= source.skipped
    assert batch["image"].isfinite().all()
    special = batch["input_ids"][batch["sample_id"].tolist().index(stable_hash("special"))]
    assert not (special == tokenizer.vocabulary.mask).any()
    assert (special == tokenizer.vocabulary.sep).sum() <= 1
    assert os.listdir(tmp_path) == ["shards"]  # nothing was written outside


def test_data_without_a_usable_sample_ends_after_an_epoch(tmp_path):
    write_shards(good(20, bad=range(20)), tmp_path, 7)
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"none of 20 samples is usable \(picture empty: 20\)"):
            next(loader(str(tmp_path), workers=workers))
    with pytest.raises(ValueError, match=r"none of 10 samples is usable"):  # one of two ranks' share
        next(loader(str(tmp_path), world_size=2))


def test_a_run_ends_when_most_of_the_last_samples_are_not_usable(tmp_path, monkeypatch):
    monkeypatch.setattr("simla_ds.data.loader.RECENT", 20)
    paths = write_shards(good(40), tmp_path, 10)
    source = loader(str(tmp_path), batch_size=4)
    take(source, 5)
    for path in paths:  # the storage goes away
        path.unlink()
    assert isinstance(source.dataset, PairDataset)
    source.dataset.files._open.clear()
    said = r"11 of the last 20 samples of rank 0 are not usable \(sample unreadable: 11\);.* data.max_skipped, now 0.5"
    with pytest.raises(ValueError, match=said):
        take(source, 3)
    assert source.local_position() <= 40  # nothing near an epoch was used up
    state = source.state_dict()
    write_shards(good(40), tmp_path, 10)
    again = loader(str(tmp_path), batch_size=4)
    again.load_state(state)
    take(again, 10)


def test_data_of_which_half_is_not_usable_may_be_used_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr("simla_ds.data.loader.RECENT", 20)
    write_shards(good(40, bad=range(0, 40, 2)), tmp_path, 10)
    with pytest.raises(ValueError, match=r"11 of the last 20 samples"):
        take(loader(str(tmp_path), batch_size=4), 40)  # half of them, sometimes more
    asked = config(str(tmp_path), batch_size=4)
    source = PairLoader(replace(asked, data=replace(asked.data, max_skipped=1.0)), Words(), VIEW)
    take(source, 40)
    assert source._recently.total() == sum(reason is not None for reason in source._recent)
    assert len(source._recent) == 20


def test_fewer_samples_than_a_batch_is_refused_with_both_numbers(tmp_path):
    write_shards(good(9), tmp_path, 7)
    with pytest.raises(ValueError, match="holds 9 samples, fewer than one batch of 5 pairs on 2 rank"):
        loader(str(tmp_path), 0, 2)


def test_only_one_rank_counts_a_damaged_shard(tmp_path):
    path = write_shards(good(20), tmp_path, 20)[0]
    path.write_bytes(path.read_bytes()[:-30_000])
    assert [sum(loader(str(tmp_path), rank, 2, batch_size=2).skipped.values()) for rank in range(2)] == [1, 0]


def test_a_shard_that_vanishes_is_counted_sample_by_sample(tmp_path):
    paths = write_shards(good(20), tmp_path, 10)
    source = loader(str(tmp_path), batch_size=10)
    paths[0].unlink()
    take(source, 2)
    assert source.skipped["sample unreadable"] >= 10


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batches_hold_what_types_py_says(shards):
    collated = take(loader(shards, batch_size=8), 1)[0]
    assert collated["image"].dtype == collated["visual_view"].dtype == torch.uint8
    batch: Any = as_floats(cast(Batch, collated))
    grid = SIZE // 8
    length = batch["input_ids"].shape[1]
    assert batch["image"].shape == (8, 3, SIZE, SIZE)
    assert batch["image"].dtype == torch.float32
    assert batch["visual_view"].shape == (8, 3, VIEW, VIEW)
    assert 0 <= batch["visual_view"].min() <= batch["visual_view"].max() <= 1
    assert length == batch["lengths"].max()
    assert torch.equal(batch["text_mask"].sum(1), batch["lengths"])
    assert (batch["input_ids"][~batch["text_mask"]] == 0).all()
    assert (batch["word_index"][~batch["text_mask"]] == -1).all()
    assert (batch["input_ids"][:, 0] == 2).all()
    assert torch.equal(batch["labels"], batch["input_ids"].view(-1)[batch["label_index"]])
    changed = (batch["mlm_input_ids"] != batch["input_ids"]).view(-1).nonzero()[:, 0]
    assert set(changed.tolist()) <= set(batch["label_index"].tolist())
    assert torch.equal(batch["token_index"], batch["text_mask"].view(-1).nonzero()[:, 0])
    assert batch["label_index"].tolist() == sorted(batch["label_index"].tolist())
    assert torch.equal(batch["masked_index"], batch["patch_mask"].view(-1).nonzero()[:, 0])
    assert batch["patch_mask"].shape == (8, grid * grid)
    assert batch["label_count"].tolist() == [len(batch["label_index"])]
    assert batch["masked_count"].tolist() == [len(batch["masked_index"])]
    assert batch["itm_draws"].shape == (8, 2)
    assert {str(tensor.dtype) for tensor in batch.values()} == {"torch.float32", "torch.int64", "torch.bool"}
    assert "visual_view" not in next(PairLoader(config(shards), Words(), 0))


def test_pairs_of_one_picture_share_the_image_id(shards):
    batch = next(loader(shards, batch_size=COUNT))
    pictures = Counter(batch["image_id"].tolist())
    assert Counter(pictures.values()) == {2: 26, 1: 1}
    assert len(set(batch["sample_id"].tolist())) == COUNT


def test_draws_differ_between_samples_and_epochs_and_captions_are_drawn_from_the_list(shards):
    first, second = take(loader(shards, batch_size=COUNT), 2)
    row = {int(key): i for i, key in enumerate(second["sample_id"])}
    again = torch.tensor([row[int(key)] for key in first["sample_id"]])
    for name in ("image", "visual_view", "patch_mask", "itm_draws"):
        assert (first[name] != second[name][again]).flatten(1).any(1).float().mean() > 0.8, name
    assert torch.cat([first["itm_draws"], second["itm_draws"]]).unique().numel() == 4 * COUNT
    lengths = Counter(first["lengths"].tolist())
    assert lengths.keys() == {4, 6}  # "7 cats", "a dog number 7"
    assert min(lengths.values()) > 12


def test_held_out_batches_are_fixed_and_in_file_order(shards_with_bad):
    settings = config(shards_with_bad)
    run = [list(eval_batches(settings, shards_with_bad, Words(), VIEW, batch_size=6)) for _ in range(2)]
    assert all(same(first, second) for (first, _), (second, _) in zip(*run, strict=True))
    found = [said["key"] for _, batch in run[0] for said in batch]
    assert found == [f"{i:04d}" for i in range(COUNT) if i not in BAD]
    assert [len(said) for _, said in run[0]] == [6] * 7 + [2]
    assert run[0][0][1][0]["caption"] == clean_caption(run[0][0][1][0]["caption"], 30)
    pixels = run[0][0][0]["image"][0]
    whole = Image.open(io.BytesIO(picture(1))).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    shown = (
        pixels * torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        + torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    ) * 255
    assert np.abs(shown.permute(1, 2, 0).numpy() - np.asarray(whole)).max() < 1.01  # a level: another resizer
    split = [
        list(eval_batches(settings, shards_with_bad, Words(), VIEW, rank=r, world_size=2, limit=20)) for r in (0, 1)
    ]
    assert sorted(said["key"] for part in split for _, batch in part for said in batch) == found[: 20 - 4]
    mine = split[1][0][0]  # a sample's draws don't depend on who reads it
    everyone = torch.cat([batch["itm_draws"] for batch, _ in run[0]])
    assert torch.equal(mine["itm_draws"], everyone[[found.index(said["key"]) for said in split[1][0][1]]])


def test_a_fingerprint_tells_other_data_and_not_other_folders(shards, tmp_path):
    there = loader(shards).fingerprint
    copy = shutil.copytree(Path(shards), tmp_path / "copy")
    assert loader(str(copy)).fingerprint == there
    next(copy.glob("*.tar")).unlink()
    assert loader(str(copy)).fingerprint != there


def test_closing_ends_the_workers_and_iterating_goes_on_after_it(shards_with_bad):
    source, alone = loader(shards_with_bad, workers=2), loader(shards_with_bad)
    first = take(source, 3)
    assert len(multiprocessing.active_children()) == 2
    source.close()
    assert not multiprocessing.active_children()
    rest = take(source, 3)
    source.close()
    assert all(same(a, b) for a, b in zip(first + rest, take(alone, 6), strict=True))


@pytest.mark.parametrize("fault", ["silent", "killed"])
def test_a_loader_process_that_is_silent_or_killed_is_one_line(shards, monkeypatch, fault):
    def stall(*_):
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    monkeypatch.setattr(PairDataset, "__getitems__", stall)
    source = loader(shards, workers=1)
    source.config = replace(source.config, data=replace(source.config.data, timeout=2))
    with pytest.raises(
        StalledData, match=r"rank 0: data.train=.*: a loader process is stuck or gone \(data.timeout=2 s\): DataLoader"
    ):
        next(source)


def test_a_loader_process_outlives_the_signals_that_are_its_trainers(shards):
    """The launcher signals the whole tree: a save needs no loader, but the step before it does."""
    others = multiprocessing.active_children()
    source = loader(shards, workers=1)
    next(source)
    (process,) = (child for child in multiprocessing.active_children() if child not in others)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    for _ in range(2):
        os.kill(process.pid, signal.SIGTERM)
        take(source, 30)
    source.close()
    process.join(10)
    assert not process.is_alive()


def test_a_process_that_fails_with_its_loader_open_ends_at_once(shards):
    """Without a close, multiprocessing sends SIGTERM to the loader processes and waits for them."""
    code = f"""
        from tests.data.test_loader import loader
        source = loader({shards!r}, workers=1)
        next(source)
        raise SystemExit(3)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], timeout=60, check=False)
    assert done.returncode == 3


def test_shards_are_named_in_the_error_when_there_are_none(shards):
    with pytest.raises(ValueError, match=r"data.train='/nowhere' matches no shards"):
        PairLoader(replace(config(shards), data=DataConfig(train="/nowhere")), Words(), 0)
    with pytest.raises(ValueError, match=r"data.val='/nowhere' matches no shards"):
        next(eval_batches(config(shards), "/nowhere", Words(), 0))
    assert len(find_shards(shards)) == 8
