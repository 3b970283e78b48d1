"""Batches of a task's examples."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from simla_ds.config import MatchingConfig, TrainConfig
from simla_ds.data.order import EpochOrder
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream.annotations import Annotations, FolderPictures
from simla_ds.downstream.config import FinetuneConfig, FinetuneData
from simla_ds.downstream.examples import Example, ExampleDataset, ExampleLoader, ExampleMaker
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
