"""Triton kernel of contrastive_loss: a running softmax over keys that are their own values, shared by many programs."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from simla_kernels.configs import config
from simla_kernels.launching import dot_precision, interpreting, launch, next_power_of_2

PROGRAMS = 128
"""About so many programs share the keys: enough for every card's processors, few enough partial sums."""


@triton.jit
def attend_kernel(
    queries_ptr,  # in   (2B, E) fp32 contiguous, divided by the temperature: the student's, then the teacher's
    own_scores_ptr,  # in   (2B,) fp32: the scores of the own keys, where the running maximum starts
    keys_ptr,  # in   (K, E) of row stride key_stride
    row_ids_ptr,  # in   (B,) int64, or None
    key_ids_ptr,  # in   (K,) int64, or None
    top_ptr,  # out  (splits, 2B) fp32: the largest score
    total_ptr,  # out  (splits, 2B) fp32: sum of exp(score - top)
    sums_ptr,  # out  (splits, 2B, E) fp32: sum of exp(score - top) key
    similarities_ptr,  # out  (B, K) fp32: the student's scores; None for a queue
    pairs,
    width,
    key_count,
    key_stride,
    rank_offset,
    keys_per_split,
    HAS_IDS: tl.constexpr,
    IS_BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    split = tl.program_id(1)
    rows = 2 * pairs
    place = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(place, rows - 1)  # rows and keys beyond the end repeat the last one: loads need no mask for them
    pair = tl.where(row < pairs, row, row - pairs)
    slice_range = tl.arange(0, BLOCK_K)
    width_range = tl.arange(0, BLOCK_E)
    in_width = (width_range < width)[None]
    top = tl.load(own_scores_ptr + row)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_E), tl.float32)
    stop = tl.minimum((split + 1) * keys_per_split, key_count)
    for first in range(split * keys_per_split, stop, BLOCK_N):
        position = first + tl.arange(0, BLOCK_N)
        key = tl.minimum(position, key_count - 1)
        key_ptr = keys_ptr + key.to(tl.int64)[:, None] * key_stride
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for from_width in range(0, width, BLOCK_K):
            column = (from_width + slice_range)[None]
            q = tl.load(queries_ptr + row[:, None] * width + column, mask=column < width, other=0.0)
            k = tl.load(key_ptr + column, mask=column < width, other=0.0).to(tl.float32)
            scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
        counts = (position < key_count)[None]
        if IS_BATCH:
            to = similarities_ptr + row.to(tl.int64)[:, None] * key_count + key[None]
            tl.store(to, scores, mask=counts & (place < pairs)[:, None])
            counts = counts & (key[None] != (pair + rank_offset)[:, None])
        if HAS_IDS:
            key_id = tl.load(key_ids_ptr + key)[None]
            counts = counts & (key_id != tl.load(row_ids_ptr + pair)[:, None])
            if not IS_BATCH:
                counts = counts & (key_id != -1)
        scores = tl.where(counts, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))  # finite: it starts at the own key's
        shrink = tl.exp(top - higher)
        weights = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(weights, 1)
        whole = tl.load(key_ptr + width_range[None], mask=in_width, other=0.0).to(tl.float32)
        sums = tl.dot(weights, whole, sums * shrink[:, None], input_precision=PRECISION)
        top = higher
    to_row = split.to(tl.int64) * rows + place
    tl.store(top_ptr + to_row, top, mask=place < rows)
    tl.store(total_ptr + to_row, total, mask=place < rows)
    to = sums_ptr + to_row[:, None] * width + width_range[None]
    tl.store(to, sums, mask=(place < rows)[:, None] & in_width)


def attend(
    queries: Tensor,
    own_keys: Tensor,
    batch_keys: Tensor,
    queue: Tensor,
    temperature: Tensor,
    ids: Tensor | None,
    queue_ids: Tensor | None,
    rank_offset: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return sum_j p_j key_j (2B, E), logsumexp (2B,) and the student's scores of the batch (B, G), all fp32.

    queries (2B, E) and own_keys (B, E) are fp32, the keys of any dtype and row stride.
    """
    pairs, (rows, width) = own_keys.shape[0], queries.shape
    queries, own_twice = queries / temperature, torch.cat([own_keys, own_keys])
    own_scores = (queries * own_twice).sum(-1)
    similarities = torch.empty((pairs, batch_keys.shape[0]), dtype=torch.float32, device=queries.device)
    row_ids = ids[rank_offset : rank_offset + pairs].contiguous() if ids is not None else None
    if row_ids is None and queue_ids is not None:
        row_ids = torch.full((pairs,), -1, dtype=torch.int64, device=queries.device)
    segments = [_Segment(batch_keys, ids, rows), _Segment(queue, queue_ids, rows)]
    splits = sum(segment.splits for segment in segments)
    top, total = (torch.empty((splits, rows), dtype=torch.float32, device=queries.device) for _ in range(2))
    sums = torch.empty((splits, rows, width), dtype=torch.float32, device=queries.device)
    done = 0
    for segment, is_batch in zip(segments, (True, False), strict=True):
        launch(
            attend_kernel,
            (triton.cdiv(rows, segment.config.tiles["BLOCK_M"]), segment.splits),
            segment.config,
            queries_ptr=queries,
            own_scores_ptr=own_scores,
            keys_ptr=segment.keys,
            row_ids_ptr=None if segment.ids is None else row_ids,
            key_ids_ptr=segment.ids,
            top_ptr=top[done:],
            total_ptr=total[done:],
            sums_ptr=sums[done:],
            similarities_ptr=similarities if is_batch else None,
            pairs=pairs,
            width=width,
            key_count=segment.keys.shape[0],
            key_stride=segment.keys.stride(0),
            rank_offset=rank_offset,
            keys_per_split=segment.keys_per_split,
            HAS_IDS=segment.ids is not None,
            IS_BATCH=is_batch,
            PRECISION=dot_precision(torch.float32, queries.device),
            BLOCK_E=max(next_power_of_2(width), segment.config.tiles["BLOCK_K"]),
        )
        done += segment.splits
    return *_combine(top, total, sums, own_scores, own_twice), similarities


class _Segment:
    """Keys that one launch goes through, as the kernel takes them, and how its programs share them."""

    def __init__(self, keys: Tensor, ids: Tensor | None, rows: int):
        keys = keys.float() if interpreting() else keys  # it computes wrongly in half precision
        self.keys = keys if keys.stride(1) == 1 else keys.contiguous()
        self.ids = None if ids is None else ids.contiguous()
        size_class = "half" if keys.dtype != torch.float32 else "fp32 few" if rows <= 32 else "fp32 many"
        self.config = config("contrastive_loss.attend", size_class, keys.device)
        block = self.config.tiles["BLOCK_N"]
        wanted = max(1, PROGRAMS // triton.cdiv(rows, self.config.tiles["BLOCK_M"]))
        self.keys_per_split = max(1, triton.cdiv(triton.cdiv(keys.shape[0], block), wanted)) * block
        self.splits = triton.cdiv(keys.shape[0], self.keys_per_split)


def _combine(top: Tensor, total: Tensor, sums: Tensor, own_scores: Tensor, own_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return sum_j p_j key_j and logsumexp of the splits and the own key together; always in the same order."""
    highest = top.amax(0)
    shares = (top - highest).exp()
    own_share = (own_scores - highest).exp()
    whole = (total * shares).sum(0) + own_share
    mixed = (sums * shares[..., None]).sum(0) + own_share[:, None] * own_keys
    return mixed / whole[:, None], highest + whole.log()


def compile_cases(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield one direction at the sizes of a step: with and without ids, small and large batches."""
    for pairs, queue, with_ids in ((64, 65536, True), (64, 65536, False), (8, 4096, True), (1024, 65536, True)):

        def run(pairs: int = pairs, queue: int = queue, with_ids: bool = with_ids) -> object:
            def of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
                return torch.empty(shape, dtype=dtype, device="meta")

            ids, queue_ids = (of(n, dtype=torch.int64) if with_ids else None for n in (pairs, queue))
            keys, in_queue = of(pairs, 256, dtype=dtype), of(queue, 256, dtype=dtype)
            return attend(of(2 * pairs, 256), of(pairs, 256), keys, in_queue, of(1), ids, queue_ids, 0)

        yield f"B {pairs} Q {queue}{' ids' if with_ids else ''}", run
