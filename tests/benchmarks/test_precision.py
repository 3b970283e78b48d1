"""Curves of two precisions: what counts as noise, what is drawn, and one short run through the launcher."""

import json
from pathlib import Path

import pytest
from PIL import Image
from scipy import stats

from benchmarks import precision
from benchmarks.precision import compare, draw, table

SEEDS = (3.0, 3.2, 3.4)
"""The end of fp32's loss in each seed: a standard deviation of 0.2."""


def curves(*shifts: float) -> dict:
    """Return curves that end at SEEDS, and in bf16 the shifts above. Their first half is far off and counts nothing."""
    ends = {("fp32", seed): end for seed, end in enumerate(SEEDS)}
    ends |= {("bf16", seed): end + shift for seed, (end, shift) in enumerate(zip(SEEDS, shifts, strict=True))}
    return {run: {"loss": [9.0 if run[0] == "fp32" else 5.0] * 4 + [end] * 4} for run, end in ends.items()}


@pytest.mark.parametrize(
    ("shifts", "within"),
    [
        ((0.0, 0.0, 0.0), True),
        ((0.1, -0.1, 0.05), True),
        ((0.3, -0.1, 0.2), True),
        ((0.1, 0.101, 0.1), False),  # less than seeds differ by, but the same in each
        ((-0.10, -0.11, -0.09), False),
    ],
)
def test_noise_is_told_by_pairs_of_one_seed(shifts, within):
    found, p = compare(curves(*shifts), "bf16")["loss"], stats.ttest_1samp(shifts, 0)[1]
    assert found["within_noise"] is within
    assert found["p"] == pytest.approx(1.0 if not any(shifts) else p, abs=1e-9)
    assert found["difference"] == pytest.approx(sum(shifts) / 3)
    assert found["difference_by_seed"] == pytest.approx(shifts)
    assert found["deviation_of_seeds"] == pytest.approx(0.2)
    assert ("DIFFERENT" in table({"loss": found}, "bf16")) is not within


def test_several_losses_are_corrected_for():
    several = {run: {f"loss/{n}": of["loss"] for n in range(4)} for run, of in curves(-0.10, -0.11, -0.14).items()}
    alone = compare({run: {"loss/0": of["loss/0"]} for run, of in several.items()}, "bf16")["loss/0"]["p"]
    assert compare(several, "bf16")["loss/0"]["p"] == pytest.approx(4 * alone)


def test_the_plot_is_a_picture(tmp_path: Path):
    draw(curves(0.1, 0.1, 0.1), tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size[0] > 300
        assert len(set(picture.convert("L").get_flattened_data())) > 20  # lines, not an empty frame


@pytest.mark.parametrize("wrong", [["--seeds", "1", "1"], ["--steps", "10"]])
def test_what_gives_no_comparison_is_refused(tmp_path: Path, wrong, capsys):
    with pytest.raises(SystemExit):
        precision.main(["--work", str(tmp_path), *wrong])
    assert wrong[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.launcher
def test_both_precisions_train_and_a_second_call_trains_nothing(tmp_path: Path, capsys):
    call = [
        "--work",
        str(tmp_path),
        "--steps",
        "20",
        "--seeds",
        "0",
        "1",
        "--jobs",
        "2",
        "--json",
        str(tmp_path / "out"),
    ]
    first = precision.main(call)
    stored = json.loads((tmp_path / "out").read_text())

    def runs() -> dict[str, int]:
        return {path.parent.name[:9]: path.stat().st_mtime_ns for path in tmp_path.glob("*-*-20-*/metrics.jsonl")}

    trained = runs()
    assert sorted(trained) == ["bf16-0-20", "bf16-1-20", "fp32-0-20", "fp32-1-20"]
    assert {"loss", "loss/itc", "loss/itm", "loss/mlm", "loss/xmm", "loss/psl"} <= stored["losses"].keys()
    assert precision.main(call) == first
    assert runs() == trained
