"""Batches of a task's examples."""

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simla_ds.config import MatchingConfig, TrainConfig
from simla_ds.data.loader import CHUNK, StalledData
from simla_ds.data.order import EpochOrder
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream.annotations import Annotations, FolderPictures
from simla_ds.downstream.config import FinetuneConfig, FinetuneData
from simla_ds.downstream.examples import Example, ExampleDataset, ExampleLoader, ExampleMaker, held_out_batches
from simla_ds.downstream.retrieval_tuning import Retrieval


def test_an_entry_is_drawn_for_otherwise_in_each_epoch_and_alike_at_each_try(tmp_path):
    train_tokenizer(["a red dog"], tmp_path / "words", 40)
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    config = FinetuneConfig(task="retrieval", train=TrainConfig(batch_size=2))
    entries = [{"image": "a.png", "caption": "a dog", "image_id": n} for n in range(3)]
    annotations = Retrieval().rows(Annotations("entries", entries, FolderPictures(tmp_path)))
    maker = ExampleMaker(config, Retrieval(), TextTokenizer(tmp_path / "words"), train=True)
    dataset = ExampleDataset(annotations, maker, EpochOrder([3], 1, 0), 0)

    def draws(indices: list[int]) -> dict[int, list[float]]:
        made = [example for _, example in dataset.__getitems__(indices).results if isinstance(example, Example)]
        return {example.number: example.draws.tolist() for example in made}

    first, second = draws([0, 1, 2]), draws([3, 4, 5])
    assert first.keys() == second.keys() == {0, 1, 2}
    assert len({draw for epoch in (first, second) for three in epoch.values() for draw in three}) == 18
    assert draws([2, 1, 0]) == first


@pytest.mark.parametrize("task", ["vqa", "nlvr2", "snli_ve", "text_assignment"])
def test_a_batch_of_one_is_refused_by_tasks_that_match_pairs_alone(task):
    assert FinetuneConfig(task=task, train=TrainConfig(batch_size=1)).train.batch_size == 1
    with pytest.raises(ValueError, match="without a wrong picture"):
        FinetuneConfig(task="retrieval", train=TrainConfig(batch_size=1))


@pytest.mark.parametrize(
    ("negatives", "ranks", "length"),
    [("global", 2, 12), ("global", 1, 4), ("local", 2, 4)],  # 4: the longest text here; other ranks' may be of 5
)
def test_texts_that_ranks_exchange_are_of_one_length(tmp_path, negatives, ranks, length):
    train_tokenizer(["a red dog"], tmp_path / "words", 40)
    tokenizer = TextTokenizer(tmp_path / "words", max_tokens=12)
    config = FinetuneConfig(task="retrieval", data=FinetuneData(max_tokens=12), train=TrainConfig(batch_size=2))
    config = replace(config, objectives=replace(config.objectives, itm=MatchingConfig(negatives=negatives)))
    pictures: Any = None
    entries = Annotations("entries", [{}] * 4, pictures)
    maker = ExampleMaker(config, Retrieval(), tokenizer, train=True)
    loader = ExampleLoader(config, entries, maker, rank=0, world_size=ranks)
    image, fields = torch.zeros(1, 3, 8, 8, dtype=torch.uint8), {"image_id": 1}
    batch = loader.collate([Example(n, image, [2, *[7] * n], np.zeros(3), fields) for n in (1, 3)])
    assert batch["input_ids"].shape == batch["text_mask"].shape == (2, length)
    assert batch["text_mask"].sum(1).tolist() == [2, 4]
    assert batch["input_ids"][0, 2:].eq(tokenizer.vocabulary.pad).all()


HELD_OUT = 2 * CHUNK + 3


def held_out(folder: Path) -> tuple[Annotations, ExampleMaker]:
    """Entries of pictures that all differ."""
    train_tokenizer(["a red dog"], folder / "words", 40)
    for number in range(HELD_OUT):
        Image.new("RGB", (40, 40), (number, 0, 255 - number)).save(folder / f"{number}.png")
    entries = [{"image": f"{n}.png", "caption": "a dog", "image_id": n} for n in range(HELD_OUT)]
    config = FinetuneConfig(task="retrieval", train=TrainConfig(batch_size=2))
    maker = ExampleMaker(config, Retrieval(), TextTokenizer(folder / "words"), train=False)
    return Retrieval().rows(Annotations("entries", entries, FolderPictures(folder))), maker


@pytest.mark.parametrize("ranks", [1, 2])
def test_held_out_entries_come_as_listed_from_any_number_of_processes(tmp_path, ranks):
    annotations, maker = held_out(tmp_path)

    def made(workers: int, rank: int) -> list[dict[str, Any]]:
        data = FinetuneData(workers=workers)
        return list(held_out_batches(annotations, maker, 7, data, limit=HELD_OUT - 1, rank=rank, world_size=ranks))

    for rank in range(ranks):
        alone = made(0, rank)
        assert torch.cat([batch["number"] for batch in alone]).tolist() == list(range(rank, HELD_OUT - 1, ranks))
        assert {len(batch["number"]) for batch in alone[:-1]} == {7}
        for workers in (1, 2):
            for mine, theirs in zip(alone, made(workers, rank), strict=True):
                assert mine.keys() == theirs.keys()
                assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_held_out_picture_that_cannot_be_read_is_named_and_no_process_is_left(tmp_path, workers):
    annotations, maker = held_out(tmp_path)
    (tmp_path / "20.png").write_bytes(b"no picture")
    batches = held_out_batches(annotations, maker, 4, FinetuneData(workers=workers))
    assert len([next(batches) for _ in range(4)]) == 4
    with pytest.raises(ValueError, match=r"^entries: entry 20 cannot be used: picture unreadable$"):
        list(batches)
    assert not multiprocessing.active_children()


def test_a_process_that_is_gone_ends_an_evaluation(tmp_path, monkeypatch):
    annotations, maker = held_out(tmp_path)
    monkeypatch.setattr(maker, "make", lambda *_: os._exit(1))
    with pytest.raises(StalledData, match=r"^entries: a loader process is stuck or gone \(data.timeout="):
        list(held_out_batches(annotations, maker, 4, FinetuneData(workers=1)))
