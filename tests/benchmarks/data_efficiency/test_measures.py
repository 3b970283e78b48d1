"""What is measured of a trained model."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.data_efficiency import measures
from benchmarks.data_efficiency.measures import chance_recall, mean_recall, measure, random_average_precision, recall_at
from simla_ds.config import ModelConfig, StreamConfig, VisionConfig
from simla_ds.data.scenes.prepare import prepare_scenes
from simla_ds.data.shards import ShardFiles, find_shards, open_shard, write_shards
from simla_ds.data.text import TextTokenizer
from simla_ds.hub import save_model_folder
from simla_ds.model.simla import Simla
from simla_ds.objectives.psl import average_precision

VISION = VisionConfig(image_size=64, patch_size=16, width=16, layers=1, heads=2)
STREAM = StreamConfig(layers=2, text_layers=1, fusion_layers=1, width=16, heads=2, intermediate_size=32)
PICTURES = 12


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    options = {"size": 64, "grid": 4, "codebook_size": 8, "vocabulary_size": 600, "splits": {"test": PICTURES}}
    prepare_scenes(root / "data", train=20, workers=1, progress=False, **options)
    words = replace(TextTokenizer(root / "data" / "tokenizer").vocabulary, visual_size=8)
    torch.manual_seed(0)
    model = Simla(ModelConfig(vision=VISION, stream=STREAM, vocabulary=words, projection_size=8))
    save_model_folder(model, root / "model", root / "data" / "tokenizer")
    return root


def test_every_caption_of_a_picture_is_ranked(scenes: Path):
    files = ShardFiles([open_shard(path) for path in find_shards(str(scenes / "data" / "test"))])
    samples = []
    for number in range(PICTURES):
        members = files.read(0, number)
        said = [json.loads(members["json"] or b"")["caption"], f"another word on picture {number}"]
        samples.append((f"{number}", {"jpg": members["jpg"], "json": json.dumps({"caption": said}).encode()}))
    write_shards(samples, scenes / "two" / "test", 5)
    found = measure(scenes / "model", ("itc", "itm"), {"two": str(scenes / "two" / "test")}, pictures=10, rerank=4)
    assert (found["two/retrieval/pictures"], found["two/retrieval/captions"]) == (10, 20)
    assert not any(name.startswith("two/keywords") for name in found)  # no scenes, so nothing is known of their things


def test_scenes_are_measured_by_everything_their_objectives_train(scenes: Path, monkeypatch: pytest.MonkeyPatch):
    splits = {"test": str(scenes / "data" / "test")}
    found = measure(scenes / "model", ("itc", "itm", "psl"), splits, pictures=PICTURES, rerank=4)
    assert (found["test/retrieval/pictures"], found["test/retrieval/captions"]) == (PICTURES, PICTURES)
    ways = [found[f"test/retrieval/itm/{way}/r1"] for way in ("image_to_text", "text_to_image")]
    assert found["test/retrieval/itm/mean_recall"] == pytest.approx(sum(ways) / 2, abs=1e-3)  # of 4 candidates: R@1
    assert found["test/keywords/random/average_precision"] < found["test/keywords/prior/average_precision"]
    assert "test/grounding/pointing" in found
    with monkeypatch.context() as patch:
        patch.setattr(measures, "thing_names", lambda: ["nothing"])
        held_out = measure(scenes / "model", ("itc", "itm", "psl"), splits, pictures=PICTURES, rerank=4)
    assert not any("keywords" in name for name in held_out)  # things never trained on: nothing ranks their names
    contrast = measure(scenes / "model", ("itc",), splits, pictures=PICTURES, rerank=4)
    assert not any("itm" in name.split("/") or "grounding" in name or "/psl/" in name for name in contrast)


def test_recall_by_itm_counts_only_where_it_decides():
    assert (recall_at(1), recall_at(4), recall_at(8), recall_at(256)) == ((1,), (1,), (1, 5), (1, 5, 10))
    recalls = {"itm/image_to_text/r1": 1.0, "itm/image_to_text/r5": 2.0}
    recalls |= {"itm/text_to_image/r1": 3.0, "itm/text_to_image/r5": 6.0, "itm/image_to_text/r10": 99.0}
    assert mean_recall(recalls, "itm", (1, 5)) == 3.0
    assert chance_recall(300, (1, 5)) == pytest.approx(1.0)


def test_a_random_orders_average_precision_is_what_random_orders_get_on_average():
    there = torch.zeros(3, 40)
    for row, right in enumerate((1, 4, 0)):  # one; several; a picture without any, which counts nowhere
        there[row, :right] = 1
    scores = torch.rand(20_000, 3, 40, generator=torch.Generator().manual_seed(0)).flatten(0, 1)
    total, count = average_precision(scores, there.repeat(20_000, 1))
    assert random_average_precision(there) == pytest.approx(float(100 * total / count), abs=0.25)  # 3 standard errors
