"""How a network runs what a step asks of it: plainly, or with every saving that leaves the result as it is.

PlainPasses runs each request as a pass of its own, padding included: the oracle. FastPasses computes the same numbers
up to rounding (dropout draws other masks) and saves
- passes: clean and masked pictures go through the image encoder together, and so do all rows of text over pictures, and
  all pictures over text. Keys and values of a picture are projected once in each layer for all rows that read it.
- padding: text is packed (model.rows).
- last layers: only the rows that a loss reads are computed there; keys and values stay complete.

Nothing here waits for the device: shapes follow from what the loader counted. Left alone: without dropout the first
layer's self-attention is the same for text alone and for ITM's rows, which is 0.15 % of the paper's step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from simla_ds.model.rows import Rows
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Context
from simla_ds.types import Batch, Features, Read, Request


class Passes(ABC):
    """What the task asks of student and teacher alike."""

    @abstractmethod
    def features(self, network: Simla, batch: Batch, *, masked: bool, every_text_token: bool) -> Features:
        """Run what comes before any cross-modal pass.

        Args:
            network: student or teacher.
            batch: see types.Batch.
            masked: whether the pictures are also needed with patch_mask hidden.
            every_text_token: whether anybody reads more of the text-only pass than [CLS].
        """

    @abstractmethod
    def run(self, network: Simla, requests: Sequence[Request]) -> list[Tensor]:
        """Run requests by this network and return what each reads (shapes: types.Read), in order."""


class PlainPasses(Passes):
    """One pass per request."""

    def features(self, network: Simla, batch: Batch, *, masked: bool, every_text_token: bool) -> Features:
        """Three passes: pictures, masked pictures, captions."""
        patch_mask = batch["patch_mask"] if masked else None
        return network.features(batch["image"], batch["input_ids"], batch["text_mask"], patch_mask)

    def run(self, network: Simla, requests: Sequence[Request]) -> list[Tensor]:
        """Run each by itself."""
        return [self._run(network, request) for request in requests]

    def _run(self, network: Simla, request: Request) -> Tensor:
        attention = None
        if request.direction == "image_over_text":
            hidden = network.image_over_text(request.image_tokens, _text_keys(request), request.text_mask)
        else:
            hidden, attention = network.text_over_image(
                _input_ids(request),
                request.text_mask,
                request.image_tokens,
                request.image_index,
                cls_attention=request.read is Read.CLS_ATTENTION,
            )
        if attention is not None:
            return attention
        read = hidden.flatten(0, 1).index_select(0, _wanted(request))
        return read.view_as(hidden) if request.read is Read.ALL else read


class FastPasses(Passes):
    """At most one pass per direction, on packed rows."""

    def features(self, network: Simla, batch: Batch, *, masked: bool, every_text_token: bool) -> Features:
        """Two passes: pictures with masked pictures, captions."""
        if masked:
            both = network.image_encoder(batch["image"], batch["patch_mask"], keep_clean=True)
            image_tokens, masked_image_tokens = both.chunk(2)
        else:
            image_tokens, masked_image_tokens = network.image_encoder(batch["image"]), None
        rows, stream = Rows.of(batch["text_mask"], batch["token_index"]), network.stream
        embeddings = stream.embeddings(rows.pack(batch["input_ids"]), rows.positions(batch["input_ids"].device))
        x = stream.body(embeddings, rows)
        if every_text_token:
            text_tokens = rows.pad(stream.last(x, rows))
        else:
            text_tokens = stream.last(x, rows, read=rows.first(x.device))[:, None]
        return network.project(image_tokens, masked_image_tokens, rows.pad(embeddings), text_tokens)

    def run(self, network: Simla, requests: Sequence[Request]) -> list[Tensor]:
        """Merge the requests of each direction."""
        results = {}
        for direction in ("text_over_image", "image_over_text"):
            numbers = [number for number, request in enumerate(requests) if request.direction == direction]
            if numbers:
                merged = _run_merged(network, [requests[number] for number in numbers])
                results.update(zip(numbers, merged, strict=True))
        return [results[number] for number in range(len(requests))]


PASSES: dict[str, type[Passes]] = {"fast": FastPasses, "plain": PlainPasses}
"""By the value of train.passes."""


def _run_merged(network: Simla, requests: list[Request]) -> list[Tensor]:
    """Run requests of one direction as one pass; attention is read on the way into the last layer."""
    stream, rows = network.stream, [_asking_rows(request) for request in requests]
    context = _context(requests)
    x = stream.body(_embed(network, requests, rows), Rows.join(rows), context)
    parts = x.split([part.total for part in rows])
    results = {
        i: stream.last_attention(parts[i], rows[i])
        for i, request in enumerate(requests)
        if request.read is Read.CLS_ATTENTION
    }
    if readers := [i for i in range(len(requests)) if i not in results]:
        rest = [requests[i] for i in readers]
        read = [rows[i].slots(_wanted(requests[i])) for i in readers]
        before = accumulate((rows[i].total for i in readers), initial=0)
        hidden = stream.last(
            torch.cat([parts[i] for i in readers]) if results else x,
            Rows.join([rows[i] for i in readers]),
            _context(rest) if results else context,
            torch.cat([slots + offset for slots, offset in zip(read, before, strict=False)]),
        )
        for i, part in zip(readers, hidden.split([len(slots) for slots in read]), strict=True):
            results[i] = part.unflatten(0, (rows[i].count, -1)) if requests[i].read is Read.ALL else part
    return [results[i] for i in range(len(requests))]


def _asking_rows(request: Request) -> Rows:
    """Return the rows whose tokens run through the stream."""
    if request.direction == "image_over_text":
        return Rows.dense(request.image_tokens)
    return Rows.of(request.text_mask, request.token_index)


def _embed(network: Simla, requests: list[Request], rows: list[Rows]) -> Tensor:
    """Embed the asking tokens of all requests, (T, D)."""
    if requests[0].direction == "image_over_text":
        images = [request.image_tokens for request in requests]
        return network.stream.embeddings(images[0] if len(images) == 1 else torch.cat(images)).flatten(0, 1)
    ids = torch.cat([part.pack(_input_ids(request)) for request, part in zip(requests, rows, strict=True)])
    return network.stream.embeddings(ids, torch.cat([part.positions(ids.device) for part in rows]))


def _context(requests: list[Request]) -> Context:
    """Stack what the requests read, each tensor once, and say which of its rows each asking row reads."""
    sources: list[Tensor] = []
    rows: list[Rows] = []
    index: list[Tensor] = []
    for request in requests:
        source, own_rows = _answering(request)
        place = next((i for i, known in enumerate(sources) if known is source), len(sources))
        if place == len(sources):
            sources.append(source)
            rows.append(own_rows)
        own = request.image_index
        own = torch.arange(own_rows.count, device=source.device) if own is None else own
        index.append(own + sum(part.count for part in rows[:place]))
    packed = [part.pack(source) for part, source in zip(rows, sources, strict=True)]
    tokens = packed[0] if len(packed) == 1 else torch.cat(packed)
    in_order = len(requests) == 1 and requests[0].image_index is None  # then nothing needs to be picked
    return Context(tokens, Rows.join(rows), None if in_order else torch.cat(index))


def _answering(request: Request) -> tuple[Tensor, Rows]:
    """Return what the cross-attention reads, (S, N or L, D), and its rows."""
    if request.direction == "image_over_text":
        return _text_keys(request), Rows.of(request.text_mask, request.token_index)
    return request.image_tokens, Rows.dense(request.image_tokens)


def _wanted(request: Request) -> Tensor:
    """Return the flat positions that a request reads, in (R * L) for text and (R * N) for pictures, ascending."""
    image = request.direction == "image_over_text"
    count, width = request.image_tokens.shape[:2] if image else request.text_mask.shape
    device = request.text_mask.device
    if request.read is Read.CLS:
        return torch.arange(count, device=device) * width
    if request.read is Read.ALL:
        return torch.arange(count * width, device=device)
    if request.rows is None:
        raise ValueError(f"a request that reads {request.read} needs rows")
    if not image:
        return request.rows
    patches = width - 1  # Request.rows counts patches, not [CLS]
    return request.rows + torch.div(request.rows, patches, rounding_mode="floor") + 1


def _input_ids(request: Request) -> Tensor:
    if request.input_ids is None:
        raise ValueError("a text_over_image request needs input_ids")
    return request.input_ids


def _text_keys(request: Request) -> Tensor:
    if request.text_keys is None:
        raise ValueError("an image_over_text request needs text_keys")
    return request.text_keys
