"""Batches of a task's examples."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from simla_ds.config import MatchingConfig, TrainConfig
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream.annotations import Annotations
from simla_ds.downstream.config import FinetuneConfig, FinetuneData
from simla_ds.downstream.examples import Example, ExampleLoader, ExampleMaker
from simla_ds.downstream.retrieval_tuning import Retrieval


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
    batch = loader.collate([Example(n, image, [2, *[7] * n], fields) for n in (1, 3)])
    assert batch["input_ids"].shape == batch["text_mask"].shape == (2, length)
    assert batch["text_mask"].sum(1).tolist() == [2, 4]
    assert batch["input_ids"][0, 2:].eq(tokenizer.vocabulary.pad).all()
