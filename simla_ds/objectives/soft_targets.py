"""Cross-entropy against a label and a teacher at once, in float32 (ALBEF section 3.3).

N rows, V classes. (1 - alpha) CE(label) + alpha CE(softmax of the teacher) needs one log-sum-exp:
lse(z) - (1 - alpha) z[label] - alpha <softmax(z_teacher), z>.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def soft_cross_entropy_rows(logits: Tensor, labels: Tensor, teacher_logits: Tensor | None, alpha: float) -> Tensor:
    """Return the loss of each row, (N,) float32.

    Args:
        logits: (N, V). labels: (N,) int64. teacher_logits: (N, V), no gradient; None: hard labels only.
        alpha: weight of the teacher's targets.
    """
    logits = logits.float()
    hard = F.cross_entropy(logits, labels, reduction="none")
    if teacher_logits is None or alpha == 0:
        return hard
    targets = teacher_logits.float().softmax(-1)
    picked = logits.gather(1, labels[:, None])[:, 0]
    # hard = lse - picked, so lse - <targets, z> = hard + picked - <targets, z>
    return hard + alpha * (picked - (targets * logits).sum(-1))


def soft_target_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean over rows of -sum_j targets_j log softmax_j(logits); both (N, K) float32."""
    return -(targets * logits.log_softmax(-1)).sum(-1).mean()


def per_target(total: Tensor, count: Tensor) -> Tensor:
    """Divide a summed loss by (1,) targets; a batch without any has the loss 0, not NaN."""
    return (total / count.clamp(min=1e-6)).squeeze()
