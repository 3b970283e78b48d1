"""Pseudo-labelled keywords: the image encoder names the caption's keywords and what the teacher adds.  (SIMLA 3.5)

B pairs, L tokens, H heads, V words. The teacher reads the caption over the picture; in its last layer each head votes
for the positions that [CLS] attends to most, and the positions with most votes are the keywords.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.objectives.base import Objective
from simla_ds.types import Batch, Outputs, Read, Request, StepFeatures
from simla_kernels import linear_soft_bce


class PseudoLabelledKeywords(Objective):
    """Binary cross-entropy over the vocabulary against keywords (hard) and the teacher's concepts (soft)."""

    def requests(self, batch: Batch, features: StepFeatures) -> list[Request]:
        """Ask the teacher for [CLS]'s attention over the unmasked caption, read over the student's picture."""
        return [
            Request(
                direction="text_over_image",
                by="teacher",
                read=Read.CLS_ATTENTION,
                input_ids=batch["input_ids"],
                text_mask=batch["text_mask"],
                token_index=batch["token_index"],
                image_tokens=features.student.image_tokens.detach(),
            )
        ]

    def loss(self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float) -> Tensor:
        """Return the mean over B x V (or the mean over B of the sum over V)."""
        keywords, teacher = self.keyword_ids(batch, outputs[0]), self.networks.teacher.concept_head
        of_teacher = (self._input(features.teacher.image_feature), teacher.weight, teacher.bias)

        def loss(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear_soft_bce(feature, weight, bias, *of_teacher, keywords, alpha, self.config.psl.reduction)

        return self.networks.student.concept_head(self._input(features.student.image_feature), loss)

    @torch.no_grad()
    def row_losses(
        self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One row per pair."""
        logits, of_teacher = (
            network.concept_head(self._input(of.image_feature)).float()
            for network, of in ((self.networks.student, features.student), (self.networks.teacher, features.teacher))
        )
        targets = alpha * of_teacher.sigmoid() + (1 - alpha) * self.targets(batch, outputs[0])
        losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        losses = losses.mean(1) if self.config.psl.reduction == "mean" else losses.sum(1)
        return losses, torch.ones_like(losses), torch.arange(len(losses), device=losses.device)

    def measures(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> dict[str, Tensor]:
        """Average precision of the concept head's ranking of the vocabulary against the keywords, per picture."""
        hard = self.targets(batch, outputs[0])
        logits = self.networks.student.concept_head(self._input(features.student.image_feature)).float()
        return {"psl/average_precision": average_precision(logits, hard)}

    def targets(self, batch: Batch, attention: Tensor) -> Tensor:
        """Return the keywords as a multi-hot (B, V) float32 from the teacher's attention (B, H, L)."""
        found, words = self.keyword_ids(batch, attention), self.vocabulary.size
        hot = torch.zeros(len(found), words + 1, device=found.device)
        return hot.scatter_(1, torch.where(found < 0, words, found), 1.0)[:, :words]

    def keyword_ids(self, batch: Batch, attention: Tensor) -> Tensor:
        """Return the keywords' ids (B, k or L) int64, -1 for none, from the teacher's attention (B, H, L)."""
        ids = batch["input_ids"]
        positions, valid = self.keyword_positions(batch, attention)
        if self.config.psl.whole_words:
            word = batch["word_index"]  # -1: of no word
            picked = word.gather(1, positions)
            picked = torch.where(valid & (picked >= 0), picked, -2)
            found = torch.where((word[:, :, None] == picked[:, None, :]).any(-1), ids, -1)
        else:
            found = torch.where(valid, ids.gather(1, positions), -1)
        if self.official:  # as published: only [CLS] is taken out, after it used up a place
            found = found.masked_fill(found == self.vocabulary.cls, -1)
        return found

    def keyword_positions(self, batch: Batch, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Return positions (B, k) int64 and which of them are keywords (B, k) bool; k = psl.keywords or L if fewer."""
        length = attention.shape[-1]
        voters, keep = min(self.config.psl.votes_per_head, length), min(self.config.psl.keywords, length)
        if self.official:
            votes = self.count_votes(attention.topk(voters, dim=-1).indices, length)
            positions = votes.topk(keep, dim=-1).indices
            return positions, torch.ones_like(positions, dtype=torch.bool)
        word = self._is_word(batch["input_ids"]) & batch["text_mask"]
        attention = attention.masked_fill(~word[:, None], -1.0)
        top = attention.topk(voters, dim=-1)
        votes = self.count_votes(top.indices, length, valid=top.values >= 0)
        # most votes first; then by mean attention, then by position (both sorts are stable)
        order = attention.mean(1).argsort(dim=-1, descending=True, stable=True)
        order = order.gather(1, votes.gather(1, order).argsort(dim=-1, descending=True, stable=True))
        positions = order[:, :keep]
        return positions, votes.gather(1, positions) > 0

    def _is_word(self, ids: Tensor) -> Tensor:
        """Return (B, L) bool: no special token. Compared one by one: a tensor of ids would be a copy to the device."""
        word = torch.ones_like(ids, dtype=torch.bool)
        for special in self.vocabulary.special:
            word &= ids != special
        return word

    @staticmethod
    def count_votes(voted: Tensor, length: int, valid: Tensor | None = None) -> Tensor:
        """Count votes (B, H, k) per position: (B, L) int64."""
        ones = torch.ones_like(voted) if valid is None else valid.to(voted.dtype)
        votes = torch.zeros(voted.shape[0], length, dtype=torch.int64, device=voted.device)
        return votes.scatter_add_(1, voted.flatten(1), ones.flatten(1))

    def _input(self, feature: Tensor) -> Tensor:
        """Cast a unit feature to the head's dtype."""
        return feature.to(self.networks.teacher.concept_head.bias.dtype)


def average_precision(logits: Tensor, hot: Tensor) -> Tensor:
    """Return (2,): the sum over rows with any keyword of the average precision, and the number of such rows."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    hits = hot.gather(1, order)
    ranks = torch.arange(1, hits.shape[1] + 1, device=hits.device)
    precision = hits.cumsum(-1) / ranks
    per_row = (precision * hits).sum(-1) / hits.sum(-1).clamp(min=1)
    present = (hits.sum(-1) > 0).float()
    return torch.stack([(per_row * present).sum(), present.sum()])
