"""Cross-modal reconstruction: masked visual tokens from the caption and the other patches.  (SIMLA section 3.4)

The mirror of MLM: the image stream asks, the caption answers. B pictures of P patches, K masked ones, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from simla_ds.objectives.base import Objective
from simla_ds.objectives.soft_targets import distilled, per_target
from simla_ds.types import Batch, Outputs, Read, Request, StepFeatures


class CrossModalReconstruction(Objective):
    """Cross-entropy against the visual token and the teacher's distribution, at masked patches only.

    Both networks read the student's caption (its embedding layer, as published, or its encoded tokens).
    """

    def requests(self, batch: Batch, features: StepFeatures) -> list[Request]:
        """Ask student, and teacher when distilling, for their masked picture over the caption."""
        student, teacher = features.student.masked_image_tokens, features.teacher.masked_image_tokens
        if student is None:
            raise RuntimeError("XMM needs the masked image pass")  # the task makes it whenever XMM is on
        encoded = self.config.xmm.text_keys == "encoded"
        keys = features.student.text_tokens if encoded else features.student.text_embeddings
        common = {
            "direction": "image_over_text",
            "read": Read.ROWS,
            "text_mask": batch["text_mask"],
            "token_index": batch["token_index"],
            "rows": batch["masked_index"],
        }
        asked = [Request(by="student", image_tokens=student, text_keys=keys, **common)]
        if self.config.xmm.distill and teacher is not None:
            asked.append(Request(by="teacher", image_tokens=teacher, text_keys=keys.detach(), **common))
        return asked

    def loss(self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float) -> Tensor:
        """Return the sum over masked patches divided by masked_count."""
        teacher, hidden = self.networks.teacher.visual_head, outputs[1] if self.config.xmm.distill else None
        loss = distilled(teacher, hidden, self._labels(batch), alpha)
        return per_target(self.networks.student.visual_head(outputs[0], loss), batch["masked_count"])

    @torch.no_grad()
    def row_losses(
        self, batch: Batch, features: StepFeatures, outputs: Outputs, alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One row per masked patch."""
        hidden = outputs[1] if self.config.xmm.distill else None
        loss = distilled(self.networks.teacher.visual_head, hidden, self._labels(batch), alpha, "none")
        losses = self.networks.student.visual_head(outputs[0], loss)
        return losses, torch.ones_like(losses), batch["masked_index"] // batch["patch_mask"].shape[1]

    def measures(self, batch: Batch, features: StepFeatures, outputs: Outputs) -> dict[str, Tensor]:
        """Share of masked patches guessed right."""
        right = (self.networks.student.visual_head(outputs[0]).argmax(-1) == self._labels(batch)).float()
        return {"xmm/accuracy": torch.stack([right.sum(), torch.full_like(right, 1.0).sum()])}

    @staticmethod
    def _labels(batch: Batch) -> Tensor:
        """Return the visual tokens at masked patches, (K,) int64."""
        if "visual_ids" not in batch:
            raise RuntimeError("XMM needs batch['visual_ids']; run the visual tokeniser before the step")
        return batch["visual_ids"].flatten().index_select(0, batch["masked_index"])
