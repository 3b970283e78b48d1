"""Which measures the report shows, and what they are called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from benchmarks.data_efficiency.grid import Grid
from benchmarks.data_efficiency.measures import (
    chance_recall,
    mean_recall,
    random_average_precision,
    recall_at,
    thing_names,
    things_there,
)
from benchmarks.data_efficiency.rows import Row
from simla_ds.data.scenes.compose import compose, describe
from simla_ds.data.scenes.prepare import SceneOptions
from simla_ds.data.scenes.splits import SPLITS


@dataclass(frozen=True)
class Headline:
    """A measure of a split, in percent."""

    name: str
    chance: str = ""
    """The measure that says what chance gets; empty: 50."""
    oracle: str = ""
    """The measure that says what one fixed answer gets, fitted to the labels of the test."""


PRIMARY = "retrieval/itc/mean_recall"
"""What fractions are compared by, and verdicts are given on."""
_KEYWORDS = {"chance": "keywords/random/average_precision", "oracle": "keywords/prior/average_precision"}


def headlines(rerank: int) -> dict[str, Headline]:
    """Return the measures by their names in rows, for ITM that orders so many candidates."""
    depths = ", ".join(f"R@{k}" for k in recall_at(rerank))
    return {
        PRIMARY: Headline("mean recall, ITC", "retrieval/chance/mean_recall"),
        "retrieval/itm/mean_recall": Headline(f"mean of {depths}, ITM", "retrieval/chance_itm/mean_recall"),
        "keywords/itc/average_precision": Headline("keyword AP, ITC", **_KEYWORDS),
        "keywords/psl/average_precision": Headline("keyword AP, PSL head", **_KEYWORDS),
        "swaps/itc/mean": Headline("swap probes, ITC"),
        "swaps/itm/mean": Headline("swap probes, ITM"),
        "grounding/proposal_iou50": Headline("grounding accuracy", "grounding/proposal_random"),
        "grounding/pointing": Headline("pointing", "grounding/centre"),
    }


def explained(rerank: int) -> str:
    """Say what the headlines mean."""
    depths = " and ".join(f"R@{k}" for k in recall_at(rerank))
    return (
        "Mean recall, ITC: of R@1, R@5 and R@10, both ways. ITM orders ITC's first "
        f"{rerank} candidates, so that only {depths} are its own: the mean is of those, and compares with no other "
        "column. Keyword AP: things of the kit ranked by how likely they are in a picture; chance is a random order, "
        "the oracle one order for all pictures by how often things are in these very pictures, which no model is told. "
        "Swap probes: a caption against itself with an attribute, a noun or a relation changed; chance is 50. "
        "Grounding accuracy: the named one of the scene's boxes; pointing: the heat map's peak lies in its box, and "
        "chance points at the middle. A dash: the set trains nothing that could tell."
    )


def filled_in(row: Row, grid: Grid) -> Row:
    """Return a finished row with what rows of older code lack.

    Mean recalls by ITM of the depths that ITM decides, with their chance, and what a random order of keywords gets.
    """
    return {**row, "metrics": {who: _filled_in(metrics, grid) for who, metrics in row["metrics"].items()}}


def _filled_in(metrics: Mapping[str, float], grid: Grid) -> dict[str, float]:
    found, depths, pictures = dict(metrics), recall_at(grid.measure.rerank), grid.measure.pictures
    for split in grid.measure.splits:
        start = f"{split}/retrieval/"
        recalls = {key.removeprefix(start): value for key, value in metrics.items() if key.startswith(start)}
        if "itm/mean_recall" in recalls:
            found[f"{start}itm/mean_recall"] = mean_recall(recalls, "itm", depths)
        # older rows are of scenes, with a caption each
        found.setdefault(f"{start}chance_itm/mean_recall", chance_recall(round(recalls["captions"]), depths))
        random = f"{split}/keywords/random/average_precision"
        if f"{split}/keywords/prior/average_precision" in metrics and random not in metrics:
            options = SceneOptions(**grid.data.scenes)
            found[random] = _random_keywords(split, min(pictures, options.splits[split]), options.seed, options.size)
    return found


@cache
def _random_keywords(split: str, pictures: int, seed: int, size: int) -> float:
    """Return what a random order of things gets on the first scenes of a split, planned once more."""
    plans = [(number, *compose(split, number, seed, size)) for number in range(pictures)]
    scenes = [describe(plan, caption, SPLITS[split], number, size) for number, plan, caption in plans]
    return random_average_precision(things_there(scenes, thing_names()))
