"""What training, the momentum teacher and model folders ask of a network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from simla_ds.config import ModelConfig


class Network(nn.Module):
    """A network that is built from a ModelConfig alone: pretraining's, or a downstream task's."""

    task: ClassVar[str]
    """What it is for, as config.json of its model folder says."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config

    @torch.no_grad()
    def take(self, weights: Mapping[str, Tensor]) -> Self:
        """Copy the value of every parameter, of the same shape; return self."""
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])
        return self

    def set_activation_checkpointing(self, on: bool) -> None:
        """Recompute activations in backward (less memory, more time), in every stack of layers."""
        for module in self.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = on  # pyright: ignore[reportArgumentType]  no tensor, no module

    def layers(self) -> Iterator[nn.Module]:
        """Yield the layers of every stack: nearly all weights, each read in its layer's forward and nowhere else."""
        for module in self.modules():
            if isinstance(module, (nn.ModuleList, nn.Sequential)):
                yield from module
