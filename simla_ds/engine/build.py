"""From a configuration to everything a run needs, refusing what cannot work before anything is written."""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from simla_ds.config import Config
from simla_ds.data.loader import PairLoader, StreamLoader
from simla_ds.data.shards import REMOTE, find_shards
from simla_ds.data.text import TextTokenizer, require_same_words
from simla_ds.data.visual_tokens import load_visual_tokenizer
from simla_ds.engine.distributed import Ranks, broadcast_object, require_alike
from simla_ds.engine.watch import Watch
from simla_ds.engine.zero_teacher import Engine, EngineSource
from simla_ds.model.pretrained import initialise
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.task import PretrainTask
from simla_ds.teacher import Teacher

LIBRARIES = ("torch", "deepspeed", "transformers", "timm", "webdataset", "tokenizers", "safetensors", "triton", "numpy")

CHECKPOINT_BYTES_PER_PARAMETER = 18
"""fp32 weights, AdamW's two moments and the teacher, and room for the queues."""


@dataclass
class Parts:
    """What a run is made of, before DeepSpeed wraps the task."""

    config: Config
    """Completed: data paths and vocabularies filled in."""
    loader: StreamLoader
    task: Any
    """The module that the engine wraps: PretrainTask, or one with the same `model`, `teacher`, `queue`, `counted` and
    forward."""
    watch: Callable[[Engine, EngineSource], Any]
    """Makes what is measured beside the training step (see engine.watch.Watch)."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Texts that belong into model folders, by file name."""


Builder = Callable[[Config, Ranks, torch.dtype, AbstractContextManager[Any]], Parts]


def build(config: Config, ranks: Ranks, dtype: torch.dtype, building: AbstractContextManager[Any]) -> Parts:
    """Find or prepare the data, check that everything fits, build student, teacher, queue and task.

    building: what the student is built within, and its weights are loaded (see zero_init).

    Raises:
        ValueError: the first thing that cannot work, with the setting to change.
    """
    config = with_data_paths(config, ranks)
    tokenizer = TextTokenizer(
        Path(config.data.tokenizer),
        max_tokens=config.data.max_tokens,
        add_sep=config.model.vocabulary.add_sep,
    )
    if config.init.checkpoint:
        require_same_words(Path(config.data.tokenizer), Path(config.init.checkpoint))
    visual_tokenizer = None
    if config.reads_visual_tokens:
        visual_tokenizer = load_visual_tokenizer(Path(config.data.visual_tokenizer), config.model.vision.grid)
    visual_size = visual_tokenizer.vocabulary_size if visual_tokenizer else config.model.vocabulary.visual_size or 1
    vocabulary = replace(tokenizer.vocabulary, visual_size=visual_size)
    config = replace(config, model=replace(config.model, vocabulary=vocabulary))
    view_size = visual_tokenizer.view_size if visual_tokenizer else 0
    loader = PairLoader(config, tokenizer, view_size, ranks.rank, ranks.world_size)
    check_sizes(config, loader.epoch_size)
    if config.runs_itm and config.train.batch_size * ranks.world_size < 2:
        raise ValueError("train.batch_size=1 on one rank leaves ITM without a wrong picture to choose; set it to 2")
    if ranks.world_size > 1:
        require_alike(config.data.named, "shards", loader.fingerprint)
    torch.manual_seed(config.train.seed)  # the same start weights on every rank
    with building:
        model = Simla(config.model)
        check_disk(config, sum(p.numel() for p in model.parameters()))
        for report in initialise(model, config.init):
            ranks.say(str(report))
        model.temperature.clamp_()
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    teacher = Teacher(model, dropout=config.teacher_dropout, dtype=dtype, device=ranks.device)
    queue = FeatureQueue.start(config).to(ranks.device)
    torch.manual_seed(config.train.seed + 1 + ranks.rank)  # dropout differs between ranks
    task = PretrainTask(model, teacher, queue, config)
    if visual_tokenizer is not None:
        visual_tokenizer.to(ranks.device)
    return Parts(config, loader, task, lambda e, s: Watch(config, e, task, s, tokenizer, visual_tokenizer))


def with_data_paths(config: Config, ranks: Ranks) -> Config:
    """Fill in where data and the tokenisers that are read are; prepare the embedded scenes when they are asked for."""
    data = config.data
    beside = {"tokenizer": "tokenizer", **({"visual_tokenizer": "visual_tokens"} if config.reads_visual_tokens else {})}
    if not (data.train or data.sources):
        root = Path(data.scenes_dir)
        _prepare_scenes(root, data.scenes_train, config.model.vision.image_size, config.model.vision.grid, ranks)
        data = replace(data, train=str(root / "train"), val=data.val or str(root / "val"))
    train = next((source.shards for source in data.sources.values()), data.train)
    find_shards(train, remote=True)  # first of all: without shards nothing beside them is found either
    for name in beside:
        if train.startswith(REMOTE) and not getattr(data, name):
            raise ValueError(f"data.{name} must be a local folder when the shards of {train} are elsewhere; name it")
    shards = Path(train)
    folder = shards if shards.is_dir() else shards.parent
    if not data.val and folder.name == "train" and (folder.parent / "val").is_dir():
        data = replace(data, val=str(folder.parent / "val"))
    found: dict[str, Any] = {key: getattr(data, key) or str(folder.parent / name) for key, name in beside.items()}
    return replace(config, data=replace(data, **found))


def _prepare_scenes(root: Path, train: int, size: int, grid: int, ranks: Ranks) -> None:
    """Make the scenes on the main rank, unless they are there already."""
    problem = None
    if ranks.is_main:
        from simla_ds.data.scenes.prepare import prepare_scenes

        try:
            prepare_scenes(root, train=train, size=size, grid=grid)
        except FileExistsError as error:
            problem = f"{error} (data.scenes_dir={root}, data.scenes_train={train}, {size} px, {grid} x {grid} patches)"
        except (OSError, ValueError) as error:  # the other ranks wait for the word
            problem = f"data.scenes_dir={root}: {error}"
    if problem := broadcast_object(problem):
        raise ValueError(problem)


def check_sizes(config: Config, epoch_size: int) -> None:
    """Raise ValueError when queue or captions do not go with an epoch of so many examples, or with the model."""
    queue = config.objectives.itc.queue_size
    if queue > epoch_size // 4:
        raise ValueError(
            f"objectives.itc.queue_size={queue} is more than a quarter of the {epoch_size} training pairs: the queue "
            f"would hold the pictures it is contrasted with; set objectives.itc.queue_size <= {epoch_size // 4}"
        )
    if config.data.max_tokens > config.model.stream.max_positions:
        raise ValueError(
            f"data.max_tokens={config.data.max_tokens} exceeds model.stream.max_positions="
            f"{config.model.stream.max_positions}; lower the one or raise the other"
        )


def check_disk(config: Config, parameters: int) -> None:
    """Raise ValueError when a run's checkpoints would not fit the disk."""
    folder = Path(config.output)
    while not folder.exists():
        folder = folder.parent
    present = len(list(Path(config.output).glob("checkpoints/step_*")))  # of a run that is resumed
    needed = parameters * CHECKPOINT_BYTES_PER_PARAMETER * max(1, config.train.keep_checkpoints + 1 - present)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 2**30:.1f} GiB free, {config.train.keep_checkpoints} checkpoints and one being "
            f"written need about {needed / 2**30:.1f} GiB beside the {present} that are there; set another --output or "
            "--train.keep_checkpoints 1"
        )


def describe_environment(ranks: Ranks, precision: str, zero_stage: int) -> dict[str, Any]:
    """Return what a run ran on, for environment.json."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else platform.processor(),
        "world_size": ranks.world_size,
        "threads": torch.get_num_threads(),
        "precision": precision,
        "zero_stage": zero_stage,
        "versions": library_versions(),
    }


def library_versions() -> dict[str, str | None]:
    """Return the versions of the libraries that a run depends on; None for those not installed."""
    versions: dict[str, str | None] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def same_model(ours: Config, theirs: dict[str, Any], path: Path) -> None:
    """Raise ValueError when a checkpoint's model section differs, naming the first field and both values."""
    difference = _first_difference(asdict(ours.model), theirs, "model")
    if difference:
        name, now, then = difference
        raise ValueError(f"{path} was trained with {name}={then}, this run has {now}; set --{name} {then} or --output")


def _first_difference(ours: Any, theirs: Any, name: str) -> tuple[str, Any, Any] | None:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            found = _first_difference(value, theirs.get(key), f"{name}.{key}")
            if found:
                return found
        return None
    return None if ours == theirs else (name, ours, theirs)
