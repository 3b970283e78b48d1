"""Model folders: what is saved is what is loaded, and a folder alone turns a picture and a string into scores."""

import importlib
import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from simla_ds import hub
from simla_ds.config import Config, ModelConfig, StreamConfig, VisionConfig, VocabularyConfig
from simla_ds.data.batch import PairMaker, as_floats, collate
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.hub import (
    TASK_NETWORKS,
    SimlaConfig,
    SimlaModel,
    SimlaProcessor,
    load_model_folder,
    resolve_weights,
    save_model_folder,
)
from simla_ds.model.simla import Simla

CAPTIONS = ["a red ball on a blue box", "two dogs, left of the tree", "a [MASK] photo of a tree-house!"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(CAPTIONS * 3, folder, 100)
    return folder


@pytest.fixture(scope="module")
def config(tokenizer_folder):
    """Every field away from its default, so that a round trip that drops one shows."""
    return ModelConfig(
        vision=VisionConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=3.0),
        stream=StreamConfig(
            shared=False,
            layers=1,
            text_layers=1,
            fusion_layers=2,
            width=32,
            heads=4,
            intermediate_size=40,
            max_positions=30,
            dropout=0.25,
            token_types=True,
        ),
        vocabulary=replace(TextTokenizer(tokenizer_folder).vocabulary, add_sep=False, visual_size=16),
        projection_size=8,
        temperature=0.05,
        temperature_min=0.01,
        temperature_max=0.4,
    )


def network(config: ModelConfig) -> Simla:
    """A network none of whose parameters is still at a start value that many share, such as 0 or 1."""
    model = Simla(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


@pytest.fixture(scope="module")
def student(config):
    return network(config)


@pytest.fixture
def folder(tmp_path, student, config, tokenizer_folder):
    save_model_folder(
        student, tmp_path / "final", tokenizer_folder, {"step": 7}, teacher=network(config), max_words=5, max_tokens=9
    )
    return tmp_path / "final"


def assert_equal_states(model: torch.nn.Module, other: torch.nn.Module) -> None:
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


def test_the_configuration_survives_the_json_file(tmp_path, config):
    SimlaConfig.from_model_config(config, {"step": 7}).save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is SimlaConfig
    assert read.model_config == config
    assert read.training == {"step": 7}
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["model_type"] == "simla"
    assert written["model"]["stream"]["text_layers"] == 1


@pytest.mark.parametrize("loader", [SimlaModel, AutoModel])
def test_a_model_comes_back_bit_for_bit_and_tied(tmp_path, student, config, loader):
    before = {name: value.clone() for name, value in student.state_dict().items()}
    SimlaModel(SimlaConfig.from_model_config(config), student).save_pretrained(tmp_path)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items()), "wrapping changed it"
    loaded = loader.from_pretrained(tmp_path)
    assert_equal_states(loaded.model, student)
    assert loaded.model.language_head.decoder.weight is loaded.model.stream.embeddings.word.weight
    assert "model.language_head.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    with torch.no_grad():  # tied for training, not only equal
        loaded.model.stream.embeddings.word.weight[5, 0] = 3.0
    assert loaded.model.language_head.decoder.weight[5, 0] == 3.0


def test_a_new_model_has_the_networks_own_start_values(config):
    torch.manual_seed(0)
    expected = Simla(config)
    torch.manual_seed(0)
    assert_equal_states(SimlaModel(SimlaConfig.from_model_config(config)).model, expected)


def test_a_saved_folder_loads_as_student_and_teacher(folder, student, config):
    loaded, read = load_model_folder(folder)
    assert read == config
    assert not loaded.training
    assert_equal_states(loaded, student)
    teacher, _ = load_model_folder(resolve_weights(folder, "teacher"))
    pos_embed = "image_encoder.pos_embed"
    assert not torch.equal(teacher.get_parameter(pos_embed), student.get_parameter(pos_embed))
    assert resolve_weights(folder, "student") == folder
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "teacher",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_saving_again_replaces_the_folder_and_leaves_nothing_beside_it(folder, config):
    other = network(config)
    save_model_folder(other, folder)
    assert_equal_states(load_model_folder(folder)[0], other)
    assert [file.name for file in folder.parent.iterdir()] == ["final"]
    with pytest.raises(ValueError, match="has no teacher weights"):
        resolve_weights(folder, "teacher")


def test_a_save_that_fails_leaves_what_was_there(folder, student, config, bert_vocabulary):
    with pytest.raises(ValueError, match=rf"vocabulary\.size=30522, the model {config.vocabulary.size}"):
        save_model_folder(network(config), folder, bert_vocabulary)
    assert_equal_states(load_model_folder(folder)[0], student)
    assert [file.name for file in folder.parent.iterdir()] == ["final"]


def test_a_save_stopped_between_the_two_renames_puts_the_old_folder_back(folder, student, config, monkeypatch):
    rename = Path.rename

    def stopped(self, target):
        if ".new-" in self.name:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_model_folder(network(config), folder)
    assert_equal_states(load_model_folder(folder)[0], student)
    assert [file.name for file in folder.parent.iterdir()] == ["final"]


def test_a_folder_of_something_else_is_not_replaced(tmp_path, student):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no model folder, so it is not replaced"):
        save_model_folder(student, tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')  # somebody else's model
    with pytest.raises(ValueError, match="is no model folder, so it is not replaced"):
        save_model_folder(student, tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def rewrite(folder, change) -> None:
    values = json.loads((folder / "config.json").read_text())
    change(values)
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "config.json").unlink(), "config.json is missing"),
        (lambda f: (f / "config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda f: rewrite(f, lambda v: v.update(model_type="clip")), "a model of type 'clip', not 'simla'"),
        (lambda f: rewrite(f, lambda v: v["model"].update(depth=3)), "unexpected keyword argument 'depth'"),
        (lambda f: rewrite(f, lambda v: v["model"]["vision"].update(image_size=33)), "image_size=33 is not a multiple"),
        (
            lambda f: rewrite(f, lambda v: v["model"].update(projection_size=16)),
            "has model.concept_head.weight (100, 8), its config.json describes (100, 16)",
        ),
        (
            lambda f: rewrite(f, lambda v: v["model"]["stream"].update(fusion_layers=1)),
            "its config.json describes no such parameter",
        ),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(folder, config, harm, said):
    harm(folder)
    said = said.replace("(100,", f"({config.vocabulary.size},")
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        load_model_folder(folder)
    assert "\n" not in str(caught.value)


def test_weights_with_a_missing_parameter_never_load(folder, caplog):
    weights = load_file(folder / "model.safetensors")
    del weights["model.image_encoder.pos_embed"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    said = r"pos_embed nowhere, its config.json describes \(1, 17, 32\)"
    with pytest.raises(ValueError, match=said):
        load_model_folder(folder)
    with caplog.at_level(logging.ERROR), pytest.raises(ValueError, match="lacks 1 parameter"):
        SimlaModel.from_pretrained(folder)


def test_broken_weights_are_one_line_that_says_so(folder):
    whole = (folder / "model.safetensors").read_bytes()
    for left in (len(whole) - 1, 100, 0):
        (folder / "model.safetensors").write_bytes(whole[:left])
        with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as weights: .*; copy it again"):
            load_model_folder(folder)


@pytest.mark.parametrize("task", TASK_NETWORKS)
def test_a_tasks_folder_is_refused_by_the_hugging_face_class_which_names_the_right_one(student, tmp_path, task):
    module, _, name = TASK_NETWORKS[task].rpartition(".")
    network = getattr(importlib.import_module(module), name)
    assert network.task == task
    save_model_folder(network(student.config), tmp_path / "task")
    with pytest.raises(ValueError, match=rf"holds a model for '{task}'; use load_model_folder\(.*, {name}\)"):
        SimlaModel.from_pretrained(tmp_path / "task")
    assert isinstance(load_model_folder(tmp_path / "task", network)[0], network)


@pytest.mark.parametrize(("card", "device"), [(True, "cuda"), (False, "cpu")])
def test_auto_takes_a_card_where_there_is_one(monkeypatch, card, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: card)
    assert hub._device("auto").type == device
    assert hub._device("cpu").type == "cpu"
    if not card:
        with pytest.raises(ValueError, match="finds no CUDA card"):
            hub._device("cuda")


@pytest.mark.gpu
def test_a_network_is_loaded_onto_the_card(folder):
    model, _ = load_model_folder(folder, device="auto")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}


# Scores


@pytest.fixture
def inputs(folder):
    pictures = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)) for i in range(3)]
    return pictures, SimlaProcessor.from_pretrained(folder)(images=pictures, text=CAPTIONS)


@torch.no_grad()
def test_scores_are_those_of_the_network(folder, student, inputs):
    model, batch = SimlaModel.from_pretrained(folder), inputs[1]
    out = model(**batch)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    features = student.features(batch["pixel_values"], ids, mask)
    fused, _ = student.text_over_image(ids, mask, features.image_tokens)
    torch.testing.assert_close(out.itm_logits, student.match_head(fused[:, 0]))
    torch.testing.assert_close(out.image_features, features.image_feature)
    torch.testing.assert_close(out.text_features, features.text_feature)
    torch.testing.assert_close(out.similarity, features.image_feature @ features.text_feature.T)
    torch.testing.assert_close(out.text_features.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(model.get_image_features(batch["pixel_values"]), out.image_features)
    torch.testing.assert_close(model.get_text_features(ids), out.text_features)  # padding is told by its id


def test_it_runs_and_trains_under_autocast(folder, inputs):
    model = SimlaModel.from_pretrained(folder)
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = model(**inputs[1])
        model.zero_grad()
        (out.itm_logits.float().sum() + out.similarity.float().sum()).backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        found.append((out.similarity.float(), out.itm_logits.float(), torch.cat(gradients)))
    for exact, rounded in zip(*found, strict=True):
        assert 0 < (rounded - exact).norm() / exact.norm() < 0.1


@torch.no_grad()
@pytest.mark.parametrize(("pictures", "captions"), [(1, 3), (3, 1), (1, 1)])
def test_one_picture_or_caption_is_paired_with_each_of_the_others(folder, inputs, pictures, captions):
    model, batch = SimlaModel.from_pretrained(folder), inputs[1]
    images, ids, mask = (
        batch["pixel_values"][:pictures],
        batch["input_ids"][:captions],
        batch["attention_mask"][:captions],
    )
    out = model(images, ids, mask)
    pairs = max(pictures, captions)
    repeated = model(images.expand(pairs, -1, -1, -1), ids.expand(pairs, -1), mask.expand(pairs, -1))
    torch.testing.assert_close(out.itm_logits, repeated.itm_logits)
    assert out.similarity.shape == (pictures, captions)
    with pytest.raises(ValueError, match="3 pictures and 2 captions make no pairs"):
        model(batch["pixel_values"], batch["input_ids"][:2])


# The processor


def test_the_processor_makes_what_evaluation_in_training_makes(folder, config, tokenizer_folder, tmp_path):
    """The same pixels and ids, bit for bit, from a JPEG on disk and a raw caption."""
    picture = tmp_path / "a.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 45, 3), np.uint8)).save(picture)
    run = Config(model=config)
    run = replace(run, data=replace(run.data, max_words=5, max_tokens=9))
    tokenizer = TextTokenizer(tokenizer_folder, max_tokens=9, add_sep=config.vocabulary.add_sep)
    maker = PairMaker(run, tokenizer, visual_view_size=0, train=False)
    members = [{"jpg": picture.read_bytes(), "txt": caption.encode()} for caption in CAPTIONS]
    pairs = [maker.make(str(i), m, np.random.default_rng(0)) for i, m in enumerate(members)]
    batch = as_floats(collate(pairs, config.vocabulary))
    made = SimlaProcessor.from_pretrained(folder)(images=[picture, str(picture), Image.open(picture)], text=CAPTIONS)
    assert torch.equal(made["pixel_values"], batch["image"])
    assert torch.equal(made["input_ids"], batch["input_ids"])
    assert torch.equal(made["attention_mask"].bool(), batch["text_mask"])


def test_a_picture_object_is_read_as_its_file_is(folder, tmp_path):
    """Transparency over white, and EXIF's orientation."""
    processor = SimlaProcessor.from_pretrained(folder)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels[..., :3]).save(tmp_path / "b.jpg", exif=turned)
    for name in ("a.png", "b.jpg"):
        from_file = processor(images=tmp_path / name)["pixel_values"]
        assert torch.equal(processor(images=Image.open(tmp_path / name))["pixel_values"], from_file)
    assert processor(text="a tree").keys() == {"input_ids", "attention_mask"}


def test_a_file_that_is_no_picture_is_refused(folder, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"nothing")
    processor = SimlaProcessor.from_pretrained(folder)
    with pytest.raises(ValueError, match="picture unreadable"):
        processor(images=tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="No such file"):
        processor(images=tmp_path / "b.jpg")


def test_a_folder_without_a_processor_says_so(tmp_path, student):
    save_model_folder(student, tmp_path / "bare")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is missing"):
        SimlaProcessor.from_pretrained(tmp_path / "bare")


def test_another_tokenizer_than_the_models_is_refused(folder, bert_vocabulary):
    (folder / "tokenizer.json").write_bytes((bert_vocabulary / "tokenizer.json").read_bytes())
    with pytest.raises(ValueError, match=r"has vocabulary\.size=30522, the model"):
        SimlaProcessor.from_pretrained(folder)


def test_a_vocabulary_without_a_size_is_refused():
    with pytest.raises(ValueError, match=r"vocabulary\.size=0"):
        SimlaModel(SimlaConfig.from_model_config(ModelConfig(vocabulary=VocabularyConfig())))
