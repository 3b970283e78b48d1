"""contrastive_loss's Triton kernel, by the interpreter: loss, similarities and gradients against float64."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from simla_kernels import checking, configs, contrastive_loss_triton, dispatch, self_check
from simla_kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference
from simla_kernels.launching import LaunchConfig
from tests.kernels.guards import guard_launches

TOLERANCE = 1e-5  # of a result's largest entry; 5e-7 was measured


@pytest.fixture(autouse=True)
def _by_triton():
    with dispatch.forced("triton"):
        yield


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return guard_launches(monkeypatch, contrastive_loss_triton)


def arguments(
    pairs: int = 5,
    keys: int = 5,
    queue: int = 70,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    ids: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Queues are the middle of a larger ring whose rows are wider than a feature."""
    generator = torch.Generator().manual_seed(pairs + queue)

    def draw(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator), dim=-1).to(dtype)

    def ring() -> Tensor:
        whole = torch.full((queue + 6, width + 12), 1e4, dtype=dtype)
        whole[3 : 3 + queue, 4 : 4 + width] = draw(queue)
        return whole[3 : 3 + queue, 4 : 4 + width]

    given: dict[str, Any] = {"image": draw(pairs).requires_grad_(), "text": draw(pairs).requires_grad_()}
    given |= {"teacher_image": draw(keys), "teacher_text": draw(keys), "image_queue": ring(), "text_queue": ring()}
    given |= {"temperature": torch.full((1,), 0.07, requires_grad=True), "alpha": 0.4}
    if ids:
        queue_ids = torch.randint(0, keys, (queue,), generator=generator)
        queue_ids[torch.rand(queue, generator=generator) < 0.1] = -1
        given |= {"ids": torch.arange(keys) // 2, "queue_ids": queue_ids}
    return {**given, **more}


def worst_error(given: dict[str, Any]) -> float:
    truth = checking.results(contrastive_loss_reference, checking.upcast(given))
    return max(checking.errors(checking.results(contrastive_loss, given), truth).values())


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("queue", [0, 1, 257])  # none; a single row; several tiles, the last one not full
@pytest.mark.parametrize(("pairs", "keys", "offset"), [(1, 1, 0), (31, 70, 39)])
def test_numbers_equal_the_definition(pairs: int, keys: int, offset: int, queue: int, ids: bool, launched: list[str]):
    assert worst_error(arguments(pairs, keys, queue, ids=ids, rank_offset=offset)) <= TOLERANCE
    assert set(launched) == {"attend_kernel"}


@pytest.mark.parametrize(("width", "alpha"), [(8, 0.0), (40, 1.0), (64, 0.0), (256, 1.0)])  # 40: no power of two
def test_every_weight_of_the_teacher_and_width(width: int, alpha: float, launched: list[str]):
    assert worst_error(arguments(width=width, alpha=alpha)) <= TOLERANCE


def test_a_program_takes_many_tiles(monkeypatch: pytest.MonkeyPatch, launched: list[str]):
    monkeypatch.setattr(contrastive_loss_triton, "PROGRAMS", 2)
    assert worst_error(arguments(20, 20, 300)) <= TOLERANCE


def test_unfilled_rows_are_left_out_when_only_the_queue_has_ids():
    assert worst_error({**arguments(), "ids": None}) <= TOLERANCE


def test_a_queue_without_anything_to_offer_changes_nothing():
    given = arguments(queue=40, queue_ids=torch.full((40,), -1))
    empty: dict[str, Any] = {"image_queue": torch.zeros(0, 16), "text_queue": torch.zeros(0, 16), "queue_ids": None}
    shorter = arguments(queue=40) | empty
    torch.testing.assert_close(contrastive_loss(**given)[0], contrastive_loss(**shorter)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp32_queue", [False, True])
def test_half_precision_inputs_are_computed_in_fp32(dtype: torch.dtype, fp32_queue: bool):
    given = arguments(20, 20, 100, dtype=dtype)
    if fp32_queue:
        given |= {name: given[name].float() for name in ("image_queue", "text_queue")}
    truth = checking.results(contrastive_loss_reference, checking.upcast(given))
    errors = checking.errors(checking.results(contrastive_loss, given), truth)
    assert all(errors[f"out{i}"] <= TOLERANCE for i in range(3))
    assert max(errors.values()) <= torch.finfo(dtype).eps  # a gradient is rounded once


def test_two_runs_are_bit_identical():
    first, second = (checking.results(contrastive_loss, arguments(20, 20, 100)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_it_passes_its_own_self_check():
    assert self_check.failure("contrastive_loss", torch.device("cpu"), (torch.float32,)) is None


@pytest.mark.parametrize("tiles", [(16, 16, 16), (64, 32, 32)])
def test_other_tiles_give_the_same_numbers(tiles: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch):
    chosen = LaunchConfig(dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), tiles, strict=True)), num_warps=4)
    monkeypatch.setattr(configs, "CONFIGS", dict.fromkeys(configs.CONFIGS, chosen))
    assert worst_error(arguments(20, 20, 100)) <= TOLERANCE


@pytest.mark.mutation
@pytest.mark.parametrize("argument", [1, 4, 5, 6])  # own keys, temperature, ids, queue_ids
def test_a_kernel_that_gets_something_else_is_seen(argument: int, monkeypatch: pytest.MonkeyPatch):
    attend: Any = contrastive_loss_triton.attend
    bad = {1: lambda own: own.flip(0), 4: lambda t: t * 1.01, 5: lambda ids: ids.flip(0), 6: lambda ids: None}[argument]
    monkeypatch.setattr(
        contrastive_loss_triton,
        "attend",
        lambda *given: attend(*given[:argument], bad(given[argument]), *given[argument + 1 :]),
    )
    assert worst_error(arguments(6, 6)) > 10 * TOLERANCE
