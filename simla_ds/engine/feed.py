"""Batches for the step: counted over all ranks, on the device, with their visual tokens; on a GPU one ahead."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from simla_ds.data.loader import StreamLoader
from simla_ds.engine.distributed import mean_over_ranks


class Feed:
    """Micro-batches in the loader's order, each made ready by `prepare`.

    `look_ahead`, called once the forward pass is under way, makes the next one ready beside the backward pass: on a
    stream of its own, so that neither copying nor the visual tokeniser waits for the step, nor the step for them. A
    CPU has no time of its own for that (the pass has all cores), so there nothing is made ahead. All of it happens in
    the training thread: numbers and their order are the same with and without, and errors arise where they are seen.
    """

    def __init__(
        self,
        loader: StreamLoader,
        prepare: Callable[[Any], Any],
        device: torch.device,
        *,
        micro_steps: int,
        counted: Sequence[str] = (),
    ):
        """counted: entries that become their means over all ranks and micro-steps of the optimizer step."""
        self.loader, self.prepare, self.device = loader, prepare, device
        self.micro_steps, self.counted = micro_steps, counted
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead = self.stream is not None
        self.position = loader.local_position()
        """The loader's after the last batch handed out; what is looked ahead does not count."""
        self.waited = 0.0
        """Seconds that the training thread has waited for the loader."""
        self._fetched: deque[tuple[Any, int]] = deque()
        """On the host: what is left of an optimizer step, with the loader's position after each."""
        self._ready: tuple[Any, int] | None = None

    def next(self) -> Any:
        """Hand out the next micro-batch."""
        batch, self.position = self._ready or self._made_ready()
        self._ready = None
        if self.stream is not None:
            step = torch.cuda.current_stream(self.device)
            step.wait_stream(self.stream)
            for tensor in batch.values():
                tensor.record_stream(step)  # or its memory could be given to the batch after it too early
        return batch

    def look_ahead(self) -> None:
        """Make the next micro-batch ready, where that is done ahead."""
        if self.ahead:
            self._ready = self._made_ready()

    def _made_ready(self) -> tuple[Any, int]:
        if not self._fetched:
            self._fetch()
        batch, position = self._fetched.popleft()
        with torch.cuda.stream(self.stream) if self.stream else nullcontext():
            return self.prepare(batch), position

    def _fetch(self) -> None:
        """Fetch an optimizer step's batches, all before its first forward: losses are divided by counts over them."""
        started = time.monotonic()
        for _ in range(self.micro_steps):
            batch = next(self.loader)
            self._fetched.append((batch, self.loader.local_position()))
        self.waited += time.monotonic() - started
        if self.counted:
            counts = [torch.cat([batch[name] for name in self.counted]) for batch, _ in self._fetched]
            mean = torch.stack(counts).mean(0)
            if self.device.type == "cuda":  # from pageable memory the copy would wait for the whole stream
                mean = mean.pin_memory()
            means = mean_over_ranks(mean.to(self.device, non_blocking=True)).split(1)
            for batch, _ in self._fetched:
                batch.update(zip(self.counted, means, strict=True))
