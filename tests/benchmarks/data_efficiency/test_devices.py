"""Cells side by side have cards of their own."""

import pytest
import torch

from benchmarks.data_efficiency.devices import cards, device, slots
from benchmarks.launching import launcher


@pytest.fixture
def four_cards(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_jobs_share_the_cards_out(four_cards: pytest.MonkeyPatch):
    assert slots(2, 2) == [["0", "1"], ["2", "3"]]
    assert slots(3, 1) == [["0"], ["1"], ["2"]]
    four_cards.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert slots(2, 1) == [["5"], ["7"]]


def test_more_jobs_than_cards_are_refused_with_both_numbers(four_cards: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"--jobs 3 x launch\.ranks 2 need 6 cards, 4 may be used; set --jobs <= 2"):
        slots(3, 2)


def test_without_cards_any_number_of_jobs_runs_on_the_cpu(four_cards: pytest.MonkeyPatch):
    four_cards.setenv("DS_ACCELERATOR", "cpu")
    assert (cards(), device(), slots(3, 2)) == ([], "cpu", [[], [], []])


def test_cards_that_the_launcher_cannot_be_told_are_refused(four_cards: pytest.MonkeyPatch):
    four_cards.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a2b")
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=GPU-1a2b: DeepSpeed's launcher takes numbers"):
        cards()


def test_the_launcher_is_told_the_cards_or_else_the_number_of_ranks():
    assert launcher(2, ["4", "6"])[2:4] == ["--include", "localhost:4,6"]
    assert launcher(2)[2:4] == ["--num_accelerators", "2"]
