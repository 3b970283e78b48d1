"""contrastive_loss: image-text contrast over a batch and two queues, against a label and a momentum teacher.

    s_bj = <q_b, key_j> / temperature,   y_b = alpha softmax(s^teacher_b) + (1 - alpha) onehot(own key)
    loss = mean over both directions and B rows of  - sum_j y_bj log softmax_j(s_b)
B pairs, G keys of the batch (all ranks), Q queue rows, E width; image queries meet text keys and the other way round.
Every sum over keys is sum_j p_bj key_j, attention whose values are its keys: with P the student's and T the teacher's,
    loss_b = logsumexp(s_b) - <q_b, Y> / temperature,   d loss_b / d q_b = (P - Y) / temperature,
    Y = alpha T + (1 - alpha) own key,   d loss / d temperature = - sum_b <q_b, d loss / d q_b> / temperature,
so one pass over the keys gives loss and gradients, and no (B, G + Q) matrix exists. (ALBEF, section 3.2; MoCo)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from simla_kernels import dispatch
from simla_kernels.dispatch import Operation
from simla_kernels.half import without_autocast

UNFILLED = -1
"""The id of a queue row that holds nothing yet."""
CHUNK_BUDGET = 4 * 2**20
"""Bytes of the scores of one chunk of keys in PyTorch's path: about a core's share of the last cache."""
EXCLUDED = -1e30
"""Added to a score that must not count. Finite: infinities would meet each other in a chunk without a key."""
WIDEST_TRITON_ROW = 256
"""A program keeps sums of whole keys in registers."""


def contrastive_loss_reference(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    alpha: float,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    rank_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss and both directions' similarities to the batch (B, G), by the definition."""
    pairs = image.shape[0]
    own = torch.arange(pairs, device=image.device) + rank_offset
    columns = torch.arange(teacher_image.shape[0] + image_queue.shape[0], device=image.device)
    own_ids = torch.full_like(own, UNFILLED) if ids is None else ids[own]
    in_batch = columns[None, : teacher_image.shape[0]] < 0 if ids is None else ids[None] == own_ids[:, None]
    in_queue = columns[None, teacher_image.shape[0] :] < 0
    if queue_ids is not None:
        in_queue = (queue_ids[None] == own_ids[:, None]) | (queue_ids[None] == UNFILLED)
    is_own = columns[None] == own[:, None]
    excluded = torch.cat([in_batch.expand(pairs, -1), in_queue.expand(pairs, -1)], 1) & ~is_own

    def one_direction(student: Tensor, teacher: Tensor, in_batch: Tensor, in_queue: Tensor) -> tuple[Tensor, Tensor]:
        keys = torch.cat([in_batch, in_queue.to(in_batch.dtype)])
        scores = student @ keys.T / temperature
        teacher_scores = (teacher[own] @ keys.T / temperature).detach().masked_fill(excluded, float("-inf"))
        targets = alpha * teacher_scores.softmax(-1) + (1 - alpha) * is_own.to(scores.dtype)
        log_p = scores.masked_fill(excluded, float("-inf")).log_softmax(-1).masked_fill(excluded, 0.0)
        return -(targets * log_p).sum(-1).mean(), scores[:, : in_batch.shape[0]].detach()

    loss_i2t, sim_i2t = one_direction(image, teacher_image, teacher_text.detach(), text_queue.detach())
    loss_t2i, sim_t2i = one_direction(text, teacher_text, teacher_image.detach(), image_queue.detach())
    return (loss_i2t + loss_t2i) / 2, sim_i2t, sim_t2i


def _torch_attend(
    queries: Tensor,
    own_keys: Tensor,
    batch_keys: Tensor,
    queue: Tensor,
    temperature: Tensor,
    ids: Tensor | None,
    queue_ids: Tensor | None,
    rank_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum_j p_j key_j (2B, E), logsumexp (2B,) and the student's scores of the batch (B, G).

    queries (2B, E): the student's rows, then the teacher's. Softmax over chunks of keys with a running maximum, which
    starts at the own key; that key is therefore left out of the chunks.
    """
    pairs, dtype = own_keys.shape[0], queries.dtype
    scaled = queries / temperature
    sums = torch.cat([own_keys, own_keys])
    top = (scaled * sums).sum(-1, keepdim=True)
    total = torch.ones_like(top)
    similarities = queries.new_empty(pairs, batch_keys.shape[0])
    own_ids = None if ids is None else ids[rank_offset : rank_offset + pairs]
    chunk = max(256, CHUNK_BUDGET // (queries.shape[0] * queries.element_size()))
    own = torch.arange(rank_offset, rank_offset + pairs, device=queries.device)
    for keys, key_ids, is_batch in ((batch_keys, ids, True), (queue, queue_ids, False)):
        for start in range(0, keys.shape[0], chunk):
            few = keys[start : start + chunk].to(dtype)
            few_ids = None if key_ids is None else key_ids[start : start + chunk]
            scores = scaled @ few.T
            if is_batch:
                similarities[:, start : start + chunk] = scores[:pairs]
                columns = torch.arange(start, start + few.shape[0], device=queries.device)
                _exclude(scores, columns[None] == own[:, None])
            elif few_ids is not None:
                scores.add_((few_ids == UNFILLED).to(dtype), alpha=EXCLUDED)
            if few_ids is not None and own_ids is not None:
                _exclude(scores, few_ids[None] == own_ids[:, None])
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))
            shrink = (top - higher).exp_()
            weights = scores.sub_(higher).exp_()
            total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
            sums.mul_(shrink).addmm_(weights, few)
            top = higher
    return sums / total, (top + total.log())[:, 0], similarities


def _exclude(scores: Tensor, excluded: Tensor) -> None:
    """Put the student's and the teacher's scores (2B, K) out of the softmax where `excluded` (B, K)."""
    scores.view(2, *excluded.shape).add_(excluded.to(scores.dtype), alpha=EXCLUDED)


@torch.library.custom_op("simla_kernels::contrastive_loss", mutates_args=())
def _forward(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    alpha: float,
    ids: Tensor | None,
    queue_ids: Tensor | None,
    rank_offset: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return loss (), sim_i2t and sim_t2i (B, G), and the gradients of image, text and temperature for a loss of 1."""
    attend = _torch_attend
    if dispatch.choose("contrastive_loss", image, lambda: _refuses(image)).name == "triton":
        from simla_kernels.contrastive_loss_triton import attend
    dtype, pairs = _compute_dtype(image), image.shape[0]
    temperature = temperature.to(dtype)
    rows = slice(rank_offset, rank_offset + pairs)
    found = []
    with without_autocast(image.device):
        for student, teacher, keys, queue in (
            (image, teacher_image, teacher_text, text_queue),
            (text, teacher_text, teacher_image, image_queue),
        ):
            queries = torch.cat([student, teacher[rows]]).to(dtype)
            own_keys = keys[rows].to(dtype)
            sums, lse, similarities = attend(queries, own_keys, keys, queue, temperature, ids, queue_ids, rank_offset)
            target = alpha * sums[pairs:] + (1 - alpha) * own_keys
            loss = (lse[:pairs] - (queries[:pairs] * target).sum(-1) / temperature).mean() / 2
            grad = (sums[:pairs] - target) / (temperature * (2 * pairs))
            found.append((loss, similarities, grad, -(queries[:pairs] * grad).sum() / temperature))
    (loss_i2t, sim_i2t, grad_image, grad_a), (loss_t2i, sim_t2i, grad_text, grad_b) = found
    return loss_i2t + loss_t2i, sim_i2t, sim_t2i, grad_image, grad_text, grad_a + grad_b


@_forward.register_fake
def _(
    image, text, teacher_image, teacher_text, image_queue, text_queue, temperature, alpha, ids, queue_ids, rank_offset
):
    dtype = _compute_dtype(image)

    def of(*shape):
        return image.new_empty(shape, dtype=dtype)

    block = (image.shape[0], teacher_image.shape[0])
    return of(), of(*block), of(*block), of(*image.shape), of(*text.shape), of(1)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = inputs[0].dtype, inputs[1].dtype, inputs[6].dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[3:])  # nothing of the queue: it may be written to before backward


def _autograd_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    image, text, temperature = (
        (saved * grad).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    )
    return image, text, None, None, None, None, temperature, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def contrastive_loss(
    image: Tensor,
    text: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    alpha: float,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    rank_offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, and the student's similarities to the batch's keys, image to text and text to image.

    The similarities (B, G) are divided by the temperature and carry no gradient. Results are fp32 (fp64 for fp64), and
    so is all arithmetic. The queues are read where they are; the gradient is made in forward and keeps no key.

    Args:
        image, text: the student's features (B, E).
        teacher_image, teacher_text: the teacher's features of the whole batch (G, E); no gradient.
        image_queue, text_queue: features of earlier batches (Q, E), any row stride; Q may be 0; no gradient.
        temperature: (1,).
        alpha: weight of the teacher's distribution in the targets.
        ids: (G,) int64; keys of an equal id that are not the own pair are left out. None: every key counts.
        queue_ids: (Q,) int64; -1 marks a row that holds nothing yet.
        rank_offset: row b's own key is rank_offset + b.

    Raises:
        ValueError: shapes, dtypes or devices that do not belong together.
    """
    tensors = {"image": image, "text": text, "teacher_image": teacher_image, "teacher_text": teacher_text}
    tensors |= {"image_queue": image_queue, "text_queue": text_queue, "temperature": temperature}
    _check(tensors, ids, queue_ids, alpha, rank_offset)
    features = (image, text, teacher_image, teacher_text, image_queue, text_queue)
    return _forward(*features, temperature, float(alpha), ids, queue_ids, rank_offset)[:3]


def _compute_dtype(image: Tensor) -> torch.dtype:
    return torch.float64 if image.dtype == torch.float64 else torch.float32


def _check(
    tensors: dict[str, Tensor], ids: Tensor | None, queue_ids: Tensor | None, alpha: float, rank_offset: int
) -> None:
    image = tensors["image"]
    if image.dim() != 2 or 0 in image.shape:
        raise ValueError(f"contrastive_loss: image {tuple(image.shape)} must be (B, E), neither of them 0")
    (pairs, width), keys, queue = image.shape, tensors["teacher_image"].shape[0], tensors["image_queue"].shape[0]
    wanted = {"text": (pairs, width), "teacher_image": (keys, width), "teacher_text": (keys, width)}
    wanted |= {"image_queue": (queue, width), "text_queue": (queue, width), "temperature": (1,)}
    for name, tensor in tensors.items():
        shape = wanted.get(name, (pairs, width))
        if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.device != image.device:
            raise ValueError(
                f"contrastive_loss: {name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} must be {shape}, "
                f"floating, on {image.device} (image is {(pairs, width)})"
            )
    for name, tensor, count in (("ids", ids, keys), ("queue_ids", queue_ids, queue)):
        if tensor is None:
            continue
        if tuple(tensor.shape) != (count,) or tensor.dtype != torch.int64 or tensor.device != image.device:
            raise ValueError(
                f"contrastive_loss: {name} {tuple(tensor.shape)} {tensor.dtype} on {tensor.device} must be ({count},) "
                f"torch.int64 on {image.device}"
            )
    if not 0 <= rank_offset <= keys - pairs:
        raise ValueError(
            f"contrastive_loss: rank_offset={rank_offset} must be in [0, {keys - pairs}]: teacher_image "
            f"has {keys} rows, image {pairs}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"contrastive_loss: alpha={alpha} must be in [0, 1]")


def _refuses(image: Tensor, *_: Any, **__: Any) -> str | None:
    if image.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"image is {image.dtype}; the kernel takes float32, bfloat16 and float16"
    if image.shape[1] > WIDEST_TRITON_ROW:
        return f"features of {image.shape[1]} are wider than {WIDEST_TRITON_ROW}"
    return None


def _example(size: int, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    pairs, keys, queue, width, rank_offset = [(1, 1, 0, 16, 0), (30, 61, 97, 64, 31), (31, 31, 130, 256, 0)][size]
    generator = torch.Generator().manual_seed(size)

    def draw(count: int) -> Tensor:
        rows = torch.randn(count, width, generator=generator)
        return torch.nn.functional.normalize(rows, dim=-1).to(device, dtype)

    names = ("image", "text", "teacher_image", "teacher_text", "image_queue", "text_queue")
    counts = (pairs, pairs, keys, keys, queue, queue)
    tensors = {name: draw(count) for name, count in zip(names, counts, strict=True)}
    for name in ("image", "text"):
        tensors[name].requires_grad_()
    ids = torch.arange(keys) // 2 if size else None
    queue_ids = torch.randint(-1, max(1, keys), (queue,), generator=generator) if size else None
    return {
        **tensors,
        "temperature": torch.full((1,), 0.07, device=device).requires_grad_(),
        "alpha": 0.4,
        "ids": None if ids is None else ids.to(device),
        "queue_ids": None if queue_ids is None else queue_ids.to(device),
        "rank_offset": rank_offset,
    }


dispatch.register(
    Operation(function=contrastive_loss, reference=contrastive_loss_reference, example=_example, refuses=_refuses)
)
