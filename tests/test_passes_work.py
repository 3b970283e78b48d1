"""What fast passes run, counted: how many passes, how many rows, and that none of it waits for the device."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections import Counter
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from simla_ds.config import Config, CrossModalConfig, MatchingConfig, StreamConfig
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.passes import FastPasses, PlainPasses
from simla_ds.task import PretrainTask
from simla_ds.teacher import Teacher
from simla_ds.types import Batch
from tests.tiny import ALBEF, STREAM, make_batch, make_task, run_config

LENGTHS = [7, 4, 6, 5]
BATCH, WIDTH, TOKENS, IMAGE_ROWS = 4, 7, 22, 10


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
    for network in count(run_config("fast"), make_batch(LENGTHS)):
        assert len(network.of("image_encoder")) == 1
        assert network.of("image_encoder.blocks.0") == [2 * BATCH * IMAGE_ROWS]
        assert network.rows["image_encoder.patch_embed"] == [BATCH * 3 * 24]  # (B, 3, S, S): B pictures, embedded once


def test_the_student_runs_three_passes_over_real_tokens_and_the_drawn_captions_padding():
    batch = make_batch(LENGTHS)
    student, _ = count(run_config("fast"), batch)
    images = BATCH * IMAGE_ROWS
    fused = 3 * TOKENS + BATCH * WIDTH  # matched, wrong picture, MLM; wrong caption
    assert student.of("stream.layers.0") == student.of("stream.layers.0.self_attention.key") == [TOKENS, images, fused]
    assert student.of("stream.layers.0.feed_forward") == [TOKENS, images, fused]


def test_keys_and_values_of_a_picture_are_projected_once_for_all_who_read_it():
    student, teacher = count(run_config("fast"), make_batch(LENGTHS))
    images = BATCH * IMAGE_ROWS
    for part in ("key", "value"):
        assert student.rows[f"stream.layers.0.cross_attention.{part}"] == [images, TOKENS]
        # PSL reads the student's pictures, MLM the teacher's own
        assert teacher.rows[f"stream.layers.0.cross_attention.{part}"] == [2 * images, TOKENS]


def test_the_last_layer_computes_only_what_a_loss_reads_from_all_keys_and_values():
    batch = make_batch(LENGTHS)
    labels, patches, images = len(batch["label_index"]), len(batch["masked_index"]), BATCH * IMAGE_ROWS
    student, teacher = count(run_config("fast"), batch)
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
    _, teacher = count(run_config("fast"), make_batch(LENGTHS))
    assert teacher.of("stream.layers.0") == sorted([TOKENS, 2 * TOKENS, BATCH * IMAGE_ROWS])


def test_heads_read_labelled_tokens_and_masked_patches_only():
    batch = make_batch(LENGTHS)
    student, teacher = count(run_config("fast"), batch)
    for network in (student, teacher):
        assert network.of("language_head.transform") == [len(batch["label_index"])]
    assert student.of("visual_head") == [len(batch["masked_index"])]  # inside it the teacher's weights are read


def test_encoded_keys_of_xmm_make_the_student_read_every_token_of_its_text_pass():
    config = run_config("fast", xmm=CrossModalConfig(text_keys="encoded"))
    student, teacher = count(config, make_batch(LENGTHS))
    assert student.of("stream.layers.1.feed_forward").count(TOKENS) == 1
    assert TOKENS not in teacher.of("stream.layers.1.feed_forward")


def test_official_mlm_keeps_its_padding_and_nothing_else_does():
    student, teacher = count(run_config("fast", fidelity="official"), make_batch(LENGTHS))
    fused = 2 * TOKENS + 2 * BATCH * WIDTH
    assert student.of("stream.layers.0") == [TOKENS, BATCH * IMAGE_ROWS, fused]
    assert student.of("language_head") == [BATCH * WIDTH]
    assert teacher.of("stream.layers.0") == sorted([TOKENS, 2 * TOKENS, BATCH * IMAGE_ROWS])


def test_without_xmm_and_fused_objectives_nothing_but_the_two_encoders_runs():
    student, teacher = count(run_config("fast", only="itc"), make_batch(LENGTHS))
    for network in (student, teacher):
        assert network.of("image_encoder.blocks.0") == [BATCH * IMAGE_ROWS]
        assert network.of("stream.layers.0") == [TOKENS]


def test_with_visible_patches_only_masked_pictures_are_shorter_rows():
    config = run_config("fast", xmm=CrossModalConfig(visible_only=True, mask_ratio=4 / 9))
    for network in count(config, make_batch(LENGTHS)):
        assert network.of("image_encoder.blocks.0") == [BATCH * (1 + 5), BATCH * IMAGE_ROWS]  # 5 of 9 patches
        assert BATCH * IMAGE_ROWS in network.of("stream.layers.0")  # there they are whole again


def test_without_distillation_the_teacher_runs_nothing_for_xmm():
    _, teacher = count(run_config("fast", xmm=CrossModalConfig(distill=False)), make_batch(LENGTHS))
    assert teacher.of("image_encoder.blocks.0") == [BATCH * IMAGE_ROWS]
    assert BATCH * IMAGE_ROWS not in teacher.of("stream.layers.0")


def test_plain_runs_every_request_by_itself_with_its_padding():
    student, teacher = count(run_config("plain"), make_batch(LENGTHS))
    padded, images = BATCH * WIDTH, BATCH * IMAGE_ROWS
    assert student.of("stream.layers.1.feed_forward") == sorted([padded, padded, 2 * padded, padded, images])
    assert student.of("image_encoder.blocks.0") == teacher.of("image_encoder.blocks.0") == [images, images]
    assert teacher.of("stream.layers.1.feed_forward") == sorted([padded, padded, padded, images])


def test_the_setting_chooses():
    assert isinstance(make_task(run_config("plain")).passes, PlainPasses)
    assert isinstance(make_task(run_config()).passes, FastPasses)


# --- no wait --------------------------------------------------------------------------------------------------------

WAITING = {"_local_scalar_dense", "nonzero", "item", "is_nonzero", "equal", "masked_select", "_unique2", "bincount"}


def _inside_kernels() -> bool:
    """Whether simla_kernels is asking: it looks at labels and indices on a CPU only, and its seeds live there.

    That it reads nothing of a device is seen on the meta device, where reading raises.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if "simla_kernels" in frame.f_code.co_filename:
            return True
        frame = frame.f_back
    return False


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
        if (name in WAITING or by_mask) and not _inside_kernels():
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
@pytest.mark.parametrize("stream", [STREAM, ALBEF], ids=["simla", "albef"])
def test_a_step_never_waits_for_the_device(stream: StreamConfig, negatives: Literal["local", "global"], dropout: float):
    stream = dataclasses.replace(stream, dropout=dropout)
    task = make_task(run_config("fast", stream, itm=MatchingConfig(negatives=negatives)))
    batch = make_batch(LENGTHS)
    with CountWaits() as waits:
        result = task(batch, alpha=0.4)
        result["loss"].backward()
    assert not waits.calls
    assert math.isfinite(result["loss"].detach())


@pytest.mark.parametrize("fidelity", ["corrected", "official"])
def test_a_step_runs_where_tensors_have_no_values(fidelity: str):
    """On the meta device nothing can be read: whatever would wait for a GPU, known above or not, raises there."""
    config = run_config("fast", fidelity=fidelity)
    with torch.device("meta"):
        student = Simla(config.model)
        teacher = Teacher(student, dropout=False)
    task = PretrainTask(student, teacher, FeatureQueue(4, config.model.projection_size, device="meta"), config)
    tensors: dict[str, Any] = {**make_batch(LENGTHS)}
    batch: Any = {name: value.to("meta") for name, value in tensors.items()}
    task(batch, alpha=0.4)["loss"].backward()
    assert all(p.grad is not None for p in task.parameters())
