"""What the trainer needs to fine-tune a downstream task: the counterpart of engine.build, and of engine.watch."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from simla_ds.config import Config, ModelConfig
from simla_ds.data.text import TextTokenizer, require_same_words
from simla_ds.downstream.annotations import Annotations
from simla_ds.downstream.base import Downstream, TaskNetwork
from simla_ds.downstream.config import FinetuneConfig
from simla_ds.downstream.evaluation import write_predictions
from simla_ds.downstream.examples import ExampleLoader, ExampleMaker, held_out_batches
from simla_ds.downstream.tasks import ANSWERS, load_annotations, make_task, read_answers
from simla_ds.downstream.text_assignment import AssignmentNetwork
from simla_ds.downstream.vqa import answer_list, given_answers
from simla_ds.engine.build import Parts, check_disk, check_sizes, same_model, with_data_paths
from simla_ds.engine.distributed import Ranks, broadcast_object, gather_objects, require_alike
from simla_ds.engine.watch import plain_student
from simla_ds.engine.zero_teacher import Engine, EngineSource
from simla_ds.evaluation import evaluating
from simla_ds.hub import read_model_folder, task_of
from simla_ds.model.network import Network
from simla_ds.model.simla import Simla
from simla_ds.teacher import Teacher

Pretrained = tuple[type[Network], dict[str, torch.Tensor]]
"""The class of a pretrained network, and its weights, still on disk."""


def build_finetuning(config: Config, ranks: Ranks, dtype: torch.dtype, building: AbstractContextManager[Any]) -> Parts:
    """Read and check the entries, build the task's network from a pretrained one, its teacher and its loader.

    building: what networks are built within, and their weights are loaded (see zero_init).
    Raises ValueError: the first thing that cannot work, or everything that is wrong with an annotation file.
    """
    if not isinstance(config, FinetuneConfig):
        raise TypeError("build_finetuning needs a FinetuneConfig")
    config, pretrained = _with_pretrained(config)  # first: scenes take minutes, a wrong folder none
    config = _with_data(config, ranks)
    if pretrained is None:
        config = _with_vocabulary(config)
    data = config.data
    tokenizer = TextTokenizer(Path(data.tokenizer), max_tokens=data.max_tokens, add_sep=config.model.vocabulary.add_sep)
    if pretrained is not None:
        require_same_words(Path(data.tokenizer), Path(config.init.checkpoint))
    train = load_annotations(config.task, data.train, data.image_root, limit=data.scenes_used)
    held_out = load_annotations(config.task, data.val, data.image_root)
    answers = _answers(config, train, ranks) if config.task == "vqa" else []
    downstream = make_task(config.task, tokenizer, answers, official=config.official, rerank=config.eval.rerank)
    train, held_out = downstream.checked(train, train=True), downstream.checked(held_out, train=False)
    for remark in dict.fromkeys((*downstream.remarks(train), *downstream.remarks(held_out))):
        ranks.say(remark)
    if data.max_words not in (0, downstream.max_words):
        raise ValueError(
            f"data.max_words={data.max_words}: {config.task} keeps {downstream.max_words} words of a text, as "
            "published; leave it out"
        )
    config = replace(config, data=replace(data, max_words=downstream.max_words))  # which the model folder states
    config = replace(config, eval=replace(config.eval, metric=config.eval.metric or f"eval/{downstream.metric}"))
    loader = ExampleLoader(
        config, train, ExampleMaker(config, downstream, tokenizer, train=True), ranks.rank, ranks.world_size
    )
    check_sizes(config, loader.epoch_size)
    if ranks.world_size > 1:
        require_alike("data.train", "annotations", loader.fingerprint)
    with building:
        model = _network(downstream, config, pretrained)
        check_disk(config, sum(p.numel() for p in model.parameters()))
    if pretrained is not None:
        ranks.say(f"{config.init.checkpoint}: pretrained weights loaded")
    model.set_activation_checkpointing(config.train.activation_checkpointing)
    teacher = Teacher(model, dropout=config.teacher_dropout, dtype=dtype, device=ranks.device)
    torch.manual_seed(config.train.seed + 1 + ranks.rank)  # dropout differs between ranks
    task: Any = downstream.module(model, teacher, config)
    task.queue.to(ranks.device)
    maker = ExampleMaker(config, downstream, tokenizer, train=False)
    files = {ANSWERS: json.dumps(answers)} if answers else {}
    return Parts(
        config, loader, task, lambda e, s: TaskWatch(config, e, task, s, downstream, held_out, maker, ranks), files
    )


class TaskWatch:
    """Held-out measures and predictions of a task; entries are shared among ranks, each is counted once."""

    def __init__(
        self,
        config: FinetuneConfig,
        engine: Engine,
        task: Any,
        source: EngineSource,
        downstream: Downstream,
        held_out: Annotations,
        maker: ExampleMaker,
        ranks: Ranks,
    ):
        self.config, self.engine, self.task, self.source = config, engine, task, source
        self.downstream, self.held_out, self.maker, self.ranks = downstream, held_out, maker, ranks
        self.predictions: list[dict[str, Any]] = []

    def prepare(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Move a batch to the device."""
        return {name: value.to(self.ranks.device, non_blocking=True) for name, value in batch.items()}

    def saw(self, batch: dict[str, torch.Tensor]) -> None:
        """Take note of nothing: a task has no visual codes."""

    def monitor(self) -> dict[str, float]:
        """Return nothing besides what every run logs."""
        return {}

    def evaluate(self) -> dict[str, float]:
        """Return `eval/NAME` of the protocol's measures, of the student; every rank must call it."""
        student = plain_student(self.task, self.engine, self.source)
        whole = self.downstream.whole
        rank, world_size = (0, 1) if whole else (self.ranks.rank, self.ranks.world_size)
        settings = self.config.eval
        where = {"limit": settings.samples, "rank": rank, "world_size": world_size}
        batches = held_out_batches(self.held_out, self.maker, settings.batch_size, self.config.data, **where)
        with evaluating(student):
            own = self.downstream.predictions(student, batches)
        parts = [own] if whole else gather_objects(own)
        self.predictions = [p for part in parts for p in part]
        if not whole:
            self.predictions.sort(key=lambda prediction: prediction["entry"])
        measures = self.downstream.measures(self.held_out.entries, self.predictions)
        return {f"eval/{name}": value for name, value in measures.items()}

    @staticmethod
    def summary(record: dict[str, Any]) -> str:
        """Return a line for people."""
        get = {name.removeprefix("eval/"): value for name, value in record.items() if name.startswith("eval/")}
        shown = " ".join(f"{name} {value:.1f}" for name, value in get.items() if "/" not in name)
        return f"step {record['step']} held out | {shown}"

    def write_predictions(self, folder: Path) -> None:
        """Write what the last evaluation predicted, with the entries, to folder/predictions.jsonl."""
        write_predictions(folder / "predictions.jsonl", self.held_out, self.predictions)

    def gradient_shares(self, batch: Any, alpha: float) -> dict[str, float]:
        """Return nothing: a task has one loss."""
        return {}


def _with_pretrained(config: FinetuneConfig) -> tuple[FinetuneConfig, Pretrained | None]:
    """Read the pretrained model, whose sizes the run has; None from scratch."""
    if not config.init.checkpoint:
        return config, None
    folder = Path(config.init.checkpoint)
    assigned = config.task == "nlvr2" and task_of(folder) == AssignmentNetwork.task
    kind = AssignmentNetwork if assigned else Simla
    model, weights = read_model_folder(folder, kind)
    if config.model != ModelConfig():
        same_model(config, asdict(model), folder)
    return replace(config, model=model), (kind, weights)


def _with_data(config: FinetuneConfig, ranks: Ranks) -> FinetuneConfig:
    """Fill in where the entries are; prepare the embedded scenes when they are asked for."""
    data = config.data
    if data.train.endswith((".json", ".jsonl")):
        if not data.val:
            raise ValueError(f"data.train={data.train} needs held-out entries beside it: set data.val to another file")
        if not (data.tokenizer or config.init.checkpoint):
            raise ValueError("without --model, an annotation file needs data.tokenizer, the folder of a tokenizer")
        return replace(config, data=replace(data, tokenizer=data.tokenizer or config.init.checkpoint))
    if not data.train:
        config = _with_scenes(config)
    filled: Any = with_data_paths(config, ranks)
    tokenizer = config.data.tokenizer or config.init.checkpoint or filled.data.tokenizer
    if not filled.data.val:
        raise ValueError(f"data.train={filled.data.train} has no `val` beside it: set data.val")
    return replace(filled, data=replace(filled.data, tokenizer=tokenizer))


def _with_scenes(config: FinetuneConfig) -> FinetuneConfig:
    """Take the scenes that are there, however many; else have as many prepared as are used, in a folder of their own.

    Of their own: pretraining would not accept a scenes_dir with fewer than it asks for.
    """
    data = config.data
    there = broadcast_object((Path(data.scenes_dir) / "manifest.json").is_file())
    if there:
        folder = Path(data.scenes_dir)
        data = replace(data, train=str(folder / "train"), val=data.val or str(folder / "val"))
    elif 0 < data.scenes_used < data.scenes_train:
        data = replace(data, scenes_dir=f"{data.scenes_dir}_{data.scenes_used}", scenes_train=data.scenes_used)
    return replace(config, data=data)


def _with_vocabulary(config: FinetuneConfig) -> FinetuneConfig:
    """From scratch the vocabulary is the tokenizer's."""
    tokenizer = TextTokenizer(Path(config.data.tokenizer), add_sep=config.model.vocabulary.add_sep)
    vocabulary = replace(tokenizer.vocabulary, visual_size=1)  # no task reads visual tokens
    return replace(config, model=replace(config.model, vocabulary=vocabulary))


def _network(downstream: Downstream, config: FinetuneConfig, pretrained: Pretrained | None) -> Network:
    """Return the task's network, started from a pretrained one where there is one."""
    start = None
    if pretrained is not None:
        kind, weights = pretrained
        start = kind(config.model).take(weights)
    # not a subclass: text assignment's network is NLVR2's with another head
    if start is not None and type(start) is downstream.network:
        return start
    torch.manual_seed(config.train.seed)  # the same start weights on every rank
    network = downstream.network(config.model)
    if start is not None and isinstance(network, TaskNetwork):
        network.start_from(start)
    return network


def _answers(config: FinetuneConfig, train: Annotations, ranks: Ranks) -> list[str]:
    """Return the answer list; say how much of the training file it leaves out."""
    file = config.data.answers
    answers = read_answers(Path(file)) if file else answer_list(train.entries, config.data.max_answers)
    given = {answer for entry in train.entries for answer in given_answers(entry) if isinstance(answer, str)}
    outside = len(given.difference(answers))
    if outside:
        ranks.say(
            f"{outside} of {len(given)} answers of {train.source} are not among the {len(answers)} of "
            f"{file or 'data.max_answers'}: they are trained on and never ranked"
        )
    return answers
