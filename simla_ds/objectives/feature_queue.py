"""The momentum queue: teacher features of recent pairs, as further negatives of ITC (MoCo; ALBEF section 3.2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from simla_ds.config import Config
from simla_ds.objectives.collectives import gather_rows


class FeatureQueue:
    """A ring of Q teacher features per modality, with the ids of their pictures.

    Only filled rows are handed out, so that a young queue holds no random negatives. Positions are Python integers:
    nothing synchronises with the device. It lives outside the engine's module tree, in float32 at any precision.
    """

    def __init__(self, size: int, width: int, device: torch.device | str = "cpu"):
        self.size = size
        self.image = torch.zeros(size, width, device=device)
        self.text = torch.zeros(size, width, device=device)
        self.image_id = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.pointer = 0
        self.filled = 0

    @classmethod
    def random(cls, size: int, width: int, seed: int = 0) -> FeatureQueue:
        """Return a queue full of random unit vectors: how the published implementation starts."""
        queue = cls(size, width)
        generator = torch.Generator().manual_seed(seed)
        queue.image = F.normalize(torch.randn(size, width, generator=generator), dim=-1)
        queue.text = F.normalize(torch.randn(size, width, generator=generator), dim=-1)
        queue.filled = size
        return queue

    @classmethod
    def start(cls, config: Config) -> FeatureQueue:
        """Return the queue that a run starts with: empty, or full as the published one.

        Its retrieval starts with features of pretraining; those are in no model folder, so random ones stand for them.
        """
        size, width = config.objectives.itc.queue_size, config.model.projection_size
        return cls.random(size, width, config.train.seed) if config.official else cls(size, width)

    def to(self, device: torch.device | str) -> FeatureQueue:
        """Move the tensors and return self."""
        self.image, self.text, self.image_id = (t.to(device) for t in (self.image, self.text, self.image_id))
        return self

    def keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the filled rows, as views: image (F, E), text (F, E), image_id (F,)."""
        return self.image[: self.filled], self.text[: self.filled], self.image_id[: self.filled]

    @torch.no_grad()
    def push(self, image_feature: Tensor, text_feature: Tensor, image_id: Tensor | None) -> None:
        """Store this micro-batch's teacher features (B, E), (B, E) and ids (B,), of all ranks in global order.

        Oldest rows are overwritten; the batch need not divide the queue. Of a batch larger than the queue the last
        rows stay. Without ids (published retrieval) those of the overwritten rows stay.
        """
        if self.size == 0:
            return
        image, text = (gather_rows(t)[-self.size :] for t in (image_feature, text_feature))
        count = image.shape[0]
        rows = (torch.arange(count, device=self.image.device) + self.pointer) % self.size
        # what is not finite would spoil every step until it is overwritten: a zero vector is nobody's neighbour
        self.image.index_copy_(0, rows, image.float().nan_to_num(0, 0, 0))
        self.text.index_copy_(0, rows, text.float().nan_to_num(0, 0, 0))
        if image_id is not None:
            self.image_id.index_copy_(0, rows, gather_rows(image_id)[-self.size :])
        self.pointer = (self.pointer + count) % self.size
        self.filled = min(self.size, self.filled + count)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything as tensors, for safetensors."""
        return {
            "image": self.image,
            "text": self.text,
            "image_id": self.image_id,
            "pointer": torch.tensor([self.pointer]),
            "filled": torch.tensor([self.filled]),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what state_dict returned. ValueError when its size is another."""
        if state["image"].shape != self.image.shape:
            raise ValueError(
                f"the checkpoint's queue is {tuple(state['image'].shape)}, this run's is {tuple(self.image.shape)}; "
                "set objectives.itc.queue_size and model.projection_size as they were, or resume with --resume none"
            )
        self.image.copy_(state["image"])
        self.text.copy_(state["text"])
        self.image_id.copy_(state["image_id"])
        self.pointer, self.filled = int(state["pointer"]), int(state["filled"])
