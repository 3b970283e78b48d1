"""Watching it learn: what student and teacher do with held-out pairs that stay the same all through a run.

HeldOut is built once and keeps its batches, with their masks and random draws, in memory (a picture of 128 px takes
0.2 MB). Every rank measures everything: the numbers don't depend on how many ranks there are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from simla_ds.config import Config
from simla_ds.data.batch import Tokenizer
from simla_ds.data.loader import eval_batches
from simla_ds.data.visual_tokens import VisualTokenizer
from simla_ds.downstream.retrieval import RECALL_AT, retrieve
from simla_ds.model.simla import Simla
from simla_ds.objectives import FeatureQueue
from simla_ds.objectives.itc import contrast_keys
from simla_ds.objectives.psl import PseudoLabelledKeywords, average_precision
from simla_ds.task import PretrainTask
from simla_ds.teacher import Teacher
from simla_ds.types import Batch, ContrastKeys, Features


class HeldOut:
    """The first eval.samples pairs of data.val: whole pictures, fixed masks, fixed draws, on any rank and at any step.

    Raises ValueError when no sample of data.val can be used.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        visual_tokenizer: VisualTokenizer | None,
        device: torch.device | str = "cpu",
    ):
        self.config, self.device = config, torch.device(device)
        self.batches: list[Batch] = []
        codes = []
        view_size = visual_tokenizer.view_size if visual_tokenizer else 0
        for batch, _ in eval_batches(config, config.data.val, tokenizer, view_size, limit=config.eval.samples):
            if visual_tokenizer is not None:
                ids = visual_tokenizer(batch.pop("visual_view").to(self.device)).cpu()
                codes.append(ids.flatten()[batch["masked_index"]])
                batch["visual_ids"] = ids
            self.batches.append(pin_negatives(batch))
        if not self.batches:
            raise ValueError(f"data.val={config.data.val}: none of its first {config.eval.samples} samples is usable")
        labels = torch.cat([batch["labels"] for batch in self.batches])
        self.guesses = {"mlm/most_frequent": _largest_share(labels)}
        if codes:
            self.guesses["xmm/most_frequent"] = _largest_share(torch.cat(codes))
        """Accuracy of always answering what is masked most often in these very pairs."""

    @torch.no_grad()
    def measure(self, network: Simla, teacher: Teacher) -> dict[str, float]:
        """Measure the student or the teacher's own network (network is teacher.module).

        Losses are those of training with hard targets (alpha 0), means over all pairs, labelled tokens or masked
        patches; ITM's wrong partners are those of `pin_negatives`, ITC's keys those of `fixed_queue`, PSL's keywords
        are picked by the teacher's attention. The training's queue, modes and random state are left as they are.

        Returns:
            `loss/NAME` of every enabled objective; its accuracies, beside the accuracy of always giving the most
            frequent answer; `psl/average_precision`, beside that of ranking words by how often they are keywords of
            these pairs; `retrieval/itc|itm/image_to_text|text_to_image/r1|r5|r10` in percent.
        """
        probe = Probe(network, teacher, self.config)
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))
        keywords = []
        with evaluating(network, teacher.module):
            keys = self._keys(teacher.module)
            for number in range(len(self.batches)):
                batch = self._on_device(number)
                probe.queue = fixed_queue(keys, number)
                outcome = probe(batch, alpha=0.0, keep=True)
                features, outputs = outcome["features"], outcome["outputs"]
                for name, loss in outcome["losses"].items():
                    count = _terms(name, batch)
                    sums[f"loss/{name}"] += torch.tensor([float(loss) * count, count], dtype=torch.float64)
                for name, objective in probe.objectives.items():
                    for key, pair in objective.measures(batch, features, outputs[name]).items():
                        sums[key] += pair.double().cpu()
                    if isinstance(objective, PseudoLabelledKeywords):
                        keywords.append(objective.targets(batch, outputs[name][0]).bool().cpu())
            recall = retrieve(network, self.batches, rerank=self.config.eval.rerank)
        measures = {name: float(total / count.clamp(min=1)) for name, (total, count) in sums.items()}
        measures.update({name: share for name, share in self.guesses.items() if name[:3] in probe.objectives})
        if keywords:
            measures["psl/frequency_prior"] = frequency_prior(keywords)
        for key, ranking in recall.rankings.items():
            found = ranking.measures()
            measures.update({f"retrieval/{key}/r{k}": found[f"r{k}"] for k in RECALL_AT})
        return measures

    def _keys(self, teacher: Simla) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the teacher's image and text features, and the ids of the pictures, batch by batch."""
        keys = []
        for number in range(len(self.batches)):
            batch = self._on_device(number)
            features = teacher.features(batch["image"], batch["input_ids"], batch["text_mask"])
            keys.append((features.image_feature, features.text_feature, batch["image_id"]))
        return keys

    def _on_device(self, number: int) -> Batch:
        tensors: dict[str, Any] = {**self.batches[number]}
        batch = Batch(**{name: value.to(self.device) for name, value in tensors.items()})
        batch["label_count"] = batch["label_count"].clamp(min=1)  # very short captions: nothing to predict, loss 0
        return batch


class Probe(PretrainTask):
    """The training step around a network under test, at rest: no rank's batch adds anything to another's.

    Ranks measure the same batch. Gathered, it would be its own negatives several times; the copies are taken out of the
    comparison, and ITM draws its negatives from this rank's rows.
    """

    def __init__(self, network: Simla, teacher: Teacher, config: Config):
        matching = replace(config.objectives.itm, negatives="local")
        config = replace(config, objectives=replace(config.objectives, itm=matching))
        super().__init__(network, teacher, FeatureQueue(0, config.model.projection_size), config)

    def contrast_keys(self, teacher: Features, batch: Batch) -> ContrastKeys:
        """As in training, without other ranks' copies of the batch."""
        temperature, official = self.model.temperature(), self.config.official
        return contrast_keys(teacher, batch, temperature, self.queue, official=official, alone=True)


def pin_negatives(batch: Batch) -> Batch:
    """Fix ITM's wrong partners: drawn evenly among the batch's other pictures by itm_draws, whatever the model.

    Training draws them by similarity, so that they get harder as ITC gets better: a loss over those would not fall.
    """
    ids, draws = batch["image_id"], batch["itm_draws"]
    allowed = ids[:, None] != ids[None]
    chosen = (draws * allowed.sum(1, keepdim=True)).long()  # (B, 2): the how manieth allowed column
    rank = allowed.cumsum(1) - 1
    wrong = [(allowed & (rank == column[:, None])).long().argmax(1) for column in chosen.unbind(1)]
    return Batch(**{**batch, "negative_image": wrong[0], "negative_text": wrong[1]})


def fixed_queue(keys: list[tuple[Tensor, Tensor, Tensor]], left_out: int) -> FeatureQueue:
    """Return a queue of all held-out pairs but those of batch `left_out`, which are keys already.

    The training's queue is empty at the start and full later, so ITC's loss against it rises as there are more keys to
    tell apart. Here each pair is compared with all other held-out pairs, at the first evaluation as at the last, by
    features that the teacher of that moment makes of them.
    """
    others = keys[:left_out] + keys[left_out + 1 :] or [tuple(part[:0] for part in keys[left_out])]
    image, text, ids = (torch.cat(parts) for parts in zip(*others, strict=True))
    queue = FeatureQueue(0, image.shape[1])
    queue.image, queue.text, queue.image_id = image, text, ids  # not by push, which gathers over ranks
    queue.size = queue.filled = len(image)
    return queue


def frequency_prior(keywords: list[Tensor]) -> float:
    """Return the average precision of one ranking for all pictures: words by how often they are keywords, (B, V) bool.

    The frequencies are those of the pictures that are judged: a learner that knows no more than them cannot do better.
    """
    frequency = torch.stack([rows.sum(0) for rows in keywords]).sum(0).float()
    total = torch.stack([average_precision(frequency.expand(rows.shape), rows.float()) for rows in keywords]).sum(0)
    return float(total[0] / total[1].clamp(min=1))


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Switch networks to eval mode, and every module back to the mode it had."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _terms(name: str, batch: Batch) -> int:
    """Return how many terms an objective's loss is the mean of."""
    return len({"mlm": batch["label_index"], "xmm": batch["masked_index"]}.get(name, batch["image"]))


def _largest_share(answers: Tensor) -> float:
    return float(answers.bincount().max() / len(answers)) if len(answers) else 0.0
