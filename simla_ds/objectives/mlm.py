"""Masked language modelling: masked words from the picture and the other words.  (SIMLA section 3.4, text side)

B captions of L tokens, M labelled tokens, V words, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.objectives.base import Objective
from simla_ds.objectives.soft_targets import per_target, soft_cross_entropy_rows
from simla_ds.types import Batch, Outputs, Read, Request, StepFeatures


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
        with torch.no_grad():
            teacher_logits = self.networks.teacher.language_head(outputs[0])
        if self.official:
            return self._official_loss(batch, outputs[1], teacher_logits, alpha)
        logits = self.networks.student.language_head(outputs[1])
        losses = soft_cross_entropy_rows(logits, batch["labels"], teacher_logits, alpha)
        return per_target(losses.sum(), batch["label_count"])

    def _official_loss(self, batch: Batch, hidden: Tensor, teacher_logits: Tensor, alpha: float) -> Tensor:
        """As published: log-softmax over the L positions (dim 1) in the teacher's term."""
        logits = self.networks.student.language_head(hidden).float()
        rows = batch["label_index"]
        hard = F.cross_entropy(logits.flatten(0, 1).index_select(0, rows), batch["labels"], reduction="sum")
        over_positions = logits.log_softmax(1).flatten(0, 1).index_select(0, rows)
        soft = -(teacher_logits.float().softmax(-1) * over_positions).sum()
        return per_target((1 - alpha) * hard + alpha * soft, batch["label_count"])

    def measures(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> dict[str, Tensor]:
        """Share of labelled tokens guessed right."""
        hidden = outputs[1]
        if self.official:
            hidden = hidden.flatten(0, 1).index_select(0, batch["label_index"])
        right = (self.networks.student.language_head(hidden).argmax(-1) == batch["labels"]).float()
        return {"mlm/accuracy": torch.stack([right.sum(), torch.full_like(right, 1.0).sum()])}
