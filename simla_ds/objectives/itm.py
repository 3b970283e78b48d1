"""Image-text matching: does this caption describe this picture?  (SIMLA section 3.3, as ALBEF section 3.2)

B pairs, D width, G candidates (B, or those of all ranks with `itm.negatives: global`). Three rows are asked for per
pair: matched, wrong picture, wrong caption; wrong ones are drawn in proportion to ITC's similarity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.objectives.base import Objective
from simla_ds.objectives.collectives import (
    gather_rows,
    gather_rows_with_gradient,
    in_global_order,
    world_size,
)
from simla_ds.types import Batch, Outputs, Read, Request, StepFeatures

SMOOTHING = 1e-4
"""Added to every candidate's weight, so that confident similarities cannot leave a row without candidates."""


def draw_columns(weights: Tensor, allowed: Tensor, uniform: Tensor) -> Tensor:
    """Draw a column per row by inverse CDF: (B, G) weights, (B, G) bool, (B,) numbers from 0 to 1; (B,) int64."""
    cumulative = (weights * allowed).cumsum(-1)
    threshold = uniform[:, None].to(cumulative.dtype) * cumulative[:, -1:]
    # a threshold rounded up to the total must not land behind the last allowed column
    last = (allowed * torch.arange(1, allowed.shape[1] + 1, device=allowed.device)).argmax(-1)
    return torch.minimum(torch.searchsorted(cumulative, threshold, right=True)[:, 0], last)


class ImageTextMatching(Objective):
    """Cross-entropy over 3B rows; a pair without any allowed wrong partner loses its wrong rows."""

    def requests(self, batch: Batch, features: StepFeatures) -> list[Request]:
        """Ask for one pass over B matched and one over 2B unmatched pairs."""
        wrong_image, wrong_text = self.draw_negatives(batch, features)
        image = features.student.image_tokens
        ids, mask = batch["input_ids"], batch["text_mask"]
        read, all_ids, all_mask = image, ids, mask
        index = torch.cat([wrong_image, torch.arange(len(ids), device=ids.device)])
        if self._global:
            # drawn ones only: every layer projects what it is given. An embedding's gradient is made in a fixed order
            others = gather_rows_with_gradient(image)
            drawn = F.embedding(wrong_image, others.flatten(1)).view_as(image)
            read, index = torch.cat([drawn, image]), torch.arange(2 * len(ids), device=ids.device)
            all_ids, all_mask = gather_rows(ids), gather_rows(mask)
        # Which texts are drawn is known to the device only, and to ask it how long they are would stop the step. Their
        # rows keep all L slots. With 14 tokens of 25 on average that is a fifth more tokens in the student's fused pass
        # (matched, wrong picture, wrong text, MLM) than if they were packed too.
        tokens = batch["token_index"]
        all_slots = torch.arange(ids.numel(), 2 * ids.numel(), device=ids.device)
        matched = Request(
            direction="text_over_image",
            by="student",
            read=Read.CLS,
            input_ids=ids,
            text_mask=mask,
            token_index=tokens,
            image_tokens=image,
        )
        unmatched = Request(
            direction="text_over_image",
            by="student",
            read=Read.CLS,
            input_ids=torch.cat([ids, all_ids.index_select(0, wrong_text)]),
            text_mask=torch.cat([mask, all_mask.index_select(0, wrong_text)]),
            token_index=torch.cat([tokens, all_slots]),
            image_tokens=read,
            image_index=index,
        )
        return [matched, unmatched]

    def loss(self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float) -> Tensor:
        """Return the mean cross-entropy over matched and unmatched rows."""
        logits, labels, kept = self._rows(batch, features, outputs)
        losses = F.cross_entropy(logits.float(), labels, reduction="none")
        return (losses * kept).sum() / kept.sum()

    @torch.no_grad()
    def row_losses(
        self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Three rows per pair; wrong ones that could not be drawn weigh nothing."""
        logits, labels, kept = self._rows(batch, features, outputs)
        pairs = torch.arange(len(batch["image_id"]), device=kept.device).repeat(3)
        return F.cross_entropy(logits.float(), labels, reduction="none"), kept, pairs

    def measures(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> dict[str, Tensor]:
        """Accuracy on matched and on unmatched rows apart: a head that always says no is right two times in three."""
        logits, labels, kept = self._rows(batch, features, outputs)
        right = (logits.argmax(-1) == labels).float() * kept
        matched, unmatched = labels == 1, labels == 0
        return {
            "itm/accuracy_matched": torch.stack([right[matched].sum(), kept[matched].sum()]),
            "itm/accuracy_unmatched": torch.stack([right[unmatched].sum(), kept[unmatched].sum()]),
        }

    def draw_negatives(self, batch: Batch, features: StepFeatures) -> tuple[Tensor, Tensor]:
        """Return the wrong picture for each text and the wrong text for each picture, (B,) int64 each."""
        if "negative_image" in batch and "negative_text" in batch:
            return batch["negative_image"], batch["negative_text"]
        allowed, uniform = self._allowed(batch), batch["itm_draws"]
        to_images, to_texts = self.candidate_similarities(features)
        return self._draw(to_images, allowed, uniform[:, 0]), self._draw(to_texts, allowed, uniform[:, 1])

    @torch.no_grad()
    def candidate_similarities(self, features: StepFeatures) -> tuple[Tensor, Tensor]:
        """Return the student's similarity of texts to candidate pictures and of pictures to candidate texts, (B, G)."""
        student, keys = features.student, features.keys
        if self._global:
            images, texts = in_global_order(keys.image), in_global_order(keys.text)
        else:
            own = slice(keys.first, keys.first + student.image_feature.shape[0])
            images, texts = keys.image[own], keys.text[own]
        return student.text_feature @ images.T / keys.temperature, student.image_feature @ texts.T / keys.temperature

    def _allowed(self, batch: Batch) -> Tensor:
        """Return (B, G) bool: candidates that are not the pair's own picture.

        Official pretraining forbids the pair itself only; fine-tuning (itc.positives image) is right in both.
        """
        ids = batch["image_id"]
        if self.official and self.config.itc.positives == "pair":
            return ~torch.eye(ids.shape[0], dtype=torch.bool, device=ids.device)
        return ids[:, None] != (gather_rows(ids) if self._global else ids)[None]

    def _draw(self, similarity: Tensor, allowed: Tensor, uniform: Tensor) -> Tensor:
        """Draw a column per row by inverse CDF from (B, G) similarities and (B,) uniform numbers."""
        smoothing = 0.0 if self.official else SMOOTHING
        return draw_columns(similarity.softmax(-1) + smoothing, allowed, uniform)

    def _rows(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (3B, 2), labels (3B,) and which rows count (3B,) float32."""
        logits = self.networks.student.match_head(torch.cat([outputs[0], outputs[1]]))
        count = outputs[0].shape[0]
        labels = (torch.arange(3 * count, device=logits.device) < count).long()
        drawable = self._allowed(batch).any(-1).float()
        return logits, labels, torch.cat([torch.ones_like(drawable), drawable, drawable])

    @property
    def _global(self) -> bool:
        return self.config.itm.negatives == "global" and world_size() > 1
