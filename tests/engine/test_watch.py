"""Shares of the gradient, without an engine: what is measured doesn't depend on how passes are run."""

from types import SimpleNamespace
from typing import Any, Literal

import pytest

from simla_ds.engine.watch import Watch
from tests.tiny import make_batch, make_task, run_config


def shares(passes: Literal["fast", "plain"], only: str = "") -> dict[str, float]:
    config = run_config(passes, only=only)
    engine: Any = SimpleNamespace(device="cpu", zero_optimization_stage=lambda: 0)
    tokenizers: Any = SimpleNamespace(vocabulary_size=20)
    source: Any = None
    watch = Watch(config, engine, make_task(config), source, tokenizers, tokenizers)
    return watch.gradient_shares(make_batch([7, 4, 6, 5]), alpha=0.4)


def test_gradient_shares_are_the_same_in_merged_and_in_plain_passes():
    fast, plain = shares("fast"), shares("plain")
    assert fast == pytest.approx(plain, rel=1e-4)
    for place, without in (("image_cls", ()), ("fused_cls", ("itc", "psl"))):
        mine = {name.rsplit("/", 1)[1]: share for name, share in fast.items() if f"/{place}/" in name}
        assert sum(mine.values()) == pytest.approx(1)
        assert {name for name, share in mine.items() if share == 0} == set(without)


def test_contrast_alone_has_the_whole_gradient_of_the_picture_and_none_of_fused_passes():
    found = shares("fast", only="itc")
    assert found == {"gradient_share/image_cls/itc": pytest.approx(1), "gradient_share/fused_cls/itc": 0.0}


def test_without_a_visual_tokenizer_there_are_no_codes_to_count():
    config = run_config(only="itc")
    engine: Any = SimpleNamespace(device="cpu", zero_optimization_stage=lambda: 0)
    nothing: Any = None
    watch = Watch(config, engine, make_task(config), nothing, nothing, None)
    batch: Any = {key: value for key, value in make_batch([3, 2]).items() if key != "visual_ids"}
    assert watch.monitor() == {}
    assert "visual_ids" not in watch.prepare(batch)
