"""What autograd keeps, by formula and by counting. Nothing of the formula was fitted to these sizes."""

import pytest
import torch

from benchmarks.growth import BASE
from benchmarks.step_contenders import Ours
from benchmarks.step_process import count_bytes
from benchmarks.step_sizes import SIZES, changed, make_batch
from simla_ds.config import Config
from simla_ds.planner.activations import activations
from simla_ds.planner.shape import StepShape

DEEPER = changed(BASE, model__vision__layers=5, model__stream__layers=2, train__batch_size=2)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        (SIZES["tiny"], torch.float32),  # the word head outweighs the layers
        (BASE, torch.bfloat16),  # half precision, whose heads still keep float32 gradients
        (DEEPER, torch.float32),
        (changed(DEEPER, model__stream__dropout=0.2, model__vision__image_size=256), torch.float32),
    ],
    ids=["tiny", "bf16", "deep", "resolution"],
)
def test_the_formula_counts_what_the_counter_counts(config: Config, dtype: torch.dtype):
    batch = make_batch(config)
    counted = count_bytes(Ours(config, dtype), batch)
    for checkpointing, name, error in ((False, "saved_bytes", 0.015), (True, "saved_bytes_checkpointed", 0.05)):
        computed = activations(config, StepShape.of(batch), dtype.itemsize, padded=True, checkpointing=checkpointing)
        assert computed.total == pytest.approx(counted[name], rel=error)


def test_text_is_not_padded_on_a_card():
    shape = StepShape.expected(SIZES["full"])
    padded, packed = (
        activations(SIZES["full"], shape, 2, padded=on, checkpointing=False).total for on in (True, False)
    )
    assert 0.9 * padded < packed < padded


def test_the_expected_batch_is_as_long_as_its_captions():
    shape = StepShape.expected(changed(BASE, train__batch_size=10), caption_tokens=12)
    assert (shape.pairs, shape.tokens, shape.labelled) == (10, 120, pytest.approx(18))
    assert shape.masked == pytest.approx(10 * 75 / 256 * BASE.model.vision.patches)
