"""The training steps that `python -m benchmarks step` compares: model, optimizer, one step."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.head_orders import IGNORED
from benchmarks.official_order import OfficialOrder
from benchmarks.step_sizes import changed, make_task
from simla_ds.config import Config
from simla_ds.model.simla import Simla
from simla_ds.model.weight_decay import parameter_groups
from simla_ds.passes import Passes
from simla_ds.types import Batch, Features, Request

ALPHA, LEARNING_RATE, WEIGHT_DECAY, MOMENTUM = 0.4, 1e-4, 0.02, 0.995
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""cpu: seconds that this process computed, on all its threads; for a machine that others use too, with one thread."""


class Clock:
    """Seconds by part of a step."""

    def __init__(self, kind: str = "wall"):
        self.now, self.parts = CLOCKS[kind], dict[str, float]()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add what runs within this context to a part."""
        started = self.seconds()
        yield
        self.parts[name] = self.parts.get(name, 0.0) + self.seconds() - started

    def seconds(self) -> float:
        """Return the time, once the device is done."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return self.now()


class Contender(ABC):
    """A model, its optimizer and a way to run one step of training."""

    computes: str
    """What a step computes, in a line."""

    @property
    @abstractmethod
    def networks(self) -> Sequence[nn.Module]:
        """Whose parameters do not count as saved for backward."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Run the forward and return the loss."""

    @abstractmethod
    def step(self, batch: Batch, clock: Clock) -> None:
        """Train on the batch."""


class FusedAdamW:
    """torch's fused AdamW; of half-precision parameters with fp32 masters, as DeepSpeed keeps them."""

    def __init__(self, groups: list[dict[str, Any]]):
        parameters = [p for group in groups for p in group["params"]]
        self.masters = {p: p.detach().float() for p in parameters if p.dtype != torch.float32}
        groups = [{**group, "params": [self.masters.get(p, p) for p in group["params"]]} for group in groups]
        self.inner = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        """Update the parameters and forget their gradients."""
        for parameter, master in self.masters.items():
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        self.inner.step()
        self.inner.zero_grad()
        for parameter, master in self.masters.items():
            parameter.data.copy_(master)


class TimedPasses(Passes):
    """Passes with a clock."""

    def __init__(self, inner: Passes, clock: Clock, teacher: Simla):
        self.inner, self.clock, self.teacher = inner, clock, teacher

    def features(self, network: Simla, batch: Batch, *, masked: bool, every_text_token: bool) -> Features:
        """As inner, timed."""
        with self.clock.part(f"forward: encoders, {self._of(network)}"):
            return self.inner.features(network, batch, masked=masked, every_text_token=every_text_token)

    def run(self, network: Simla, requests: Sequence[Request]) -> list[Tensor]:
        """As inner, timed."""
        with self.clock.part(f"forward: fused passes, {self._of(network)}"):
            return self.inner.run(network, requests)

    def _of(self, network: Simla) -> str:
        return "teacher" if network is self.teacher else "student"


class Ours(Contender):
    """PretrainTask with fast passes."""

    computes = "five objectives, teacher and queue (corrected fidelity, fast passes), fused AdamW"

    def __init__(self, config: Config, dtype: torch.dtype):
        self.task = make_task(config, dtype)
        self.optimizer = FusedAdamW(parameter_groups(self.task.model, WEIGHT_DECAY, official=False))

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Student and teacher."""
        return self.task.model, self.task.teacher.module

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss."""
        return self.task(batch, alpha=ALPHA)["loss"]

    def step(self, batch: Batch, clock: Clock) -> None:
        """Forward, backward, AdamW, queue, teacher."""
        passes = self.task.passes
        self.task.passes = TimedPasses(passes, clock, self.task.teacher.module)
        with clock.part("forward"):
            result = self.task(batch, alpha=ALPHA)
        self.task.passes = passes
        with clock.part("backward"):
            result["loss"].backward()
        with clock.part("AdamW"):
            self.optimizer.step()
        with clock.part("queue and teacher"):
            self.task.queue.push(**result["queue_rows"])
            self.task.teacher.update(MOMENTUM)


class Published(Contender):
    """The published step (benchmarks.official_order)."""

    computes = "the same five objectives, teacher and queue in the published order, teacher's dropout on, torch's AdamW"

    def __init__(self, config: Config, *, autocast: bool):
        config = changed(config, objectives__fidelity="official")
        self.task, self.autocast = make_task(config), autocast
        self.order = OfficialOrder(self.task)
        groups = parameter_groups(self.task.model, WEIGHT_DECAY, official=True)
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE)

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Student and teacher."""
        return self.task.model, self.task.teacher.module

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss."""
        return self._losses(batch)["total"]

    def step(self, batch: Batch, clock: Clock) -> None:
        """Teacher, forward with the queue's update, backward, AdamW."""
        with clock.part("queue and teacher"):
            self.order.move_teacher(MOMENTUM)
        with clock.part("forward"):
            loss = self.loss(batch)
        with clock.part("backward"):
            loss.backward()
        with clock.part("AdamW"):
            self.optimizer.step()
            self.optimizer.zero_grad()

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        context: AbstractContextManager = nullcontext()
        if self.autocast:
            context = torch.autocast(batch["image"].device.type, dtype=torch.bfloat16)
        with context:
            return self.order.losses(batch, ALPHA)


class Flava(Contender):
    """transformers.FlavaForPreTraining at the same widths, depths, resolution and batch."""

    computes = (
        "FLAVA: contrast within the batch, ITM, masked patches and words of one fused pass over text and image "
        "together (half as many fused layers); no teacher, queue, keywords, second fused direction or dropout; "
        "fused AdamW"
    )

    def __init__(self, config: Config, dtype: torch.dtype):
        import transformers

        model = config.model
        common = {
            "hidden_size": model.vision.width,
            "num_attention_heads": model.vision.heads,
            "intermediate_size": 4 * model.vision.width,
        }
        image = {"image_size": model.vision.image_size, "patch_size": model.vision.patch_size}
        image |= {"num_hidden_layers": model.vision.layers, "vocab_size": model.vocabulary.visual_size}
        text = {"num_hidden_layers": model.stream.layers, "vocab_size": model.vocabulary.size}
        fused = {"num_hidden_layers": max(1, model.stream.layers // 2)}
        torch.manual_seed(0)
        flava: Any = transformers.FlavaConfig(
            image_config=common | image,
            text_config=common | text,
            multimodal_config=common | fused,
            hidden_size=model.vision.width,
            projection_dim=model.projection_size,
            init_codebook=False,
        )
        self.model: Any = transformers.FlavaForPreTraining(flava)
        self.model.to(dtype).train()
        self.dtype = dtype
        self.optimizer = FusedAdamW([{"params": list(self.model.parameters()), "weight_decay": WEIGHT_DECAY}])

    @property
    def networks(self) -> Sequence[nn.Module]:
        """The model."""
        return (self.model,)

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss, every pair a matched one."""
        labels = torch.full_like(batch["input_ids"], IGNORED).flatten()
        labels = labels.index_copy(0, batch["label_index"], batch["labels"])
        mask = batch["text_mask"].long()
        return self.model(
            input_ids=batch["input_ids"],
            input_ids_masked=batch["mlm_input_ids"],
            pixel_values=batch["image"].to(self.dtype),
            attention_mask=mask,
            bool_masked_pos=batch["patch_mask"],
            mlm_labels=labels.view_as(batch["input_ids"]),
            mim_labels=batch["visual_ids"].clone(),  # pyright: ignore[reportTypedDictNotRequiredAccess]  XMM is on
            itm_labels=torch.ones(len(mask), dtype=torch.int64, device=mask.device),
            skip_unmasked_multimodal_encoder=True,
            return_loss=True,
        ).loss

    def step(self, batch: Batch, clock: Clock) -> None:
        """Forward, backward, AdamW."""
        with clock.part("forward"):
            loss = self.loss(batch)
        with clock.part("backward"):
            loss.backward()
        with clock.part("AdamW"):
            self.optimizer.step()


BUILD: dict[str, Callable[[Config, torch.dtype], Contender]] = {
    "ours": Ours,
    "official order": lambda config, dtype: Published(config, autocast=False),
    "official order, autocast bf16": lambda config, dtype: Published(config, autocast=True),
    "FLAVA": Flava,
}
