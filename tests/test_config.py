"""Each check of the configuration names the setting and both numbers; derived values follow their stated rules."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from simla_ds.config import (
    Config,
    ContrastiveConfig,
    CrossModalConfig,
    DataConfig,
    EvalConfig,
    MaskedLanguageConfig,
    MatchingConfig,
    ModelConfig,
    ObjectivesConfig,
    OptimConfig,
    PseudoLabelConfig,
    SourceConfig,
    StreamConfig,
    TeacherConfig,
    TrainConfig,
    VisionConfig,
)
from simla_ds.objectives import OBJECTIVES

ALL_OFF: dict[str, Any] = {
    "itc": ContrastiveConfig(weight=0.0),
    "itm": MatchingConfig(weight=0.0),
    "mlm": MaskedLanguageConfig(weight=0.0),
    "xmm": CrossModalConfig(weight=0.0),
    "psl": PseudoLabelConfig(weight=0.0),
}


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: VisionConfig(image_size=130), ["model.vision.image_size=130", "patch_size=16", "to 128"]),
        (lambda: VisionConfig(image_size=10), ["image_size=10", "patch_size=16", "to 16"]),
        (lambda: VisionConfig(width=130), ["model.vision.width=130", "model.vision.heads=4"]),
        (lambda: VisionConfig(layers=0), ["model.vision", "layers", ">= 1"]),
        (lambda: StreamConfig(width=130), ["model.stream.width=130", "model.stream.heads=4"]),
        (lambda: StreamConfig(dropout=1.0), ["model.stream.dropout", "[0, 1)", "1.0"]),
        (lambda: StreamConfig(layers=0), ["model.stream", "layer"]),
        (lambda: ModelConfig(vision=VisionConfig(width=64)), ["model.vision.width=64", "model.stream.width=128"]),
        (
            lambda: ModelConfig(stream=StreamConfig(max_positions=64)),
            ["model.stream.max_positions=64", "64 patches", ">= 65"],
        ),
        (lambda: ModelConfig(temperature=0.9), ["model.temperature=0.9", "[0.001, 0.5]"]),
        (lambda: ModelConfig(temperature_min=0.0), ["temperature", "[0.0, 0.5]"]),
        (lambda: ContrastiveConfig(queue_size=-1), ["objectives.itc.queue_size", ">= 0", "-1"]),
        (lambda: MaskedLanguageConfig(probability=0), ["objectives.mlm.probability", "(0, 1)", "got 0"]),
        (lambda: CrossModalConfig(mask_ratio=1.0), ["objectives.xmm.mask_ratio", "(0, 1)", "got 1.0"]),
        (lambda: EvalConfig(every=2.5), ["eval.every", "below 1", "got 2.5"]),
        (lambda: CrossModalConfig(every=0), ["objectives.xmm.every", ">= 1", "got 0"]),
        (lambda: PseudoLabelConfig(keywords=65), ["objectives.psl.keywords=65", "64"]),
        (
            lambda: Config(
                objectives=ObjectivesConfig(psl=PseudoLabelConfig(whole_words=True)), data=DataConfig(max_tokens=65)
            ),
            ["objectives.psl.whole_words", "data.max_tokens=65", "<= 64"],
        ),
        (
            lambda: Config(objectives=ObjectivesConfig(fidelity="official", itm=MatchingConfig(negatives="global"))),
            ["objectives.itm.negatives=global", "fidelity=official"],
        ),
        (lambda: PseudoLabelConfig(keywords=0), ["objectives.psl", "keywords", ">= 1"]),
        (lambda: ObjectivesConfig(alpha=1.1), ["objectives.alpha", "[0, 1]", "1.1"]),
        (lambda: ObjectivesConfig(**ALL_OFF), ["every weight is 0"]),
        (lambda: ObjectivesConfig(psl=PseudoLabelConfig(weight=-1)), ["objectives.psl.weight", ">= 0", "got -1"]),
        (
            lambda: ObjectivesConfig(**{**ALL_OFF, "xmm": CrossModalConfig(every=2)}),
            ["objectives.xmm.every=2", "only objective"],
        ),
        (lambda: TeacherConfig(momentum=1.0), ["teacher.momentum", "[0, 1)", "1.0"]),
        (lambda: DataConfig(crop_scale=(0.9, 0.5)), ["data.crop_scale", "(0.9, 0.5)"]),
        (lambda: DataConfig(train="x", sources={"a": SourceConfig(shards="y")}), ["data.train=x", "data.sources"]),
        (lambda: DataConfig(sources={"a b": SourceConfig(shards="y")}), ["data.sources", "a b"]),
        (
            lambda: DataConfig(sources={"a": SourceConfig(shards="y", weight=1), "b": SourceConfig(shards="z")}),
            ["data.sources", "weight > 0", "{'a': 1, 'b': 0.0}"],
        ),
        (lambda: DataConfig(sources={"a": SourceConfig(shards="y", weight=-1)}), ["data.sources", "> 0", "-1"]),
        (lambda: DataConfig(sources={"a": SourceConfig(weight=1)}), ["data.sources.a.shards", "missing"]),
        (lambda: DataConfig(max_tokens=2), ["data.max_tokens", ">= 3", "got 2"]),
        (lambda: DataConfig(max_words=0), ["data.max_words", ">= 1", "got 0"]),
        (lambda: DataConfig(flip=7), ["data.flip", "[0, 1]", "got 7"]),
        (lambda: DataConfig(augment_ops=-1), ["data.augment_ops", ">= 0", "got -1"]),
        (lambda: DataConfig(workers=-1), ["data.workers", ">= 0", "-1"]),
        (lambda: DataConfig(augment_magnitude=11), ["data.augment_magnitude", "[0, 10]", "11"]),
        (lambda: OptimConfig(learning_rate=0), ["optim.learning_rate", "> 0", "got 0"]),
        (lambda: OptimConfig(reference_batch=0), ["optim.reference_batch", ">= 1", "got 0"]),
        (lambda: TrainConfig(batch_size=0), ["train.batch_size", ">= 1", "got 0"]),
        (lambda: TrainConfig(grad_accumulation=0), ["train.grad_accumulation", ">= 1", "got 0"]),
        (lambda: TrainConfig(keep_checkpoints=0), ["train.keep_checkpoints", ">= 1", "got 0"]),
        (lambda: TrainConfig(steps=-1), ["train.steps", ">= 0"]),
        (lambda: Config(train=TrainConfig(batch_size=1)), ["train.batch_size=1", "objectives.itm.weight=1.0", ">= 2"]),
    ],
)
def test_a_wrong_value_is_refused_with_the_setting_and_both_numbers(build: Callable[[], Any], named: list[str]):
    with pytest.raises(ValueError, match=r".") as raised:
        build()
    message = str(raised.value)
    assert "\n" not in message
    assert [part for part in named if part not in message] == []


def test_a_batch_of_one_is_fine_where_its_wrong_partners_are_elsewhere_or_not_wanted():
    one = TrainConfig(batch_size=1)
    Config(train=one, objectives=ObjectivesConfig(itm=MatchingConfig(weight=0.0)))
    Config(train=one, objectives=ObjectivesConfig(itm=MatchingConfig(negatives="global")))


def test_objectives_without_a_weight_are_not_enabled():
    assert ObjectivesConfig().enabled == ("itc", "itm", "mlm", "xmm", "psl")
    assert ObjectivesConfig(**{**ALL_OFF, "xmm": CrossModalConfig()}).enabled == ("xmm",)


def test_a_sixth_objective_is_enabled_by_its_field_alone():
    @dataclass(frozen=True, kw_only=True)
    class More(ObjectivesConfig):
        sixth: MatchingConfig = field(default_factory=MatchingConfig)

    assert More().enabled == (*OBJECTIVES, "sixth")
    assert More(sixth=MatchingConfig(weight=0.0)).enabled == tuple(OBJECTIVES)


def test_depths_follow_the_layout():
    assert (StreamConfig(layers=12).depth, StreamConfig(layers=12).text_depth) == (12, 12)
    albef = StreamConfig(shared=False, text_layers=6, fusion_layers=5)
    assert (albef.depth, albef.text_depth) == (11, 6)


@pytest.mark.parametrize(("scale", "factor"), [("sqrt", 2.0), ("linear", 4.0), ("none", 1.0)])
def test_learning_rate_scales_from_the_reference_batch_by_the_stated_rule(scale: Any, factor: float):
    config = Config(optim=OptimConfig(reference_batch=32, scale=scale))
    assert config.learning_rate_scale(128) == pytest.approx(factor)
    assert config.learning_rate_scale(32) == 1.0


def test_the_teacher_forgets_per_pair_and_not_per_step_unless_official():
    config = Config(optim=OptimConfig(reference_batch=32), teacher=TeacherConfig(momentum=0.99))
    assert config.teacher_momentum(32) == pytest.approx(0.99)
    assert config.teacher_momentum(64) == pytest.approx(config.teacher_momentum(32) ** 2)
    official = Config(objectives=ObjectivesConfig(fidelity="official"), teacher=TeacherConfig(momentum=0.99))
    assert official.teacher_momentum(64) == 0.99


def test_defaults_that_depend_on_fidelity_can_be_overridden():
    corrected, official = Config(), Config(objectives=ObjectivesConfig(fidelity="official"))
    assert (corrected.clip, official.clip) == (1.0, 0.0)
    assert (corrected.teacher_dropout, official.teacher_dropout) == (False, True)
    own = Config(
        objectives=ObjectivesConfig(fidelity="official"),
        optim=OptimConfig(clip=3.0),
        teacher=TeacherConfig(dropout=False),
    )
    assert (own.clip, own.teacher_dropout) == (3.0, False)


def test_a_run_counts_samples_unless_steps_are_given():
    config = Config(train=TrainConfig(samples=100))
    assert config.total_steps(32) == 4  # the last step is a whole one
    assert Config(train=TrainConfig(steps=7, samples=100)).total_steps(32) == 7


@pytest.mark.parametrize(
    ("every", "total", "due"),
    [
        (3, 10, [3, 6, 9]),
        (0, 10, []),
        (0.5, 10, [5, 10]),
        (0.25, 10, [3, 5, 8, 10]),
        (0.2, 3, [1, 2, 3]),  # fewer steps than evaluations
    ],
)
def test_evaluations_come_every_so_many_steps_or_so_often_in_a_run(every: float, total: int, due: list[int]):
    assert [step for step in range(1, total + 1) if EvalConfig(every=every).is_due(step, total)] == due
