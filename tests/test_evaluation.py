"""Held-out measures: they depend on weights alone, not on batches, ranks or what the training is doing."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from simla_ds.config import (
    Config,
    ContrastiveConfig,
    CrossModalConfig,
    DataConfig,
    EvalConfig,
    MatchingConfig,
    ModelConfig,
    ObjectivesConfig,
    StreamConfig,
    VisionConfig,
)
from simla_ds.data.shards import write_shards
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.data.visual_tokens import fit_codebook, load_visual_tokenizer
from simla_ds.evaluation import HeldOut, Probe, evaluating, fixed_queue, frequency_prior
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue, collectives, itm
from simla_ds.task import PretrainTask
from simla_ds.teacher import ModuleSource, Teacher

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 40), "blue": (30, 30, 220), "grey": (128, 128, 128)}
PAIRS, GRID = 14, 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Configuration and tokenisers of fourteen pictures in two colours each, with captions of several lengths."""
    root = tmp_path_factory.mktemp("held_out")
    names, samples, captions = list(COLOURS), [], []
    for number in range(PAIRS):
        first, second = names[number % 4], names[(number // 4 + number) % 4]
        pixels = np.zeros((32, 32, 3), dtype=np.uint8)
        pixels[:, :16], pixels[:, 16:] = COLOURS[first], COLOURS[second]
        pixels += np.random.default_rng(number).integers(0, 20, pixels.shape, dtype=np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        captions.append(f"{first} beside {second}" + " and nothing else at all" * (number % 3 == 0))
        record = json.dumps({"caption": captions[-1], "image_id": number})
        samples.append((f"{number:04d}", {"png": buffer.getvalue(), "json": record.encode()}))
    write_shards(samples, root / "val", 100)
    train_tokenizer(captions, root / "tokenizer", 100)
    generator = torch.Generator().manual_seed(0)
    views = torch.rand(20, 3, 4 * GRID, 4 * GRID, generator=generator)
    fit_codebook(views, codes=16, grid=GRID, seed=0).save(root / "visual_tokens")
    tokenizer = TextTokenizer(root / "tokenizer")
    codebook = load_visual_tokenizer(root / "visual_tokens", GRID)
    vocabulary = replace(tokenizer.vocabulary, visual_size=codebook.vocabulary_size)
    model = ModelConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=16, layers=1, heads=2),
        stream=StreamConfig(layers=2, width=16, heads=2, intermediate_size=32, max_positions=32),
        vocabulary=vocabulary,
        projection_size=8,
    )
    config = Config(
        model=model,
        objectives=ObjectivesConfig(itc=ContrastiveConfig(queue_size=8)),
        data=DataConfig(val=str(root / "val")),
        eval=EvalConfig(samples=100, batch_size=5, rerank=4),
    )
    return config, tokenizer, codebook


def networks(config, seed=0):
    """Student and teacher that differ from each other and from start values."""
    torch.manual_seed(seed)
    student = Simla(config.model)
    teacher = Teacher(student, dropout=config.teacher_dropout).follow(ModuleSource(student))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        student.temperature.value.fill_(0.1)
    return student, teacher


def held_out(parts, **changes):
    config, tokenizer, codebook = parts
    config = replace(config, eval=replace(config.eval, **changes))
    return HeldOut(config, tokenizer, codebook)


def test_losses_do_not_depend_on_the_batch_size(parts):
    """Each pair meets all other held-out pairs in ITC; MLM and XMM are means over tokens and patches, not of means."""
    student, teacher = networks(parts[0])
    small, large = (held_out(parts, batch_size=size).measure(student, teacher) for size in (5, 14))
    assert small.keys() == large.keys()
    for name in ("itc", "mlm", "xmm", "psl"):
        assert small[f"loss/{name}"] == pytest.approx(large[f"loss/{name}"], rel=1e-5), name
    for name in ("itc/accuracy", "mlm/accuracy", "xmm/accuracy", "psl/average_precision", "psl/frequency_prior"):
        assert small[name] == pytest.approx(large[name], rel=1e-5), name


def test_without_xmm_no_visual_tokenizer_is_needed(parts):
    config, tokenizer, _ = parts
    config = replace(config, objectives=replace(config.objectives, xmm=CrossModalConfig(weight=0)))
    measures = HeldOut(config, tokenizer, None).measure(*networks(config))
    assert {"loss/itc", "loss/mlm", "mlm/most_frequent"} <= measures.keys()
    assert not [name for name in measures if "xmm" in name]


def test_losses_are_those_of_the_training_step(parts):
    student, teacher = networks(parts[0])
    h = held_out(parts, batch_size=PAIRS)
    measures = h.measure(student, teacher)
    task = PretrainTask(student.eval(), teacher, FeatureQueue(0, 8), parts[0])
    with torch.no_grad():
        losses = task(h.batches[0], alpha=0.0)["losses"]
    assert {name for name in measures if name.startswith("loss/")} == {f"loss/{name}" for name in losses}
    for name, loss in losses.items():
        assert measures[f"loss/{name}"] == pytest.approx(float(loss), rel=1e-6), name


@pytest.mark.parametrize(
    ("fidelity", "negatives"), [("corrected", "local"), ("corrected", "global"), ("official", "local")]
)
def test_measures_do_not_depend_on_the_number_of_ranks(parts, fidelity, negatives, monkeypatch):
    config = parts[0]
    objectives = replace(config.objectives, fidelity=fidelity, itm=MatchingConfig(negatives=negatives))
    h = held_out((replace(config, objectives=objectives), *parts[1:]))
    student, teacher = networks(config)
    alone = h.measure(student, teacher)
    for module in (collectives, itm):
        monkeypatch.setattr(module, "world_size", lambda: 3)
    monkeypatch.setattr(collectives, "rank", lambda: 2)
    monkeypatch.setattr(collectives, "_all_gather", lambda rows: [rows.clone() for _ in range(3)])
    monkeypatch.setattr(collectives.dist, "broadcast", lambda tensor, source: None)  # all have what rank 0 has
    among_three = h.measure(student, teacher)
    assert among_three.keys() == alone.keys()
    for name, value in alone.items():
        assert among_three[name] == pytest.approx(value, rel=1e-5), name


def test_training_goes_on_as_if_nothing_had_been_measured(parts):
    student, teacher = networks(parts[0])
    student.train()
    student.stream.layers[0].eval()
    modes = {name: module.training for name, module in student.named_modules()}
    state = torch.get_rng_state()
    weights = {name: value.clone() for name, value in student.state_dict().items()}
    h = held_out(parts)
    first = h.measure(student, teacher)
    assert {name: module.training for name, module in student.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weights[name], value) for name, value in student.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in student.parameters())
    assert h.measure(student, teacher) == first  # dropout of .1 would show


def test_modes_come_back_after_an_error():
    module = torch.nn.Sequential(torch.nn.Dropout()).train()

    def fail():
        with evaluating(module):
            assert not module[0].training
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert module[0].training


def test_the_teacher_is_measured_as_a_network_of_its_own(parts):
    """Its numbers do not follow the student's, and equal a student's with the same weights."""
    student, teacher = networks(parts[0])
    h = held_out(parts)
    before, of_student = h.measure(teacher.module, teacher), h.measure(student, teacher)
    with torch.no_grad():
        student.load_state_dict(teacher.module.state_dict())
    assert h.measure(teacher.module, teacher) == before == h.measure(student, teacher)
    assert of_student != before


def test_every_measure_is_there_and_in_range(parts):
    measures = held_out(parts).measure(*networks(parts[0]))
    wanted = {f"loss/{name}" for name in ("itc", "itm", "mlm", "xmm", "psl")}
    wanted |= {"itc/accuracy", "itc/target_entropy", "itm/accuracy_matched", "itm/accuracy_unmatched", "mlm/accuracy"}
    wanted |= {"mlm/most_frequent", "xmm/accuracy", "xmm/most_frequent", "psl/average_precision", "psl/frequency_prior"}
    wanted |= {
        f"retrieval/{score}/{direction}/r{k}"
        for score in ("itc", "itm")
        for direction in ("image_to_text", "text_to_image")
        for k in (1, 5, 10)
    }
    assert measures.keys() == wanted
    assert all(0 <= value < 100 or name.startswith("retrieval") for name, value in measures.items())


def test_an_objective_that_is_off_is_not_measured(parts):
    config = parts[0]
    objectives = replace(config.objectives, psl=replace(config.objectives.psl, weight=0.0))
    objectives = replace(objectives, mlm=replace(config.objectives.mlm, weight=0.0))
    measures = held_out((replace(config, objectives=objectives), *parts[1:])).measure(*networks(config))
    assert not [name for name in measures if "psl" in name or "mlm" in name]


def test_guesses_are_shares_of_the_commonest_answer(parts):
    h = held_out(parts)
    labels = torch.cat([batch["labels"] for batch in h.batches]).tolist()
    assert h.guesses["mlm/most_frequent"] == pytest.approx(max(map(labels.count, labels)) / len(labels))
    assert 0 < h.guesses["xmm/most_frequent"] < 1


def test_the_frequency_prior_ranks_words_by_frequency():
    # words 0, 1, 2, 3 are keywords of 3, 2, 1, 0 pictures: the ranking is 0 1 2 3
    keywords = [torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool(), torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool()]
    assert frequency_prior(keywords) == pytest.approx(
        (1 + 1 + (1 + 2 / 3) / 2) / 3
    )  # a picture without any is left out


def test_the_fixed_queue_holds_all_other_batches():
    keys = [
        (torch.full((2, 3), float(n)), torch.full((2, 3), -float(n)), torch.tensor([2 * n, 2 * n + 1]))
        for n in range(3)
    ]
    image, text, ids = fixed_queue(keys, 1).keys()
    assert ids.tolist() == [0, 1, 4, 5]
    assert image[:, 0].tolist() == [0, 0, 2, 2]
    assert text[:, 0].tolist() == [0, 0, -2, -2]
    assert fixed_queue(keys[:1], 0).keys()[0].shape == (0, 3)


def test_the_probe_leaves_the_task_alone(parts):
    student, teacher = networks(parts[0])
    task = PretrainTask(student, teacher, FeatureQueue(8, 8), parts[0])
    probe = Probe(student, teacher, parts[0])
    assert probe.model is task.model
    assert probe.queue is not task.queue
    held_out(parts).measure(task.model, task.teacher)
    assert task.queue.filled == 0


def test_no_usable_pair_is_one_clear_line(parts, tmp_path):
    write_shards([("0", {"png": b"no picture", "json": b'{"caption": "red"}'})], tmp_path, 10)
    config = replace(parts[0], data=replace(parts[0].data, val=str(tmp_path)))
    with pytest.raises(ValueError, match=r"data\.val=.* none of its first"):
        HeldOut(config, *parts[1:])
