"""SIMLA: image encoder, single stream, projections and heads (arXiv 2203.14395, figure 2)."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from simla_ds.config import ModelConfig
from simla_ds.model.heads import Classifier, LanguageHead, Temperature
from simla_ds.model.network import Network
from simla_ds.model.stream import Stream
from simla_ds.model.vision import ImageEncoder
from simla_ds.types import Features

EXPECTED_KEYWORDS = 5
"""Keywords of a caption that the concept head expects before training."""


class Simla(Network):
    """The network of student and teacher alike. B pairs, L tokens, N = patches + 1, D width, E projection size."""

    task = "pretrain"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        vocabulary, width, projection = config.vocabulary, config.stream.width, config.projection_size
        if vocabulary.size < 1 or vocabulary.visual_size < 1:
            raise ValueError(
                f"model.vocabulary.size={vocabulary.size} and visual_size={vocabulary.visual_size} must be >= 1; "
                "they are filled in from the tokenisers before training"
            )
        self.image_encoder = ImageEncoder(config.vision)
        self.stream = Stream(config.stream, vocabulary, config.image_positions)
        self.image_projection = nn.Linear(width, projection)
        self.text_projection = nn.Linear(width, projection)
        self.match_head = nn.Linear(width, 2)
        self.language_head = LanguageHead(width, self.stream.embeddings.word)
        self.visual_head = Classifier(width, vocabulary.visual_size)
        self.concept_head = Classifier(projection, vocabulary.size)
        # A caption has a handful of keywords among thousands of words: start at that rate, as focal loss does, or the
        # first thousands of steps go into pushing every bias down, and the teacher suggests every word meanwhile.
        nn.init.constant_(self.concept_head.bias, -math.log(vocabulary.size / EXPECTED_KEYWORDS))
        self.temperature = Temperature(config)

    def image_feature(self, image_tokens: Tensor) -> Tensor:
        """(B, N, D) image tokens to (B, E) float32 unit vectors."""
        return F.normalize(self.image_projection(image_tokens[:, 0]).float(), dim=-1)

    def text_feature(self, text_tokens: Tensor) -> Tensor:
        """(B, L, D) encoded tokens to (B, E) float32 unit vectors."""
        return F.normalize(self.text_projection(text_tokens[:, 0]).float(), dim=-1)

    def features(
        self, image: Tensor, input_ids: Tensor, text_mask: Tensor, patch_mask: Tensor | None = None
    ) -> Features:
        """Run what comes before any cross-modal pass: the picture, the picture with hidden patches, the caption."""
        image_tokens = self.image_encoder(image)
        masked = None if patch_mask is None else self.image_encoder(image, patch_mask)
        embeddings = self.stream.embeddings(input_ids)
        text_tokens, _ = self.stream(embeddings, text_mask)
        return self.project(image_tokens, masked, embeddings, text_tokens)

    def project(
        self, image_tokens: Tensor, masked_image_tokens: Tensor | None, text_embeddings: Tensor, text_tokens: Tensor
    ) -> Features:
        """Add the projected [CLS] rows to what the encoders made of a batch; shapes as in Features."""
        return Features(
            image_tokens=image_tokens,
            masked_image_tokens=masked_image_tokens,
            text_embeddings=text_embeddings,
            text_tokens=text_tokens,
            image_feature=self.image_feature(image_tokens),
            text_feature=self.text_feature(text_tokens),
        )

    def text_over_image(
        self,
        input_ids: Tensor,
        text_mask: Tensor,
        image_tokens: Tensor,
        image_index: Tensor | None = None,
        *,
        cls_attention: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Fuse captions (R, L) with pictures (S, N, D); row r reads picture image_index[r], or r.

        Returns (R, L, D) and, when asked for, the last layer's text self-attention of [CLS], (R, H, L).
        """
        rows = self.stream.embeddings(input_ids)
        return self.stream(rows, text_mask, image_tokens, context_index=image_index, cls_attention=cls_attention)

    def image_over_text(self, image_tokens: Tensor, text_keys: Tensor, text_mask: Tensor) -> Tensor:
        """Run pictures (R, N, D) through the stream like text, reading captions (R, L, D). Returns (R, N, D)."""
        rows = self.stream.embeddings(image_tokens)
        return self.stream(rows, None, text_keys, text_mask)[0]
