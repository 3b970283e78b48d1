"""What `python -m benchmarks kernels` times: every operation with Triton kernels at the sizes of training at base size.

16 pairs, pictures of 256 patches and [CLS], captions of up to 30 tokens, width 768. Contenders run forward and backward
from the same inputs in the same direction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.head_orders import IGNORED, Head, mlm_official_order, xmm_official_order
from simla_kernels import (
    contrastive_loss,
    cross_attention,
    cross_attention_varlen,
    dropout_add_layer_norm,
    linear_soft_bce,
    linear_soft_ce,
)

ATTENTION = {
    "text over image": (30, 257),
    "image over text": (257, 30),
    "image": (257, 257),
    "text": (30, 30),
}
ROWS, HEADS, DIM, WIDTH, PROJECTION, QUEUE, WORDS, ALPHA = 16, 12, 64, 768, 256, 65_536, 30_522, 0.4
LENGTHS = (13, 16, 11, 14, 19, 12, 15, 9, 13, 17, 14, 10, 12, 22, 13, 14)
"""Tokens of 16 captions, as long as COCO's."""
DROPOUT, SEED = 0.1, 0
Run = Callable[[], Sequence[Tensor]]


class Case(NamedTuple):
    """An operation's arguments, and what is timed; `ours` is this project's."""

    operation: str
    arguments: dict[str, Any]
    runs: dict[str, Run]
    """Each returns the result and the gradients of the inputs, alike at every call of `ours`."""
    checked: dict[str, Run]
    """What must agree before anything is timed: the runs, without dropout and without padding."""


def cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Yield (operation and sizes, what makes the case)."""
    for name, (queries, keys) in ATTENTION.items():
        yield f"cross_attention: {name} ({queries} x {keys})", partial(_attention, queries, keys, device, dtype)
    yield f"cross_attention_varlen: text over image ({sum(LENGTHS)} tokens x 257)", partial(_packed, device, dtype)
    yield "linear_soft_ce: XMM (16 x 256, 75 masked, V 8192)", partial(xmm_head, device, dtype)
    yield "linear_soft_ce: MLM (16 x 30, 15 % masked, V 30522)", partial(_mlm_head, device, dtype)
    yield "linear_soft_bce: PSL (16, V 30522)", partial(_psl_head, device, dtype)
    yield "contrastive_loss: ITC (16, queue 65536)", partial(_contrast, device, dtype)
    for tokens in (ROWS * 257, ROWS * 30):
        yield f"dropout_add_layer_norm: {tokens} x {WIDTH}, dropout 0.1", partial(_layer_norm, tokens, device, dtype)


def _attention(queries: int, keys: int, device: torch.device, dtype: torch.dtype) -> Case:
    def tokens(length: int) -> Tensor:
        return _normal(device, dtype, ROWS, length, HEADS, DIM).transpose(1, 2)

    q, k, v = (tokens(length).requires_grad_() for length in (queries, keys, keys))

    def by(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: _tensor(cross_attention(q, k, v)),
        "eager": lambda: _eager(q, k, v),
        "SDPA": lambda: F.scaled_dot_product_attention(q, k, v),
    }
    if device.type == "cuda":
        from torch.nn.attention.flex_attention import flex_attention

        torch._dynamo.reset()  # or the second case's sizes would make all later ones dynamic
        flexible: Any = torch.compile(flex_attention, dynamic=False)
        runs |= {"FlexAttention": lambda: flexible(q, k, v)}
        backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION)
        runs |= {f"SDPA {backend.name.lower()}": by(backend) for backend in backends}
    return _case("cross_attention", {"q": q, "k": k, "v": v}, runs, (q, k, v), tokens(queries))


def _packed(device: torch.device, dtype: torch.dtype) -> Case:
    lengths = torch.tensor(LENGTHS, device=device)
    inside = torch.arange(max(LENGTHS), device=device) < lengths[:, None]
    padded = _normal(device, dtype, *inside.shape, HEADS, DIM).requires_grad_()
    k, v = (_normal(device, dtype, ROWS * 257, HEADS, DIM).requires_grad_() for _ in range(2))
    q = padded.detach()[inside].requires_grad_()
    starts = F.pad(lengths.cumsum(0), (1, 0))
    picture_starts = torch.arange(0, ROWS * 257 + 1, 257, device=device)
    arguments: dict[str, Any] = {"q": q, "k": k, "v": v, "cu_q": starts, "cu_k": picture_starts}
    arguments |= {"max_q": max(LENGTHS), "max_k": 257}

    def by_rows(attend: Callable[..., Tensor]) -> Tensor:
        rows = [t.view(ROWS, 257, HEADS, DIM).transpose(1, 2) for t in (k, v)]
        return attend(padded.transpose(1, 2), *rows).transpose(1, 2)

    direction = _normal(device, dtype, *inside.shape, HEADS, DIM) * inside[..., None, None]
    runs = {"ours": _with_backward(lambda: _tensor(cross_attention_varlen(**arguments)), (q, k, v), direction[inside])}
    for name, attend in (("eager, padded", _eager), ("SDPA, padded", F.scaled_dot_product_attention)):
        runs[name] = _with_backward(partial(by_rows, attend), (padded, k, v), direction)
    if device.type == "cuda":
        from torch.nn.attention.varlen import varlen_attn

        cu_q, cu_k = starts.int(), picture_starts.int()

        def flash() -> Tensor:
            return _tensor(varlen_attn(q, k, v, cu_q, cu_k, max(LENGTHS), 257))

        runs["varlen_attn"] = _with_backward(flash, (q, k, v), direction[inside])

    def unpadded(run: Run) -> Run:
        return lambda: [t[inside] if t.shape == padded.shape else t for t in run()]

    checked = {name: unpadded(run) for name, run in runs.items()}
    return Case("cross_attention_varlen", arguments, runs, checked)


def xmm_head(device: torch.device, dtype: torch.dtype) -> Case:
    """16 pictures of 256 patches, 75 of each masked, 8,192 codes; student's and teacher's hidden states at all."""
    hidden, teacher_hidden, head, teacher_head = _heads((ROWS, 256), WIDTH, 8192, device, dtype)
    masked = torch.zeros(ROWS, 256, dtype=torch.bool, device=device)
    for row in masked:
        row[torch.randperm(256, device=device)[:75]] = True
    index = masked.flatten().nonzero()[:, 0]
    labels = torch.randint(8192, (len(index),), device=device)
    return _head_case(
        (hidden, head, teacher_hidden, teacher_head),
        (index, labels),
        lambda: xmm_official_order(hidden, head, teacher_hidden, teacher_head, masked, labels, ALPHA),
    )


def _mlm_head(device: torch.device, dtype: torch.dtype) -> Case:
    hidden, teacher_hidden, head, teacher_head = _heads((ROWS, 30), WIDTH, WORDS, device, dtype)
    index = torch.randperm(ROWS * 30, device=device)[: round(0.15 * ROWS * 30)].sort().values
    labels = torch.randint(WORDS, (len(index),), device=device)
    everywhere = torch.full((ROWS * 30,), IGNORED, device=device).index_copy(0, index, labels).view(ROWS, 30)
    return _head_case(
        (hidden, head, teacher_hidden, teacher_head),
        (index, labels),
        lambda: mlm_official_order(hidden, head, teacher_hidden, teacher_head, everywhere, ALPHA),
    )


def _head_case(inputs: tuple[Any, ...], read: tuple[Tensor, Tensor], official: Callable[[], Tensor]) -> Case:
    hidden, head, teacher_hidden, teacher_head = inputs
    index, labels = read

    def rows(t: Tensor) -> Tensor:
        return t.flatten(0, 1).index_select(0, index)

    def arguments() -> tuple[Any, ...]:
        return rows(hidden), *head, rows(teacher_hidden), *teacher_head, labels, ALPHA

    def masked_unfused() -> Tensor:
        logits = F.linear(rows(hidden), *head).float()
        with torch.no_grad():
            targets = F.linear(rows(teacher_hidden), *teacher_head).float().softmax(-1)
        soft = -(targets * logits.log_softmax(-1)).sum(-1).mean()
        return (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * soft

    runs: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: linear_soft_ce(*arguments()),
        "official order": official,
        "masked, unfused": masked_unfused,
    }
    names = ("h", "weight", "bias", "teacher_h", "teacher_weight", "teacher_bias", "labels", "alpha")
    case = _case("linear_soft_ce", dict(zip(names, arguments(), strict=True)), runs, (hidden, *head))
    if hidden.device.type == "cuda":  # hard labels only: less than what is compared, and so not held to its results
        chunked = nn.LinearCrossEntropyOptions()  # without options the logits are made whole
        hard: Any = partial(F.linear_cross_entropy, linear_bias=head.bias, options=chunked)
        run = _with_backward(lambda: hard(rows(hidden), head.weight, labels), (hidden, *head))
        case.runs["F.linear_cross_entropy, chunked (hard labels only)"] = run
    return case


def _psl_head(device: torch.device, dtype: torch.dtype) -> Case:
    feature, teacher_feature, head, teacher_head = _heads((ROWS,), PROJECTION, WORDS, device, dtype)
    keywords = torch.randint(WORDS, (ROWS, 5), device=device)
    arguments: tuple[Any, ...] = (feature, *head, teacher_feature, *teacher_head, keywords, ALPHA)

    def official() -> Tensor:
        with torch.no_grad():
            hard = torch.zeros(ROWS, WORDS, device=device).scatter_(1, keywords, 1.0)
            soft = F.linear(teacher_feature, *teacher_head).float().sigmoid()
        logits = F.linear(feature, *head).float()
        bce = F.binary_cross_entropy_with_logits
        return (1 - ALPHA) * bce(logits, hard) + ALPHA * bce(logits, soft)

    names = ("h", "weight", "bias", "teacher_h", "teacher_weight", "teacher_bias", "keyword_ids", "alpha")
    runs = {"ours": lambda: linear_soft_bce(*arguments), "official order": official}
    return _case("linear_soft_bce", dict(zip(names, arguments, strict=True)), runs, (feature, *head))


def _contrast(device: torch.device, dtype: torch.dtype) -> Case:
    def features(rows: int, of: torch.dtype) -> Tensor:
        return F.normalize(_normal(device, torch.float32, rows, PROJECTION), dim=-1).to(of)

    names = ("image", "text", "teacher_image", "teacher_text")
    arguments: dict[str, Any] = {name: features(ROWS, dtype) for name in names}
    arguments |= {name: features(QUEUE, torch.float32) for name in ("image_queue", "text_queue")}
    arguments |= {"temperature": torch.full((1,), 0.07, device=device), "alpha": ALPHA}
    inputs = arguments["image"], arguments["text"], arguments["temperature"]
    for t in inputs:
        t.requires_grad_()

    def official() -> Tensor:
        image, text, teacher_image, teacher_text = (arguments[name].float() for name in names)
        temperature, found = arguments["temperature"], []
        for student, teacher, others, queue in (
            (image, teacher_image, teacher_text, arguments["text_queue"]),
            (text, teacher_text, teacher_image, arguments["image_queue"]),
        ):
            with torch.no_grad():
                keys = torch.cat([others.T, queue.T.clone()], dim=1)
                own = torch.zeros(ROWS, keys.shape[1], device=device).fill_diagonal_(1)
                targets = ALPHA * F.softmax(teacher @ keys / temperature, dim=1) + (1 - ALPHA) * own
            scores = student @ keys / temperature
            found.append(-torch.sum(F.log_softmax(scores, dim=1) * targets, dim=1).mean())
        return torch.stack(found).mean()

    runs = {"ours": lambda: contrastive_loss(**arguments)[0], "official order": official}
    return _case("contrastive_loss", arguments, runs, inputs)


def _layer_norm(tokens: int, device: torch.device, dtype: torch.dtype) -> Case:
    x, residual = (_normal(device, dtype, tokens, WIDTH).requires_grad_() for _ in range(2))
    weight, bias = (torch.ones(WIDTH, device=device, dtype=dtype).requires_grad_() for _ in range(2))
    direction = _normal(device, dtype, tokens, WIDTH)
    arguments = {"x": x, "residual": residual, "weight": weight, "bias": bias, "seed": SEED}

    def case(dropout: float) -> Case:
        given = {**arguments, "dropout_p": dropout}
        runs: dict[str, Callable[[], Tensor]] = {
            "ours": lambda: dropout_add_layer_norm(**given),
            "eager": lambda: F.layer_norm(residual + F.dropout(x, dropout), (WIDTH,), weight, bias, 1e-12),
        }
        return _case("dropout_add_layer_norm", given, runs, (x, residual, weight, bias), direction)

    return case(DROPOUT)._replace(checked=case(0.0).runs)  # the contenders' masks are not the same


def _heads(
    shape: tuple[int, ...], width: int, classes: int, device: torch.device, dtype: torch.dtype
) -> tuple[Any, ...]:
    heads = [
        Head(0.05 * _normal(device, dtype, classes, width), 0.05 * _normal(device, dtype, classes)) for _ in range(2)
    ]
    for t in heads[0]:
        t.requires_grad_()
    return _normal(device, dtype, *shape, width).requires_grad_(), _normal(device, dtype, *shape, width), *heads


def _normal(device: torch.device, dtype: torch.dtype, *size: int) -> Tensor:
    return torch.randn(size, device=device).to(dtype)


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q * DIM**-0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def _case(
    operation: str,
    arguments: dict[str, Any],
    runs: dict[str, Callable[[], Tensor]],
    inputs: tuple[Tensor, ...],
    direction: Tensor | None = None,
) -> Case:
    timed = {name: _with_backward(run, inputs, direction) for name, run in runs.items()}
    return Case(operation, arguments, timed, dict(timed))


def _with_backward(run: Callable[[], Tensor], inputs: tuple[Tensor, ...], direction: Tensor | None = None) -> Run:
    """Return what runs forward and backward: along `direction` (the result's shape), of a loss along 1."""

    def forward_and_backward() -> Sequence[Tensor]:
        out = run()
        return out.detach(), *torch.autograd.grad(out, inputs, direction)

    return forward_and_backward


def _tensor(out: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out
