"""Subsets, start weights, and what a row is identified by."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

from benchmarks.data_efficiency import identity
from benchmarks.data_efficiency.data import Pairs, completed, with_start_weights
from benchmarks.data_efficiency.data import identity as config_identity
from benchmarks.data_efficiency.sets import SETS
from simla_ds.config import Config, InitConfig, ModelConfig, ObjectivesConfig, StreamConfig, TrainConfig, VisionConfig
from simla_ds.data.shards import find_shards, open_shard
from simla_ds.data.text import TextTokenizer
from simla_ds.engine.build import build
from simla_ds.engine.distributed import Ranks

VISION = VisionConfig(image_size=64, patch_size=16, width=16, layers=1, heads=2)
STREAM = StreamConfig(layers=4, text_layers=2, fusion_layers=2, width=16, heads=2, intermediate_size=32)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    scenes = {"train": 50, "size": 64, "grid": 4, "codebook_size": 8, "vocabulary_size": 600, "workers": 1}
    return Pairs(tmp_path_factory.mktemp("work"), {**scenes, "splits": {"test": 4}, "shard_size": 20})


def keys(folder: str) -> set[str]:
    return {shard.key(i) for path in find_shards(folder) for shard in [open_shard(path)] for i in range(len(shard))}


def config(stream: StreamConfig = STREAM, seed: int = 0) -> Config:
    return Config(model=ModelConfig(vision=VISION, stream=stream), train=TrainConfig(seed=seed))


def set_config(name: str, seed: int = 3) -> Config:
    """Return the configuration of an objective set."""
    stack = SETS[name][1].get("model", {}).get("stream", {})
    off = {key: replace(getattr(ObjectivesConfig(), key), weight=0.0) for key in SETS[name][1].get("objectives", {})}
    return replace(config(replace(STREAM, **stack), seed), objectives=ObjectivesConfig(**off))


def test_a_smaller_share_is_part_of_a_larger_one_and_another_seed_chooses_others(pairs: Pairs):
    tenth, fifth, other = (keys(pairs.subset(f, seed)) for f, seed in ((0.1, 0), (0.2, 0), (0.2, 1)))
    assert [len(chosen) for chosen in (tenth, fifth, other)] == [5, 10, 10]
    assert tenth < fifth < keys(pairs.subset(1.0, 0))
    assert fifth != other


def test_a_queue_is_at_most_a_quarter_of_the_cells_pairs(pairs: Pairs):
    for fraction, size in ((0.2, 2), (1.0, 6)):
        assert completed(config(), pairs, fraction, queue_size=6).objectives.itc.queue_size == size


def test_every_set_starts_training_from_the_same_weights_where_shapes_agree(pairs: Pairs, tmp_path: Path):
    base, started = completed(set_config("simla"), pairs, 1.0, 0), {}
    for name in SETS:
        one = with_start_weights(completed(set_config(name), pairs, 1.0, 0), base, tmp_path / name)
        assert bool(one.init.checkpoint) == (name == "albef")
        model = build(one, Ranks(0, 0, 1, torch.device("cpu")), torch.float32, nullcontext()).task.model
        started[name] = dict(model.named_parameters())
    simla, albef = started["simla"], started["albef"]
    assert albef.keys() - simla.keys() == {"stream.embeddings.token_type.weight"}
    for name, parameters in started.items():
        assert name == "albef" or parameters.keys() == simla.keys()
        shared = parameters.keys() & simla.keys()
        assert [key for key in shared if not torch.equal(parameters[key], simla[key])] == [], name


def test_a_set_of_another_network_starts_from_the_published_weights_that_the_grid_names(pairs: Pairs, tmp_path: Path):
    words = TextTokenizer(Path(pairs.beside("tokenizer"))).vocabulary.size
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    bert = BertModel(BertConfig(vocab_size=words, max_position_embeddings=128, **sizes))
    bert.save_pretrained(tmp_path / "bert")
    init = InitConfig(text=str(tmp_path / "bert"))
    base, albef = (completed(replace(set_config(name), init=init), pairs, 1.0, 0) for name in ("simla", "albef"))
    started = with_start_weights(albef, base, tmp_path / "albef")
    model = build(started, Ranks(0, 0, 1, torch.device("cpu")), torch.float32, nullcontext()).task.model
    ours, theirs = dict(model.named_parameters()), dict(bert.named_parameters())
    for name, same in (("word", "word_embeddings"), ("token_type", "token_type_embeddings")):
        assert torch.equal(ours[f"stream.embeddings.{name}.weight"], theirs[f"embeddings.{same}.weight"]), name


def test_data_given_as_shards_are_identified_by_what_is_measured_as_well(pairs: Pairs, tmp_path: Path):
    one = Pairs(tmp_path, {}, pairs.train, {"test": pairs.splits["test"]})
    other = Pairs(tmp_path, {}, pairs.train, {"test": pairs.train})
    assert one.digest == Pairs(tmp_path / "elsewhere", {}, pairs.train, {"test": pairs.splits["test"]}).digest
    assert one.digest != other.digest


def test_paths_are_no_part_of_a_configurations_identity(pairs: Pairs):
    one = completed(config(), pairs, 1.0, 0)
    moved = replace(one, output="elsewhere", data=replace(one.data, train="there", tokenizer="there", val="there"))
    assert config_identity(one) == config_identity(moved)
    assert config_identity(one) != config_identity(completed(config(seed=1), pairs, 1.0, 0))


def test_the_code_hash_covers_what_trains_and_measures_a_cell_and_not_the_report():
    files = {str(path.relative_to(identity.ROOT)) for path in identity.code_files()}
    needed = {"launch/pretrain.py", "simla_ds/objectives/psl.py", "simla_ds/data/scenes/captions.py"}
    needed |= {"kernels/simla_kernels/linear_soft_bce.py", "simla_ds/downstream/probes.py"}
    needed |= {f"benchmarks/data_efficiency/{name}.py" for name in ("cell", "measures", "cost")}
    assert needed <= files
    assert not {"benchmarks/data_efficiency/page.py", "simla_ds/cli.py", "simla_ds/downstream/vqa.py"} & files


def test_the_code_hash_changes_with_a_files_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.py").write_text("x = 1\n")
    monkeypatch.setattr(identity, "ROOT", tmp_path)
    monkeypatch.setattr(identity, "code_files", lambda: (tmp_path / "a.py",))
    before = identity.code_hash.__wrapped__()
    (tmp_path / "a.py").write_text("x = 2\n")
    assert identity.code_hash.__wrapped__() != before
