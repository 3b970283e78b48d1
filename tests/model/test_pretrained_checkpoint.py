"""Whole checkpoints: published SIMLA, ALBEF and downstream files, our own folders, and what is none of them."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from simla_ds.config import StreamConfig
from simla_ds.hub import save_model_folder
from simla_ds.model.pretrained import load_checkpoint, load_vision
from simla_ds.model.simla import Simla
from simla_ds.verify import load_recorded_networks, recorded_config
from tests import tiny

STREAM = tiny.STREAM
ALBEF = replace(tiny.ALBEF, text_layers=6, fusion_layers=6)  # the published depth
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])


def network(stream: StreamConfig = STREAM) -> Simla:
    return Simla(tiny.model_config(stream)).eval()


def save_albef(file: Path, model: Simla) -> dict[str, torch.Tensor]:
    """Save model under ALBEF's names, with what its file holds besides and without the heads that it lacks."""
    inverse = [
        (r"^image_encoder\.", "visual_encoder."),
        (r"^stream\.embeddings\.(word|position|token_type)\.", r"text_encoder.bert.embeddings.\1_embeddings."),
        (r"^stream\.embeddings\.norm\.", "text_encoder.bert.embeddings.LayerNorm."),
        (r"^stream\.layers\.(\d+)\.feed_forward\.up\.", r"text_encoder.bert.encoder.layer.\1.intermediate.dense."),
        (r"^stream\.layers\.(\d+)\.feed_forward\.down\.", r"text_encoder.bert.encoder.layer.\1.output.dense."),
        (r"^stream\.layers\.(\d+)\.feed_forward\.norm\.", r"text_encoder.bert.encoder.layer.\1.output.LayerNorm."),
        (r"^stream\.layers\.(\d+)\.(self|cross)_attention\.", r"text_encoder.bert.encoder.layer.\1.\2attention."),
        (r"\.selfattention\.", ".attention."),
        (r"attention\.(query|key|value)\.", r"attention.self.\1."),
        (r"attention\.output\.", "attention.output.dense."),
        (r"attention\.norm\.", "attention.output.LayerNorm."),
        (r"^language_head\.decoder\.bias", "text_encoder.cls.predictions.bias"),
        (r"^language_head\.transform\.", "text_encoder.cls.predictions.transform.dense."),
        (r"^language_head\.norm\.", "text_encoder.cls.predictions.transform.LayerNorm."),
        (r"^image_projection\.", "vision_proj."),
        (r"^text_projection\.", "text_proj."),
        (r"^match_head\.", "itm_head."),
        (r"^temperature\.value$", "temp"),
    ]
    weights = {}
    for name, value in model.named_parameters():
        if name.startswith(("visual_head", "concept_head")) or name.endswith("mask_token"):
            continue
        for pattern, replacement in inverse:
            name = re.sub(pattern, replacement, name)
        weights[name] = value.detach().reshape(()) if name == "temp" else value.detach().clone()
    weights["image_queue"], weights["queue_ptr"] = torch.zeros(8, 4), torch.zeros(1, dtype=torch.long)
    torch.save({"model": weights, "epoch": 29, "config": {"image_res": 32}}, file)
    return weights


@pytest.fixture(scope="module")
def recorded(recorded_step):
    """Published weights, and the networks that `simla verify` builds of them."""
    weights = load_file(recorded_step / "weights.safetensors")
    config = recorded_config(json.loads((recorded_step / "config.json").read_text()))
    return weights, config, load_recorded_networks(weights, config, dropout=False)


def assert_same_parameters(model: Simla, other: Simla) -> None:
    for (name, ours), (_, theirs) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_a_published_checkpoint_gives_student_and_teacher(tmp_path, recorded):
    weights, config, (student, teacher) = recorded
    torch.save({"model": weights, "epoch": 29, "lr_scheduler": {"t": 1}}, tmp_path / "checkpoint_29.pth")
    model, copy = Simla(config.model), Simla(config.model)
    report = load_checkpoint(model, tmp_path / "checkpoint_29.pth", copy)
    assert_same_parameters(model, student)
    assert_same_parameters(copy, teacher.module)
    assert report.missing == report.unexpected == report.interpolated == ()
    assert "teacher.stream.embeddings.word.weight" in report.loaded
    assert "teacher.match_head.weight" not in report.loaded  # it has no momentum copy: the student's
    assert set(report.ignored) == {"image_queue", "text_queue", "queue_ptr"}


def test_a_downstream_checkpoint_gives_the_backbone_and_says_what_it_lacks(tmp_path, recorded):
    """Names without the `bert.` component; no mask token, MLM head, visual head, concept head."""
    weights, config, (student, _) = recorded
    kept = {
        n.replace(".bert.", "."): v for n, v in weights.items() if not re.search(r"\.cls\.|mim_|concept_|mask_t", n)
    }
    torch.save({"model": kept}, tmp_path / "retrieval.pth")
    model = Simla(config.model)
    report = load_checkpoint(model, tmp_path / "retrieval.pth")
    name = "stream.layers.11.cross_attention.key.weight"
    assert torch.equal(model.get_parameter(name), student.get_parameter(name))
    groups = {name.split(".")[0] for name in report.missing}
    assert groups == {"image_encoder", "language_head", "visual_head", "concept_head"}
    assert [name for name in report.missing if name.startswith("image_encoder")] == ["image_encoder.mask_token"]
    assert any(name.startswith("teacher.stream.") for name in report.ignored)
    assert report.unexpected == ()


def test_the_report_reads_as_a_few_lines(tmp_path, recorded):
    weights, config, _ = recorded
    torch.save({"model": {**weights, "cls_head.0.bias": torch.zeros(2)}}, tmp_path / "a.pth")
    text = str(load_checkpoint(Simla(config.model), tmp_path / "a.pth"))
    assert text.splitlines()[0] == f"{tmp_path / 'a.pth'}: 363 of 363 parameters loaded"
    assert text.splitlines()[1:] == [
        "  unexpected, not used: head.*.bias",
        "  not wanted: image_queue, queue_ptr, teacher.* (360), text_queue",
    ]


def test_a_checkpoint_of_another_resolution_has_its_grid_resampled(tmp_path, recorded):
    weights, config, _ = recorded
    torch.save({"model": weights}, tmp_path / "a.pth")
    larger = replace(config.model, vision=replace(config.model.vision, image_size=96))
    said = r"trained with 16 patches, the model would read them as 36; set model\.stream\.image_positions=16"
    with pytest.raises(ValueError, match=said):
        load_checkpoint(Simla(larger), tmp_path / "a.pth")
    larger = replace(larger, stream=replace(larger.stream, image_positions=16))
    model, copy = Simla(larger), Simla(larger)
    report = load_checkpoint(model, tmp_path / "a.pth", copy)
    note = "image_encoder.pos_embed (1, 17, 64) -> (1, 37, 64)"
    assert report.interpolated == (note, f"teacher.{note}")
    assert not torch.equal(
        model.get_parameter("image_encoder.pos_embed"), copy.get_parameter("image_encoder.pos_embed")
    )


def test_an_albef_checkpoint_loads_into_the_split_stream(tmp_path):
    source, model = network(ALBEF), network(ALBEF)
    weights = save_albef(tmp_path / "ALBEF.pth", source)
    assert "text_encoder.bert.encoder.layer.6.crossattention.self.key.weight" in weights
    assert "text_encoder.bert.encoder.layer.5.crossattention.self.key.weight" not in weights
    report = load_checkpoint(model, tmp_path / "ALBEF.pth")
    assert {name.split(".")[0] for name in report.missing} == {"image_encoder", "visual_head", "concept_head"}
    image, mask = torch.randn(2, 3, 24, 24), IDS != 0
    with torch.no_grad():
        for each in (source, model):
            each.image_encoder.mask_token.zero_()
        ours, theirs = (n.text_over_image(IDS, mask, n.image_encoder(image))[0] for n in (model, source))
    assert torch.equal(ours, theirs)
    assert torch.equal(model.temperature.value, source.temperature.value)


@pytest.mark.parametrize(
    ("saved", "wanted", "said"),
    [
        (ALBEF, replace(STREAM, layers=12), "set model.stream.shared=false, text_layers=6 and fusion_layers=6"),
        (replace(STREAM, layers=12), ALBEF, "set model.stream.shared=true and layers=12"),
        (ALBEF, replace(ALBEF, token_types=False), "set model.stream.token_types=true"),
        (STREAM, replace(STREAM, token_types=True), "set model.stream.token_types=false"),
        (ALBEF, STREAM, "has 12 layers in stream.layers.*, the model 2"),
        (STREAM, replace(STREAM, layers=1), "has 2 layers in stream.layers.*, the model 1"),
    ],
)
def test_a_checkpoint_of_another_make_is_refused(tmp_path, saved, wanted, said):
    save_albef(tmp_path / "a.pth", network(saved))
    with pytest.raises(ValueError, match=re.escape(said)):
        load_checkpoint(network(wanted), tmp_path / "a.pth")


def test_a_checkpoint_with_an_incomplete_backbone_is_refused(tmp_path):
    weights = save_albef(tmp_path / "a.pth", network())
    for lost in ("visual_encoder.pos_embed", "text_encoder.bert.encoder.layer.1.output.dense.bias"):
        torch.save({"model": {n: v for n, v in weights.items() if n != lost}}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="a backbone is loaded whole or not at all"):
            load_checkpoint(network(), tmp_path / "a.pth")


def test_our_own_folder_gives_student_and_teacher(tmp_path):
    student, teacher = network(), network()
    save_model_folder(student, tmp_path / "final", teacher=teacher)
    model, copy = network(), network()
    report = load_checkpoint(model, tmp_path / "final", copy)
    assert_same_parameters(model, student)
    assert_same_parameters(copy, teacher)
    assert report.missing == report.unexpected == ()
    with pytest.raises(ValueError, match=r"trained with 4 attention heads, the model has 2: set model\.vision\.heads"):
        load_checkpoint(Simla(replace(tiny.model_config(), vision=replace(tiny.VISION, heads=2))), tmp_path / "final")


class Pickled:
    """Anything that is no tensor."""


def test_a_pickle_that_could_run_code_is_refused_in_one_line(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "args": Pickled()}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"is refused: besides tensors it holds .*Pickled.*could run code") as caught:
        load_checkpoint(network(), tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.pth", b"not a checkpoint", "cannot be read as weights"),
        ("a.safetensors", b"\x00" * 20, "cannot be read as weights"),
        ("a.txt", b"", "is no weights file"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_checkpoint(network(), tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_path_that_names_nothing_or_too_much_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_vision(network(), tmp_path / "none.pth")
    for name in ("a.pth", "b.pth"):
        torch.save([1, 2], tmp_path / name)
    (tmp_path / "step_00000004").mkdir()
    (tmp_path / "step_00000004" / "MANIFEST.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step_00000004 is a training checkpoint; .* `simla export`"):
        load_vision(network(), tmp_path / "step_00000004")
    with pytest.raises(ValueError, match=r"several weights files \(a\.pth, b\.pth\)"):
        load_vision(network(), tmp_path)
    with pytest.raises(ValueError, match="holds no state dict"):
        load_vision(network(), tmp_path / "a.pth")


def test_a_folder_says_itself_how_many_patches_its_positions_were_trained_with(tmp_path, recorded):
    _, config, _ = recorded
    larger = replace(config.model, vision=replace(config.model.vision, image_size=96))
    larger = replace(larger, stream=replace(larger.stream, image_positions=16))
    save_model_folder(Simla(larger), tmp_path / "folder")
    load_checkpoint(Simla(larger), tmp_path / "folder")
    with pytest.raises(ValueError, match=r"trained with 16 patches, the model would read them as 36"):
        load_checkpoint(Simla(replace(larger, stream=config.model.stream)), tmp_path / "folder")
