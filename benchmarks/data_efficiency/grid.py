"""What a grid file says: a configuration, the data, the measures, and which cells there are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from benchmarks.data_efficiency.identity import ROOT, config_hash
from benchmarks.data_efficiency.sets import SETS, Settings, merged
from simla_ds.config import VisionConfig

PLAIN = ""
"""The variant that changes nothing."""


@dataclass(frozen=True)
class Cell:
    """One training run of a grid."""

    objectives: str
    """A name of SETS."""
    fraction: float
    """Share of the training pairs."""
    seed: int
    variant: str = PLAIN
    """A name of Grid.variants."""

    @property
    def group(self) -> str:
        """Set and variant: what is averaged over seeds."""
        return f"{self.objectives}.{self.variant}" if self.variant else self.objectives

    @property
    def name(self) -> str:
        """Name on the command line and of its files, such as simla.official-1-0: set, variant, fraction, seed."""
        return f"{self.group}-{self.fraction:g}-{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a cell is trained."""

    ranks: int = 1
    """Processes of the launcher."""
    threads: int = 1
    """CPU threads of each, and of the measuring."""
    deepspeed: str = "ds_configs/zero2.json"


@dataclass(frozen=True, kw_only=True)
class Data:
    """The pairs: the embedded scenes, or shards of one's own."""

    scenes: Settings = field(default_factory=dict)
    """Options of scenes.prepare.SceneOptions, prepared on the first run; empty: none."""
    train: str = ""
    """Else shards, as data.train, with tokenizer and visual tokeniser beside them or in `config`."""
    test: Settings = field(default_factory=dict)
    """And the shards of each split that is measured, by its name."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """What is measured after training."""

    splits: Sequence[str] = ("test", "test_vendor", "test_pairing")
    pictures: int = 300
    """Pictures of each split, and captions to choose among."""
    rerank: int = 8
    """Candidates that ITM orders."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid file. Raises ValueError for what cannot be, naming the choices."""

    name: str
    about: str = ""
    """What a reader of the report should know: where it was run, or that and why it was not."""
    config: Settings
    """The recipe that all cells share: keys as in launch/recipes."""
    queue_size: int = 0
    """Keys in ITC's queue; never more than a quarter of a cell's pairs."""
    launch: Launch = Launch()
    data: Data
    measure: Measure = Measure()
    sets: Mapping[str, Settings] = field(default_factory=dict)
    """Changes to the configuration that a set of SETS was found to need, such as its own learning rate."""
    variants: Mapping[str, Settings] = field(default_factory=dict)
    """Changes to the configuration, by name."""
    cells: Sequence[Mapping[str, Any]]
    """Blocks of objectives x variants x fractions x seeds."""
    sentences: Sequence[Sequence[str]] = ()
    """Pairs of groups (set or set.variant) that the report compares."""

    def __post_init__(self):
        _among(self.sets, SETS, "sets")
        for number, block in enumerate(self.cells):
            where = f"cells[{number}]"
            _only(block, ("objectives", "variants", "fractions", "seeds"), where)
            _among(block.get("objectives", ()), SETS, f"{where}.objectives")
            _among([v for v in block.get("variants", ()) if v != PLAIN], self.variants, f"{where}.variants")
            for fraction in block.get("fractions", ()):
                if not (isinstance(fraction, (int, float)) and 0 < fraction <= 1):
                    raise ValueError(f"{where}.fractions: {fraction} is no share of the data; give 0.02, 0.1 or 1.0")
            for seed in block.get("seeds", ()):
                if not (isinstance(seed, int) and seed >= 0):
                    raise ValueError(f"{where}.seeds: {seed} is no seed; give whole numbers >= 0")
        if bool(self.data.scenes) == bool(self.data.train):
            raise ValueError("data: give either `scenes` or `train` with `test`")
        if not self.all_cells:
            raise ValueError("cells: there are none; each block needs objectives, fractions and seeds")
        groups = {cell.group for cell in self.all_cells}
        for pair in self.sentences:
            _among(pair, groups, "sentences")

    @property
    def all_cells(self) -> list[Cell]:
        """Every cell once: seed by seed, so that an unfinished grid compares as many sets as it can."""
        found = dict.fromkeys(cell for block in self.cells for cell in _cells(block))
        return sorted(found, key=lambda cell: cell.seed)

    @property
    def shared_hash(self) -> str:
        """Return what all cells have in common, as a hash: rows of another one are not comparable."""
        shared = (self.config, self.queue_size, asdict(self.launch), asdict(self.data), asdict(self.measure))
        return config_hash(shared)

    def find(self, name: str) -> Cell:
        """Return the cell of a name. Raises ValueError with the choices for the part that is unknown."""
        cells = {cell.name: cell for cell in self.all_cells}
        if name in cells:
            return cells[name]
        group, fraction, seed = [*name.rsplit("-", 2), "", ""][:3]
        parts = (
            ("objectives", group, sorted({cell.group for cell in cells.values()})),
            ("fraction", fraction, sorted({f"{cell.fraction:g}" for cell in cells.values()}, key=float)),
            ("seed", seed, sorted({str(cell.seed) for cell in cells.values()})),
        )
        for what, given, known in parts:
            if given not in known:
                raise ValueError(f"--cell {name}: no {what} {given!r} in this grid; it has {', '.join(known)}")
        raise ValueError(f"--cell {name}: this grid has no such combination; --list shows its cells")

    def settings(self, cell: Cell) -> Settings:
        """Return the recipe of a cell, without paths and without what depends on the number of its pairs."""
        tuned, variant = self.sets.get(cell.objectives, {}), self.variants.get(cell.variant, {})
        return merged(self.config, tuned, variant, SETS[cell.objectives][1], {"train": {"seed": cell.seed}})

    def smoke(self) -> Grid:
        """Return the same sets and variants, each trained for a few steps on a few pairs: does everything run?

        The pairs are scenes, on one rank and without files of the grid's own, whatever it trains on.
        """
        from simla_ds.data.scenes.prepare import SPLIT_SIZES  # late: this imports torch, which reads its threads then

        splits = [name for name in self.measure.splits if name in SPLIT_SIZES] or ["test"]
        scenes = {"vocabulary_size": 800, "grid": self.vision.grid} | self.data.scenes
        scenes |= {"train": 160, "splits": {"val": 8} | dict.fromkeys(splits, 24), "codebook_size": 32}
        train = {"samples": 64, "steps": 0, "batch_size": 16, "grad_accumulation": 1}
        own_files = {"data": {"tokenizer": "", "visual_tokenizer": ""}, "init": {"text": "", "vision": ""}}
        few = {"train": train | {"diagnose_every": 2, "log_every": 2}, "data": {"workers": 0}}
        groups = dict.fromkeys(replace(cell, fraction=1.0, seed=0) for cell in self.all_cells)
        return replace(
            self,
            name=f"{self.name}-smoke",
            config=merged(self.config, few, own_files),
            launch=replace(self.launch, ranks=1),
            data=Data(scenes=scenes),
            measure=replace(self.measure, splits=splits, pictures=24, rerank=4),
            cells=[
                {"objectives": [c.objectives], "variants": [c.variant], "fractions": [1.0], "seeds": [0]}
                for c in groups
            ],
        )

    @property
    def vision(self) -> VisionConfig:
        """The image encoder that all cells share."""
        return VisionConfig(**self.config.get("model", {}).get("vision", {}))


def read_grid(path: Path) -> Grid:
    """Read a grid file. Raises ValueError, naming the file, for what it must not hold.

    Beside Grid's keys it may have `base`, another grid file in its folder whose keys it changes, and `recipe`, a file
    under the project's root whose settings lie under `config`.
    """
    try:
        content = _read_keys(path)
        _only(content, [item.name for item in fields(Grid)], "the file")
        for name, kind in (("launch", Launch), ("data", Data), ("measure", Measure)):
            _only(content.get(name, {}), [item.name for item in fields(kind)], name)
            content[name] = kind(**content.get(name, {}))
        missing = [name for name in ("name", "config", "cells") if name not in content]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing")
        return Grid(**content)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_keys(path: Path) -> Settings:
    """Return a file's keys, with those of its base and recipe below them."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no keys")
    base, recipe = content.pop("base", None), content.pop("recipe", None)
    if recipe is not None:
        content["config"] = merged(_read_keys(ROOT / recipe), content.get("config", {}))
    return content if base is None else merged(_read_keys(path.parent / base), content)


def _cells(block: Mapping[str, Any]) -> Iterator[Cell]:
    for seed in block.get("seeds", ()):
        for fraction in sorted(block.get("fractions", ()), reverse=True):
            for objectives in block.get("objectives", ()):
                for variant in block.get("variants", (PLAIN,)):
                    yield Cell(objectives, float(fraction), seed, variant)


def _only(given: Any, known: Sequence[str], where: str) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{where} must hold keys, got {given!r}")
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ValueError(f"{where} has {', '.join(unknown)}; known are {', '.join(known)}")


def _among(given: Any, known: Any, where: str) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{where}: unknown {name!r}; the choices are {', '.join(sorted(known))}")
