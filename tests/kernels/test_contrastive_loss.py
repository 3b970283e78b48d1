"""contrastive_loss in PyTorch: numbers, gradients, queues read in place, and what torch.compile makes of it."""

import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from simla_kernels import checking, dispatch
from simla_kernels.contrastive_loss import contrastive_loss, contrastive_loss_reference
from tests.kernels.mutants import mutant

MODULE: Any = importlib.import_module("simla_kernels.contrastive_loss")
TOLERANCE = 1e-5  # of a result's largest entry; 6e-7 was measured
HALF_FLOOR = 1e-5


def arguments(
    pairs: int = 5,
    keys: int | None = None,
    queue: int = 31,
    width: int = 16,
    dtype: torch.dtype = torch.float32,
    ids: bool = True,
    **more: Any,
) -> dict[str, Any]:
    """Unit features; with ids, pairs of pictures are the same and a tenth of the queue is unfilled."""
    keys = pairs if keys is None else keys
    generator = torch.Generator().manual_seed(pairs + queue)

    def draw(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=generator), dim=-1).to(dtype)

    names = ("image", "text", "teacher_image", "teacher_text", "image_queue", "text_queue")
    given: dict[str, Any] = {
        name: draw(count) for name, count in zip(names, (pairs, pairs, keys, keys, queue, queue), strict=True)
    }
    given["image"].requires_grad_()
    given["text"].requires_grad_()
    given |= {"temperature": torch.full((1,), 0.07, requires_grad=True), "alpha": 0.4}
    if ids:
        queue_ids = torch.randint(0, keys, (queue,), generator=generator)
        queue_ids[torch.rand(queue, generator=generator) < 0.1] = -1
        given |= {"ids": torch.arange(keys) // 2, "queue_ids": queue_ids}
    return {**given, **more}


def worst_error(function: Any, given: dict[str, Any]) -> float:
    truth = checking.results(contrastive_loss_reference, checking.upcast(given))
    return max(checking.errors(checking.results(function, given), truth).values())


@pytest.mark.parametrize("function", [contrastive_loss_reference, contrastive_loss])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_gradients_are_those_of_finite_differences(function: Any, alpha: float):
    given = checking.upcast(arguments(3, 6, queue=7, width=4, alpha=alpha, rank_offset=2))
    # the teacher's targets move with the temperature, but carry no gradient: differences see that only where alpha is 0
    wanted = ("image", "text") if alpha else ("image", "text", "temperature")

    def loss(*tensors: Tensor) -> Tensor:
        return function(**{**given, **dict(zip(wanted, tensors, strict=True))})[0]

    assert torch.autograd.gradcheck(loss, tuple(given[name] for name in wanted))


@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("queue", [0, 31, 1000])  # none; less than a chunk; several chunks, the last one shorter
@pytest.mark.parametrize(
    ("pairs", "keys", "offset"), [(1, 1, 0), (30, 30, 0), (31, 93, 62), (31, 93, 5), (257, 300, 9)]
)
def test_loss_similarities_and_gradients_equal_the_definition(
    pairs: int, keys: int, offset: int, queue: int, ids: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(MODULE, "CHUNK_BUDGET", 1)  # the shortest chunk: 256 keys
    assert worst_error(contrastive_loss, arguments(pairs, keys, queue, ids=ids, rank_offset=offset)) <= TOLERANCE


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("width", [8, 64, 300])
def test_every_weight_of_the_teacher_and_width(alpha: float, width: int):
    assert worst_error(contrastive_loss, arguments(30, queue=257, width=width, alpha=alpha)) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_twice_pytorchs(dtype: torch.dtype):
    given = arguments(30, queue=257, width=64, dtype=dtype)
    truth = checking.results(contrastive_loss_reference, checking.upcast(given))
    theirs = checking.errors(checking.results(contrastive_loss_reference, given), truth)
    mine = checking.errors(checking.results(contrastive_loss, given), truth)
    assert all(mine[name] <= 2 * theirs[name] + HALF_FLOOR for name in truth)
    assert all(mine[f"out{i}"] <= TOLERANCE for i in range(3))  # fp32 arithmetic whatever the inputs


def test_float16_gradients_survive_a_loss_scale_of_2_to_the_16():
    given = arguments(30, queue=257, dtype=torch.float16)
    tensors = [given[name] for name in ("image", "text", "temperature")]
    plain = torch.autograd.grad(contrastive_loss(**given)[0], tensors)
    scaled = torch.autograd.grad(contrastive_loss(**given)[0] * 2**16, tensors)
    for before, after in zip(plain, scaled, strict=True):
        assert after.isfinite().all()
        torch.testing.assert_close(after.float() / 2**16, before.float(), rtol=1e-3, atol=1e-7)


def test_similarities_carry_no_gradient_and_count_excluded_keys_too():
    given = arguments()
    _, image_to_text, text_to_image = contrastive_loss(**given)
    assert not image_to_text.requires_grad
    expected = given["image"] @ given["teacher_text"].T / 0.07
    torch.testing.assert_close(image_to_text, expected.detach())
    assert text_to_image.shape == (5, 5)


def test_unfilled_rows_and_other_captions_of_the_same_picture_do_not_count():
    given = arguments(4, queue=6, ids=False)
    given |= {"ids": torch.tensor([7, 8, 9, 10]), "queue_ids": torch.tensor([-1, 50, 51, -1, 52, 53])}
    filled = [1, 2, 4, 5]
    shorter = {**given, "queue_ids": None} | {n: given[n][filled] for n in ("image_queue", "text_queue")}
    torch.testing.assert_close(contrastive_loss(**given)[0], contrastive_loss(**shorter)[0])
    alone = {**given, "ids": torch.full((4,), 3), "queue_ids": torch.tensor([-1, 3, 3, -1, 3, 3])}
    assert contrastive_loss(**alone)[0].item() == pytest.approx(0, abs=1e-6)


def test_unfilled_rows_are_left_out_when_only_the_queue_has_ids():
    given = arguments(4, queue=300)
    given["ids"] = None
    assert worst_error(contrastive_loss, given) <= TOLERANCE


def test_rows_of_a_larger_ring_are_read_where_they_are():
    ring = torch.full((2, 64, 40), float("nan"))
    ring[:, 3:34, 8:24] = torch.randn(2, 31, 16)
    views = {"image_queue": ring[0, 3:34, 8:24], "text_queue": ring[1, 3:34, 8:24]}
    before = ring.clone()
    assert worst_error(contrastive_loss, arguments(queue=31) | views) <= TOLERANCE
    torch.testing.assert_close(ring, before, rtol=0, atol=0, equal_nan=True)


def test_a_queue_may_be_written_to_before_backward():
    given = arguments()
    expected = torch.autograd.grad(contrastive_loss(**given)[0], given["image"])
    loss = contrastive_loss(**given)[0]
    given["text_queue"].zero_()
    given["teacher_text"].zero_()
    assert torch.equal(torch.autograd.grad(loss, given["image"])[0], expected[0])


class LargestResult(TorchDispatchMode):
    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_no_matrix_over_all_keys_exists(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(MODULE, "CHUNK_BUDGET", 1)
    given = arguments(8, queue=20_000, width=16)
    queries, own = torch.randn(16, 16), torch.randn(8, 16)
    with LargestResult() as seen:
        MODULE._torch_attend(
            queries, own, given["teacher_text"], given["text_queue"], torch.ones(1), given["ids"], given["queue_ids"], 0
        )
    assert seen.numbers <= 16 * 256 < 8 * 20_000


@pytest.mark.parametrize("ids", [False, True])
def test_the_operator_passes_opcheck(ids: bool):
    given = arguments(3, 5, queue=7, ids=ids, rank_offset=1)
    given = {"ids": None, "queue_ids": None, **given}
    torch.library.opcheck(MODULE._forward, (), given)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_into_one_graph(backend: str):
    given = arguments(rank_offset=0)
    compiled = torch.compile(contrastive_loss, fullgraph=True, backend=backend)
    expected, found = checking.results(contrastive_loss, given), checking.results(compiled, given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_it_may_be_recomputed():
    given = arguments()

    def recomputed(**inputs: Any) -> Any:
        return checkpoint(contrastive_loss, use_reentrant=False, **inputs)

    expected, found = checking.results(contrastive_loss, given), checking.results(recomputed, given)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_two_runs_are_bit_identical():
    given = arguments(31, queue=1000, width=64)
    first, second = checking.results(contrastive_loss, given), checking.results(contrastive_loss, given)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_backend_is_named():
    assert dispatch.backend("contrastive_loss", **arguments()).name == "torch"
    wide = arguments(width=300)
    assert MODULE._refuses(**wide) == "features of 300 are wider than 256"
    assert "float64" in MODULE._refuses(**checking.upcast(wide))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(0, 16)}, r"image \(0, 16\) must be \(B, E\)"),
        ({"text": torch.zeros(4, 16)}, r"text \(4, 16\) .* must be \(5, 16\)"),
        ({"teacher_text": torch.zeros(6, 16)}, r"teacher_text \(6, 16\) .* must be \(5, 16\)"),
        ({"text_queue": torch.zeros(30, 16)}, r"text_queue \(30, 16\) .* must be \(31, 16\)"),
        ({"image_queue": torch.zeros(31, 8)}, r"image_queue \(31, 8\) .* must be \(31, 16\)"),
        ({"image_queue": torch.zeros(31, 16, device="meta")}, r"image_queue \(31, 16\) .* on meta must be .* on cpu"),
        ({"text": torch.zeros(5, 16, dtype=torch.int64)}, r"text \(5, 16\) torch.int64 .* floating"),
        ({"temperature": torch.tensor(0.07)}, r"temperature \(\) .* must be \(1,\)"),
        ({"ids": torch.zeros(4, dtype=torch.int64)}, r"ids \(4,\) torch.int64 .* must be \(5,\)"),
        ({"queue_ids": torch.zeros(31)}, r"queue_ids \(31,\) torch.float32 .* torch.int64"),
        ({"rank_offset": 1}, r"rank_offset=1 must be in \[0, 0\]: teacher_image has 5 rows, image 5"),
        ({"alpha": 1.5}, r"alpha=1.5 must be in \[0, 1\]"),
    ],
)
def test_bad_input_is_named_with_its_shape(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**arguments() | change)


MUTATIONS = {
    "alpha swapped": ("alpha * sums[pairs:] + (1 - alpha) * own_keys", "(1 - alpha) * sums[pairs:] + alpha * own_keys"),
    "softmax over queries": ("weights = scores.sub_(higher).exp_()", "weights = scores.softmax(0)"),
    "teacher and student swapped": ("torch.cat([student, teacher[rows]])", "torch.cat([teacher[rows], student])"),
    "gradients in bfloat16": ("grad = (sums[:pairs] - target)", "grad = (sums[:pairs] - target).bfloat16().float()"),
    "own key of another rank": ("rows = slice(rank_offset, rank_offset + pairs)", "rows = slice(0, pairs)"),
    "unfilled rows count": ("scores.add_((few_ids == UNFILLED).to(dtype), alpha=EXCLUDED)", "pass"),
    "equal ids count": ("_exclude(scores, few_ids[None] == own_ids[:, None])", "pass"),
    "own key counts twice": ("_exclude(scores, columns[None] == own[:, None])", "pass"),
    "no running maximum": ("total.mul_(shrink)", "total"),
    "temperature not in the gradient": ("/ (temperature * (2 * pairs))", "/ (2 * pairs)"),
}  # fmt: skip


@pytest.mark.mutation
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_loss_is_seen(name: str, monkeypatch: pytest.MonkeyPatch):
    broken = mutant(monkeypatch, "contrastive_loss", *MUTATIONS[name])
    given = [arguments(7, 21, queue=600, rank_offset=14, ids=ids) for ids in (True, False)]
    assert max(worst_error(contrastive_loss, g) for g in given) <= TOLERANCE
    assert max(worst_error(broken.contrastive_loss, g) for g in given) > 10 * TOLERANCE
