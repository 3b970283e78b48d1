"""The loss heads in the published order: logits at all positions, full softmaxes, then the masked ones are picked.

B rows of P positions, K width, V classes. What linear_soft_ce is timed against; the results are the same.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""Label of a position that is not masked."""


class Head(NamedTuple):
    """A linear classifier: weight (V, K), bias (V,)."""

    weight: Tensor
    bias: Tensor


def xmm_official_order(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, masked: Tensor, labels: Tensor, alpha: float
) -> Tensor:
    """Return the cross-modal reconstruction loss (REFERENCE_STEP section 3, XMM).

    Args:
        hidden, teacher_hidden: (B, P, K) at all patches. masked: (B, P) bool. labels: codes at masked patches.
        alpha: weight of the teacher's term.
    """
    logits = F.linear(hidden, *head).float()
    with torch.no_grad():
        targets = F.linear(teacher_hidden, *teacher_head).float().softmax(-1)
    hard = F.cross_entropy(logits[masked], labels)
    soft = -(logits.log_softmax(-1) * targets).sum(-1)
    return (1 - alpha) * hard + alpha * soft[masked].mean()


def mlm_official_order(
    hidden: Tensor, head: Head, teacher_hidden: Tensor, teacher_head: Head, labels: Tensor, alpha: float, over: int = -1
) -> Tensor:
    """Return the masked language modelling loss (REFERENCE_STEP section 3, MLM).

    Args:
        hidden, teacher_hidden: (B, L, K) at all positions. labels: (B, L) int64, IGNORED where no word is masked.
        alpha: weight of the teacher's term.
        over: dimension of the log-softmax in the teacher's term: -1 words (corrected), 1 positions (as published).
    """
    logits = F.linear(hidden, *head).float()
    with torch.no_grad():
        targets = F.linear(teacher_hidden, *teacher_head).float().softmax(-1)
    hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    soft = -(logits.log_softmax(over) * targets).sum(-1)
    return (1 - alpha) * hard + alpha * soft[labels != IGNORED].mean()
