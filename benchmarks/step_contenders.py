"""The training steps that `python -m benchmarks step` compares: model, optimizer, one step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.head_orders import IGNORED
from benchmarks.official_order import OfficialOrder
from benchmarks.step_sizes import changed, make_task
from benchmarks.timing import CPU
from simla_ds.config import Config
from simla_ds.model.simla import Simla
from simla_ds.model.weight_decay import parameter_groups
from simla_ds.passes import Passes
from simla_ds.types import Batch, Features, Request

ALPHA, LEARNING_RATE, WEIGHT_DECAY, MOMENTUM = 0.4, 1e-4, 0.02, 0.995
Part = Callable[[str], AbstractContextManager[Any]]
"""Enters a named part of a step: benchmarks.timing.Clock.part, or nothing."""


def unnoticed(name: str) -> AbstractContextManager[Any]:
    """Enter a part that nobody times: on a card each reading of a clock would wait for what was launched so far."""
    return nullcontext()


class Contender(ABC):
    """A model, its optimizer and a way to run one step of training."""

    computes: str
    """What a step computes, in a line."""
    multiplies: torch.dtype
    """What its products are of."""

    @property
    @abstractmethod
    def networks(self) -> Sequence[nn.Module]:
        """Whose parameters do not count as saved for backward."""

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """Run the forward and return the loss."""

    @abstractmethod
    def step(self, batch: Batch, part: Part = unnoticed) -> None:
        """Train on the batch."""


class FusedAdamW:
    """torch's fused AdamW; of half-precision parameters with fp32 masters, as DeepSpeed keeps them."""

    def __init__(self, groups: list[dict[str, Any]]):
        parameters = [p for group in groups for p in group["params"]]
        self.masters = {p: p.detach().float() for p in parameters if p.dtype != torch.float32}
        groups = [{**group, "params": [self.masters.get(p, p) for p in group["params"]]} for group in groups]
        self.inner = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)

    def step(self) -> None:
        """Update the parameters and forget their gradients. Masters' stay in memory, as in DeepSpeed's flat buffers."""
        for parameter, master in self.masters.items():
            if parameter.grad is None or master.grad is None:
                master.grad = None if parameter.grad is None else parameter.grad.float()
            else:
                master.grad.copy_(parameter.grad)
            parameter.grad = None
        self.inner.step()
        if not self.masters:
            self.inner.zero_grad()
        for parameter, master in self.masters.items():
            parameter.data.copy_(master)


class TimedPasses(Passes):
    """Passes that are parts of the forward."""

    def __init__(self, inner: Passes, part: Part, teacher: Simla):
        self.inner, self.part, self.teacher = inner, part, teacher

    def features(self, network: Simla, batch: Batch, *, masked: bool, every_text_token: bool) -> Features:
        """As inner, timed."""
        with self.part(f"forward: encoders, {self._of(network)}"):
            return self.inner.features(network, batch, masked=masked, every_text_token=every_text_token)

    def run(self, network: Simla, requests: Sequence[Request]) -> list[Tensor]:
        """As inner, timed."""
        with self.part(f"forward: fused passes, {self._of(network)}"):
            return self.inner.run(network, requests)

    def _of(self, network: Simla) -> str:
        return "teacher" if network is self.teacher else "student"


class Ours(Contender):
    """PretrainTask with fast passes."""

    computes = "five objectives, teacher and queue (corrected fidelity, fast passes), fused AdamW"

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device = CPU):
        self.task, self.multiplies = make_task(config, dtype, device), dtype
        self.optimizer = FusedAdamW(parameter_groups(self.task.model, WEIGHT_DECAY, official=False))

    @property
    def networks(self) -> Sequence[nn.Module]:
        """Student and teacher."""
        return self.task.model, self.task.teacher.module

    def loss(self, batch: Batch) -> Tensor:
        """Return the summed loss."""
        return self.task(batch, alpha=ALPHA)["loss"]

    def step(self, batch: Batch, part: Part = unnoticed) -> None:
        """Forward, backward, AdamW, queue, teacher."""
        passes = self.task.passes
        self.task.passes = TimedPasses(passes, part, self.task.teacher.module)
        with part("forward"):
            result = self.task(batch, alpha=ALPHA)
        self.task.passes = passes
        with part("backward"):
            result["loss"].backward()
        with part("AdamW"):
            self.optimizer.step()
        with part("queue and teacher"):
            self.task.queue.push(**result["queue_rows"])
            self.task.teacher.update(MOMENTUM)


class Published(Contender):
    """The published step (benchmarks.official_order)."""

    computes = "the same five objectives, teacher and queue in the published order, teacher's dropout on, torch's AdamW"

    def __init__(self, config: Config, device: torch.device = CPU, *, autocast: bool):
        config = changed(config, objectives__fidelity="official")
        self.task, self.autocast = make_task(config, device=device), autocast
        self.multiplies = torch.bfloat16 if autocast else torch.float32
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

    def step(self, batch: Batch, part: Part = unnoticed) -> None:
        """Teacher, forward with the queue's update, backward, AdamW."""
        with part("queue and teacher"):
            self.order.move_teacher(MOMENTUM)
        with part("forward"):
            loss = self.loss(batch)
        with part("backward"):
            loss.backward()
        with part("AdamW"):
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

    def __init__(self, config: Config, dtype: torch.dtype, device: torch.device = CPU):
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
        self.model.to(device, dtype).train()
        self.multiplies = dtype
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
            pixel_values=batch["image"].to(self.multiplies),
            attention_mask=mask,
            bool_masked_pos=batch["patch_mask"],
            mlm_labels=labels.view_as(batch["input_ids"]),
            mim_labels=batch["visual_ids"].clone(),  # pyright: ignore[reportTypedDictNotRequiredAccess]  XMM is on
            itm_labels=torch.ones(len(mask), dtype=torch.int64, device=mask.device),
            skip_unmasked_multimodal_encoder=True,
            return_loss=True,
        ).loss

    def step(self, batch: Batch, part: Part = unnoticed) -> None:
        """Forward, backward, AdamW."""
        with part("forward"):
            loss = self.loss(batch)
        with part("backward"):
            loss.backward()
        with part("AdamW"):
            self.optimizer.step()


BUILD: dict[str, Callable[[Config, torch.dtype, torch.device], Contender]] = {
    "ours": Ours,
    "official order": lambda config, dtype, device: Published(config, device, autocast=False),
    "official order, autocast bf16": lambda config, dtype, device: Published(config, device, autocast=True),
    "FLAVA": Flava,
}
