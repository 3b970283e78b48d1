"""Model folders: Hugging Face classes around the network, and a processor from picture and caption to its inputs.

    model, processor = SimlaModel.from_pretrained(folder), SimlaProcessor.from_pretrained(folder)
    scores = model.eval()(**processor(images=picture, text=["a dog on a sofa", "two boats"]))

A folder holds config.json, model.safetensors, the tokenizer's files, preprocessor_config.json and, after training,
`teacher/`, a folder of the same kind. deepspeed and triton are not needed. I pictures, T captions, B pairs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging
from transformers.utils.generic import ModelOutput

from simla_ds.config import ModelConfig, StreamConfig, VisionConfig, VocabularyConfig
from simla_ds.data.processor import SimlaProcessor, read_json, save_processor
from simla_ds.model.network import Network
from simla_ds.model.simla import Simla
from simla_ds.model.weight_files import read_weights

N = TypeVar("N", bound=Network)
WEIGHTS, CONFIG = "model.safetensors", "config.json"
__all__ = [
    "SimlaConfig",
    "SimlaModel",
    "SimlaOutput",
    "SimlaProcessor",
    "load_model_folder",
    "new_model_folder",
    "read_model_folder",
    "resolve_weights",
    "save_model_folder",
    "task_of",
]
TASK_NETWORKS = {
    "vqa": "simla_ds.downstream.vqa.AnswerNetwork",
    "nlvr2": "simla_ds.downstream.nlvr2.PairNetwork",
    "snli_ve": "simla_ds.downstream.snli_ve.EntailmentNetwork",
}
"""Classes of the networks that SimlaModel does not hold, by task, for messages."""
_PARTS = {"vision": VisionConfig, "stream": StreamConfig, "vocabulary": VocabularyConfig}


class SimlaConfig(PreTrainedConfig):
    """config.json of a model folder: the frozen ModelConfig as nested dicts under `model`."""

    model_type = "simla"
    model: dict | None = None
    """ModelConfig as nested dicts."""
    task: str = Simla.task
    """Which network it is: pretraining's, which SimlaModel holds, or a downstream task's."""
    training: dict | None = None
    """Where the weights come from: whatever save_model_folder was given as `extra`."""
    tie_word_embeddings: bool = True
    """The language head's decoder is the word embedding; nothing else is implemented."""

    @classmethod
    def from_model_config(cls, config: ModelConfig, training: dict | None = None) -> SimlaConfig:
        """Wrap a ModelConfig."""
        return cls(model=asdict(config), training=training)

    @property
    def model_config(self) -> ModelConfig:
        """The ModelConfig; ValueError when the dicts describe none."""
        values = self.model or {}
        try:
            return ModelConfig(**{k: _PARTS[k](**v) if k in _PARTS else v for k, v in values.items()})
        except TypeError as error:
            raise ValueError(f"config.json describes no model that this version knows: {error}") from error


@dataclass
class SimlaOutput(ModelOutput):
    """What SimlaModel returns."""

    image_features: Tensor | None = None
    """(I, E) float32 unit vectors."""
    text_features: Tensor | None = None
    """(T, E) float32 unit vectors."""
    similarity: Tensor | None = None
    """(I, T) cosines, -1 to 1: quick, for ranking. ITC trains softmax(similarity / temperature) of a whole batch, so
    a cosine alone is no probability."""
    itm_logits: Tensor | None = None
    """(B, 2) in the weights' dtype: softmax(-1)[:, 1] is the probability that a pair's picture and caption match."""


class SimlaModel(PreTrainedModel):
    """A PreTrainedModel around the network, which is `self.model`."""

    config_class = SimlaConfig
    main_input_name = "pixel_values"
    _tied_weights_keys = {  # noqa: RUF012, transformers reads a plain class attribute
        "model.language_head.decoder.weight": "model.stream.embeddings.word.weight"
    }

    def __init__(self, config: SimlaConfig, network: Simla | None = None):
        """Build the network that config describes with start values, or wrap one that exists."""
        super().__init__(config)
        self.model = Simla(config.model_config) if network is None else network
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Do nothing: Simla's own start values are the right ones, and a wrapped network keeps its weights."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as transformers does, but refuse (ValueError) another network, and weights that lack a parameter."""
        folder = Path(str(pretrained_model_name_or_path))
        if (folder / CONFIG).is_file() and (task := _read_config(folder).task) != Simla.task:
            module, _, network = TASK_NETWORKS.get(task, "").rpartition(".")
            load = f"load_model_folder({str(folder)!r}, {network}) with: from {module} import {network}"
            raise ValueError(f"{folder} holds a model for {task!r}; {f'use {load}' if network else 'not this one'}")
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["output_loading_info"] = True
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{pretrained_model_name_or_path} lacks {len(missing)} parameter(s), first {missing[0]}")
        return (model, info) if wants_info else model

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """(I, 3, S, S) normalised pictures, in the weights' dtype, to (I, E) float32 unit vectors."""
        return self.model.image_feature(self.model.image_encoder(pixel_values))

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(T, L) int64 token ids and mask (1 at tokens; None: all but padding) to (T, E) float32 unit vectors."""
        rows = self.model.stream.embeddings(input_ids)
        return self.model.text_feature(self.model.stream(rows, self._text_mask(input_ids, attention_mask))[0])

    def forward(
        self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> SimlaOutput:
        """Compare pictures (I, 3, S, S) in the weights' dtype with captions (T, L) int64: cosines of all, ITM of pairs.

        Pair b is picture b and caption b; a single picture or caption is paired with each of the others. Without
        attention_mask all tokens but padding count; what else a processor gives is passed over. ValueError when I and T
        differ and neither is 1.
        """
        pictures, captions = len(pixel_values), len(input_ids)
        if pictures != captions and 1 not in (pictures, captions):
            raise ValueError(
                f"{pictures} pictures and {captions} captions make no pairs: give as many, or one of either"
            )
        mask = self._text_mask(input_ids, attention_mask)
        features = self.model.features(pixel_values, input_ids, mask)
        image_index = torch.arange(max(pictures, captions), device=input_ids.device) if pictures > 1 else None
        if pictures == 1 and captions > 1:
            image_index = torch.zeros(captions, dtype=torch.long, device=input_ids.device)
        if captions < pictures:
            input_ids, mask = input_ids.expand(pictures, -1), mask.expand(pictures, -1)
        fused, _attention = self.model.text_over_image(input_ids, mask, features.image_tokens, image_index)
        return SimlaOutput(
            image_features=features.image_feature,
            text_features=features.text_feature,
            similarity=features.image_feature @ features.text_feature.T,
            itm_logits=self.model.match_head(fused[:, 0]),
        )

    def _text_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        return input_ids != self.model.config.vocabulary.pad if attention_mask is None else attention_mask.bool()


AutoConfig.register(SimlaConfig.model_type, SimlaConfig, exist_ok=True)
AutoModel.register(SimlaConfig, SimlaModel, exist_ok=True)


def save_model_folder(
    model: Network,
    folder: Path,
    tokenizer_folder: Path | None = None,
    extra: dict | None = None,
    *,
    teacher: Network | None = None,
    max_words: int = 30,
    max_tokens: int = 25,
    files: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write a model folder that from_pretrained reads: all of it, or nothing.

    Args:
        model: the student, whole parameters (not ZeRO shards).
        folder: written beside and renamed into place; a model folder already there is replaced, its teacher included.
        tokenizer_folder: tokenizer to copy; None: the folder holds no processor.
        extra: what config.json keeps under `training`, such as the step.
        teacher: also write folder/teacher.
        max_words: words of a caption that the processor keeps.
        max_tokens: tokens of a caption that it keeps.
        files: texts to write beside the weights, by file name (a task's answer list).

    Raises:
        ValueError: folder holds something else, or the tokenizer doesn't fit the model.
    """
    with new_model_folder(folder) as fresh:
        for network, target in ((model, fresh), (teacher, fresh / "teacher")):
            if network is None:
                continue
            _write_network(network, target, extra)
            for name, text in files.items():
                (target / name).write_text(text, encoding="utf-8")
            if tokenizer_folder is not None:
                save_processor(network.config, Path(tokenizer_folder), target, max_words, max_tokens)


@contextmanager
def new_model_folder(folder: Path) -> Iterator[Path]:
    """Yield the name of a folder to make and fill, which then takes the place of `folder`: whole, or not at all.

    Raises:
        ValueError: folder holds something that this project did not write.
    """
    folder = Path(folder)
    if folder.exists() and not _is_ours(folder) and (folder.is_file() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and is no model folder, so it is not replaced; name another")
    fresh, stale = (folder.with_name(f".{folder.name}.{kind}-{os.getpid()}") for kind in ("new", "old"))
    try:
        yield fresh
        if folder.exists():
            folder.rename(stale)
        fresh.rename(folder)
    finally:
        if stale.exists() and not folder.exists():  # stopped between the two
            stale.rename(folder)
        for leftover in (fresh, stale):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_ours(folder: Path) -> bool:
    """Whether a folder holds a network of this project, or the image codebook that `simla import` writes."""
    if not (folder / CONFIG).is_file():
        return False
    return read_json(folder / CONFIG).get("model_type") in (SimlaConfig.model_type, "flava_image_codebook")


def load_model_folder(folder: Path, kind: type[N] = Simla, device: str = "cpu") -> tuple[N, ModelConfig]:
    """Load the network of a model folder and its configuration, in eval mode, without deepspeed or triton.

    Args:
        folder: pretraining's, or with `kind` that of a downstream task's network.
        kind: the network it must hold.
        device: where the network goes; `auto`: a CUDA card where there is one.

    Returns:
        The network in float32, whatever dtype is stored, and the configuration that config.json holds.

    Raises:
        ValueError: as read_model_folder, or no such device.
    """
    config, weights = read_model_folder(folder, kind)
    return kind(config).take(weights).eval().to(_device(device)), config


def read_model_folder(folder: Path, kind: type[Network]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the configuration of a model folder, and its weights for Network.take, which stay on disk until then.

    Raises:
        ValueError: a file is missing or broken, another model type or task, or weights of other sizes than config.json
            says.
    """
    folder = Path(folder)
    described = _read_config(folder)
    config = described.model_config
    if described.task != kind.task:
        raise ValueError(f"{folder} holds a model for {described.task!r}, not for {kind.task!r}")
    if not (folder / WEIGHTS).is_file():
        raise ValueError(f"{folder} is no model folder: {WEIGHTS} is missing")
    with torch.device("meta"):
        wanted = {f"model.{name}": tuple(p.shape) for name, p in kind(config).named_parameters()}
    weights = read_weights(folder / WEIGHTS)
    given = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise ValueError(
                f"{folder / WEIGHTS} has {name} {given.get(name, 'nowhere')}, "
                f"its {CONFIG} describes {wanted.get(name, 'no such parameter')}"
            )
    return config, {name.removeprefix("model."): value for name, value in weights.items()}


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda: torch finds no CUDA card here; name auto or cpu")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def _write_network(network: Network, target: Path, extra: dict | None) -> None:
    """Write config.json and model.safetensors. A tied parameter is stored once, under its first name."""
    config = SimlaConfig.from_model_config(network.config, extra)
    if isinstance(network, Simla):
        with _no_progress_bar():
            SimlaModel(config, network).save_pretrained(target)
        return
    config.task = network.task
    target.mkdir(parents=True)
    config.save_pretrained(target)
    weights = {f"model.{name}": p.detach().cpu().contiguous() for name, p in network.named_parameters()}
    save_file(weights, target / WEIGHTS, metadata={"format": "pt"})


def resolve_weights(folder: Path, weights: Literal["student", "teacher"]) -> Path:
    """Return the folder of the student's or the teacher's weights; ValueError when there is none."""
    chosen = Path(folder) / "teacher" if weights == "teacher" else Path(folder)
    if not (chosen / CONFIG).is_file():
        raise ValueError(f"{folder} has no {weights} weights: {chosen / CONFIG} is missing")
    return chosen


def task_of(folder: Path) -> str:
    """Return what a model folder's network is for; ValueError when it is no model folder."""
    return _read_config(Path(folder)).task


def _read_config(folder: Path) -> SimlaConfig:
    values = read_json(folder / CONFIG)
    if (kind := values.get("model_type")) != SimlaConfig.model_type:
        raise ValueError(f"{folder} holds a model of type {kind!r}, not {SimlaConfig.model_type!r}")
    return SimlaConfig.from_dict(values)


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Keep transformers from drawing a bar for one file."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
