"""Start weights from local files: a Hugging Face BERT, a timm ViT or DeiT, a published SIMLA or ALBEF checkpoint.

What is asked for must load: this module knows each format's names and what its shapes do not show (heads, token types,
which layers fuse); simla_ds.model.loading checks shapes and layers before anything is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from simla_ds.config import InitConfig
from simla_ds.model.loading import LoadReport, load_state
from simla_ds.model.official_names import ALIASES, BUFFERS, our_name, translate
from simla_ds.model.simla import Simla
from simla_ds.model.weight_files import read_weights

_TOKEN_TYPES = "stream.embeddings.token_type.weight"
VISION_POSITIONS, STREAM_POSITIONS = "image_encoder.pos_embed", "stream.embeddings.position.weight"
PRETRAINED_PATCHES = 256
"""At the published 256 px."""


def initialise(model: Simla, config: InitConfig) -> list[LoadReport]:
    """Load what init.* asks for, a whole checkpoint last; call it before the teacher is copied. Raises ValueError."""
    reports = []
    if config.vision:
        reports.append(load_vision(model, Path(config.vision)))
    if config.text:
        reports.append(load_bert(model, Path(config.text)))
    if config.checkpoint:
        reports.append(load_checkpoint(model, Path(config.checkpoint)))
    return reports


def load_bert(model: Simla, path: Path) -> LoadReport:
    """Load a Hugging Face BERT folder into the stream, and its masked-word head where it has one.

    Cross-attention keeps its start values. Token types are left out unless model.stream.token_types. Raises ValueError.
    """
    settings = _read_json(path / "config.json")
    if settings.get("model_type") != "bert":
        raise ValueError(f"{path} holds a model of type {settings.get('model_type')!r}; init.text takes a 'bert'")
    if settings.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{path} was trained with hidden_act={settings['hidden_act']!r}; the stream computes 'gelu'")
    _require_heads(model, path, "stream", settings.get("num_attention_heads"))
    state, ignored = {}, []
    for name, value in read_weights(path).items():
        rest = name.removeprefix("bert.")
        official = f"text_encoder.{rest}" if rest.startswith("cls.") else f"text_encoder.bert.{rest}"
        ours = our_name(official)
        unwanted = official in ALIASES or re.match(r"pooler\.|cls\.seq_relationship\.|embeddings\.position_ids", rest)
        if unwanted or (ours == _TOKEN_TYPES and not model.config.stream.token_types):
            ignored.append(name)
        else:
            state[ours] = value
    scope = ("stream.", "language_head.")
    return load_state(model, path, state, scope=scope, optional=r"\.cross_attention\.", ignored=ignored)


def load_vision(model: Simla, path: Path) -> LoadReport:
    """Load a timm ViT or DeiT (a file or a folder with one) into the image encoder.

    Classifiers are left out; pos_embed is resampled to model.vision.image_size. The mask token is SIMLA's own, so it
    keeps its zeros. Raises ValueError.
    """
    state, ignored = {}, []
    for name, value in read_weights(path).items():
        if re.match(r"(head|head_dist|fc_norm|pre_logits)\.", name):
            ignored.append(name)
        else:
            state[f"image_encoder.{name}"] = value
    optional = r"mask_token$|^image_encoder\.norm\."  # timm's mean-pooled classifiers have fc_norm instead of norm
    return load_state(model, path, state, scope=("image_encoder.",), optional=optional, ignored=ignored)


def load_checkpoint(model: Simla, path: Path, teacher: Simla | None = None) -> LoadReport:
    """Load a whole model: a published SIMLA or ALBEF .pth (pretraining or downstream), or a model folder of ours.

    A teacher given becomes a copy of the student, then takes the momentum copies there are. Raises ValueError.
    """
    if path.is_dir() and (path / "config.json").is_file():
        student, momentum = _read_model_folder(model, path, with_teacher=teacher is not None)
        ignored = []
    else:
        weights = read_weights(path)
        published = translate(weights)
        student, momentum = published.student, published.teacher
        ignored = [name for name in weights if name in BUFFERS]
    if teacher is None:
        ignored += [f"teacher.{name}" for name in momentum]
    _require_same_stream(model, path, student)
    _require_trained_positions(model, path, student)
    report = load_state(model, path, student, scope=("",), optional="mask_token$", ignored=ignored)
    if teacher is None:
        return report
    teacher.load_state_dict(model.state_dict())
    if not momentum:
        return report
    copies = load_state(teacher, path, momentum, scope=("",), optional="mask_token$")  # what it lacks: the student's
    return replace(
        report,
        loaded=(*report.loaded, *(f"teacher.{name}" for name in copies.loaded)),
        unexpected=(*report.unexpected, *(f"teacher.{name}" for name in copies.unexpected)),
        interpolated=(*report.interpolated, *(f"teacher.{note}" for note in copies.interpolated)),
    )


def trained_positions(patches: int, positions: int) -> int:
    """Return how many patches the stream's positions were trained for, by the rows of the two position tables.

    Fine-tuning at a higher resolution has more patches than the stream's table has rows: that is still pretraining's.
    """
    return patches if patches < positions else PRETRAINED_PATCHES


def _require_trained_positions(model: Simla, path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse a model that would read the stream's positions of patches in another grid than they were trained in."""
    if not {VISION_POSITIONS, STREAM_POSITIONS} <= state.keys():
        return  # load_state says what is missing
    stated = 0
    if path.is_dir() and (path / "config.json").is_file():
        stated = _read_json(path / "config.json").get("model", {}).get("stream", {}).get("image_positions", 0)
    found = stated or trained_positions(state[VISION_POSITIONS].shape[1] - 1, len(state[STREAM_POSITIONS]))
    if found != model.config.image_positions:
        raise ValueError(
            f"{path}: the stream's positions were trained with {found} patches, the model would read them as "
            f"{model.config.image_positions}; set model.stream.image_positions={found}, from which they are resampled"
        )


def _require_same_stream(model: Simla, path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse weights of a stream that is put together differently: fused in other layers, or with token types."""
    layers = {int(m[1]) for name in state if (m := re.match(r"stream\.layers\.(\d+)\.", name))}
    fused = {int(m[1]) for name in state if (m := re.match(r"stream\.layers\.(\d+)\.cross_attention\.", name))}
    config = model.config.stream
    wanted = {i for i, layer in enumerate(model.stream.layers) if layer.cross_attention is not None}
    if len(layers) != config.depth:
        return  # load_state says so, with both numbers
    if fused != wanted:
        first, change = min(fused, default=-1), "it is no fused model; init.text takes a BERT"
        if first == 0:
            change = f"set model.stream.shared=true and layers={len(layers)}"
        elif first > 0:
            change = f"set model.stream.shared=false, text_layers={first} and fusion_layers={len(layers) - first}"
        raise ValueError(
            f"{path} has cross-attention in {len(fused)} of {len(layers)} layers, the model in {len(wanted)}: {change}"
        )
    if (_TOKEN_TYPES in state) != config.token_types:
        has, model_has = ("has", "has none") if _TOKEN_TYPES in state else ("has no", "has some")
        raise ValueError(
            f"{path} {has} token types and the model {model_has}: "
            f"set model.stream.token_types={str(not config.token_types).lower()}"
        )


def _require_heads(model: Simla, path: Path, part: str, heads: int | None) -> None:
    """Refuse another number of attention heads: no shape would show it, and every result would be wrong."""
    ours = getattr(model.config, part).heads
    if heads != ours:
        raise ValueError(
            f"{path} was trained with {heads} attention heads, the model has {ours}: set model.{part}.heads"
        )


def _read_model_folder(model: Simla, path: Path, *, with_teacher: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the student's and the teacher's parameters of a folder that simla_ds.hub wrote."""
    settings = _read_json(path / "config.json")
    if settings.get("model_type") != "simla":
        kind = settings.get("model_type")
        raise ValueError(f"{path} holds a model of type {kind!r}; init.checkpoint takes a 'simla' folder or a .pth")
    for part in ("vision", "stream"):
        _require_heads(model, path, part, settings.get("model", {}).get(part, {}).get("heads"))
    words, ours = settings.get("model", {}).get("vocabulary", {}), asdict(model.config.vocabulary)
    for key in ("pad", "unk", "cls", "sep", "mask", "add_sep"):  # no shape shows them either
        if key in words and words[key] != ours[key]:
            raise ValueError(
                f"{path} was trained with model.vocabulary.{key}={json.dumps(words[key])}, the model has "
                f"{json.dumps(ours[key])}; set {'it' if key == 'add_sep' else 'data.tokenizer to the folder'}"
            )
    folders = [path, path / "teacher"] if with_teacher and (path / "teacher").is_dir() else [path]
    states = [{n.removeprefix("model."): v for n, v in read_weights(folder).items()} for folder in folders]
    if words.get("visual_size") == 1 != ours["visual_size"]:  # trained without visual tokens: its head says nothing
        states = [{n: v for n, v in state.items() if not n.startswith("visual_head.")} for state in states]
    return states[0], states[1] if len(states) > 1 else {}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read: {error.__class__.__name__}; give a Hugging Face model folder"
        ) from error
    return content if isinstance(content, dict) else {}
