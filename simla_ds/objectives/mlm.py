"""Masked language modelling: masked words from the picture and the other words.  (SIMLA section 3.4, text side)

B captions of L tokens, M labelled tokens, V words, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ds.model.heads import HeadLoss
from simla_ds.objectives.base import Objective
from simla_ds.objectives.soft_targets import distilled, per_target
from simla_ds.types import Batch, Outputs, Read, Request, StepFeatures
from simla_kernels import linear_soft_ce_over_positions


class MaskedLanguageModelling(Objective):
    """Cross-entropy against the masked word and the teacher's distribution, at labelled tokens only.

    `official` normalises the teacher's term over positions instead of words (REFERENCE_STEP oddity 1), which needs the
    student's logits everywhere.
    """

    def requests(self, batch: Batch, features: StepFeatures) -> list[Request]:
        """Ask student and teacher to read the masked caption over their own picture."""
        common = {
            "direction": "text_over_image",
            "input_ids": batch["mlm_input_ids"],
            "text_mask": batch["text_mask"],
            "rows": batch["label_index"],
        }
        tokens = batch["token_index"]
        # official: its loss reads the padding as well
        student = {"read": Read.ALL} if self.official else {"read": Read.ROWS, "token_index": tokens}
        return [
            Request(
                by="teacher", read=Read.ROWS, image_tokens=features.teacher.image_tokens, token_index=tokens, **common
            ),
            Request(by="student", image_tokens=features.student.image_tokens, **student, **common),
        ]

    def loss(self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float) -> Tensor:
        """Return the sum over labelled tokens divided by label_count."""
        teacher = self.networks.teacher.language_head
        with torch.no_grad():
            hidden = teacher.transformed(outputs[0])
        loss = distilled(teacher.decoder, hidden, batch["labels"], alpha)
        if self.official:
            loss = self._over_positions(batch, hidden, alpha)
        return per_target(self.networks.student.language_head(outputs[1], loss), batch["label_count"])

    @torch.no_grad()
    def row_losses(
        self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One row per labelled token."""
        teacher = self.networks.teacher.language_head
        loss = distilled(teacher.decoder, teacher.transformed(outputs[0]), batch["labels"], alpha, "none")
        losses = self.networks.student.language_head(outputs[1], loss)
        return losses, torch.ones_like(losses), batch["label_index"] // batch["input_ids"].shape[1]

    def _over_positions(self, batch: Batch, hidden: Tensor, alpha: float) -> HeadLoss:
        """As published: log-softmax over the L positions in the teacher's term."""
        teacher = self.networks.teacher.language_head.decoder

        def loss(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return linear_soft_ce_over_positions(
                rows, weight, bias, hidden, teacher.weight, teacher.bias, batch["label_index"], batch["labels"], alpha
            )

        return loss

    def measures(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> dict[str, Tensor]:
        """Share of labelled tokens guessed right."""
        hidden = outputs[1]
        if self.official:
            hidden = hidden.flatten(0, 1).index_select(0, batch["label_index"])
        right = (self.networks.student.language_head(hidden).argmax(-1) == batch["labels"]).float()
        return {"mlm/accuracy": torch.stack([right.sum(), torch.full_like(right, 1.0).sum()])}
