"""Reports: metrics are read as written, pictures show what is right, the demo's promises are what the issue says."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from simla_ds.data.transforms import normalise
from simla_ds.demo import broken_promises, held_out_table, training_command
from simla_ds.downstream.retrieval import Ranking, RetrievalResult
from simla_ds.report import (
    RIGHT,
    Sheet,
    draw_curves,
    evaluations,
    read_metrics,
    retrieval_picture,
    retrieval_table,
    series,
    to_picture,
)

NAMES = ("itc", "itm", "mlm", "xmm", "psl")


def evaluation(step, loss, precision=0.5, prior=0.3):
    numbers = {f"loss/{name}": loss for name in NAMES}
    numbers |= {"psl/average_precision": precision, "psl/frequency_prior": prior, "mlm/accuracy": 0.25}
    numbers |= {f"retrieval/{s}/{d}/r1": 100 - loss for s in ("itc", "itm") for d in ("image_to_text", "text_to_image")}
    line = {"step": step, "samples_seen": step * 32}
    return line | {f"eval/{who}/{name}": value for who in ("student", "teacher") for name, value in numbers.items()}


def training(step, loss):
    return {"step": step, "samples_seen": step * 32, "loss": loss, **{f"loss/{name}": loss / 5 for name in NAMES}}


def write_run(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def result(ranks):
    """Ten queries a direction with these ranks by ITC, all missed by ITM."""

    def ranking(rank):
        return Ranking(torch.tensor(rank), torch.arange(10).repeat(len(rank), 1))

    directions = ("image_to_text", "text_to_image")
    rankings = {f"itc/{d}": ranking(ranks) for d in directions} | {f"itm/{d}": ranking([9] * 10) for d in directions}
    ceilings = {f"{d}/r{k}": 100.0 for d in directions for k in (1, 5, 10)}
    return RetrievalResult(rankings, ceilings, dict.fromkeys(directions, 1.0), pictures=100, captions=100, rerank=16)


def test_a_resumed_run_reads_as_one(tmp_path):
    run = write_run(tmp_path / "run", [training(10, 5.0), training(20, 4.0), evaluation(20, 3.0), training(20, 4.5)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')  # killed while writing
    lines = read_metrics(run)
    assert series(lines, "loss") == ([320, 640], [5.0, 4.5])
    assert [line["step"] for line in evaluations(lines)] == [20]


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_metrics_is_one_clear_line(tmp_path, content):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl"):
        read_metrics(tmp_path)


def test_curves_are_drawn_of_full_and_of_meagre_runs(tmp_path):
    pytest.importorskip("matplotlib")
    full = write_run(tmp_path / "full", [evaluation(0, 5.0), training(10, 5.0), training(20, 4.0), evaluation(20, 3.0)])
    meagre = write_run(tmp_path / "meagre", [{"step": 10, "samples_seen": 320, "loss": 1.0}])
    sizes = []
    for run in (full, meagre):
        draw_curves(run, run / "curves.png")
        with Image.open(run / "curves.png") as picture:
            assert picture.width > 1000
            sizes.append(np.asarray(picture.convert("L")).std())
    assert sizes[0] > sizes[1]  # more is drawn


def count_frames(path):
    green = np.array([int(RIGHT[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.asarray(Image.open(path).convert("RGB")) == green).all(-1).sum())


def test_the_right_picture_gets_a_green_frame(tmp_path):
    def sheet(rank, top):
        return Sheet(
            rankings={"text_to_image": Ranking(torch.tensor(rank), torch.tensor(top))},
            picture=lambda number: Image.new("RGB", (16, 16), (40 * number, 0, 0)),
            captions=["a very long caption " * 30, "b"],
            image_of_caption=[0, 1],
        )

    retrieval_picture(sheet([1, 1], [[1, 0], [0, 1]]), tmp_path / "second.png")
    retrieval_picture(sheet([9, 9], [[2, 3], [4, 5]]), tmp_path / "missed.png")
    frame = 128**2 - 118**2  # five pixels wide
    assert count_frames(tmp_path / "second.png") == 2 * frame
    assert count_frames(tmp_path / "missed.png") == 0


def test_both_directions_and_both_outcomes_fit_on_a_sheet(tmp_path):
    generator = torch.Generator().manual_seed(0)
    rank = torch.randint(0, 3, (40,), generator=generator)
    top = torch.randint(40, (40, 10), generator=generator)
    sheet = Sheet(
        rankings={"text_to_image": Ranking(rank, top), "image_to_text": Ranking(rank, top)},
        picture=lambda number: Image.new("RGB", (128, 128), (number, 99, 99)),
        captions=[f"caption {number}" for number in range(40)],
        image_of_caption=range(40),
    )
    retrieval_picture(sheet, tmp_path / "sheet.png", examples=2)
    assert Image.open(tmp_path / "sheet.png").height == 8 * 138 + 70


def test_a_normalised_picture_comes_back():
    pixels = torch.randint(256, (3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    back = torch.from_numpy(np.asarray(to_picture(normalise(pixels[None])[0])).copy()).permute(2, 0, 1)
    assert torch.equal(back, pixels)


def test_the_table_gives_recall_over_chance():
    lines = retrieval_table(result([0, 0, 0, 0, 4, 4, 4, 9, 9, 9])).splitlines()
    assert lines[2].split() == ["itc", "image", "to", "text", "40.0", "70.0", "100.0", "40.0", "4.9", "5"]


GOOD = [0] * 3 + [9] * 7  # R@1 of 30 %, 30 times a chance of 1 %


@pytest.mark.parametrize(
    ("lines", "ranks", "said"),
    [
        ([evaluation(0, 5.0), evaluation(9, 4.0)], GOOD, []),
        (
            [evaluation(0, 5.0), evaluation(9, 4.0)],
            [0] * 2 + [9] * 8,
            ["R@1 image to text is 20.0 %", "R@1 text to image"],
        ),
        (
            [evaluation(0, 5.0), evaluation(9, 5.0)],
            GOOD,
            [f"held-out {name} loss went from 5.000 to 5.000" for name in ("itc", "itm", "mlm", "xmm")],
        ),
        ([evaluation(0, 5.0), evaluation(9, 4.0, 0.3, 0.3)], GOOD, ["keyword average precision is 0.300"]),
        ([evaluation(9, 4.0)], GOOD, ["1 evaluation(s)"]),
    ],
)
def test_a_promise_that_does_not_hold_is_said(lines, ranks, said):
    broken = broken_promises(lines, result(ranks))
    assert len(broken) == len(said)
    assert all(part in line for part, line in zip(said, broken, strict=True))


def test_the_table_of_held_out_numbers_has_guesses_beside():
    table = held_out_table([evaluation(0, 5.0, 0.1, 0.2), evaluation(9, 4.0, 0.6, 0.3)])
    assert ["psl/average_precision", "0.100", "0.600", "0.300"] in [row.split() for row in table.splitlines()]


def test_the_demo_trains_through_the_documented_command(tmp_path, project_root):
    command = training_command(tmp_path / "scenes", tmp_path / "run")
    assert command[1].endswith("/deepspeed")
    assert "launch/pretrain.py" in command
    assert (project_root / command[command.index("--deepspeed") + 1]).is_file()
