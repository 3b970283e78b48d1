"""`simla import`: published weights of every kind become model folders that load, with their teacher, at any size."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simla_ds.cli import main
from simla_ds.data.processor import SimlaProcessor
from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream.nlvr2 import PairNetwork
from simla_ds.downstream.snli_ve import EntailmentNetwork
from simla_ds.downstream.text_assignment import AssignmentNetwork
from simla_ds.downstream.vqa import AnswerNetwork
from simla_ds.hub import load_model_folder, save_model_folder
from simla_ds.importing import at_resolution, describe
from simla_ds.model.official_names import translate
from simla_ds.model.simla import Simla
from tests.model.test_pretrained_checkpoint import save_albef
from tests.tiny import ALBEF, model_config, spread_weights

RECORDED = Path(__file__).parent / "data"
KINDS = {
    "pretrain_step": Simla,
    "retrieval": Simla,
    "vqa": AnswerNetwork,
    "nlvr": PairNetwork,
    "ve": EntailmentNetwork,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Tokenizers of exactly as many words as the recorded models have."""
    folder = tmp_path_factory.mktemp("tokenizers")
    words = " ".join(f"{a}{b}{c}" for a in "abcdefghwxyz0123456789" for b in "ijklmno" for c in "pqrstuv")
    for size in (300, 720):
        train_tokenizer([words] * 2, folder / str(size), size)
        assert TextTokenizer(folder / str(size)).vocabulary.size == size
    return folder


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers / "300"


def call(source, out, *options):
    heads = [] if source.is_dir() else ["--heads", "4"]
    return main(["import", str(source), "--out", str(out), *heads, *map(str, options)])


@pytest.mark.parametrize("kind", KINDS)
def test_published_weights_become_a_folder_of_their_task(kind, tokenizers, tmp_path, capsys):
    tokenizer = tokenizers / ("720" if kind == "pretrain_step" else "300")
    weights = load_file(RECORDED / kind / "weights.safetensors")
    torch.save({"model": weights, "epoch": 4}, tmp_path / "published.pth")
    assert call(tmp_path / "published.pth", tmp_path / "out", "--tokenizer", tokenizer) == 0
    assert "parameters loaded" in capsys.readouterr().out
    published = translate(weights)
    for folder, state in (("out", published.student), ("out/teacher", {**published.student, **published.teacher})):
        network, config = load_model_folder(tmp_path / folder, KINDS[kind])
        found = dict(network.named_parameters())
        assert {name for name in state if name in network.state_dict()} == set(state)
        assert all(torch.equal(found[name], state[name]) for name in found if name in state)
    assert not config.vocabulary.add_sep
    assert config.stream.token_types == (kind == "nlvr")
    ids, _ = SimlaProcessor.from_pretrained(tmp_path / "out").tokenizer.encode("aip")
    assert (ids[0], 3 in ids) == (2, False)  # [CLS], and no [SEP]


def test_a_whole_answer_network_has_nothing_left_at_its_start_values(tokenizer, tmp_path):
    torch.save(load_file(RECORDED / "vqa" / "weights.safetensors"), tmp_path / "vqa.pth")
    assert call(tmp_path / "vqa.pth", tmp_path / "out", "--tokenizer", tokenizer) == 0
    state = translate(load_file(RECORDED / "vqa" / "weights.safetensors")).student
    network, _ = load_model_folder(tmp_path / "out", AnswerNetwork)
    assert {name for name, _ in network.named_parameters()} - state.keys() == {"image_encoder.mask_token"}


def test_positions_are_resampled_for_another_resolution_and_the_streams_stay_as_they_were_trained(tokenizer, tmp_path):
    torch.save(load_file(RECORDED / "retrieval" / "weights.safetensors"), tmp_path / "a.pth")
    assert call(tmp_path / "a.pth", tmp_path / "out", "--tokenizer", tokenizer, "--image-size", 128) == 0
    model, config = load_model_folder(tmp_path / "out")
    assert (config.vision.patches, config.image_positions, config.stream.max_positions) == (64, 9, 40)  # 65 > 40 rows
    tokens = model.image_encoder(torch.randn(1, 3, 128, 128))
    assert (
        model.image_over_text(tokens, torch.randn(1, 4, 32), torch.ones(1, 4, dtype=torch.bool)).shape == tokens.shape
    )
    old = load_file(RECORDED / "retrieval" / "weights.safetensors")["visual_encoder.pos_embed"]
    new = model.get_parameter("image_encoder.pos_embed")
    assert torch.equal(new[:, 0], old[:, 0])
    assert new.shape[1] == 65


def test_what_was_fine_tuned_at_384_px_has_the_pretrained_grid_of_stream_positions():
    config = replace(model_config(), stream=replace(model_config().stream, max_positions=300))
    state = {name: p.detach() for name, p in Simla(config).named_parameters()}
    state["image_encoder.pos_embed"] = torch.zeros(1, 577, 32)
    found = describe(state, Path("a.pth"), 4)
    assert (found.vision.patches, found.image_positions) == (576, 256)


def test_albefs_split_stack_and_token_types_are_seen(tmp_path):
    model = spread_weights(Simla(replace(model_config(replace(ALBEF, text_layers=2, fusion_layers=3)))))
    weights = save_albef(tmp_path / "albef.pth", model)
    found = describe(translate(weights).student, tmp_path / "albef.pth", 4)
    assert (found.stream.shared, found.stream.text_layers, found.stream.fusion_layers) == (False, 2, 3)
    assert found.stream.token_types
    assert replace(found.stream, layers=6, dropout=0.0, image_positions=0) == model.config.stream


def test_a_folder_of_ours_is_taken_to_another_resolution(tokenizers, tmp_path):
    torch.save(load_file(RECORDED / "pretrain_step" / "weights.safetensors"), tmp_path / "a.pth")
    assert call(tmp_path / "a.pth", tmp_path / "small", "--tokenizer", tokenizers / "720") == 0
    assert call(tmp_path / "small", tmp_path / "large", "--image-size", "96") == 0
    small, _ = load_model_folder(tmp_path / "small" / "teacher")
    large, config = load_model_folder(tmp_path / "large" / "teacher")
    assert (config.vision.image_size, config.image_positions) == (96, 16)
    name = "stream.layers.0.feed_forward.up.weight"
    assert torch.equal(small.get_parameter(name), large.get_parameter(name))
    assert SimlaProcessor.from_pretrained(tmp_path / "large").image_size == 96


@pytest.mark.parametrize("kind", [AnswerNetwork, AssignmentNetwork])
def test_a_tasks_folder_is_taken_to_another_resolution_with_its_files(kind, tokenizers, tmp_path):
    vocabulary = replace(TextTokenizer(tokenizers / "300").vocabulary, visual_size=1)
    student, teacher = (spread_weights(kind(replace(model_config(), vocabulary=vocabulary)), seed) for seed in (1, 2))
    files = {"answers.json": '["yes"]'} if kind is AnswerNetwork else {}
    save_model_folder(student, tmp_path / "small", tokenizers / "300", teacher=teacher, files=files)
    assert call(tmp_path / "small", tmp_path / "large", "--image-size", "48") == 0
    for name, network in (("", student), ("teacher", teacher)):
        large, config = load_model_folder(tmp_path / "large" / name, kind)
        assert (config.vision.image_size, config.image_positions) == (48, student.config.image_positions)
        found = dict(large.named_parameters())
        other = {n for n, p in network.named_parameters() if not torch.equal(p, found[n])}
        assert other == {"image_encoder.pos_embed"}
        assert all((tmp_path / "large" / name / file).read_text() == text for file, text in files.items())
    assert main(["import", str(tmp_path / "small"), "--out", str(tmp_path / "x"), "--heads", "4"]) == 2


def test_a_resolution_may_have_more_patches_than_the_stream_has_positions():
    config = at_resolution(model_config(), 56)  # 49 patches, 40 positions
    assert (config.vision.patches, config.image_positions) == (49, 9)
    with pytest.raises(ValueError, match="max_positions=40 is too small for 49 patches"):
        replace(config, stream=replace(config.stream, image_positions=0))


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("retrieval", [], "give --tokenizer"),
        ("retrieval", ["--tokenizer", "TOKENIZER", "--image-size", "50"], "is not a multiple"),
        ("other", ["--tokenizer", "TOKENIZER"], "neither itm_head, cls_head nor text_decoder"),
        ("vit", ["--tokenizer", "TOKENIZER"], "lacks"),
    ],
)
def test_what_cannot_be_imported_is_one_line_and_leaves_nothing(tokenizer, tmp_path, capsys, name, options, told):
    weights = load_file(RECORDED / "retrieval" / "weights.safetensors")
    if name == "other":
        weights = {"a": torch.zeros(2)}
    if name == "vit":
        weights = {"itm_head.weight": torch.zeros(2, 32)}
    torch.save(weights, tmp_path / "a.pth")
    given = [str(tokenizer) if option == "TOKENIZER" else option for option in options]
    assert call(tmp_path / "a.pth", tmp_path / "out", *given) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_other_words_is_refused_with_both_numbers(tmp_path, capsys):
    train_tokenizer(["a red dog"] * 3, tmp_path / "tokenizer", 60)
    shutil.copy(RECORDED / "ve" / "weights.safetensors", tmp_path / "ve.safetensors")
    assert call(tmp_path / "ve.safetensors", tmp_path / "out", "--tokenizer", tmp_path / "tokenizer") == 2
    assert "words, the checkpoint 300" in capsys.readouterr().err
