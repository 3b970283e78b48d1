"""The best weights so far, by a held-out measure, and when to stop looking for better ones."""

from __future__ import annotations

from typing import Any

from simla_ds.config import EvalConfig


class Best:
    """Follows one measure, higher is better. Its state goes into checkpoints, so that a resumed run stops alike."""

    def __init__(self, config: EvalConfig):
        self.metric, self.patience = config.metric, config.patience
        self.value: float | None = None
        self.step = 0
        self.without_gain = 0

    def improves(self, record: dict[str, Any]) -> bool:
        """Take note of an evaluation's record; return whether its value is the best so far.

        Raises ValueError when the record has no such measure.
        """
        if not self.metric:
            return False
        if self.metric not in record:
            known = ", ".join(sorted(name for name in record if name.startswith("eval/")))
            raise ValueError(f"eval.metric={self.metric} is not measured; choose one of {known}")
        if self.value is not None and record[self.metric] <= self.value:
            self.without_gain += 1
            return False
        self.value, self.step, self.without_gain = record[self.metric], record["step"], 0
        return True

    @property
    def stops(self) -> bool:
        """Whether `patience` evaluations in a row have brought nothing better."""
        return bool(self.metric and self.patience) and self.without_gain >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"value": self.value, "step": self.step, "without_gain": self.without_gain}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken."""
        self.value, self.step, self.without_gain = state["value"], state["step"], state["without_gain"]
