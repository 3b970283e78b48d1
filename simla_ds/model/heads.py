"""What is read off the two encoders: classes, words, the temperature."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simla_ds.config import ModelConfig
from simla_ds.model.layer_norm import layer_norm
from simla_ds.model.stream import LAYER_NORM_EPS, init_linear

HeadLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (N, D), weight (V, D), bias (V,)) -> loss."""


class Classifier(nn.Linear):
    """A linear head over many classes, whose loss can be had without its logits.

    The loss runs inside `forward`: under ZeRO-3 the weight is whole only there.
    """

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  nn.Linear's takes no loss
        self, hidden: Tensor, loss: HeadLoss | None = None
    ) -> Tensor:
        """(..., D) hidden states to (..., V) logits, or to what `loss` makes of them and the weights."""
        return super().forward(hidden) if loss is None else loss(hidden, self.weight, self.bias)


class LanguageHead(nn.Module):
    """BERT's masked-word head; its decoder shares the word embeddings."""

    def __init__(self, width: int, word_embeddings: nn.Embedding):
        super().__init__()
        self.transform = nn.Linear(width, width)
        self.norm = layer_norm(width, LAYER_NORM_EPS)
        self.decoder = Classifier(width, word_embeddings.num_embeddings)
        self.decoder.weight = word_embeddings.weight
        init_linear(self.transform, width)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, hidden: Tensor, loss: HeadLoss | None = None) -> Tensor:
        """(..., D) hidden states to (..., V) logits, or to a loss (see Classifier)."""
        return self.decoder(self.transformed(hidden), loss)

    def transformed(self, hidden: Tensor) -> Tensor:
        """(..., D) hidden states to what the decoder reads, (..., D)."""
        return self.norm(F.gelu(self.transform(hidden)))


class Temperature(nn.Module):
    """The learned softmax temperature of ITC, kept within bounds.

    The bound is functional with a straight-through gradient: an in-place clamp of the parameter would be lost when the
    optimizer's fp32 master overwrites it (the trainer clamps the master as well). The parameter has shape (1,), since
    DeepSpeed refuses 0-dim parameters.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.low, self.high = config.temperature_min, config.temperature_max
        self.value = nn.Parameter(torch.tensor([config.temperature]))

    @torch.no_grad()
    def clamp_(self) -> None:
        """Bring the parameter itself within bounds (loaded weights may lie outside)."""
        self.value.clamp_(self.low, self.high)

    def forward(self) -> Tensor:
        """Return the bounded temperature, (1,) float32."""
        value = self.value.float()
        return value + (value.clamp(self.low, self.high) - value).detach()
