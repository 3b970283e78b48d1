"""Start weights: what real transformers and timm models compute, the stream and the encoder must compute as well."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import BertConfig, BertForMaskedLM, BertModel

from simla_ds.config import InitConfig, ModelConfig, StreamConfig, VisionConfig, VocabularyConfig
from simla_ds.hub import save_model_folder
from simla_ds.model.pretrained import initialise, load_bert, load_checkpoint, load_vision
from simla_ds.model.simla import Simla

WIDTH, HEADS, LAYERS, FFN, WORDS, POSITIONS = 32, 4, 3, 48, 40, 24
IDS = torch.tensor([[2, 7, 9, 11, 3], [2, 8, 3, 0, 0]])
MASK = IDS != 0
STREAM = StreamConfig(
    layers=LAYERS, width=WIDTH, heads=HEADS, intermediate_size=FFN, max_positions=POSITIONS, dropout=0.0
)
VISION = VisionConfig(image_size=32, patch_size=8, width=WIDTH, layers=2, heads=HEADS)


def tiny(stream: StreamConfig = STREAM) -> Simla:
    config = ModelConfig(
        vision=VISION, stream=stream, vocabulary=VocabularyConfig(size=WORDS, visual_size=16), projection_size=8
    )
    return Simla(config).eval()


def save_bert(folder: Path, cls: type = BertForMaskedLM, **changes) -> Any:
    sizes: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": FFN,
        "max_position_embeddings": POSITIONS,
    }
    bert = cls(BertConfig(**(sizes | changes))).eval()
    bert.save_pretrained(folder)
    return bert


def save_vit(file: Path, *, wrapper: str | None = None, **changes) -> Any:
    sizes: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": WIDTH,
        "depth": 2,
        "num_heads": HEADS,
        "num_classes": 5,
    }
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False, dynamic_img_size=True, **(sizes | changes)).eval()
    state = vit.state_dict()
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, file)
    return vit


# Hugging Face BERT


@pytest.mark.parametrize("token_types", [True, False])
def test_the_stream_computes_what_bert_computes(tmp_path, token_types):
    bert = save_bert(tmp_path, BertModel)
    if not token_types:  # SIMLA has none: it computes what BERT does without the row that BERT adds to every token
        with torch.no_grad():
            bert.embeddings.token_type_embeddings.weight.zero_()
    model = tiny(replace(STREAM, token_types=token_types))
    report = load_bert(model, tmp_path)
    with torch.no_grad():
        ours, _ = model.stream(model.stream.embeddings(IDS), MASK)
        theirs = bert(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state
    torch.testing.assert_close(ours[MASK], theirs[MASK], atol=1e-5, rtol=0)
    assert all(".cross_attention." in name or name.startswith("language_head.") for name in report.missing)
    assert ("embeddings.token_type_embeddings.weight" in report.ignored) is not token_types
    assert report.unexpected == report.interpolated == ()


def test_the_language_head_computes_what_berts_computes(tmp_path):
    bert = save_bert(tmp_path)
    model = tiny(replace(STREAM, token_types=True))
    report = load_bert(model, tmp_path)
    with torch.no_grad():
        ours = model.language_head(model.stream(model.stream.embeddings(IDS), MASK)[0])
        theirs = bert(input_ids=IDS, attention_mask=MASK.long()).logits
    torch.testing.assert_close(ours[MASK], theirs[MASK], atol=1e-5, rtol=0)
    assert report.missing
    assert all(".cross_attention." in name for name in report.missing)


def test_the_oldest_spelling_of_a_bert_file_loads(tmp_path):
    """bert-base-uncased itself: a pickle, LayerNorm.gamma and beta, a pooler and a next-sentence head."""
    bert = save_bert(tmp_path)
    state = {re.sub("LayerNorm.weight$", "LayerNorm.gamma", n): v for n, v in bert.state_dict().items()}
    state = {re.sub("LayerNorm.bias$", "LayerNorm.beta", n): v for n, v in state.items()}
    state |= {"bert.pooler.dense.bias": torch.zeros(WIDTH), "cls.seq_relationship.bias": torch.zeros(2)}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    model = tiny()
    report = load_bert(model, tmp_path)
    norm = bert.bert.encoder.layer[1].attention.output.LayerNorm
    assert torch.equal(model.get_parameter("stream.layers.1.self_attention.norm.weight"), norm.weight)
    assert report.unexpected == ()
    assert {"bert.pooler.dense.bias", "cls.seq_relationship.bias"} < set(report.ignored)


def test_a_longer_position_table_gives_its_first_rows(tmp_path):
    bert = save_bert(tmp_path, BertModel, max_position_embeddings=POSITIONS + 8)
    model = tiny()
    report = load_bert(model, tmp_path)
    table = bert.embeddings.position_embeddings.weight
    assert torch.equal(model.stream.embeddings.position.weight, table[:POSITIONS])
    assert report.interpolated == ("stream.embeddings.position.weight (32, 32) -> (24, 32)",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 5}, "has 5 layers in stream.layers.*, the model 3: set model.stream.layers=5"),
        ({"vocab_size": 41}, "stream.embeddings.word.weight is (41, 32), the model's (40, 32): change data.tokenizer"),
        (
            {"hidden_size": 64},
            "stream.embeddings.word.weight is (40, 64), the model's (40, 32): change model.stream.width",
        ),
        ({"intermediate_size": 50}, "(50, 32), the model's (48, 32): change model.stream.intermediate_size"),
        ({"max_position_embeddings": 20}, "is (20, 32), the model's (24, 32): change model.stream.max_positions"),
        ({"num_attention_heads": 8}, "trained with 8 attention heads, the model has 4: set model.stream.heads"),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
    ],
)
def test_another_bert_is_refused_and_nothing_is_written(tmp_path, changes, said):
    save_bert(tmp_path, BertModel, **changes)
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        load_bert(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_folder_without_a_bert_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        load_bert(tiny(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "roberta"}')
    with pytest.raises(ValueError, match="type 'roberta'"):
        load_bert(tiny(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "num_attention_heads": HEADS}))
    with pytest.raises(ValueError, match="holds no weights file"):
        load_bert(tiny(), tmp_path)
    save_file({"distilbert.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"none of stream\.layers\.\*"):
        load_bert(tiny(), tmp_path)


# timm ViT


@pytest.mark.parametrize(
    ("file", "wrapper"), [("deit.pth", "model"), ("vit.pth", "state_dict"), ("a.bin", None), ("a.safetensors", None)]
)
def test_the_image_encoder_computes_what_timms_vit_computes(tmp_path, file, wrapper):
    vit = save_vit(tmp_path / file, wrapper=wrapper)
    model = tiny()
    report = load_vision(model, tmp_path)
    image = torch.randn(2, 3, 32, 32)  # elsewhere timm resamples otherwise, see test_vision
    with torch.no_grad():
        torch.testing.assert_close(model.image_encoder(image), vit.forward_features(image), atol=1e-5, rtol=0)
    assert report.missing == ("image_encoder.mask_token",)
    assert report.unexpected == ()
    assert set(report.ignored) == {"head.weight", "head.bias"}


def test_positions_of_another_resolution_are_resampled_as_a_grid(tmp_path):
    vit = save_vit(tmp_path / "vit.pth", img_size=48)
    model = tiny()
    report = load_vision(model, tmp_path / "vit.pth")
    grid = vit.pos_embed[:, 1:].reshape(1, 6, 6, WIDTH).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(4, 4), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    assert torch.equal(model.get_parameter("image_encoder.pos_embed"), torch.cat([vit.pos_embed[:, :1], grid], dim=1))
    assert report.interpolated == ("image_encoder.pos_embed (1, 37, 32) -> (1, 17, 32)",)


def test_a_mean_pooled_classifier_has_no_last_norm_and_that_is_reported(tmp_path):
    save_vit(tmp_path / "vit.pth", global_pool="avg", class_token=True)
    report = load_vision(tiny(), tmp_path / "vit.pth")
    assert {"image_encoder.norm.weight", "image_encoder.norm.bias"} < set(report.missing)
    assert {"fc_norm.weight", "fc_norm.bias"} < set(report.ignored)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"depth": 3}, "has 3 layers in image_encoder.blocks.*, the model 2: set model.vision.layers=3"),
        ({"embed_dim": 64}, "image_encoder.cls_token is (1, 1, 64), the model's (1, 1, 32): change model.vision.width"),
        ({"patch_size": 16}, "(32, 3, 16, 16), the model's (32, 3, 8, 8): change model.vision.patch_size"),
        ({"mlp_ratio": 2.0}, "(64, 32), the model's (128, 32): change model.vision.mlp_ratio"),
        ({"init_values": 0.1}, "has image_encoder.blocks.*.ls1 (2)"),
    ],
)
def test_another_vit_is_refused(tmp_path, changes, said):
    save_vit(tmp_path / "vit.safetensors", **changes)
    with pytest.raises(ValueError, match=re.escape(said)):
        load_vision(tiny(), tmp_path)


def test_initialise_runs_what_is_asked_for_and_nothing_else(tmp_path):
    save_bert(tmp_path / "bert", BertModel)
    vit = save_vit(tmp_path / "vit.pth")
    model = tiny()
    assert initialise(model, InitConfig()) == []
    config = InitConfig(text=str(tmp_path / "bert"), vision=str(tmp_path / "vit.pth"))
    assert [report.source for report in initialise(model, config)] == [config.vision, config.text]
    assert torch.equal(model.get_parameter("image_encoder.cls_token"), vit.cls_token)
    save_model_folder(tiny(), tmp_path / "final")
    config = replace(config, checkpoint=str(tmp_path / "final"))
    assert len(initialise(model, config)) == 3
    assert not torch.equal(model.get_parameter("image_encoder.cls_token"), vit.cls_token)


def test_a_model_folder_with_other_special_tokens_is_refused(tmp_path):
    model = tiny()
    save_model_folder(model, tmp_path / "final")
    for change, said in (({"add_sep": False}, "add_sep=true, the model has false; set it"), ({"mask": 5}, "mask=4")):
        vocabulary = replace(model.config.vocabulary, **change)
        with pytest.raises(ValueError, match=f"trained with model.vocabulary.{said}"):
            load_checkpoint(Simla(replace(model.config, vocabulary=vocabulary)), tmp_path / "final")


def test_a_model_folder_trained_without_visual_tokens_starts_a_run_with_them(tmp_path):
    model = tiny()
    vocabulary = replace(model.config.vocabulary, visual_size=1)
    save_model_folder(Simla(replace(model.config, vocabulary=vocabulary)), tmp_path / "final")
    report = load_checkpoint(model, tmp_path / "final")
    assert report.missing
    assert all(name.startswith("visual_head.") for name in report.missing)


# Size


def test_the_base_model_has_238_million_parameters():
    """ViT-B/16 85.8 M, BERT-base with cross-attention 137.3 M, its head .6 M; concepts 7.8 M, visual tokens 6.3 M.

    Of BERT-base's 109.5 M the pooler and token types are left out and 12 x 2.36 M of cross-attention are added; the
    decoder is tied to the word vectors and counts once.
    """
    config = ModelConfig(
        vision=VisionConfig(image_size=256, patch_size=16, width=768, layers=12, heads=12),
        stream=StreamConfig(layers=12, width=768, heads=12, intermediate_size=3072, max_positions=512),
        vocabulary=VocabularyConfig(size=30_522, visual_size=8_192),
        projection_size=256,
    )
    with torch.device("meta"):
        model = Simla(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts["image_encoder"] == 85_845_504
    assert counts["stream"] == 137_256_960
    assert sum(p.numel() for p in model.parameters()) == 238_264_183
