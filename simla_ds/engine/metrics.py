"""What a run reports: metrics.jsonl, TensorBoard and CSV through DeepSpeed's monitor, a bar or lines, and alarms."""

from __future__ import annotations

import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from simla_ds.config import Config


class Metrics:
    """Writes what happens in a run. On ranks other than the main one it does nothing."""

    def __init__(self, output: Path, monitor: Any, total_steps: int, first_step: int, *, active: bool):
        self.active, self.monitor, self.total_steps = active, monitor, total_steps
        self.file = self._open(output / "metrics.jsonl", first_step) if active else None
        terminal = sys.stderr.isatty()
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step") if active and terminal else None

    @staticmethod
    def _open(path: Path, first_step: int) -> Any:
        """Open for appending, without what an interrupted run wrote after the checkpoint it goes on from."""
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= first_step]
            path.write_text("".join(f"{line}\n" for line in kept) if first_step else "")
        return path.open("a", buffering=1)

    def write(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and send its numbers to the monitor."""
        if self.file is None:
            return
        self.file.write(json.dumps({k: _plain(v) for k, v in record.items()}) + "\n")
        numbers = [(name, value, record["samples_seen"]) for name, value in record.items() if _is_number(value)]
        self.monitor.write_events([event for event in numbers if event[0] not in ("step", "samples_seen")])

    def show(self, record: dict[str, Any]) -> None:
        """Show a training record: on the bar of a terminal, else as a line."""
        if not self.active:
            return
        losses = " ".join(f"{k[5:]} {v:.3f}" for k, v in record.items() if k.startswith("loss/"))
        text = f"loss {record['loss']:.3f} | {losses} | {record['samples_per_second']:.1f} pairs/s"
        if self.bar is not None:
            self.bar.update(record["step"] - self.bar.n)
            self.bar.set_description_str(text)
        else:
            pairs_left = record["samples_seen"] / record["step"] * (self.total_steps - record["step"])
            left = pairs_left / record["samples_per_second"]
            self.say(f"step {record['step']}/{self.total_steps} | {text} | {_duration(left)} left")

    def say(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self.active:
            tqdm.write(line, file=sys.stderr)
            sys.stderr.flush()

    def close(self) -> None:
        """Close files and bar."""
        if self.file is not None:
            self.file.close()
        if self.bar is not None:
            self.bar.close()


class Alarms:
    """Says by name, once each, what users otherwise find out after days."""

    ITM_STUCK = (0.63, 0.70)
    """ITM's loss when the head answers by the base rate: H(1/3) = .6365; .69 = ln 2 when it guesses."""
    PATIENCE_SAMPLES = 20_000
    """Pairs within which no ITM loss is called stuck."""

    def __init__(self, config: Config):
        self.model = config.model
        self.raised: set[str] = set()

    def check(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Return records for the alarms that a training record raises for the first time."""
        found = [
            {"alarm": name, "message": message} for name, message in self._symptoms(record) if name not in self.raised
        ]
        self.raised.update(alarm["alarm"] for alarm in found)
        return [{"step": record["step"], "samples_seen": record["samples_seen"], **alarm} for alarm in found]

    def _symptoms(self, record: dict[str, Any]) -> list[tuple[str, str]]:
        seen, symptoms = record["samples_seen"], []
        itm, temperature = record.get("loss/itm"), record.get("temperature")
        low, high = self.ITM_STUCK
        if itm is not None and seen > self.PATIENCE_SAMPLES and low <= itm <= high:
            symptoms.append(("itm_stuck", f"ITM's loss is {itm:.3f} after {seen} pairs: it answers by the base rate"))
        if (
            temperature is not None
            and not self.model.temperature_min * 1.001 < temperature < self.model.temperature_max * 0.999
        ):
            symptoms.append(("temperature_at_bound", f"ITC's temperature is at a bound: {temperature:.4f}"))
        for modality in ("image", "text"):
            spread = record.get(f"{modality}_feature_spread")
            if spread is not None and spread < 0.02 and seen > self.PATIENCE_SAMPLES:
                symptoms.append(
                    (f"{modality}_features_collapsed", f"{modality} features are alike: spread {spread:.4f}")
                )
        used = record.get("visual_codes_used")
        if used is not None and used < 0.1:
            symptoms.append(("dead_codes", f"only {used:.1%} of the visual codes occur; fit the codebook again"))
        return symptoms


def peak_memory_mb(device: torch.device) -> float:
    """Return the most memory this process has held: on the device, or resident on a CPU, in MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _plain(value: Any) -> Any:
    """Round floats to 9 digits (exact for float32); JSON has no NaN, so it becomes a string."""
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else str(value)
    return value


def _step_of(line: str) -> float:
    """Return the step of a line; infinite for one that was cut while it was written."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
