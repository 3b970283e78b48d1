"""What a run looks like: its curves, a table of retrieval, a sheet of what was retrieved, right and wrong."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from simla_ds.data.transforms import CLIP_MEAN, CLIP_STD
from simla_ds.downstream.retrieval import DIRECTIONS, Ranking, RetrievalResult
from simla_ds.objectives import OBJECTIVES

RIGHT, WRONG, INK, PAPER = "#1a9641", "#bbbbbb", "black", "white"
TILE, GAP, COLUMN, LINE, ANSWERS = 128, 10, 250, 16, 5


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl, in the order of their steps; of a step done twice the later lines.

    A run that was killed and resumed repeats the steps after its checkpoint. Raises ValueError when there is no line.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} is no run folder: metrics.jsonl is missing")
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(text)
        except ValueError:  # the last line of a killed run
            continue
        lines[record["step"], _kind(record)] = record
    if not lines:
        raise ValueError(f"{path} holds no line yet")
    return sorted(lines.values(), key=lambda record: record["step"])


def _kind(record: dict[str, Any]) -> str:
    """Tell training, evaluation and other lines apart by what they hold."""
    if "loss" in record:
        return "training"
    return "evaluation" if any(name.startswith("eval/") for name in record) else "other"


def evaluations(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the evaluation lines."""
    return [line for line in lines if _kind(line) == "evaluation"]


def series(lines: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Return pairs seen and values of one number, where it was written."""
    points = [(line["samples_seen"], line[name]) for line in lines if isinstance(line.get(name), (int, float))]
    return [x for x, _ in points], [y for _, y in points]


def draw_curves(run: Path, out: Path) -> None:
    """Write a PNG: losses in training and on held-out pairs, recall at 1, keywords, accuracies, over pairs seen."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = read_metrics(run)
    rows = -(-(len(OBJECTIVES) + 3) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(18, 4 * rows), layout="constrained")
    panels = iter(axes.flat)
    for name in OBJECTIVES:
        _draw_loss(next(panels), lines, name)
    _draw_recall(next(panels), lines)
    for title, names in (
        ("keywords: average precision", ("psl/average_precision", "psl/frequency_prior")),
        ("accuracy", ("itm/accuracy_matched", "itm/accuracy_unmatched", "mlm/accuracy", "xmm/accuracy")),
    ):
        axis = next(panels)
        for key in names:
            axis.plot(*series(lines, f"eval/student/{key}"), marker=".", label=key)
        _finish(axis, title)
    figure.savefig(out, dpi=100)
    plt.close(figure)


def _draw_loss(axis: Any, lines: Sequence[dict[str, Any]], name: str) -> None:
    axis.plot(*series(lines, f"loss/{name}"), color="#9ecae1", linewidth=1, label="training")
    for who, colour in (("student", "#08519c"), ("teacher", "#e6550d")):
        points = series(lines, f"eval/{who}/loss/{name}")
        axis.plot(*points, color=colour, marker="o", markersize=4, label=f"held out, {who}")
    _finish(axis, f"loss/{name}")


def _draw_recall(axis: Any, lines: Sequence[dict[str, Any]]) -> None:
    for score, style in (("itc", "--"), ("itm", "-")):
        for direction, colour in zip(DIRECTIONS, ("#31a354", "#756bb1"), strict=True):
            x, y = series(lines, f"eval/student/retrieval/{score}/{direction}/r1")
            axis.plot(x, y, style, color=colour, marker=".", label=f"{score} {direction.replace('_', ' ')}")
    _finish(axis, "held-out R@1, %")


def _finish(axis: Any, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("pairs seen")
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8)


def retrieval_table(result: RetrievalResult) -> str:
    """Return a table of recall in percent, with R@1 over chance and what duplicate captions leave possible."""
    rows = [f"{result.captions} captions of {result.pictures} pictures; recall in %"]
    rows.append(f"{'':20}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'x chance':>10}{'mean rank':>11}{'median':>8}")
    for key, ranking in result.rankings.items():
        m, direction = ranking.measures(), key.partition("/")[2]
        rows.append(
            f"{key.replace('/', ' ').replace('_', ' '):20}{m['r1']:8.1f}{m['r5']:8.1f}{m['r10']:8.1f}"
            f"{m['r1'] / result.chance[direction]:10.1f}{m['mean_rank']:11.1f}{m['median_rank']:8.0f}"
        )
    for direction in DIRECTIONS:
        best = "".join(f"{result.ceilings[f'{direction}/r{k}']:8.1f}" for k in (1, 5, 10))
        rows.append(f"{'max ' + direction.replace('_', ' '):20}{best}")
    return "\n".join(rows) + "\n(max: captions in the same words, of different pictures, cannot be told apart)"


@dataclass(frozen=True)
class Sheet:
    """What a sheet of retrieved examples is drawn from."""

    rankings: dict[str, Ranking]
    """By direction: `text_to_image`, `image_to_text`."""
    picture: Callable[[int], Image.Image]
    """A picture by its number."""
    captions: Sequence[str]
    """(T,)"""
    image_of_caption: Sequence[int]
    """(T,)"""


def retrieval_picture(sheet: Sheet, out: Path, examples: int = 4) -> None:
    """Write a PNG: captions with the five pictures found, and pictures with the five captions found.

    Of each kind up to `examples` queries answered right at once and as many that were not, evenly from all queries.
    What is right has a green frame or green letters; the place of the right answer is written beside each query.
    """
    picked = {direction: _pick(ranking.rank, examples) for direction, ranking in sheet.rankings.items()}
    rows = sum(len(queries) for queries in picked.values())
    page = Image.new("RGB", (COLUMN + ANSWERS * (TILE + GAP) + 2 * GAP, rows * (TILE + GAP) + GAP + 2 * 30), PAPER)
    top = GAP
    for direction, title, draw in (
        ("text_to_image", "caption -> picture", _draw_pictures),
        ("image_to_text", "picture -> caption", _draw_captions),
    ):
        ImageDraw.Draw(page).text((GAP, top), title, fill=INK, font=ImageFont.load_default(18))
        top += 30
        for query in picked.get(direction, []):
            draw(page, top, sheet, sheet.rankings[direction], query)
            top += TILE + GAP
    page.save(out)


def _pick(rank: Tensor, examples: int) -> list[int]:
    """Return queries right at once, then others, spread over all."""
    chosen = []
    for wanted in ((rank == 0), (rank > 0)):
        numbers = wanted.nonzero().flatten()
        chosen += numbers[:: max(1, len(numbers) // examples)][:examples].tolist()
    return chosen


def _draw_pictures(page: Image.Image, top: int, sheet: Sheet, ranking: Ranking, query: int) -> None:
    """A caption, and the pictures found for it."""
    pen = ImageDraw.Draw(page)
    _write(pen, (GAP, top), sheet.captions[query], 38, INK)
    _write_place(pen, (GAP, top + TILE - LINE), ranking, query)
    for column, number in enumerate(ranking.top[query, :ANSWERS].tolist()):
        left, right = COLUMN + column * (TILE + GAP), number == sheet.image_of_caption[query]
        page.paste(sheet.picture(number).resize((TILE, TILE)), (left, top))
        frame, width = (RIGHT, 5) if right else (WRONG, 1)
        pen.rectangle((left, top, left + TILE - 1, top + TILE - 1), outline=frame, width=width)


def _draw_captions(page: Image.Image, top: int, sheet: Sheet, ranking: Ranking, query: int) -> None:
    """A picture, and the captions found for it."""
    pen = ImageDraw.Draw(page)
    page.paste(sheet.picture(query).resize((TILE, TILE)), (GAP, top))
    _write_place(pen, (GAP + TILE + 4, top), ranking, query)
    for row, number in enumerate(ranking.top[query, :ANSWERS].tolist()):
        right = sheet.image_of_caption[number] == query
        text = f"{row + 1}. {textwrap.shorten(sheet.captions[int(number)], 110)}"
        pen.text((COLUMN, top + row * 24), text, fill=RIGHT if right else INK, font=ImageFont.load_default(13))


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, width: int, ink: str) -> None:
    for row, line in enumerate(textwrap.wrap(text, width)[: TILE // LINE - 1]):
        pen.text((place[0], place[1] + row * LINE), line, fill=ink, font=ImageFont.load_default(12))


def _write_place(pen: ImageDraw.ImageDraw, place: tuple[int, int], ranking: Ranking, query: int) -> None:
    found = int(ranking.rank[query])
    text = "right" if found == 0 else f"right one at {found + 1}"
    pen.text(place, text, fill=RIGHT if found == 0 else "#d7191c", font=ImageFont.load_default(13))


def to_picture(image: Tensor) -> Image.Image:
    """Undo the normalisation of a (3, S, S) picture of a Batch."""
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    pixels = ((image.float() * std + mean) * 255).round().clamp(0, 255).byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
