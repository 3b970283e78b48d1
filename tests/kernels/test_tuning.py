"""Tuning launch configurations, its clock and card stood in for: no card is here. What Triton does with them is not."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.tuning import tune
from simla_kernels import tuned
from simla_kernels.configs import CONFIGS, config, trying
from simla_kernels.launching import LaunchConfig

KEY = ("cross_attention.forward", "half d64 long")
CPU, CARD = torch.device("cpu"), torch.device("cuda")


class Kernel:
    """Its time is the distance from 128 x 32 tiles and 8 warps; some configurations fail or are wrong."""

    def __init__(self, fails_at: int = 0, wrong_at: int = 0):
        self.fails_at, self.wrong_at = fails_at, wrong_at

    def __call__(self) -> list[Tensor]:
        self.used = config(*KEY, CPU)
        if self.used.tiles["BLOCK_M"] == self.fails_at:
            raise RuntimeError("out of resources: shared memory")
        return [torch.ones(3) * (2.0 if self.used.tiles["BLOCK_M"] == self.wrong_at else 1.0)]

    def seconds(self, run: object) -> float:
        self()
        wanted = {"BLOCK_M": 128, "BLOCK_N": 32}
        steps = sum(abs(size.bit_length() - wanted[name].bit_length()) for name, size in self.used.tiles.items())
        return 1.0 + steps + abs(self.used.num_warps - 8)


def test_the_fastest_neighbour_is_followed_until_none_is_faster():
    kernel = Kernel()
    found = tune(kernel, kernel.seconds)
    assert found == {KEY: LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 32}, num_warps=8)}
    assert config(*KEY, CPU) == CONFIGS[KEY]  # nothing stays behind


@pytest.mark.parametrize("fault", ["fails_at", "wrong_at"])
def test_what_fails_or_changes_the_result_is_passed_over(fault: str):
    kernel = Kernel(**{fault: 128})
    assert tune(kernel, kernel.seconds) == {KEY: LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8)}


def test_a_run_that_draws_anew_at_every_call_is_refused_before_anything_is_tried():
    kernel, generator = Kernel(), torch.Generator().manual_seed(0)

    def drawing() -> list[Tensor]:
        return [t * torch.rand(3, generator=generator) for t in kernel()]

    with pytest.raises(ValueError, match="two runs with the same configurations differ"):
        tune(drawing, lambda run: pytest.fail("nothing must be timed"))
    assert config(*KEY, CPU) == CONFIGS[KEY]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    tuned._of_card.cache_clear()


@pytest.mark.usefixtures("card")
def test_a_stored_configuration_is_used_on_its_card_and_only_when_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    file, best = tmp_path / "tuned.json", LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 3)
    tuned.store(file, CARD, {KEY: best})
    tuned.store(file, CARD, {("layer_norm.forward", "wide"): LaunchConfig({"BLOCK_ROWS": 2}, 4)})
    assert config(*KEY, CARD) == CONFIGS[KEY]
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    assert config(*KEY, CARD) == best
    assert config("layer_norm.forward", "wide", CARD).tiles == {"BLOCK_ROWS": 2}
    assert config(*KEY, CPU) == CONFIGS[KEY]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Another")
    assert config(*KEY, CARD) == CONFIGS[KEY]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("content", ["{", "[]", None])
def test_a_file_that_cannot_be_read_is_named(content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "tuned.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    with pytest.raises(ValueError, match=r"SIMLA_KERNELS_TUNED=.*tuned\.json"):
        config(*KEY, CARD)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("entry", [{"tiles": {}, "warps": 4}, {"num_warps": 4}])
def test_an_entry_of_another_form_is_named(entry: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "tuned.json"
    tuned.store(file, CARD, {KEY: CONFIGS[KEY]})
    content = json.loads(file.read_text())
    content[next(iter(content))][" | ".join(KEY)] = entry
    file.write_text(json.dumps(content))
    monkeypatch.setenv(tuned.VARIABLE, str(file))
    with pytest.raises(ValueError, match="no launch configuration"):
        config(*KEY, CARD)


def test_trying_ends_with_its_context_even_by_an_exception():
    with pytest.raises(KeyError), trying({KEY: LaunchConfig({"BLOCK_M": 16, "BLOCK_N": 16}, 1)}):
        raise KeyError
    assert config(*KEY, CPU) == CONFIGS[KEY]
