"""Fast passes against plain ones: the same numbers, fewer rows, no wait for the device."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simla_ds.config import (
    Config,
    CrossModalConfig,
    MatchingConfig,
    PseudoLabelConfig,
    StreamConfig,
    TeacherConfig,
    TrainConfig,
)
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.passes import FastPasses, PlainPasses
from simla_ds.task import PretrainTask
from simla_ds.teacher import Teacher
from simla_ds.types import Batch
from tests.tiny import ALBEF, STREAM, make_batch, make_task, model_config, run_config

NAMES = ("itc", "itm", "mlm", "xmm", "psl")
LENGTHS = [7, 4, 6, 5]
BATCH, WIDTH, TOKENS, IMAGE_ROWS = 4, 7, 22, 10
LAYOUTS = pytest.mark.parametrize("stream", [STREAM, ALBEF], ids=["simla", "albef"])
FIDELITIES = pytest.mark.parametrize("fidelity", ["corrected", "official"])


def configure(
    passes: str,
    stream: StreamConfig = STREAM,
    only: str = "",
    teacher: TeacherConfig | None = None,
    **objectives: object,
) -> Config:
    """Return a run's configuration; `only` switches all other objectives off."""
    config = run_config(**objectives)
    if only:
        off = {n: dataclasses.replace(getattr(config.objectives, n), weight=0.0) for n in NAMES if n != only}
        config = dataclasses.replace(config, objectives=dataclasses.replace(config.objectives, **off))
    train = TrainConfig(batch_size=4, passes=passes)  # type: ignore[arg-type]
    return dataclasses.replace(config, model=model_config(stream), train=train, teacher=teacher or TeacherConfig())


def run(config: Config, batch: Batch, **named: Any) -> tuple[dict[str, Tensor], dict[str, Tensor | None]]:
    """Return every loss and every gradient of one step."""
    task = make_task(config)
    result = task(batch, alpha=0.4, **named)
    result["loss"].backward()
    return {"total": result["loss"].detach(), **result["losses"]}, {n: p.grad for n, p in task.named_parameters()}


def assert_fast_equals_plain(batch: Batch, **options: Any) -> None:
    """Losses to 1e-5; gradients to 1e-5 of the tensor's maximum, or (key biases: truly 0) of the largest one's."""
    losses, gradients = run(configure("fast", **options), batch)
    plain_losses, plain_gradients = run(configure("plain", **options), batch)
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
        {"itm": MatchingConfig(negatives="global")},
        {"psl": PseudoLabelConfig(whole_words=True)},
        {"teacher": TeacherConfig(dropout=True), "fidelity": "official"},
    ],
    ids=["encoded", "encoded albef", "no distillation", "global negatives", "whole words", "teacher in train mode"],
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
        batch["negative_image"], batch["negative_text"] = torch.tensor([1, 0, 1, 0]), torch.full((BATCH,), drawn)
        assert_fast_equals_plain(batch)


@pytest.mark.parametrize("step", [0, 1])
def test_fast_equals_plain_at_steps_with_and_without_xmm(step: int):
    batch, every = make_batch(LENGTHS), CrossModalConfig(every=2)
    fast, plain = (run(configure(passes, xmm=every), batch, step=step)[0] for passes in ("fast", "plain"))
    assert ("xmm" in fast) == (step == 0)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-7)


def test_merged_passes_recompute_their_activations_and_change_no_number():
    results, sizes = [], []
    for on in (False, True):
        task = make_task(configure("fast"))
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
def losses_over_seeds(passes: str, dropout: float, seeds: int) -> Tensor:
    """Return (seeds, 5) losses of one batch under other draws of dropout, in student and teacher."""
    stream = dataclasses.replace(STREAM, dropout=dropout)
    task, batch = make_task(configure(passes, stream, teacher=TeacherConfig(dropout=True))), make_batch(LENGTHS)
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


# --- what is run ----------------------------------------------------------------------------------------------------


class Counts:
    """Rows that enter modules of one network, call by call."""

    def __init__(self, network: nn.Module):
        self.rows: dict[str, list[int]] = {}
        for name, module in network.named_modules():
            module.register_forward_pre_hook(lambda _, inputs, name=name: self._add(name, *inputs[:1]))

    def _add(self, name: str, *first: Tensor) -> None:
        self.rows.setdefault(name, []).extend(x.shape[:-1].numel() for x in first)

    def of(self, name: str) -> list[int]:
        """Return the rows of each call, in order of size."""
        return sorted(self.rows.get(name, []))


def count(config: Config, batch: Batch) -> tuple[Counts, Counts]:
    """Return what student and teacher ran in one forward."""
    task = make_task(config)
    student, teacher = Counts(task.model), Counts(task.teacher.module)
    task(batch, alpha=0.4)
    return student, teacher


def test_all_pictures_clean_and_masked_are_one_pass():
    for network in count(configure("fast"), make_batch(LENGTHS)):
        assert len(network.of("image_encoder")) == 1
        assert network.of("image_encoder.blocks.0") == [2 * BATCH * IMAGE_ROWS]
        assert network.rows["image_encoder.patch_embed"] == [BATCH * 3 * 24]  # (B, 3, S, S): B pictures, embedded once


def test_the_student_runs_three_passes_over_real_tokens_and_the_drawn_captions_padding():
    batch = make_batch(LENGTHS)
    student, _ = count(configure("fast"), batch)
    images = BATCH * IMAGE_ROWS
    fused = 3 * TOKENS + BATCH * WIDTH  # matched, wrong picture, MLM; wrong caption
    assert student.of("stream.layers.0") == student.of("stream.layers.0.self_attention.key") == [TOKENS, images, fused]
    assert student.of("stream.layers.0.feed_forward") == [TOKENS, images, fused]


def test_keys_and_values_of_a_picture_are_projected_once_for_all_who_read_it():
    student, teacher = count(configure("fast"), make_batch(LENGTHS))
    images = BATCH * IMAGE_ROWS
    for part in ("key", "value"):
        assert student.rows[f"stream.layers.0.cross_attention.{part}"] == [images, TOKENS]
        # PSL reads the student's pictures, MLM the teacher's own
        assert teacher.rows[f"stream.layers.0.cross_attention.{part}"] == [2 * images, TOKENS]


def test_the_last_layer_computes_only_what_a_loss_reads_from_all_keys_and_values():
    batch = make_batch(LENGTHS)
    labels, patches, images = len(batch["label_index"]), len(batch["masked_index"]), BATCH * IMAGE_ROWS
    student, teacher = count(configure("fast"), batch)
    fused = 3 * TOKENS + BATCH * WIDTH
    for part in ("self_attention.query", "self_attention.output", "feed_forward"):
        assert student.of(f"stream.layers.1.{part}") == sorted([BATCH, 3 * BATCH + labels, patches]), part
    assert student.of("stream.layers.1.cross_attention.query") == sorted([3 * BATCH + labels, patches])
    assert student.of("stream.layers.1.self_attention.key") == [TOKENS, images, fused]
    assert student.of("stream.layers.1.cross_attention.key") == sorted([TOKENS, images])
    # PSL ends at its row of attention: only MLM's pictures are read, only MLM's tokens go on
    assert teacher.of("stream.layers.1.cross_attention.key") == sorted([TOKENS, images])
    assert teacher.of("stream.layers.1.feed_forward") == sorted([BATCH, labels, patches])
    assert teacher.of("stream.layers.1.self_attention.value") == [TOKENS, TOKENS, images]


def test_the_teachers_mlm_and_psl_rows_are_one_pass():
    _, teacher = count(configure("fast"), make_batch(LENGTHS))
    assert teacher.of("stream.layers.0") == sorted([TOKENS, 2 * TOKENS, BATCH * IMAGE_ROWS])


def test_heads_read_labelled_tokens_and_masked_patches_only():
    batch = make_batch(LENGTHS)
    for network in count(configure("fast"), batch):
        assert network.of("language_head") == [len(batch["label_index"])]
        assert network.of("visual_head") == [len(batch["masked_index"])]


def test_encoded_keys_of_xmm_make_the_student_read_every_token_of_its_text_pass():
    config = configure("fast", xmm=CrossModalConfig(text_keys="encoded"))
    student, teacher = count(config, make_batch(LENGTHS))
    assert student.of("stream.layers.1.feed_forward").count(TOKENS) == 1
    assert TOKENS not in teacher.of("stream.layers.1.feed_forward")


def test_official_mlm_keeps_its_padding_and_nothing_else_does():
    student, teacher = count(configure("fast", fidelity="official"), make_batch(LENGTHS))
    fused = 2 * TOKENS + 2 * BATCH * WIDTH
    assert student.of("stream.layers.0") == [TOKENS, BATCH * IMAGE_ROWS, fused]
    assert student.of("language_head") == [BATCH * WIDTH]
    assert teacher.of("stream.layers.0") == sorted([TOKENS, 2 * TOKENS, BATCH * IMAGE_ROWS])


def test_without_xmm_and_fused_objectives_nothing_but_the_two_encoders_runs():
    student, teacher = count(configure("fast", only="itc"), make_batch(LENGTHS))
    for network in (student, teacher):
        assert network.of("image_encoder.blocks.0") == [BATCH * IMAGE_ROWS]
        assert network.of("stream.layers.0") == [TOKENS]


def test_plain_runs_every_request_by_itself_with_its_padding():
    student, teacher = count(configure("plain"), make_batch(LENGTHS))
    padded, images = BATCH * WIDTH, BATCH * IMAGE_ROWS
    assert student.of("stream.layers.1.feed_forward") == sorted([padded, padded, 2 * padded, padded, images])
    assert student.of("image_encoder.blocks.0") == teacher.of("image_encoder.blocks.0") == [images, images]
    assert teacher.of("stream.layers.1.feed_forward") == sorted([padded, padded, padded, images])


def test_the_setting_chooses():
    assert isinstance(make_task(configure("plain")).passes, PlainPasses)
    assert isinstance(make_task(run_config()).passes, FastPasses)


# --- no wait --------------------------------------------------------------------------------------------------------

WAITING = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "_unique2", "bincount"}


class CountWaits(TorchDispatchMode):
    """Counts operators whose result a GPU would hand to the host: values that are read, shapes that depend on data."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name.startswith("index") and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8)
            for group in args[1:2]
            for t in (group if isinstance(group, list | tuple) else [])
        )
        if name in WAITING or by_mask:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def test_what_waits_is_counted():
    x = torch.arange(4.0)
    with CountWaits() as waits:
        places = x.nonzero()
        assert x.sum().item() == 6
        assert x.any()
        assert len(x[x > 1]) < len(places)
    assert sum(waits.calls.values()) == 4


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("negatives", ["local", "global"])
@LAYOUTS
def test_a_step_never_waits_for_the_device(stream: StreamConfig, negatives: str, dropout: float):
    stream = dataclasses.replace(stream, dropout=dropout)
    task = make_task(configure("fast", stream, itm=MatchingConfig(negatives=negatives)))  # type: ignore[arg-type]
    batch = make_batch(LENGTHS)
    with CountWaits() as waits:
        result = task(batch, alpha=0.4)
        result["loss"].backward()
    assert not waits.calls
    assert math.isfinite(result["loss"].detach())


@FIDELITIES
def test_a_step_runs_where_tensors_have_no_values(fidelity: str):
    """On the meta device nothing can be read: whatever would wait for a GPU, known above or not, raises there."""
    config = configure("fast", fidelity=fidelity)
    with torch.device("meta"):
        student = Simla(config.model)
        teacher = Teacher(student, dropout=False)
    task = PretrainTask(student, teacher, FeatureQueue(4, config.model.projection_size, device="meta"), config)
    tensors: dict[str, Any] = {**make_batch(LENGTHS)}
    batch: Any = {name: value.to("meta") for name, value in tensors.items()}
    task(batch, alpha=0.4)["loss"].backward()
    assert all(p.grad is not None for p in task.parameters())


def test_plain_and_fast_hand_over_outputs_of_the_same_shapes():
    batch = make_batch(LENGTHS)
    for fidelity in ("corrected", "official"):
        shapes = []
        for passes in ("fast", "plain"):
            task: PretrainTask = make_task(configure(passes, fidelity=fidelity))
            outputs = task(batch, alpha=0.4, keep=True)["outputs"]
            shapes.append({name: [tuple(result.shape) for result in o.results] for name, o in outputs.items()})
        assert shapes[0] == shapes[1]
