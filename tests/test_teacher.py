"""The momentum teacher: exact in float32, followed by its computing copy, refused when it does not fit."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simla_ds.downstream.snli_ve import EntailmentNetwork
from simla_ds.model.simla import Simla
from simla_ds.teacher import ModuleSource, Teacher
from tests.tiny import make_batch, model_config, spread_weights

STEPS, MOMENTUM = 200, 0.995
TOLERANCE = 2e-6  # values reach 4: float32 rounds by 2.4e-7 at each step, and errors fade by the momentum


@pytest.fixture
def student() -> Simla:
    """Return a tiny student with weights of order one."""
    model = Simla(model_config())
    spread_weights(model)
    return model


@torch.no_grad()
def drift(teacher: Teacher, student: Simla) -> dict[str, float]:
    """Let the student drift for 200 steps; return the teacher's largest error per parameter against float64."""
    generator = torch.Generator().manual_seed(1)
    exact = {name: p.double().clone() for name, p in student.named_parameters()}
    pace = {n: 1e-3 * torch.randn(p.shape, generator=generator) for n, p in student.named_parameters()}
    for _ in range(STEPS):
        for name, parameter in student.named_parameters():
            parameter += pace[name]
            exact[name] = MOMENTUM * exact[name] + (1 - MOMENTUM) * parameter.double()
        teacher.update(MOMENTUM)
    return {name: (teacher.master[name].double() - exact[name]).abs().max().item() for name in exact}


class Rounded(ModuleSource):
    """A source that hands out what a low-precision copy of the weights would hold."""

    def __init__(self, module: nn.Module, dtype: torch.dtype):
        super().__init__(module)
        self.dtype = dtype

    def shards(self):
        """Return rounded values."""
        return {name: value.to(self.dtype).float() for name, value in super().shards().items()}


def teacher_of(student: Simla, **settings: Any) -> Teacher:
    return Teacher(student, dropout=False, **settings).follow(ModuleSource(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_master_equals_the_float64_average_over_200_updates(student: Simla, dtype: torch.dtype):
    errors = drift(teacher_of(student, dtype=dtype), student)
    assert max(errors.values()) < TOLERANCE


def test_feeding_bfloat16_rounded_weights_is_noticed_at_that_tolerance(student: Simla):
    errors = drift(Teacher(student, dropout=False).follow(Rounded(student, torch.bfloat16)), student)
    matrices = [error for name, error in errors.items() if name.endswith("weight")]
    assert min(matrices) > 20 * TOLERANCE


def test_an_average_kept_in_bfloat16_would_not_move(student: Simla):
    """Why the master is float32: one step of .5 % of a small difference is below bfloat16's resolution."""
    kept, wanted = torch.ones(1, dtype=torch.bfloat16), torch.full((1,), 1.3, dtype=torch.bfloat16)
    assert kept.clone().lerp_(wanted, 1 - MOMENTUM) == kept
    teacher = teacher_of(student, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in teacher.master.items()}
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.3
    teacher.update(MOMENTUM)
    for name, value in teacher.master.items():
        torch.testing.assert_close(
            value - before[name], torch.full_like(value, 0.3 * (1 - MOMENTUM)), atol=5e-7, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_computing_copy_is_the_master_rounded_to_its_dtype(student: Simla, dtype: torch.dtype):
    teacher = teacher_of(student, dtype=dtype)
    start = {name: p.clone() for name, p in teacher.module.named_parameters()}
    drift(teacher, student)
    moved = 0
    for name, parameter in teacher.module.named_parameters():
        assert parameter.dtype == dtype
        assert torch.equal(parameter, teacher.master[name].to(dtype))
        moved += not torch.equal(parameter, start[name])
    assert moved > 0.9 * len(start)


def test_the_copy_computes_with_the_new_weights(student: Simla):
    """A tied decoder or a cached weight left behind would show here."""
    teacher = teacher_of(student)
    drift(teacher, student)
    fresh = Simla(model_config())
    fresh.load_state_dict({**fresh.state_dict(), **teacher.state_dict(), **tied(teacher.state_dict())})
    batch = make_batch([6, 4])
    inputs = (batch["input_ids"], batch["text_mask"], teacher.module.image_encoder(batch["image"]))
    mine = teacher.module.language_head(teacher.module.text_over_image(*inputs)[0])
    torch.testing.assert_close(mine, fresh.language_head(fresh.text_over_image(*inputs)[0]))


def tied(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"language_head.decoder.weight": state["stream.embeddings.word.weight"]}


def test_the_teacher_is_apart_from_the_student_and_needs_no_gradient(student: Simla):
    student.set_activation_checkpointing(True)
    teacher = teacher_of(student)
    own = {p.data_ptr() for p in student.parameters()}
    assert not own & {p.data_ptr() for p in teacher.module.parameters()}
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert not teacher.module.stream.activation_checkpointing
    assert not teacher.module.image_encoder.activation_checkpointing
    assert student.stream.activation_checkpointing


@pytest.mark.parametrize("dropout", [False, True])
def test_dropout_in_the_teacher_is_its_own_switch(student: Simla, dropout: bool):
    student.train(not dropout)
    assert Teacher(student, dropout=dropout).module.training is dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trips_into_master_and_copy(student: Simla, dtype: torch.dtype):
    teacher = teacher_of(student, dtype=dtype)
    drift(teacher, student)
    saved = {name: value.clone() for name, value in teacher.state_dict().items()}
    other_student = Simla(model_config())
    other = Teacher(other_student, dropout=False, dtype=dtype).follow(ModuleSource(student))
    other.load_state_dict(saved)
    for name, parameter in other.module.named_parameters():
        assert torch.equal(other.master[name], saved[name])
        assert torch.equal(parameter, saved[name].to(dtype))
    # and it goes on from there as the first one does
    for t in (teacher, other):
        t.update(MOMENTUM)
    assert all(torch.equal(other.master[n], teacher.master[n]) for n in saved)


def test_in_float32_the_master_itself_computes_and_in_bfloat16_there_are_two(student: Simla):
    size = sum(p.numel() for p in student.parameters())
    for dtype, wanted in ((torch.float32, 4 * size), (torch.bfloat16, (4 + 2) * size)):
        teacher = teacher_of(student, dtype=dtype)
        tensors = [*teacher.master.values(), *teacher.module.parameters()]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        assert sum(storages.values()) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_filled_by_layer_it_computes_the_same_and_keeps_nothing_of_the_layers(student: Simla, dtype: torch.dtype):
    whole, by_layer = teacher_of(student, dtype=dtype), Teacher(student, dropout=False, dtype=dtype)
    by_layer.follow(ModuleSource(student), by_layer=True)
    batch = make_batch([6, 4])
    for _ in range(2):
        outputs = []
        for network in (whole.module, by_layer.module):
            tokens = network.image_encoder(batch["image"].to(dtype))
            read = network.text_over_image(batch["input_ids"], batch["text_mask"], tokens, cls_attention=True)
            outputs.append(read)
        for mine, wanted in zip(*outputs, strict=True):
            assert torch.equal(mine, wanted)
        drift(whole, student)
        by_layer.master = {name: value.clone() for name, value in whole.master.items()}
        by_layer.refresh()
    kept = {name for name, parameter in by_layer.module.named_parameters() if parameter.numel()}
    assert kept == {name for name in whole.master if ".layers." not in name and ".blocks." not in name}


def test_a_layer_without_parameters_has_nothing_to_be_filled():
    student = EntailmentNetwork(model_config())
    teacher = Teacher(student, dropout=False)
    teacher.follow(WithoutEmptyFills(student), by_layer=True)
    assert torch.equal(teacher.module.head(torch.ones(2, 32)), student.head(torch.ones(2, 32)))


class WithoutEmptyFills(ModuleSource):
    """Ranks exchange nothing for no parameters, so EngineSource cannot be asked for it."""

    def fill(self, parameters, shards):
        assert parameters
        super().fill(parameters, shards)


def test_a_layer_that_fails_is_emptied_all_the_same(student: Simla):
    teacher = Teacher(student, dropout=False).follow(ModuleSource(student), by_layer=True)
    with pytest.raises(RuntimeError):
        teacher.module.image_encoder.blocks(torch.zeros(1, 2, 3))
    assert not any(p.numel() for p in teacher.module.image_encoder.blocks.parameters())


def test_a_teacher_becomes_what_it_is_told_to_follow(student: Simla):
    other = spread_weights(Simla(model_config()), seed=7)
    teacher = Teacher(student, dropout=False).follow(ModuleSource(other))
    for name, parameter in other.named_parameters():
        assert torch.equal(teacher.module.get_parameter(name), parameter)


def test_state_of_another_model_is_refused_by_name_and_sizes(student: Simla):
    teacher = teacher_of(student)
    state = dict(teacher.state_dict())
    missing = {n: v for n, v in state.items() if n != "match_head.bias"}
    with pytest.raises(ValueError, match=r"other parameters than this model: 1, first match_head.bias"):
        teacher.load_state_dict(missing)
    with pytest.raises(ValueError, match=r"match_head.bias \(3,\), this model \(2,\)"):
        teacher.load_state_dict({**state, "match_head.bias": torch.zeros(3)})
