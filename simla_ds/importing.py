"""Published checkpoints as model folders: what a file holds, and its sizes, are read off its weights.  (`simla import`)

Taken are the names of the published implementation, pretraining's and each downstream task's, SIMLA's and ALBEF's; and
the encoder of DALL-E's dVAE, XMM's visual tokeniser.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from simla_ds.config import ModelConfig, StreamConfig, VisionConfig
from simla_ds.data.processor import SimlaProcessor
from simla_ds.data.text import TextTokenizer
from simla_ds.downstream.nlvr2 import PairNetwork
from simla_ds.downstream.snli_ve import EntailmentNetwork
from simla_ds.downstream.tasks import ANSWERS
from simla_ds.downstream.text_assignment import AssignmentNetwork
from simla_ds.downstream.vqa import AnswerNetwork
from simla_ds.hub import new_model_folder, read_model_folder, save_model_folder, task_of
from simla_ds.model.image_codebook import image_codebook, is_image_codebook
from simla_ds.model.loading import LoadReport, load_state
from simla_ds.model.network import Network
from simla_ds.model.official_names import BUFFERS, translate
from simla_ds.model.pretrained import load_checkpoint, trained_positions
from simla_ds.model.simla import Simla
from simla_ds.model.weight_files import read_weights

NETWORKS: tuple[type[Network], ...] = (Simla, AnswerNetwork, PairNetwork, EntailmentNetwork)
MAX_TOKENS, MAX_TOKENS_OF_TASKS = 25, 50
"""Tokens kept of a caption; of a question or sentence, which the published evaluation does not cut."""
HEAD_SIZE = 64
"""Of ViT-B and BERT-base."""


def import_checkpoint(
    source: Path, out: Path, tokenizer: Path | None, *, image_size: int | None = None, heads: int | None = None
) -> LoadReport:
    """Write a checkpoint's student, and its momentum copy as teacher, to the model folder `out`; say what was loaded.

    Args:
        source: weights file, or a model folder of ours (whose resolution may be changed). Of a dVAE's encoder (DALL-E's
            encoder.pkl) `out` becomes the folder of a FlavaImageCodebook, and no other option applies.
        out: written whole or not at all.
        tokenizer: the one it was trained with; None for a model folder: its own.
        image_size: side of pictures that it shall take; the image encoder's positions are resampled as a grid once, the
            stream's whenever they are read. None: as it was trained.
        heads: attention heads of both encoders; None: one for every 64 of width.

    Raises:
        ValueError: no such weights, sizes that do not go together, a tokenizer of another vocabulary.
    """
    if source.is_dir() and (source / "config.json").is_file():
        if heads is not None:
            raise ValueError(f"{source} is a model folder, whose config.json says how many heads: it takes no --heads")
        return _resized(source, out, tokenizer, image_size)
    weights = read_weights(source)
    if is_image_codebook(weights):
        if (tokenizer, image_size, heads) != (None, None, None):
            raise ValueError(f"{source} is the encoder of a dVAE: it takes no --tokenizer, --image-size or --heads")
        return _import_image_codebook(weights, source, out)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer: give --tokenizer, the folder of the one it was trained with")
    published = translate(weights)
    kind = kind_of(published.student, source)
    config = _with_tokenizer(describe(published.student, source, heads), tokenizer)
    config = at_resolution(config, image_size or config.vision.image_size)
    model, teacher = kind(config), kind(config) if published.teacher else None
    if isinstance(model, Simla) and (teacher is None or isinstance(teacher, Simla)):
        report = load_checkpoint(model, source, teacher)
    else:
        buffers = [name for name in weights if name in BUFFERS]
        report = _load(model, source, published.student, buffers)
        if teacher is not None:
            teacher.load_state_dict(model.state_dict())
            _load(teacher, source, {**published.student, **published.teacher})
    most = MAX_TOKENS if kind is Simla else MAX_TOKENS_OF_TASKS
    save_model_folder(model, out, tokenizer, {"imported": source.name}, teacher=teacher, max_tokens=most)
    return report


def _import_image_codebook(weights: Mapping[str, Tensor], source: Path, out: Path) -> LoadReport:
    model = image_codebook(weights, source)
    with new_model_folder(out) as fresh:
        model.save_pretrained(fresh)
    return LoadReport(str(source), loaded=tuple(weights), missing=(), unexpected=(), interpolated=())


def kind_of(state: Mapping[str, Tensor], source: Path) -> type[Network]:
    """Return the network whose parameters these are, by what only it has. ValueError: it cannot be told."""
    if any(name.startswith("decoder.") for name in state):
        return AnswerNetwork
    if "head.2.weight" in state:
        return PairNetwork if len(state["head.2.weight"]) == 2 else EntailmentNetwork
    if "match_head.weight" in state:
        return Simla
    raise ValueError(
        f"{source} holds no checkpoint that is known: neither itm_head, cls_head nor text_decoder is there"
    )


def describe(state: Mapping[str, Tensor], source: Path, heads: int | None = None) -> ModelConfig:
    """Return the sizes of weights under our names; text that ends without [SEP], as the published code encodes it.

    ValueError: a table that decides a size is missing.
    """
    try:
        patch = state["image_encoder.patch_embed.proj.weight"]
        width, patches = patch.shape[0], state["image_encoder.pos_embed"].shape[1] - 1
        words, positions = (state[f"stream.embeddings.{table}.weight"] for table in ("word", "position"))
        up = state["image_encoder.blocks.0.mlp.fc1.weight"]
        intermediate = state["stream.layers.0.feed_forward.up.weight"]
    except KeyError as error:
        raise ValueError(f"{source} lacks {error.args[0]}: no image encoder with a text encoder") from None
    heads = heads or max(1, width // HEAD_SIZE)
    layers = _count(state, r"stream\.layers\.(\d+)\.")
    fused = _count(state, r"stream\.layers\.(\d+)\.cross_attention\.")
    if (
        "head.2.weight" in state and len(state["head.2.weight"]) == 2
    ):  # its upper half is there twice, see nlvr2.sources
        depth = 2 * layers // 3 if fused == layers else layers - fused // 2
        layers, fused = depth, depth if fused == layers else fused // 2
    projection = state.get("image_projection.weight")
    visual = state.get("visual_head.weight")
    return ModelConfig(
        vision=VisionConfig(
            image_size=round(patches**0.5) * patch.shape[-1],
            patch_size=patch.shape[-1],
            width=width,
            layers=_count(state, r"image_encoder\.blocks\.(\d+)\."),
            heads=heads,
            mlp_ratio=len(up) / width,
        ),
        stream=StreamConfig(
            shared=fused == layers,
            layers=layers,
            text_layers=layers - fused,
            fusion_layers=fused,
            width=words.shape[1],
            heads=heads,
            intermediate_size=len(intermediate),
            max_positions=len(positions),
            image_positions=trained_positions(patches, len(positions)),
            token_types="stream.embeddings.token_type.weight" in state,
        ),
        vocabulary=replace(ModelConfig().vocabulary, size=len(words), visual_size=1 if visual is None else len(visual)),
        projection_size=ModelConfig.projection_size if projection is None else len(projection),
    )


def at_resolution(config: ModelConfig, image_size: int) -> ModelConfig:
    """Return the configuration for pictures of another size; what was trained is resampled where it is read."""
    vision, stream = replace(config.vision, image_size=image_size), config.stream
    return replace(config, vision=vision, stream=replace(stream, image_positions=config.image_positions))


def _resized(source: Path, out: Path, tokenizer: Path | None, image_size: int | None) -> LoadReport:
    """Take a model folder of ours, pretraining's or a task's, to another resolution."""
    kind = next(network for network in (*NETWORKS, AssignmentNetwork) if network.task == task_of(source))
    config, weights = read_model_folder(source, kind)
    processor = SimlaProcessor.from_pretrained(source)
    config = at_resolution(config, image_size or config.vision.image_size)
    model, teacher = kind(config), None
    report = _load(model, source, weights)
    if (source / "teacher").is_dir():
        teacher = kind(config)
        _load(teacher, source / "teacher", read_model_folder(source / "teacher", kind)[1])
    most = processor.tokenizer.max_tokens
    save_model_folder(
        model,
        out,
        tokenizer or source,
        {"imported": source.name},
        teacher=teacher,
        max_words=processor.max_words,
        max_tokens=most,
        files={ANSWERS: (source / ANSWERS).read_text(encoding="utf-8")} if (source / ANSWERS).is_file() else {},
    )
    return report


def _load(network: Network, source: Path, state: Mapping[str, Tensor], ignored: list[str] | None = None) -> LoadReport:
    """Load a downstream network's parameters; NLVR2's tied keys and values stand in the file twice."""
    twice = network.state_dict().keys() - dict(network.named_parameters()).keys()
    once = {name: value for name, value in state.items() if name not in twice}
    return load_state(network, source, once, scope=("",), optional="mask_token$", ignored=ignored or ())


def _with_tokenizer(config: ModelConfig, folder: Path) -> ModelConfig:
    """Take the special ids from the tokenizer. ValueError when it has another number of words."""
    vocabulary = TextTokenizer(folder, add_sep=False).vocabulary
    if vocabulary.size != config.vocabulary.size:
        raise ValueError(
            f"the tokenizer in {folder} has {vocabulary.size} words, the checkpoint {config.vocabulary.size}: "
            "give the one it was trained with"
        )
    return replace(config, vocabulary=replace(vocabulary, visual_size=config.vocabulary.visual_size))


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})
