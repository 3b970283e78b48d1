"""Write parameters from elsewhere into a model: everything is checked first, and all of it is accounted for.

Backbone layers are taken whole or not at all, and sizes must fit. Two tables are adapted: position embeddings of the
image are resampled as a grid, and of a longer text table the first rows are taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from simla_ds.model.network import Network
from simla_ds.model.positions import resample

_WIDTH = "model.stream.width"
_CONFIG_KEYS = [
    (r"^image_encoder\.patch_embed\.proj\.weight", ("model.vision.width", "", *("model.vision.patch_size",) * 2)),
    (r"^image_encoder\.blocks\.\d+\.mlp\.fc1\.", ("model.vision.mlp_ratio", "model.vision.width")),
    (r"^image_encoder\.blocks\.\d+\.mlp\.fc2\.weight", ("model.vision.width", "model.vision.mlp_ratio")),
    (r"^image_encoder\.", ("model.vision.width",) * 3),
    (r"^stream\.embeddings\.word\.", ("data.tokenizer (model.vocabulary.size)", _WIDTH)),
    (r"^stream\.embeddings\.position\.", ("model.stream.max_positions", _WIDTH)),
    (r"^stream\.layers\.\d+\.feed_forward\.up\.", ("model.stream.intermediate_size", _WIDTH)),
    (r"^stream\.layers\.\d+\.feed_forward\.down\.weight", (_WIDTH, "model.stream.intermediate_size")),
    (r"^(image|text)_projection\.", ("model.projection_size", _WIDTH)),
    (r"^concept_head\.", ("data.tokenizer (model.vocabulary.size)", "model.projection_size")),
    (r"^language_head\.decoder\.", ("data.tokenizer (model.vocabulary.size)",)),
    (r"^visual_head\.", ("data.visual_tokenizer (model.vocabulary.visual_size)", _WIDTH)),
    (r"", (_WIDTH, _WIDTH)),
]
"""Which setting decides each dimension of a parameter; the first pattern that fits counts."""


@dataclass(frozen=True)
class LoadReport:
    """What a file gave to a model. Names are this project's; the teacher's begin with `teacher.`."""

    source: str
    """The file or folder."""
    loaded: tuple[str, ...]
    """Parameters that have their value from it."""
    missing: tuple[str, ...]
    """Parameters such a file could hold but doesn't; they keep their start values."""
    unexpected: tuple[str, ...]
    """Names in the file that mean nothing to this model."""
    interpolated: tuple[str, ...]
    """Loaded parameters whose value had to be resampled or cut, with both shapes."""
    ignored: tuple[str, ...] = ()
    """Names in the file that are known and not wanted: classifiers, queues, momentum copies without a teacher."""

    def __str__(self) -> str:
        rows = [f"{self.source}: {len(self.loaded)} of {len(self.loaded) + len(self.missing)} parameters loaded"]
        rows += [f"  missing, start values kept: {summary(self.missing)}"] if self.missing else []
        rows += [f"  unexpected, not used: {summary(self.unexpected)}"] if self.unexpected else []
        ignored = summary(re.sub(r"^teacher\..*", "teacher.*", name) for name in self.ignored)
        rows += [f"  not wanted: {ignored}"] if ignored else []
        return "\n".join([*rows, *(f"  adapted: {note}" for note in self.interpolated)])


def load_state(
    model: Network,
    path: Path,
    state: Mapping[str, Tensor],
    *,
    scope: tuple[str, ...],
    optional: str,
    ignored: Iterable[str] = (),
) -> LoadReport:
    """Check all of state against the parameters whose names begin with scope, then write it to them.

    Args:
        model: written to, once everything fits.
        path: where state is from, for messages.
        state: tensors by this project's names.
        scope: `image_encoder.` and `stream.` are backbones, which must be whole; heads need not be.
        optional: pattern of backbone parameters that may be missing all the same.
        ignored: names already left out, for the report.

    Raises:
        ValueError: a backbone isn't there, is incomplete or has another number of layers; a shape doesn't fit.
    """
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(scope)}
    for backbone, stack in (("image_encoder.", "blocks."), ("stream.", "layers.")):
        if backbone.startswith(scope):
            wanted = {name for name in parameters if name.startswith(backbone)}
            _require_layers(model, path, backbone + stack, set(state), wanted)
            if lost := [name for name in parameters if name in wanted - state.keys() and not re.search(optional, name)]:
                raise ValueError(f"{path} lacks {summary(lost)}: a backbone is loaded whole or not at all")
    fitted = {name: _fit(path, name, state[name], p) for name, p in parameters.items() if name in state}
    with torch.no_grad():
        for name, value in fitted.items():
            parameters[name].copy_(value)
    adapted = {name: value for name, value in fitted.items() if state[name].shape != value.shape}
    return LoadReport(
        source=str(path),
        loaded=tuple(fitted),
        missing=tuple(name for name in parameters if name not in state),
        unexpected=tuple(sorted(state.keys() - parameters.keys())),
        interpolated=tuple(f"{name} {_shape(state[name])} -> {_shape(value)}" for name, value in adapted.items()),
        ignored=tuple(sorted(ignored)),
    )


def _require_layers(model: Network, path: Path, stack: str, given: set[str], wanted: set[str]) -> None:
    """Refuse a file with none of a stack of layers, with more or fewer, or with layers of another make."""
    given, wanted = ({name for name in names if name.startswith(stack)} for names in (given, wanted))
    if not given:
        raise ValueError(f"{path} holds none of {stack}*, which was asked for")
    layers, model_layers = (len({name[len(stack) :].split(".")[0] for name in names}) for names in (given, wanted))
    if layers != model_layers:
        stream_key = "layers" if model.config.stream.shared else "text_layers + fusion_layers"
        key = "vision.layers" if stack.startswith("image") else f"stream.{stream_key}"
        raise ValueError(f"{path} has {layers} layers in {stack}*, the model {model_layers}: set model.{key}={layers}")
    if odd := given - wanted:
        raise ValueError(f"{path} has {summary(sorted(odd))} in its layers, which this model does not compute")


def _fit(path: Path, name: str, value: Tensor, wanted: Tensor) -> Tensor:
    """Return value in the shape of the model's parameter; ValueError where that can't be."""
    if value.shape == wanted.shape:
        return value
    if name == "image_encoder.pos_embed" and value.dim() == 3 and value.shape[-1] == wanted.shape[-1]:
        return _resample_positions(path, value, wanted.shape[1] - 1)
    if name == "stream.embeddings.position.weight" and value.shape[1:] == wanted.shape[1:] and len(value) > len(wanted):
        return value[: len(wanted)]
    raise ValueError(
        f"{path}: {name} is {_shape(value)}, the model's {_shape(wanted)}: change {_config_key(name, value, wanted)}"
    )


def _resample_positions(path: Path, table: Tensor, patches: int) -> Tensor:
    try:
        return resample(table[0].float(), patches)[None]
    except ValueError as error:
        raise ValueError(f"{path}: image_encoder.pos_embed has {error}") from None


def _config_key(name: str, value: Tensor, wanted: Tensor) -> str:
    """Return the setting that decides the first dimension in which two shapes differ."""
    keys = next(keys for pattern, keys in _CONFIG_KEYS if re.search(pattern, name))
    pairs = zip(value.shape, wanted.shape, keys, strict=False)
    return next((key for given, want, key in pairs if given != want), keys[0])


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def summary(names: Iterable[str], most: int = 6) -> str:
    """Return names with layer numbers and last components folded away, each with how many it stands for."""
    folded = Counter(re.sub(r"\.\d+\.", ".*.", name) for name in names)
    groups = Counter()
    for name, count in folded.items():
        groups[".".join(name.split(".")[:4])] += count
    shown = [name if count == 1 else f"{name} ({count})" for name, count in groups.items()]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more groups" if len(shown) > most else "")
