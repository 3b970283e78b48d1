"""The training loop.

shard -> sample -> Batch -> engine(batch) -> engine.backward -> engine.step -> queue, teacher
"""

from __future__ import annotations

import json
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from torch import Tensor

from simla_ds.config import Config
from simla_ds.engine.best import Best
from simla_ds.engine.build import Builder, build, describe_environment, library_versions, same_model
from simla_ds.engine.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from simla_ds.engine.checkpoint_folder import prune_checkpoints, read_state
from simla_ds.engine.deepspeed_config import resolve_deepspeed_config, resolve_precision
from simla_ds.engine.distributed import Ranks, broadcast_object, gather_objects, mean_over_ranks
from simla_ds.engine.faults import FiniteGuard, StopRequest
from simla_ds.engine.feed import Feed
from simla_ds.engine.metrics import Alarms, Metrics, peak_memory_mb
from simla_ds.engine.optimizer import forget_initial_step, learning_rate, set_learning_rate
from simla_ds.engine.zero_init import ZeroInit
from simla_ds.engine.zero_teacher import EngineSource, clamp_temperature_master
from simla_ds.model.weight_decay import parameter_groups
from simla_ds.parsing import dump_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """One run: built whole or not at all, then `fit`."""

    def __init__(self, config: Config, deepspeed_json: str | None, ranks: Ranks, build: Builder = build):
        """`build` says what is trained: pretraining's (the default) or a downstream task's parts."""
        self.ranks = ranks
        precision = resolve_precision(config.train.precision, ranks.device.type)
        settings = resolve_deepspeed_config(
            deepspeed_json or {}, config, ranks.world_size, precision, ranks.device.type
        )
        self.output = Path(config.output)
        checkpoint = find_checkpoint(self.output, config.resume, ranks)
        self.zero_stage = settings["zero_optimization"]["stage"]
        dtype, in_parts = DTYPES[precision], self.zero_stage == 3
        building = ZeroInit(settings, dtype, ranks.device) if in_parts else nullcontext()
        parts = build(config, ranks, dtype, building)
        self.config, self.loader, self.task = parts.config, parts.loader, parts.task
        if checkpoint is not None:
            same_model(self.config, read_state(checkpoint)["model"], checkpoint)
        self.queue, self.teacher = self.task.queue, self.task.teacher
        self.micro_steps = config.train.grad_accumulation
        self.global_batch = config.train.batch_size * self.micro_steps * ranks.world_size
        self.total_steps = config.total_steps(self.global_batch)
        add_monitors(settings, self.config)
        groups: Any = parameter_groups(self.task.model, config.optim.weight_decay, official=config.official)
        self.engine, *_ = deepspeed.initialize(model=self.task, model_parameters=groups, config=settings)
        forget_initial_step(self.engine)
        self.source = EngineSource(self.engine)
        self.teacher.follow(self.source, by_layer=in_parts)
        self.step = self.samples_before = 0
        self.best = Best(self.config.eval)
        if checkpoint is not None:
            self._resume(checkpoint)
        if ranks.is_main:
            self._describe_run(precision)
        self.metrics = Metrics(self.output, self.engine.monitor, self.total_steps, self.step, active=ranks.is_main)
        self.alarms = Alarms(self.config)
        self.watch, self.files = parts.watch(self.engine, self.source), parts.files
        counted = () if config.official else self.task.counted
        prepare, device = self.watch.prepare, ranks.device
        self.feed = Feed(self.loader, prepare, device, micro_steps=self.micro_steps, counted=counted)
        self.window = _Window()
        self.guard = FiniteGuard(self.engine, config.train.max_bad_steps)
        self.stop = StopRequest()

    def fit(self) -> None:
        """Train to the last step, then write final/; or, told by a signal, save and return."""
        if self.step == 0:
            self._evaluate()
        while self.step < self.total_steps and not self.best.stops:
            self._optimizer_step()
            if self._due(self.config.train.log_every):
                self._log()
            if self._due(self.config.train.diagnose_every):
                self._write(self.watch.gradient_shares(self.last_batch, self.alpha))
            if self.config.eval.is_due(self.step, self.total_steps) or self.step == self.total_steps:
                self._evaluate()
            stop = self.stop.agreed()
            ends = self.step == self.total_steps or self.best.stops
            if self._due(self.config.train.checkpoint_every) or ends or stop:
                self._checkpoint()
            if stop and not ends:
                self.metrics.say(f"stopped by a signal: saved at step {self.step}, --resume auto goes on from there")
                break
        else:
            self._write_model("final")
        self.stop.close()
        self.loader.close()
        self.metrics.close()

    @property
    def samples_seen(self) -> int:
        """Pairs trained on so far, over all ranks."""
        return self.samples_before + self.step * self.global_batch

    @property
    def alpha(self) -> float:
        """Weight of the teacher's targets at this step."""
        ramp = self.config.objectives.alpha_ramp_samples
        return self.config.objectives.alpha * (min(1.0, self.samples_seen / ramp) if ramp else 1.0)

    def _optimizer_step(self) -> None:
        """Forward and backward of every micro-batch, one update, then the teacher."""
        set_learning_rate(self.engine, self._learning_rate())
        momentum = self.config.teacher_momentum(self.global_batch)
        for _ in range(self.micro_steps):
            self.last_batch = batch = self.feed.next()
            self.watch.saw(batch)
            if self.config.official:  # as published: the teacher moves before it is asked, at every forward
                self.teacher.update(momentum)
            outputs = self.engine(batch, alpha=self.alpha, step=self.step)
            if self.step + 1 < self.total_steps:
                self.feed.look_ahead()  # beside the backward pass
            self.engine.backward(outputs["loss"])
            self.engine.step()  # a no-op until the accumulation boundary
            if self.queue.size:
                self.queue.push(**outputs["queue_rows"])
            self.window.add(outputs)
        bad = self.guard.verdict(self.window.outputs[-self.micro_steps :])
        if bad is None:
            model = self.config.model
            if hasattr(self.task.model, "temperature"):
                clamp_temperature_master(self.engine, model.temperature_min, model.temperature_max)
            if not self.config.official:
                self.teacher.update(momentum)
        else:
            self._skip(bad)
        self.step += 1

    def _skip(self, bad: list[str]) -> None:
        """Leave a step that was not applied out of the means, and say why."""
        del self.window.outputs[-self.micro_steps :], self.window.by_source[-self.micro_steps :]
        if bad:
            self._write({"skipped_step": bad})
            limit = self.config.train.max_bad_steps
            self.metrics.say(
                f"step {self.step} skipped: {', '.join(bad)} not finite; {self.guard.in_a_row} in a row, the run ends "
                f"at {limit} (train.max_bad_steps)"
            )

    def _learning_rate(self) -> float:
        total = self.samples_before + self.total_steps * self.global_batch
        return learning_rate(self.config, self.samples_seen, total, self.global_batch)

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _log(self) -> None:
        """Write the means since the last line, over ranks."""
        if not self.window.outputs:  # every step was skipped
            return
        names, values = self.window.means()
        numbers = dict(zip(names, mean_over_ranks(values).tolist(), strict=True))
        pairs = self.window.steps * self.config.train.batch_size * self.ranks.world_size
        grad_norm = self.engine.get_global_grad_norm()
        record = {
            **numbers,
            "lr": self._learning_rate(),
            "alpha": self.alpha,
            "grad_norm": float(grad_norm) if grad_norm is not None else None,
            "samples_per_second": pairs / self.window.seconds(),
            "data_wait": self.feed.waited / max(1, self.window.steps // self.micro_steps),
            "data_wait_share": self.feed.waited / self.window.seconds(),
            **self._losses_by_source(),
            "peak_memory_mb": peak_memory_mb(self.ranks.device),
            **self.watch.monitor(),
            "skipped": dict(sum(map(Counter, gather_objects(dict(self.loader.skipped))), Counter())),
            "fetch_retries": sum(gather_objects(self.loader.retried)),
        }
        record = self._write(record)
        self.metrics.show(record)
        for alarm in self.alarms.check(record):
            self.metrics.write(alarm)
            self.metrics.say(f"ALARM {alarm['alarm']}: {alarm['message']}")
        self.window, self.feed.waited = _Window(), 0.0

    def _losses_by_source(self) -> dict[str, float]:
        """Return each source's share of the pairs and mean losses since the last line, over ranks."""
        names, sums = self.window.sums_by_source()
        if not names:
            return {}
        record, sums = {}, mean_over_ranks(sums)  # (names, sources, 2); means have the same ratios as sums
        for number, source in enumerate(self.config.data.sources):
            record[f"source/{source}/share"] = float(sums[0, number, 1] / sums[0, :, 1].sum())
            for name, (loss, weight) in zip(names[1:], sums[1:, number].tolist(), strict=True):
                if weight:
                    record[f"source/{source}/loss/{name}"] = loss / weight
        return record

    def _write(self, record: dict[str, Any]) -> dict[str, Any]:
        record = {"step": self.step, "samples_seen": self.samples_seen, **record}
        self.metrics.write(record)
        return record

    def _evaluate(self) -> None:
        """Held-out measures of student and teacher; every rank runs them, the main one writes."""
        if not (self.config.data.val and self.config.eval.every):
            return
        started = time.monotonic()
        # rank 0's word counts: what is best, and whether the run ends, must not hang on a last bit of other cards
        record = self._write(broadcast_object(self.watch.evaluate()))
        self.metrics.say(self.watch.summary(record))
        if self.best.improves(record):
            self._write_model("best")
            if self.ranks.is_main:
                self.watch.write_predictions(self.output / "best")
        if self.best.stops:
            self.metrics.say(
                f"step {self.step}: no better {self.best.metric} than {self.best.value:.4f} (step {self.best.step}) in "
                f"{self.best.patience} evaluations (eval.patience): the run ends"
            )
        self.window.pause(time.monotonic() - started)

    def _checkpoint(self) -> None:
        started = time.monotonic()
        state = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "data": self.loader.state_dict(gather_objects(self.feed.position)),
            "model": asdict(self.config.model),
            "zero_stage": self.zero_stage,
            "versions": library_versions(),
            "config": asdict(self.config),
            "best": self.best.state_dict(),
        }
        folder = self.output / "checkpoints"
        save_checkpoint(folder, self.engine, self.teacher, self.queue, state, self.ranks)
        if self.ranks.is_main:
            prune_checkpoints(folder, self.config.train.keep_checkpoints)
        self.window.pause(time.monotonic() - started)

    def _resume(self, path: Path) -> None:
        state = load_checkpoint(path, self.engine, self.teacher, self.queue, self.ranks)
        self.step = state["step"]
        # at another number of ranks or batch size a step is another number of pairs
        self.samples_before = state["samples_seen"] - self.step * self.global_batch
        if not self.config.train.steps:
            self.total_steps = self.step + -(
                -max(0, self.config.train.samples - self.samples_seen) // self.global_batch
            )
        self.loader.load_state(state["data"])
        if "best" in state:
            self.best.load_state_dict(state["best"])
        self.ranks.say(f"resumed from {path} at step {self.step} of {self.total_steps}")
        if changed := changes(state["config"], json.loads(json.dumps(asdict(self.config)))):
            self.ranks.say(f"settings changed: {', '.join(changed)} (another experiment needs another --output)")
        now = {"world_size": self.ranks.world_size, "zero_stage": self.zero_stage}
        if changed := [f"{name} {state[name]} -> {value}" for name, value in now.items() if state[name] != value]:
            dropout = "; dropout is drawn afresh" if state["world_size"] != self.ranks.world_size else ""
            self.ranks.say(f"layout changed: {', '.join(changed)}; goes on at pair {self.samples_seen}{dropout}")

    def _describe_run(self, precision: str) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "config.yaml").write_text(dump_config(self.config))
        environment = describe_environment(self.ranks, precision, self.zero_stage)
        (self.output / "environment.json").write_text(json.dumps(environment, indent=1))
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.task.model.parameters())
        self.ranks.say(
            f"{parameters / 1e6:.1f} M parameters, {self.loader.epoch_size} pairs, {self.total_steps} steps of "
            f"{self.global_batch} pairs on {self.ranks.world_size} {self.ranks.device.type} rank(s), {precision}, "
            f"ZeRO-{self.zero_stage}, gradient clipping {self.config.clip or 'off'}, fidelity "
            f"{self.config.objectives.fidelity}; output {self.output}"
        )

    def _write_model(self, name: str) -> None:
        """Write NAME/ (student) and NAME/teacher, as model folders; all ranks gather, the main one writes."""
        student, teacher = (self._whole(shards) for shards in (self.source.shards(), self.teacher.master))
        if self.ranks.is_main:
            from simla_ds.hub import save_model_folder  # transformers' models: seconds, and no other rank needs them

            save_model_folder(
                student,
                self.output / name,
                Path(self.config.data.tokenizer),
                {"step": self.step, "samples_seen": self.samples_seen},
                teacher=teacher,
                max_words=self.config.data.max_words,
                max_tokens=self.config.data.max_tokens,
                files=self.files,
            )
        dist.barrier()

    def _whole(self, shards: dict[str, Tensor]) -> Any:
        """Return a network with the float32 weights of all ranks' shards, on the main rank; on the others none."""
        with torch.device("cpu" if self.ranks.is_main else "meta"):
            network = type(self.task.model)(self.config.model)
        self.source.fill(dict(network.named_parameters()), shards)
        return network


def changes(before: dict[str, Any], after: dict[str, Any], above: str = "") -> list[str]:
    """Return the dotted keys of JSON settings whose values differ, with both, but for where the run is."""
    found = []
    for key in sorted((before.keys() | after.keys()) - {"output", "resume"}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changes(old, new, f"{above}{key}.")
        elif old != new:
            found.append(f"{above}{key} {old} -> {new}")
    return found


class _Window:
    """What happened since the last log line. Tensors stay on the device until then."""

    def __init__(self):
        self.outputs: list[dict[str, Tensor]] = []
        self.by_source: list[dict[str, Tensor]] = []
        """See PretrainTask.forward; empty dictionaries where there is one source."""
        self.steps = 0
        self._started = time.monotonic()

    def add(self, outputs: dict[str, Any]) -> None:
        """Keep a micro-step's scalars."""
        losses = {f"loss/{name}": value for name, value in outputs["losses"].items()}
        self.outputs.append({"loss": outputs["loss"].detach(), **losses, **outputs["monitor"]})
        self.by_source.append(outputs.get("by_source", {}))
        self.steps += 1

    def means(self) -> tuple[list[str], Tensor]:
        """Return names and their means over the micro-steps that have them."""
        names = list(dict.fromkeys(name for scalars in self.outputs for name in scalars))
        columns = [[scalars[name].float() for scalars in self.outputs if name in scalars] for name in names]
        return names, torch.stack([torch.stack(column).mean() for column in columns])

    def sums_by_source(self) -> tuple[list[str], Tensor]:
        """Return names, `pairs` first, and their (names, sources, 2) sums; no names where there is one source."""
        names = list(dict.fromkeys(name for sums in self.by_source for name in sums))
        columns = [torch.stack([sums[name] for sums in self.by_source if name in sums]).sum(0) for name in names]
        return names, torch.stack(columns) if columns else torch.empty(0)

    def pause(self, seconds: float) -> None:
        """Leave out time that was not training."""
        self._started += seconds

    def seconds(self) -> float:
        """Seconds of training."""
        return max(1e-9, time.monotonic() - self._started)


def add_monitors(settings: dict[str, Any], config: Config) -> None:
    """Add TensorBoard and CSV, and Weights & Biases when asked for, to DeepSpeed's settings; what these say stands."""
    sections: dict[str, Any] = {
        "tensorboard": {"enabled": True, "output_path": config.output, "job_name": "tensorboard"},
        "csv_monitor": {"enabled": True, "output_path": config.output, "job_name": "csv"},
    }
    if config.train.wandb_project:
        sections["wandb"] = {"enabled": True, "project": config.train.wandb_project}
    for name, options in sections.items():
        settings[name] = {**options, **settings.get(name, {})}
