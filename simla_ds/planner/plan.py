"""A row per ZeRO layout, with and without activation checkpointing: what it holds, whether it fits, how fast it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from simla_ds.config import Config, VocabularyConfig
from simla_ds.planner.cards import GIB, Card
from simla_ds.planner.memory import FULL, Memory, Parameters, Zero, count_parameters, plan_memory
from simla_ds.planner.shape import CAPTION_TOKENS, StepShape
from simla_ds.planner.speed import Seconds, Sent, bytes_sent, step_seconds

RESERVED = 2 * GIB
"""Of a card: CUDA's context, NCCL's buffers, and what the allocator loses to fragments (assumed)."""
ASSUMED = VocabularyConfig(size=30_522, visual_size=8_192)
"""bert-base-uncased's words and the DALL-E dVAE's tokens, where no tokeniser is at hand."""
MOST_PAIRS = 4096


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What is trained on."""

    card: Card
    nodes: int = 1
    cards: int = 8
    """Of each node."""
    utilisation: float = 0.35
    """Share of the card's peak that the step's arithmetic reaches: assumed, not measured."""

    @property
    def ranks(self) -> int:
        """n."""
        return self.nodes * self.cards


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to train."""

    zero: Zero
    checkpointing: bool
    memory: Memory
    """At the recipe's micro batch."""
    fits: bool
    largest: int
    """Pairs of the largest micro batch that fits; 0: none."""
    batch: int
    """Micro batch that the figures below are for: the recipe's, or the largest that fits."""
    seconds: Seconds | None
    sent: Sent
    pairs_per_second: float
    days: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows, and what they were computed for."""

    config: Config
    hardware: Hardware
    precision: str
    parameters: Parameters
    pairs: int
    assumed_vocabulary: bool
    rows: list[Row]


def make_plan(
    config: Config,
    hardware: Hardware,
    layouts: Sequence[Zero],
    *,
    pairs: int = 0,
    caption_tokens: float = CAPTION_TOKENS,
) -> Plan:
    """Compute every layout with and without activation checkpointing.

    Args:
        config: a recipe. layouts: what to compare. pairs: to train on; 0: the recipe's.
        caption_tokens: mean tokens of a caption.

    Raises:
        ValueError: a step that the formulas do not describe.
    """
    _check(config)
    config, assumed = _with_vocabulary(config)
    precision = config.train.precision
    if precision == "auto":
        precision = "fp32" if hardware.card.cpu else "bf16"
    size, parameters = FULL if precision == "fp32" else FULL // 2, count_parameters(config.model)
    steps = config.train.steps * config.train.batch_size * config.train.grad_accumulation * hardware.ranks
    pairs = pairs or steps or config.train.samples
    rows = [
        _row(_with(config, activation_checkpointing=on), hardware, zero, size, parameters, pairs, caption_tokens)
        for zero in layouts
        for on in (False, True)
    ]
    return Plan(
        config=config,
        hardware=hardware,
        precision=precision,
        parameters=parameters,
        pairs=pairs,
        assumed_vocabulary=assumed,
        rows=rows,
    )


def _row(
    config: Config, hardware: Hardware, zero: Zero, size: int, parameters: Parameters, pairs: int, caption_tokens: float
) -> Row:
    room = hardware.card.memory - (0 if hardware.card.cpu else RESERVED)

    def memory(batch: int) -> Memory:
        at = _with(config, batch_size=batch)
        shape = StepShape.expected(at, caption_tokens)
        found = plan_memory(at, shape, zero, hardware.ranks, size, parameters, cpu=hardware.card.cpu)
        return replace(found, parts={**found.parts, "host": found.host}, host=0.0) if hardware.card.cpu else found

    low, high = 1, MOST_PAIRS + 1  # ITM needs two pairs: one is no batch
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory(middle).peak <= room else (low, middle)
    largest = low if low > 1 else 0
    wanted = config.train.batch_size
    batch = min(wanted, largest)
    seconds, rate = None, 0.0
    if batch:
        at = _with(config, batch_size=batch)
        shape = StepShape.expected(at, caption_tokens)
        nodes, ranks = hardware.nodes, hardware.ranks
        seconds = step_seconds(at, shape, zero, hardware.card, nodes, ranks, size, parameters, hardware.utilisation)
        rate = batch * config.train.grad_accumulation * ranks / seconds.total
    own = memory(wanted)
    return Row(
        zero=zero,
        checkpointing=config.train.activation_checkpointing,
        memory=own,
        fits=own.peak <= room,
        largest=largest,
        batch=batch,
        seconds=seconds,
        sent=bytes_sent(config, zero, hardware.ranks, size, parameters),
        pairs_per_second=rate,
        days=pairs / rate / 86_400 if rate else float("inf"),
    )


def _with(config: Config, **train: object) -> Config:
    return replace(config, train=replace(config.train, **train))  # pyright: ignore[reportArgumentType]  by name


def _check(config: Config) -> None:
    """Refuse what the formulas do not describe, by the first setting that leaves it."""
    objectives = config.objectives
    off = [name for name in objectives.names if name not in objectives.enabled]
    cheaper = {
        f"objectives.{off[0] if off else ''}.weight 0": bool(off),
        "objectives.fidelity official": config.official,
        "train.passes plain": config.train.passes != "fast",
        "objectives.xmm.visible_only true": objectives.xmm.visible_only,
        f"objectives.xmm.every {objectives.xmm.every}": objectives.xmm.every > 1,
        "model.stream.shared false": not config.model.stream.shared,
    }
    dearer = {
        "objectives.itm.negatives global": objectives.itm.negatives == "global",
        "objectives.xmm.text_keys encoded": objectives.xmm.text_keys == "encoded",
    }
    for bound, settings in (("an upper", cheaper), ("a lower", dearer)):
        for setting in (name for name, wrong in settings.items() if wrong):
            raise ValueError(
                f"the plan's formulas describe the corrected step of all five objectives in fast passes; {setting} is "
                f"another one: leave it out to have {bound} bound"
            )


def _with_vocabulary(config: Config) -> tuple[Config, bool]:
    """Fill in the tokenisers' sizes, and say whether they are assumed."""
    vocabulary = config.model.vocabulary
    if vocabulary.size and vocabulary.visual_size:
        return config, False
    folders = [config.data.tokenizer, config.data.visual_tokenizer]
    if not any(folders) and not config.data.train:
        folders = [f"{config.data.scenes_dir}/tokenizer", f"{config.data.scenes_dir}/visual_tokens"]
    size, codes = vocabulary.size or ASSUMED.size, vocabulary.visual_size or ASSUMED.visual_size
    found, assumed = replace(ASSUMED, size=size, visual_size=codes), True
    if all(folder and Path(folder).is_dir() for folder in folders):
        from simla_ds.data.text import TextTokenizer
        from simla_ds.data.visual_tokens import load_visual_tokenizer

        words = TextTokenizer(Path(folders[0]), max_tokens=config.data.max_tokens).vocabulary
        codes = load_visual_tokenizer(Path(folders[1]), config.model.vision.grid).vocabulary_size
        found, assumed = replace(words, visual_size=codes), False
    return replace(config, model=replace(config.model, vocabulary=found)), assumed
