"""Visual question answering: a decoder writes the answer to what the stream made of question and picture.  (VQA v2;
ALBEF section 5)

B questions of L tokens; A answers of M tokens, several to a question in training; D width, V words.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from simla_ds.config import ModelConfig, StreamConfig
from simla_ds.downstream.base import Downstream, TaskBatch, TaskNetwork, copy_weights
from simla_ds.model.heads import LanguageHead
from simla_ds.model.rows import Rows
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Context, Stream
from simla_ds.model.vision import ImageEncoder


def decoder_config(config: StreamConfig) -> StreamConfig:
    """Return the decoder's make: the upper half of a shared stream (6 of 12), or the fusing layers of ALBEF's."""
    layers = config.depth - (config.depth // 2 if config.shared else config.text_layers)
    return replace(config, shared=True, layers=layers)


class AnswerNetwork(TaskNetwork):
    """Question over picture, then answers over question."""

    task = "vqa"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        patches = config.vision.patches
        self.image_encoder = ImageEncoder(config.vision)
        self.stream = Stream(config.stream, config.vocabulary, patches)
        self.decoder = Stream(decoder_config(config.stream), config.vocabulary, patches)
        self.language_head = LanguageHead(config.stream.width, self.decoder.embeddings.word)

    def start_from(self, pretrained: Simla) -> None:
        """Take the encoders; the decoder gets the stream's embeddings and upper layers, and its masked-word head."""
        copy_weights(self.image_encoder, pretrained.image_encoder)
        copy_weights(self.stream, pretrained.stream)
        copy_weights(self.decoder.embeddings, pretrained.stream.embeddings)
        upper = list(pretrained.stream.layers)[-len(self.decoder.layers) :]
        for layer, source in zip(self.decoder.layers, upper, strict=True):
            copy_weights(layer, source)
        copy_weights(self.language_head, pretrained.language_head)

    def question(self, batch: TaskBatch) -> Context:
        """Encode `input_ids`, `text_mask` (B, L), `token_index` (T,) over `image` (B, 3, S, S): what answers read."""
        image = self.image_encoder(batch["image"])
        rows = Rows.of(batch["text_mask"], batch["token_index"])
        context = Context(image.flatten(0, 1), Rows.dense(image))
        x = self.stream.embeddings(rows.pack(batch["input_ids"]), rows.positions(image.device))
        return Context(self.stream.last(self.stream.body(x, rows, context), rows, context), rows)

    def answer(self, question: Context, ids: Tensor, mask: Tensor, of_question: Tensor, slots: Tensor) -> Tensor:
        """Return the logits of the next word after some places of answers, (N, V) float32.

        Args:
            question: what `question` returned.
            ids: (A, M) int64, [CLS] first. mask: (A, M) bool.
            of_question: (A,) int64 which question each answers.
            slots: (N,) int64 flat places in (A * M).
        """
        rows = Rows.of(mask, causal=True)
        context = Context(question.tokens, question.rows, of_question)
        x = self.decoder.embeddings(ids).flatten(0, 1)
        hidden = self.decoder.last(self.decoder.body(x, rows, context), rows, context)
        return self.language_head(hidden.index_select(0, slots)).float()


class Vqa(Downstream):
    """Answers as sequences, weighted by how many people gave them."""

    name = "vqa"
    network = AnswerNetwork
    metric = "accuracy"

    def __init__(self, *, official: bool = False):
        """`official`: the published code computes the teacher's distribution but never uses it."""
        self.official = official

    def loss(self, student: AnswerNetwork, teacher: AnswerNetwork, batch: TaskBatch, alpha: float) -> Tensor:
        """Return the sum over answers of weight times summed cross-entropy of their words, divided by B.

        `answer_ids`, `answer_mask` (A, M); `answer_question` (A,); `answer_weight` (A,) float32; `answer_slots` (N,)
        flat places in (A * M) whose next word is predicted, ascending.
        """
        slots = batch["answer_slots"]
        alpha = 0.0 if self.official else alpha

        def log_probabilities(network: AnswerNetwork) -> Tensor:
            answers = (batch["answer_ids"], batch["answer_mask"], batch["answer_question"], slots)
            return network.answer(network.question(batch), *answers).log_softmax(-1)

        log_p = log_probabilities(student)
        words = batch["answer_ids"].flatten().index_select(0, slots + 1)
        losses = -log_p.gather(1, words[:, None])[:, 0]
        if alpha:
            with torch.no_grad():
                targets = log_probabilities(teacher).exp()
            losses = (1 - alpha) * losses - alpha * (targets * log_p).sum(-1)
        of_answer = torch.div(slots, batch["answer_ids"].shape[1], rounding_mode="floor")
        weights = batch["answer_weight"].index_select(0, of_answer)
        return (losses * weights).sum() / len(batch["input_ids"])
