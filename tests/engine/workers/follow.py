"""A rank of tests/engine/test_zero_teacher.py: trains under DeepSpeed in one layout after another.

For each layout it reports, as one JSON line, how far the teacher is from an EMA made by other means, and where the
temperature went when it was driven past its bounds. The fp32 weights are put together here from the optimizer's own
flat buffers and their documented order, without anything that simla_ds.engine.zero_teacher uses.
"""

import argparse
import json
import math
import re
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from simla_ds.config import OptimConfig, TrainConfig
from simla_ds.engine import zero_teacher
from simla_ds.engine.checkpoint import load_checkpoint, save_checkpoint
from simla_ds.engine.checkpoint_folder import check_whole, read_state
from simla_ds.engine.deepspeed_config import resolve_deepspeed_config
from simla_ds.engine.distributed import Ranks, broadcast_object, finish, gather_objects, start
from simla_ds.engine.optimizer import forget_initial_step, set_learning_rate
from simla_ds.engine.tensor_files import Pieces
from simla_ds.engine.zero_layout import Engine
from simla_ds.engine.zero_teacher import EngineSource, clamp_temperature_master
from simla_ds.model.weight_decay import parameter_groups
from simla_ds.task import PretrainTask
from simla_ds.teacher import Teacher
from tests.tiny import STREAM, VISION, make_batch, make_task, run_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CONFIGS = Path(__file__).resolve().parents[3] / "ds_configs"
MOMENTUM = 0.98
APART = 0.97
"""What the teacher starts at, of the student."""
RATE = 2e-3
BATCHES = 4
FROZEN = "match_head.bias"
TEMPERATURE = "temperature.value"


class OnePassTask(PretrainTask):
    """The real task's model in one pass of either kind: every parameter gets a gradient, at a fifth of the cost."""

    def forward(self, batch, **kwargs):
        """Return `loss`."""
        tokens = self.model.image_encoder(batch["image"], batch["patch_mask"])
        fused, _ = self.model.text_over_image(batch["input_ids"], batch["text_mask"], tokens)
        image_feature, text_feature = self.model.image_feature(tokens), self.model.text_feature(fused)
        outputs = (
            self.model.language_head(fused),
            self.model.match_head(fused[:, 0]),
            self.model.visual_head(tokens),
            self.model.concept_head(image_feature.to(fused.dtype)),
            image_feature @ text_feature.T / self.model.temperature(),
        )
        return {"loss": torch.stack([output.float().square().mean() for output in outputs]).sum()}


class DrivenTask(PretrainTask):
    """Nothing but the temperature, pulled up (by a negative number) or down as hard as clipping lets it."""

    def forward(self, batch, **kwargs):
        """Return `loss` and the temperature that similarities would be divided by; `batch` is the pull, a number."""
        temperature = self.model.temperature()
        return {"loss": (batch * temperature).squeeze(), "temperature": temperature.detach()}


def settings_for(layout: str, config, world_size: int) -> tuple[dict, str]:
    """Return DeepSpeed settings and precision of a layout such as `zero2_offload:bf16` or `zero0:bf16:fusedadam`."""
    name, precision, *options = layout.split(":")
    settings = resolve_deepspeed_config(CONFIGS / f"{name}.json", config, world_size, precision, "cpu")
    if name.startswith("zero3"):  # tiny weights would all be kept whole, in one sub-group
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 1200, "sub_group_size": 8000}
    if precision == "fp16":
        settings["fp16"]["initial_scale_power"] = 8  # no overflows to wait for
    if "torchadam" in options:  # instead of DeepSpeedCPUAdam, which is compiled at first use
        settings["zero_force_ds_cpu_optimizer"] = False
        settings["optimizer"]["params"] |= {"torch_adam": True}
    if "fusedadam" in options:
        settings["optimizer"]["params"] |= {"torch_adam": False}
        del settings["optimizer"]["params"]["fused"]
    return settings, precision


def build(layout: str, world_size: int, kind: type[PretrainTask]) -> tuple[Engine, PretrainTask, list[list[str]]]:
    """Return a fresh engine around the real task, with one parameter frozen, and the optimizer's groups by name."""
    config = run_config()
    config = replace(
        config,
        model=replace(config.model, vision=replace(VISION, layers=1), stream=replace(STREAM, layers=1)),
        optim=OptimConfig(learning_rate=RATE, weight_decay=0.05),
        train=TrainConfig(batch_size=2),
    )
    settings, precision = settings_for(layout, config, world_size)
    torch.manual_seed(0)
    task = make_task(config)
    task.__class__ = kind
    task.model.get_parameter(FROZEN).requires_grad_(False)
    task.teacher.module.to(DTYPES[precision])
    groups: Any = parameter_groups(task.model, config.optim.weight_decay, official=False)
    named = {id(p): name for name, p in task.model.named_parameters()}
    names = [[named[id(p)] for p in group["params"]] for group in groups]
    engine, *_ = deepspeed.initialize(model=task, model_parameters=groups, config=settings)
    forget_initial_step(engine)
    return engine, task, names


def gathered(piece: Tensor) -> list[Tensor]:
    """Return every rank's piece, in rank order."""
    parts = [torch.empty_like(piece) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, piece.detach().contiguous())
    return parts


def whole_weights(engine: Engine) -> dict[str, Tensor]:
    """Return the fp32 weights by name, out of the optimizer's flat buffers."""
    optimizer, name_of = engine.optimizer, {id(p): n for n, p in engine.module.model.named_parameters()}
    found: dict[str, Tensor] = {}
    if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3: each parameter cut in equal, padded parts
        for parameters, flat in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
            ranks, offset = gathered(flat), 0
            for p in parameters:
                part = -(-p.ds_numel // len(ranks))
                whole = torch.cat([flat_of_rank[offset : offset + part] for flat_of_rank in ranks])
                found[name_of[id(p)]] = whole[: p.ds_numel].view(p.ds_shape)
                offset += part
        return found
    if hasattr(
        optimizer, "single_partition_of_fp32_groups"
    ):  # stages 1, 2: a group laid end to end, cut in equal parts
        flats = [torch.cat(gathered(piece)) for piece in optimizer.single_partition_of_fp32_groups]
        groups = optimizer.bit16_groups
    elif hasattr(optimizer, "bf16_groups"):  # BF16_Optimizer: the same under other names
        flats = [torch.cat(gathered(piece)) for piece in optimizer.fp32_groups_flat_partition]
        groups = optimizer.bf16_groups
    elif hasattr(optimizer, "fp32_groups_flat"):
        flats, groups = optimizer.fp32_groups_flat, optimizer.fp16_groups
    elif hasattr(optimizer, "fp32_groups"):
        flats = [torch.cat([t.detach().flatten() for t in group]) for group in optimizer.fp32_groups]
        groups = optimizer.fp16_groups
    else:
        flats = [torch.cat([p.detach().flatten() for p in group["params"]]) for group in optimizer.param_groups]
        groups = [group["params"] for group in optimizer.param_groups]
    for parameters, flat in zip(groups, flats, strict=True):
        offset = 0
        for p in parameters:
            found[name_of[id(p)]] = flat.detach()[offset : offset + p.numel()].view_as(p).clone()
            offset += p.numel()
    return found


def forward_weights(engine: Engine) -> dict[str, Tensor]:
    """Return the weights that the forward reads, in the training dtype."""
    parameters = list(engine.module.model.parameters())
    if not hasattr(parameters[0], "ds_id"):
        return {n: p.detach().clone() for n, p in engine.module.model.named_parameters()}
    with deepspeed.zero.GatheredParameters(parameters):
        return {n: p.detach().clone() for n, p in engine.module.model.named_parameters()}


@torch.no_grad()
def teacher_weights(teacher: Teacher, batch: Any) -> dict[str, Tensor]:
    """Return what the teacher's forward reads, seen where it is whole: in each layer's own forward at stage 3."""
    network: Any = teacher.module
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    seen = {name: parameter.clone() for name, parameter in network.named_parameters()}

    def look(layer: torch.nn.Module, _: Any) -> None:
        seen.update({names[id(parameter)]: parameter.clone() for parameter in layer.parameters()})

    hooks = [layer.register_forward_pre_hook(look) for layer in network.layers()]
    network.text_over_image(batch["input_ids"], batch["text_mask"], network.image_encoder(batch["image"]))
    for hook in hooks:
        hook.remove()
    return seen


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Return the largest difference of any element; not a number when one of them is none."""
    return torch.stack([(left[name].double() - right[name].double()).abs().max() for name in right]).max().item()


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the largest error of any element, of its magnitude where that is over 1: float32 knows no more."""
    errors = [(found[n].double() - t).abs() / t.abs().clamp(min=1.0) for n, t in truth.items()]
    return torch.stack([of.max() for of in errors]).max().item()


def difference(left: Path, right: Path) -> float:
    """Return the largest difference between two checkpoints' tensors; infinite when one counts other updates.

    Without the frozen weight: it has no float32 master and is rounded to the training dtype.
    """
    check_whole(right)
    if read_state(left)["adamw_steps"] != read_state(right)["adamw_steps"]:
        return math.inf
    old, new = (dict(Pieces(path / "weights")) for path in (left, right))
    assert old.pop(f"weight/{FROZEN}").shape == new.pop(f"weight/{FROZEN}").shape
    assert old.keys() == new.keys()
    return distance(old, new)


class Follower:
    """Runs steps on one engine and keeps EMAs beside the real teacher: whole in float64 (the truth) and in float32, and
    one fed by the forward's weights.
    """

    def __init__(self, layout: str, kind: type[PretrainTask], rank: int, world_size: int):
        self.engine, self.task, self.groups = build(layout, world_size, kind)
        self.source, self.teacher = EngineSource(self.engine), self.task.teacher
        self.teacher.follow(self.source, by_layer=layout.startswith("zero3"))
        for shard in self.teacher.master.values():
            shard.mul_(APART)
        self.teacher.refresh()
        self.dtype = DTYPES[layout.split(":")[1]]
        self.start, seen = whole_weights(self.engine), forward_weights(self.engine)
        self.frozen = {FROZEN: seen[FROZEN].float()}
        self.start_error = distance(self.start, {name: seen[name] for name in self.start})
        self.wrong = {name: APART * value for name, value in {**self.start, **self.frozen}.items()}
        self.truth = {name: value.double() for name, value in self.wrong.items()}
        self.single = {name: value.clone() for name, value in self.wrong.items()}
        self.batches = [make_batch([5, 7], seed=10 * rank + i) for i in range(BATCHES)]
        for batch in self.batches:
            batch["image"] = batch["image"].to(self.dtype)

    def step(self, index: int) -> bool:
        """Run one step; return whether it was applied."""
        outputs = self.engine(self.batches[index % BATCHES], alpha=0.4)
        self.engine.backward(outputs["loss"])
        self.engine.step()
        return self.engine.was_step_applied()

    def follow(self, steps: int) -> dict[str, Any]:
        """Train, updating all EMAs; compare them at the end."""
        model, applied, first_move = self.task.model.config, 0, 0.0
        for index in range(steps):
            if not self.step(index):
                continue
            clamp_temperature_master(self.engine, model.temperature_min, model.temperature_max)
            self.teacher.update(MOMENTUM)
            now = {**whole_weights(self.engine), **self.frozen}
            for name, value in self.truth.items():
                value.lerp_(now[name].double(), 1 - MOMENTUM)
                self.single[name].lerp_(now[name], 1 - MOMENTUM)
                self.wrong[name].lerp_(now[name].to(self.dtype).float(), 1 - MOMENTUM)
            first_move = first_move or abs(now[TEMPERATURE] - self.start[TEMPERATURE]).item()
            applied += 1
        now, seen = whole_weights(self.engine), forward_weights(self.engine)
        master = self.whole(self.teacher.master)
        return {
            "applied": applied,
            "start": self.start_error,
            "first_move": first_move / RATE,
            "moved": distance(self.start, now),
            "source": distance(self.whole(self.source.shards()), {**now, **self.frozen}),
            "forward_is_cast_master": distance(seen, {name: value.to(self.dtype) for name, value in now.items()}),
            "teacher": distance(master, self.truth),
            "teacher_of_size": error(master, self.truth),
            "rounding": 2**-24 / (1 - MOMENTUM),  # of float32: half a unit in the last place each step
            "teacher_from_fp32": distance(master, self.single),
            "copy": distance(
                teacher_weights(self.teacher, self.batches[0]), {n: v.to(self.dtype) for n, v in master.items()}
            ),
            "bytes": gather_objects(self.bytes()),
            "outside": sum(v.numel() for n, v in master.items() if not re.search(r"\.(layers|blocks)\.", n)),
            "frozen": self.frozen[FROZEN].numel(),
            "sizes": [[self.start[name].numel() for name in group] for group in self.groups],
            "fed_by_forward_weights": distance(self.wrong, self.truth),
            "fed_by_forward_weights_from_fp32": distance(self.wrong, self.single),
        }

    def reload(self, folder: Path, before: Path | None) -> dict[str, float]:
        """Save; load what another layout saved and save that again; load the own; train on, twice from there."""
        own, ranks = self.save(folder), Ranks(dist.get_rank(), 0, dist.get_world_size(), torch.device("cpu"))
        saved, queue = whole_weights(self.engine), self.task.queue
        report = {}
        if before is not None:
            load_checkpoint(before, self.engine, self.teacher, queue, ranks)
            report["carried"] = difference(before, self.save(folder / "carried"))
        ends = []
        for _ in range(2):
            load_checkpoint(own, self.engine, self.teacher, queue, ranks)
            loaded = self.whole(self.source.shards())
            report["reloaded"] = max(report.get("reloaded", 0.0), distance(loaded, saved))
            while not self.step(0):  # an overflow in fp16
                pass
            ends.append(whole_weights(self.engine))
        return {**report, "drifted": distance(saved, ends[0]), "continued": distance(*ends)}

    def whole(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return whole float32 parameters out of all ranks' shards."""
        wholes = {name: torch.full(value.shape, math.nan) for name, value in self.truth.items()}
        self.source.fill(wholes, shards)
        return wholes

    def bytes(self) -> dict[str, int]:
        """Return what this rank's memory holds of the teacher: its master, and what else its network needs."""
        master = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.teacher.master.values()}
        copies = [p.data.untyped_storage() for p in self.teacher.module.parameters()]
        others = {s.data_ptr(): s.nbytes() for s in copies if s.data_ptr() not in master}
        return {"master": sum(master.values()), "copy": sum(others.values())}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint and return its path."""
        ranks = Ranks(dist.get_rank(), 0, dist.get_world_size(), torch.device("cpu"))
        state = {"step": 1, "samples_seen": 4}
        return save_checkpoint(folder, self.engine, self.teacher, self.task.queue, state, ranks)

    def drive(self) -> dict[str, list[float]]:
        """Pull the temperature past each bound; report where it was stored after each step, unclamped and clamped."""
        self.task.__class__ = DrivenTask
        set_learning_rate(self.engine, 0.5)
        model = self.task.model.config
        before, after, forward = [], [], []
        for direction in [-100.0] * 4 + [100.0] * 12:
            outputs = self.engine(direction)
            forward.append(outputs["temperature"].item())
            self.engine.backward(outputs["loss"])
            self.engine.step()
            before.append(whole_weights(self.engine)[TEMPERATURE].item())
            clamp_temperature_master(self.engine, model.temperature_min, model.temperature_max)
            after.append(whole_weights(self.engine)[TEMPERATURE].item())
        copies = [forward_weights(self.engine)[TEMPERATURE].item()]
        return {"before": before, "after": after, "forward": forward, "copies": copies}


def main() -> None:
    """Run the layouts named on the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--whole-task", action="store_true", help="the real five objectives, and a reload")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("layouts", nargs="+")
    arguments = parser.parse_args()
    zero_teacher.BUCKET = 10_000  # several buckets of this model
    accelerator: Any = get_accelerator()
    accelerator.is_fp16_supported = lambda: True  # slow here, but its masters are laid out as on a GPU
    ranks = start()
    before = None
    box = broadcast_object(tempfile.mkdtemp())
    for layout in arguments.layouts:
        started = time.monotonic()
        kind = PretrainTask if arguments.whole_task else OnePassTask
        follower = Follower(layout, kind, ranks.rank, ranks.world_size)
        report = {"layout": layout, "optimizer": type(follower.engine.optimizer).__name__}
        report |= follower.follow(arguments.steps)
        if arguments.whole_task:
            report |= follower.reload(Path(box) / layout, before)
            before = Path(box) / layout / "step_00000001"
        report |= {"temperature": follower.drive(), "seconds": time.monotonic() - started}
        if ranks.is_main:
            with arguments.out.open("a") as file:
                file.write(json.dumps(report) + "\n")
        follower.engine.destroy()
    if ranks.is_main:
        shutil.rmtree(box)
    finish()


if __name__ == "__main__":
    main()
