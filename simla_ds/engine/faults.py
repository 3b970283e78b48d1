"""What can go wrong in a running job, and how all ranks agree on what to do: signals, and steps that are not finite."""

from __future__ import annotations

import math
import signal
import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from simla_ds.engine.distributed import gather_objects

Engine = Any


class StopRequest:
    """SIGTERM or SIGINT to any rank, agreed on by all without waiting: asked at one step, answered at the next.

    The flags are added up over a gloo group of their own, in the background, so that no step waits for the host or the
    device. The run then saves and ends one step later on every rank.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.received: signal.Signals | None = None
        self._group: Any = dist.new_group(backend="gloo")
        self._flag = torch.zeros(1)
        self._exchange: Any = None
        self._before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}

    def _receive(self, number: int, _frame: Any) -> None:
        self.received = signal.Signals(number)

    def agreed(self) -> bool:
        """Return whether a rank had been signalled by the step before; every rank must call it once per step."""
        asked = False
        if self._exchange is not None:
            self._exchange.wait()  # it had a step's time
            asked = bool(self._flag.item())
        self._flag = torch.tensor([float(self.received is not None)])
        self._exchange = dist.all_reduce(self._flag, group=self._group, async_op=True)
        return asked

    def close(self) -> None:
        """Let signals do again what they did."""
        if self._exchange is not None:
            self._exchange.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)


class FiniteGuard:
    """Lets no step pass whose gradient is not finite, on any rank, and ends the run after too many in a row.

    DeepSpeed skips such steps at stages 1 to 3, and at stage 0 in bf16 and fp16. AdamW alone (stage 0 in fp32) would
    take them, so it is made to look first.
    """

    def __init__(self, engine: Engine, limit: int):
        """limit: steps in a row after which the run ends."""
        self.engine, self.limit = engine, limit
        self.in_a_row = 0
        self._dropped = False
        if not hasattr(engine.optimizer, "overflow"):
            self._step = engine.optimizer.step
            engine.optimizer.step = self._step_if_finite

    @torch.no_grad()
    def _step_if_finite(self) -> None:
        """Step unless a gradient is not finite. They are reduced already, hence the same on every rank."""
        gradients = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        self._dropped = not bool(torch.nn.utils.get_total_norm(gradients).isfinite())
        if not self._dropped:
            self._step()

    def verdict(self, outputs: list[dict[str, Tensor]]) -> list[str] | None:
        """Return None if the step was applied, else which losses were not finite, by name and rank; on every rank.

        The list is empty where fp16 is still looking for its loss scale.

        Args:
            outputs: this rank's scalars of each micro-step of the optimizer step.

        Raises:
            FloatingPointError: on every rank, at the limit.
        """
        if self.engine.was_step_applied() and not self._dropped:
            self.in_a_row = 0
            return None
        mine = {
            name
            for one in outputs
            for name, value in one.items()
            if name.startswith("loss/") and not math.isfinite(value)
        }
        ranks = gather_objects(sorted(mine))
        found = [f"{name} (rank {rank})" for rank, names in enumerate(ranks) for name in names]
        if not found and self.engine.fp16_enabled():
            return []
        self.in_a_row += 1
        found = found or ["the gradient"]
        if self.in_a_row >= self.limit:
            raise FloatingPointError(
                f"{', '.join(found)} not finite, for {self.in_a_row} steps in a row (train.max_bad_steps); the last "
                "checkpoint is kept. Lower optim.learning_rate or set train.precision fp32"
            )
        return found


def lost_peer(error: RuntimeError) -> bool:
    """Return whether a collective failed because another rank is gone."""
    words = ("closed by peer", "reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)
