"""Fast passes against plain ones: the same numbers. (What they run is counted in test_passes_work.py.)"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from simla_ds.config import (
    Config,
    CrossModalConfig,
    MatchingConfig,
    PseudoLabelConfig,
    StreamConfig,
    TeacherConfig,
)
from simla_ds.model import rows
from simla_ds.task import PretrainTask
from simla_ds.types import Batch, Read, Request
from tests.tiny import ALBEF, STREAM, make_batch, make_task, run_config

NAMES = ("itc", "itm", "mlm", "xmm", "psl")
LENGTHS = [7, 4, 6, 5]
LAYOUTS = pytest.mark.parametrize("stream", [STREAM, ALBEF], ids=["simla", "albef"])
FIDELITIES = pytest.mark.parametrize("fidelity", ["corrected", "official"])


def run(config: Config, batch: Batch, **named: Any) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return every loss and every gradient of one step."""
    task = make_task(config)
    result = task(batch, alpha=0.4, **named)
    result["loss"].backward()
    return {"total": result["loss"].detach(), **result["losses"]}, {n: p.grad for n, p in task.named_parameters()}


def assert_fast_equals_plain(batch: Batch, **options: Any) -> None:
    """Losses to 1e-5; gradients to 1e-5 of the tensor's maximum, or (key biases: truly 0) of the largest one's."""
    losses, gradients = run(run_config("fast", **options), batch)
    plain_losses, plain_gradients = run(run_config("plain", **options), batch)
    assert losses.keys() == plain_losses.keys()
    for name, loss in plain_losses.items():
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-7, msg=name)
    largest = max(float(g.abs().max()) for g in plain_gradients.values() if g is not None)
    for name, wanted in plain_gradients.items():
        found = gradients[name]
        assert (found is None) == (wanted is None), name
        if found is None or wanted is None:
            continue
        scale = largest if name.endswith("key.bias") else float(wanted.abs().max())
        assert (found - wanted).abs().max() <= 1e-5 * scale, name


@FIDELITIES
@LAYOUTS
@pytest.mark.parametrize("only", ["", *NAMES])
def test_fast_equals_plain_for_each_objective_alone_and_for_all_together(
    only: str, stream: StreamConfig, fidelity: str
):
    assert_fast_equals_plain(make_batch(LENGTHS), only=only, stream=stream, fidelity=fidelity)


@FIDELITIES
@LAYOUTS
@pytest.mark.parametrize(
    ("lengths", "pad_to"),
    [
        pytest.param([3, 2, 4, 2], 0, id="fewer tokens than keywords"),
        pytest.param([1, 7, 1, 3], 0, id="some of CLS alone"),
        pytest.param([1, 1, 1], 0, id="all of CLS alone"),
        pytest.param([5, 5, 5], 0, id="no padding"),
        pytest.param([6, 2, 4], 11, id="no caption fills the batch's width"),
        pytest.param([4, 6], 0, id="two pairs"),
    ],
)
def test_fast_equals_plain_for_captions_of_odd_lengths(
    lengths: list[int], pad_to: int, stream: StreamConfig, fidelity: str
):
    assert_fast_equals_plain(make_batch(lengths, pad_to=pad_to), stream=stream, fidelity=fidelity)


@pytest.mark.parametrize(
    "options",
    [
        {"xmm": CrossModalConfig(text_keys="encoded")},
        {"xmm": CrossModalConfig(text_keys="encoded"), "stream": ALBEF},
        {"xmm": CrossModalConfig(distill=False)},
        {"xmm": CrossModalConfig(visible_only=True)},
        {"itm": MatchingConfig(negatives="global")},
        {"psl": PseudoLabelConfig(whole_words=True)},
        {"teacher": TeacherConfig(dropout=True), "fidelity": "official"},
    ],
    ids=[
        "encoded",
        "encoded albef",
        "no distillation",
        "visible patches",
        "global negatives",
        "whole words",
        "teacher in train mode",
    ],
)
def test_fast_equals_plain_under_other_settings(options: dict[str, Any]):
    assert_fast_equals_plain(make_batch(LENGTHS), **options)


@pytest.mark.parametrize("image_id", [[0, 1, 0, 3], [5, 5, 5, 5]], ids=["two of one picture", "all of one picture"])
@FIDELITIES
def test_fast_equals_plain_when_pairs_share_a_picture(image_id: list[int], fidelity: str):
    batch = make_batch(LENGTHS)
    batch["image_id"] = torch.tensor(image_id)
    assert_fast_equals_plain(batch, fidelity=fidelity)


def test_fast_equals_plain_with_every_drawn_caption_the_longest_and_with_every_one_the_shortest():
    for drawn in (0, 1):
        batch = make_batch(LENGTHS)
        batch["negative_image"], batch["negative_text"] = torch.tensor([1, 0, 1, 0]), torch.full((4,), drawn)
        assert_fast_equals_plain(batch)


@FIDELITIES
@LAYOUTS
def test_fast_equals_plain_with_attention_by_length_as_on_a_card(
    stream: StreamConfig, fidelity: str, monkeypatch: pytest.MonkeyPatch
):
    """By cross_attention_varlen's PyTorch path; the wrong captions that ITM draws have hidden tokens."""
    calls = []

    def by_length(device: torch.device, queries: rows.Rows, keys: rows.Rows) -> bool:
        calls.append(queries.index is not None or keys.index is not None)
        return calls[-1]

    monkeypatch.setattr(rows, "_by_length", by_length)
    assert_fast_equals_plain(make_batch(LENGTHS), stream=stream, fidelity=fidelity)
    assert any(calls)


@pytest.mark.parametrize("step", [0, 1])
def test_fast_equals_plain_at_steps_with_and_without_xmm(step: int):
    batch, every = make_batch(LENGTHS), CrossModalConfig(every=2)
    fast, plain = (run(run_config(passes, xmm=every), batch, step=step)[0] for passes in ("fast", "plain"))
    assert ("xmm" in fast) == (step == 0)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)


def test_merged_passes_recompute_their_activations_and_change_no_number():
    results, sizes = [], []
    for on in (False, True):
        task = make_task(run_config("fast"))
        task.model.set_activation_checkpointing(on)
        saved: list[int] = []

        def keep(t: Tensor, saved: list[int] = saved) -> Tensor:
            saved.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            result = task(make_batch(LENGTHS), alpha=0.4)
        result["loss"].backward()
        results.append((result["losses"], {n: p.grad for n, p in task.named_parameters()}))
        sizes.append(sum(saved))
    for whole, recomputed in zip(*results, strict=True):
        torch.testing.assert_close(recomputed, whole, rtol=1e-6, atol=1e-7)
    assert sizes[1] < 0.35 * sizes[0]  # 0.12 measured; 0.76 with the image encoder's blocks alone


# --- with dropout ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def losses_over_seeds(passes: Literal["fast", "plain"], dropout: float, seeds: int) -> Tensor:
    """Return (seeds, 5) losses of one batch under other draws of dropout, in student and teacher."""
    stream = dataclasses.replace(STREAM, dropout=dropout)
    task, batch = make_task(run_config(passes, stream, teacher=TeacherConfig(dropout=True))), make_batch(LENGTHS)
    task.train()
    rows = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        losses = task(batch, alpha=0.4)["losses"]
        rows.append(torch.stack([losses[name] for name in NAMES]))
    return torch.stack(rows).double()


def test_with_dropout_the_losses_have_the_same_mean_and_spread():
    seeds = 50
    fast, plain = (
        losses_over_seeds(passes, 0.2, seeds)[:, :4] for passes in ("fast", "plain")
    )  # PSL's keywords stay the same
    errors = ((fast.var(0) + plain.var(0)) / seeds).sqrt()
    assert ((fast.mean(0) - plain.mean(0)).abs() <= 4 * errors).all()
    spread = fast.std(0) / plain.std(0)
    assert ((spread > 0.55) & (spread < 1.8)).all()  # four standard errors of a ratio of 50 draws each


def test_plain_and_fast_hand_over_outputs_of_the_same_shapes():
    batch = make_batch(LENGTHS)
    for fidelity in ("corrected", "official"):
        shapes = []
        for passes in ("fast", "plain"):
            task: PretrainTask = make_task(run_config(passes, fidelity=fidelity))
            outputs = task(batch, alpha=0.4, keep=True)["outputs"]
            shapes.append({name: [tuple(result.shape) for result in o.results] for name, o in outputs.items()})
        assert shapes[0] == shapes[1]


def test_a_request_that_reads_padding_may_not_leave_it_out():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="give no token_index"):
        Request(
            direction="text_over_image",
            by="student",
            read=Read.ALL,
            image_tokens=torch.zeros(2, 4, 8),
            text_mask=mask,
            token_index=torch.arange(6),
        )
