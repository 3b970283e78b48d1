"""The published pretraining step: its arithmetic in its order, as a baseline (REFERENCE_STEP section 2).

Eager attention, logits at all positions, keys and values of a picture projected in each of four fused passes, padded
captions, negatives drawn row by row, a queue that is copied and concatenated, a teacher moved parameter by parameter.
It runs on the networks of a PretrainTask, so that both compute the same losses from the same weights; where the
arithmetic is the same (patches, ViT blocks, projections, the heads' layers) it calls the model's own modules.
B pairs, L padded caption length, N = P + 1 image rows, D width, E projection width, Q queue rows.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.head_orders import IGNORED, Head, mlm_official_order, xmm_official_order
from simla_ds.model.gelu_linear import GeluLinear
from simla_ds.model.heads import Classifier
from simla_ds.model.layer_norm import ResidualLayerNorm
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Attention, StreamLayer
from simla_ds.task import PretrainTask
from simla_ds.types import Batch

HIDDEN_TEXT = -10_000.0
"""What the published self-attention adds to the score of a padded word."""
VOTES, KEYWORDS = 4, 5


class OfficialOrder:
    """One step of the published implementation on a task's networks. In-batch keys are this process's, as published."""

    def __init__(self, task: PretrainTask):
        self.task, self.student, self.teacher = task, task.model, task.teacher.module
        for network in (self.student, self.teacher):
            use_plain_operations(network)
        self.cls = task.config.model.vocabulary.cls
        image, text, _ = task.queue.keys()
        self.image_queue, self.text_queue = image.T.contiguous(), text.T.contiguous()  # (E, Q), as published
        self.pointer = 0

    @torch.no_grad()
    def move_teacher(self, momentum: float) -> None:
        """Move the teacher towards the student, one parameter after the other; before each forward."""
        for ours, theirs in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            ours.data = ours.data * momentum + theirs.data * (1 - momentum)

    def losses(self, batch: Batch, alpha: float) -> dict[str, Tensor]:
        """Return every loss by name and their sum as `total`; the queue is overwritten on the way."""
        f, m = self.student, self.teacher
        mask = batch["text_mask"]
        image = f.image_encoder(batch["image"])
        v, t = f.image_feature(image), self._text_feature(f, batch)
        with torch.no_grad():
            image_m = m.image_encoder(batch["image"])
            v_m, t_m = m.image_feature(image_m), self._text_feature(m, batch)
        itc, image_to_text, text_to_image = self._itc((v, t), (v_m, t_m), alpha)
        losses = {
            "itc": itc,
            "itm": self._itm(batch, image, image_to_text, text_to_image),
            "mlm": self._mlm(batch, mask, image, image_m, alpha),
            "xmm": self._xmm(batch, mask, alpha),
            "psl": self._psl(batch, mask, image.detach(), (v, v_m), alpha),
        }
        losses["total"] = torch.stack(list(losses.values())).sum()
        return losses

    def _text_feature(self, network: Simla, batch: Batch) -> Tensor:
        hidden, _ = run_stream(network, network.stream.embeddings(batch["input_ids"]), batch["text_mask"])
        return network.text_feature(hidden)

    def _itc(
        self, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], alpha: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss and the student's similarities (B, B + Q) of both directions."""
        temperature, (v, t), (v_m, t_m) = self.student.temperature(), student, teacher
        with torch.no_grad():
            texts = torch.cat([t_m.T, self.text_queue.clone()], dim=1)
            images = torch.cat([v_m.T, self.image_queue.clone()], dim=1)
            own = torch.zeros(len(v), texts.shape[1], device=v.device).fill_diagonal_(1)
            of_image = alpha * F.softmax(v_m @ texts / temperature, dim=1) + (1 - alpha) * own
            of_text = alpha * F.softmax(t_m @ images / temperature, dim=1) + (1 - alpha) * own
        image_to_text, text_to_image = v @ texts / temperature, t @ images / temperature
        i2t = -torch.sum(F.log_softmax(image_to_text, dim=1) * of_image, dim=1).mean()
        t2i = -torch.sum(F.log_softmax(text_to_image, dim=1) * of_text, dim=1).mean()
        places = slice(self.pointer, self.pointer + len(v))
        if places.stop <= self.image_queue.shape[1]:  # published queues are multiples of the batch
            self.image_queue[:, places], self.text_queue[:, places] = v_m.T, t_m.T
            self.pointer = places.stop % self.image_queue.shape[1]
        return (i2t + t2i) / 2, image_to_text, text_to_image

    def _itm(self, batch: Batch, image: Tensor, image_to_text: Tensor, text_to_image: Tensor) -> Tensor:
        ids, mask, count = batch["input_ids"], batch["text_mask"], len(image)
        matched, _ = run_text_over_image(self.student, ids, mask, image)
        wrong_image, wrong_text = draw_negatives(batch, image_to_text[:, :count], text_to_image[:, :count])
        images = torch.stack([image[i] for i in wrong_image])
        texts, masks = (torch.stack([rows[i] for i in wrong_text]) for rows in (ids, mask))
        unmatched, _ = run_text_over_image(
            self.student, torch.cat([ids, texts]), torch.cat([mask, masks]), torch.cat([images, image])
        )
        logits = self.student.match_head(torch.cat([matched[:, 0], unmatched[:, 0]]))
        labels = torch.cat([torch.ones(count), torch.zeros(2 * count)]).long().to(logits.device)
        return F.cross_entropy(logits, labels)

    def _mlm(self, batch: Batch, mask: Tensor, image: Tensor, image_m: Tensor, alpha: float) -> Tensor:
        ids = batch["mlm_input_ids"]
        labels = torch.full_like(ids, IGNORED).flatten().index_copy(0, batch["label_index"], batch["labels"])
        with torch.no_grad():
            hidden_m, _ = run_text_over_image(self.teacher, ids, mask, image_m)
            hidden_m = self.teacher.language_head.transformed(hidden_m)
        hidden, _ = run_text_over_image(self.student, ids, mask, image)
        hidden = self.student.language_head.transformed(hidden)
        heads = (head_of(network.language_head.decoder) for network in (self.student, self.teacher))
        head, head_m = heads
        return mlm_official_order(hidden, head, hidden_m, head_m, labels.view_as(ids), alpha, over=1)

    def _xmm(self, batch: Batch, mask: Tensor, alpha: float) -> Tensor:
        words, hidden_patches = self.student.stream.embeddings(batch["input_ids"]), batch["patch_mask"]
        rows = []
        for network, keys in ((self.teacher, words.detach()), (self.student, words)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and network is self.student):
                image = network.image_encoder(batch["image"], hidden_patches)
                tokens, _ = run_stream(network, network.stream.embeddings(image), None, keys, mask)
                rows.append(tokens[:, 1:])
        codes = batch["visual_ids"][hidden_patches]  # pyright: ignore[reportTypedDictNotRequiredAccess]  the step's input
        head, head_m = (head_of(network.visual_head) for network in (self.student, self.teacher))
        return xmm_official_order(rows[1], head, rows[0], head_m, hidden_patches, codes, alpha)

    def _psl(self, batch: Batch, mask: Tensor, image: Tensor, features: tuple[Tensor, Tensor], alpha: float) -> Tensor:
        ids, (v, v_m) = batch["input_ids"], features
        with torch.no_grad():
            _, attention = run_text_over_image(self.teacher, ids, mask, image)
            voted = attention[:, :, 0].topk(min(VOTES, ids.shape[1]), dim=-1).indices
            votes = F.one_hot(voted, ids.shape[1]).sum((1, 2))
            keywords = ids.gather(1, votes.topk(min(KEYWORDS, ids.shape[1]), dim=-1).indices)
            hard = torch.zeros(len(ids), self.task.config.model.vocabulary.size, device=v.device)
            hard.scatter_(1, keywords, 1.0)[:, self.cls] = 0
            soft = self.teacher.concept_head(v_m).sigmoid().float()
        logits = self.student.concept_head(v).float()
        bce = F.binary_cross_entropy_with_logits
        return (1 - alpha) * bce(logits, hard) + alpha * bce(logits, soft)


def use_plain_operations(network: nn.Module) -> None:
    """Make attention of timm's blocks eager, and autograd keep what GELU made, as the published code does."""
    for module in network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # type: ignore[assignment]  timm's own switch
        if isinstance(module, GeluLinear):
            setattr(module, "forward", partial(_gelu_linear, module))  # noqa: B010  a module's method, replaced


def _gelu_linear(layer: GeluLinear, x: Tensor) -> Tensor:
    return F.linear(F.gelu(x), layer.weight, layer.bias)


def head_of(classifier: Classifier) -> Head:
    """Return a classifier as benchmarks.head_orders takes it."""
    return Head(classifier.weight, classifier.bias)


def draw_negatives(batch: Batch, image_to_text: Tensor, text_to_image: Tensor) -> tuple[list[int], list[int]]:
    """Return the wrong picture of each text and the wrong text of each picture, drawn row by row, or as recorded."""
    if "negative_image" in batch and "negative_text" in batch:
        return batch["negative_image"].tolist(), batch["negative_text"].tolist()
    drawn = []
    for similarity in (text_to_image, image_to_text):
        weights = F.softmax(similarity.detach().float(), dim=1).fill_diagonal_(0)
        drawn.append([int(torch.multinomial(row, 1).item()) for row in weights])
    return drawn[0], drawn[1]


def run_text_over_image(network: Simla, ids: Tensor, mask: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Run captions (R, L) over pictures (R, N, D): hidden states (R, L, D), the last self-attention (R, H, L, L)."""
    return run_stream(network, network.stream.embeddings(ids), mask, image)


def run_stream(
    network: Simla, x: Tensor, mask: Tensor | None, context: Tensor | None = None, context_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Run every layer over padded rows (R, L, D), with cross-attention where there is a context (R, N, D)."""
    attention = x
    for layer in network.stream.layers:
        assert isinstance(layer, StreamLayer)
        x, attention = attend(layer.self_attention, x, x, bias(mask, HIDDEN_TEXT))
        if context is not None:
            assert isinstance(layer.cross_attention, Attention)
            floor = torch.finfo(x.dtype).min
            x, _ = attend(layer.cross_attention, x, context, bias(context_mask, floor))
        inner = layer.feed_forward.up(x)
        x = add_and_normalise(layer.feed_forward.norm, layer.feed_forward.down(inner), x)
    return x, attention


def bias(mask: Tensor | None, hidden: float) -> Tensor | None:
    """Return what is added to scores: (R, 1, 1, L), `hidden` where the mask is False."""
    return None if mask is None else (~mask)[:, None, None, :].float() * hidden


def attend(block: Attention, x: Tensor, source: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return new rows and the attention before dropout (R, H, Lq, Lk)."""
    q, k, v = (
        layer(rows).unflatten(-1, (block.heads, -1)).transpose(1, 2)
        for layer, rows in ((block.query, x), (block.key, source), (block.value, source))
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = F.softmax(scores if added is None else scores + added.to(scores.dtype), dim=-1)
    dropped = F.dropout(weights, block.norm.dropout, block.norm.training)
    out = (dropped @ v).transpose(1, 2).flatten(2)
    return add_and_normalise(block.norm, block.output(out), x), weights


def add_and_normalise(norm: ResidualLayerNorm, x: Tensor, residual: Tensor) -> Tensor:
    """LayerNorm(residual + dropout(x)), operation by operation."""
    x = F.dropout(x, norm.dropout, norm.training) + residual
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)
