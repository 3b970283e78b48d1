"""Visual question answering: a decoder writes the answer to what the stream made of question and picture.  (VQA v2;
ALBEF section 5)

B questions of L tokens; A answers of M tokens, several to a question in training; D width, V words.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from simla_ds.config import ModelConfig, StreamConfig
from simla_ds.data.text import TextTokenizer
from simla_ds.downstream.annotations import Annotations, Entry, wrong_text
from simla_ds.downstream.base import SupervisedTask, TaskBatch, TaskNetwork, copy_weights
from simla_ds.downstream.vqa_accuracy import ANNOTATORS, answer_type, normalise_prediction, soft_accuracy
from simla_ds.model.heads import LanguageHead
from simla_ds.model.rows import Rows
from simla_ds.model.simla import Simla
from simla_ds.model.stream import Context, Stream
from simla_ds.model.vision import ImageEncoder

ANSWERS_AT_ONCE = 512
"""Answers read whole by a pass when ranking: each of their words has the logits of a vocabulary."""


def decoder_config(config: StreamConfig) -> StreamConfig:
    """Return the decoder's make: the upper half of a shared stream (6 of 12), or the fusing layers of ALBEF's."""
    layers = config.depth - (config.depth // 2 if config.shared else config.text_layers)
    return replace(config, shared=True, layers=layers)


class AnswerNetwork(TaskNetwork):
    """Question over picture, then answers over question."""

    task = "vqa"

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        patches = config.image_positions
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


class Vqa(SupervisedTask):
    """Answers as sequences, weighted by how many people gave them."""

    name = "vqa"
    network = AnswerNetwork
    metric = "accuracy"
    max_words = 50  # of a question, as published for its test

    def __init__(
        self,
        tokenizer: TextTokenizer | None = None,
        answers: Sequence[str] = (),
        *,
        candidates: int = 128,
        official: bool = False,
    ):
        """Make a task that ranks `answers`; with none of them it writes answers freely.

        tokenizer: needed for everything but the loss. candidates: answers that are read whole for each question, those
        with the likeliest first words. official: as published, the teacher's distribution is never used, and the
        first word counts twice in a score.
        """
        self.tokenizer, self.answers, self.official = tokenizer, list(answers), official
        self.candidates = min(candidates, len(self.answers))
        if self.answers:
            self.answer_ids, self.answer_mask = self._padded([self._encoded(answer) for answer in self.answers])

    def problems(self, entry: Entry, *, train: bool) -> Iterator[str]:
        """A picture, a question; answers to learn from, or in an evaluation the question's id."""
        yield from wrong_text(entry, "image", "question")
        if not isinstance(entry.get("question_id", 0 if train else None), int):  # Visual Genome's have none
            yield "key 'question_id' must hold a number"
        if train or "answer" in entry:
            answers = given_answers(entry)
            if not answers or not all(isinstance(answer, str) for answer in answers):
                yield "key 'answer' must hold a text or a list of texts"

    def pictures(self, entry: Entry) -> list[str]:
        """Return its picture."""
        return [entry["image"]]

    def text(self, entry: Entry) -> str:
        """Return the question, cleaned."""
        return clean_question(entry["question"], self.max_words)

    def said(self, entry: Entry) -> str:
        """Return the question and its answers: "left" may be one."""
        return " ".join([entry["question"], *(given_answers(entry) if "answer" in entry else ())])

    def identity(self, entry: Entry) -> Hashable | None:
        """Return the question's id, which is its data set's own; None without."""
        number = entry.get("question_id")
        return f"{entry['dataset']} {number}" if number is not None and "dataset" in entry else number

    def remarks(self, annotations: Annotations) -> list[str]:
        """Say which answers of the list are one and the same to the tokenizer, as unknown words are."""
        if not self.answers:
            return ["answers are written freely; published numbers rank a list of them: --answers FILE"]
        rows = [tuple(self._encoded(answer)) for answer in self.answers]
        counts = Counter(rows)
        alike = [answer for answer, row in zip(self.answers, rows, strict=True) if counts[row] > 1]
        told = f"{len(alike)} of {len(rows)} answers look like others to the tokenizer and cannot be told apart: "
        return [told + ", ".join(map(repr, alike[:5]))] if alike else []

    def fields(self, entry: Entry) -> dict[str, Any]:
        """Return the ids of each distinct answer and how much it counts: its share of the people who were asked.

        Visual Genome asked one; its answers count half, as published.
        """
        counts = Counter(given_answers(entry)) if "answer" in entry else Counter()
        half = 0.5 if entry.get("dataset") == "vg" else 1.0
        return {"answers": [(self._encoded(text), half * n / counts.total()) for text, n in counts.items()]}

    def collate(self, fields: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the answers of a batch, as `loss` reads them."""
        answers = [(row, *answer) for row, field in enumerate(fields) for answer in field["answers"]]
        if not answers:
            return {}
        ids, mask = self._padded([ids for _, ids, _ in answers])
        followed = torch.cat([mask[:, 1:], torch.zeros(len(mask), 1, dtype=torch.bool)], dim=1)
        return {
            "answer_ids": ids,
            "answer_mask": mask,
            "answer_question": torch.tensor([row for row, _, _ in answers]),
            "answer_weight": torch.tensor([weight for _, _, weight in answers], dtype=torch.float32),
            "answer_slots": followed.view(-1).nonzero()[:, 0],
        }

    def predict(self, network: AnswerNetwork, batch: TaskBatch) -> list[dict[str, Any]]:
        """Return the best of the list's answers and its probability among the candidates, or a free answer."""
        question = network.question(batch)
        if not self.answers:
            return [{"answer": text} for text in self._written(network, question)]
        chosen, probability = self._ranked(network, question)
        best = probability.argmax(-1, keepdim=True)
        numbers, sure = chosen.gather(1, best)[:, 0].tolist(), probability.gather(1, best)[:, 0].tolist()
        return [{"answer": self.answers[n], "probability": p} for n, p in zip(numbers, sure, strict=True)]

    def measures(self, entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Return the soft accuracy in percent, over all and by type; nothing where entries have no answers."""
        answered = [p for p in predictions if "answer" in entries[p["entry"]]]
        if not answered:
            return {"questions": len(predictions)}
        scores: dict[str, list[float]] = defaultdict(list)
        for said in answered:
            entry = entries[said["entry"]]
            given = given_answers(entry)
            alone = [normalise_prediction(given[0])] * ANNOTATORS  # ten people's answers are normalised already
            score = soft_accuracy(said["answer"], given if len(given) > 1 else alone)
            scores["accuracy"].append(score)
            scores[f"accuracy/{answer_type(entry)}"].append(score)
            if "question_type" in entry:
                scores[f"accuracy/question/{entry['question_type']}"].append(score)
        return {name: 100 * sum(values) / len(values) for name, values in scores.items()} | {"questions": len(answered)}

    def _ranked(self, network: AnswerNetwork, question: Context) -> tuple[Tensor, Tensor]:
        """Return the candidates of each question, (B, k) numbers of answers, and their probabilities.

        First by their first word alone, then by the sum of all their words' log-probabilities; no length
        normalisation.
        """
        device, count = question.tokens.device, question.rows.count
        ids, mask = self.answer_ids.to(device), self.answer_mask.to(device)
        start = ids[:1, :1].expand(count, 1)
        slots = torch.arange(count, device=device)
        first = network.answer(question, start, torch.ones_like(start, dtype=torch.bool), slots, slots).log_softmax(-1)
        first_scores, chosen = first.index_select(1, ids[:, 1]).topk(self.candidates, dim=-1)
        of_question = torch.arange(count, device=device).repeat_interleave(self.candidates)
        parts = zip(*(t.split(ANSWERS_AT_ONCE) for t in (chosen.flatten(), of_question)), strict=True)
        scores = torch.cat([_summed(network, question, ids[part], mask[part], asked) for part, asked in parts])
        scores = scores.view(count, self.candidates) + (first_scores if self.official else 0.0)
        return chosen, scores.softmax(-1)

    def _written(self, network: AnswerNetwork, question: Context, most: int = 12) -> list[str]:
        """Write each answer word by word, the likeliest each time, until [SEP] or `most` words."""
        tokenizer, device, count = self._tokenizer, question.tokens.device, question.rows.count
        vocabulary, of_question = tokenizer.vocabulary, torch.arange(count, device=device)
        ids = torch.full((count, 1), vocabulary.cls, device=device)
        for length in range(1, most + 1):
            slots = of_question * length + length - 1
            logits = network.answer(question, ids, torch.ones_like(ids, dtype=torch.bool), of_question, slots)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        rows = [row[: row.index(vocabulary.sep)] if vocabulary.sep in row else row for row in ids.tolist()]
        return [tokenizer.decode(row) for row in rows]

    def _encoded(self, answer: str) -> list[int]:
        """Return [CLS] pieces [SEP]: an answer has an end, whatever captions do."""
        ids, _ = self._tokenizer.encode(answer)
        vocabulary = self._tokenizer.vocabulary
        return ids if vocabulary.add_sep else [*ids, vocabulary.sep]

    def _padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
        return ids.masked_fill(~mask, self._tokenizer.vocabulary.pad), mask

    @property
    def _tokenizer(self) -> TextTokenizer:
        if self.tokenizer is None:
            raise ValueError("answers can be encoded with a tokenizer only")
        return self.tokenizer

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


def _summed(network: AnswerNetwork, question: Context, ids: Tensor, mask: Tensor, of_question: Tensor) -> Tensor:
    """Return the sum of each answer's words' log-probabilities (A,), of ids and mask (A, M) and of_question (A,)."""
    followed = torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], dim=1)
    slots = followed.flatten().nonzero()[:, 0]
    log_p = network.answer(question, ids, mask, of_question, slots).log_softmax(-1)
    words = log_p.gather(1, ids.flatten()[slots + 1][:, None])[:, 0]
    return log_p.new_zeros(ids.shape).flatten().index_copy(0, slots, words).view_as(ids).sum(1)


def submission(entries: Sequence[Entry], predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the public evaluation server takes: an answer for each question's id."""
    ids = [entries[said["entry"]]["question_id"] for said in predictions]
    return [{"question_id": n, "answer": said["answer"]} for n, said in zip(ids, predictions, strict=True)]


def given_answers(entry: Entry) -> list[str]:
    """Return an entry's answers: ten people's, or one."""
    answers = entry.get("answer", [])
    return answers if isinstance(answers, list) else [answers]


def answer_list(entries: Iterable[Entry], most: int) -> list[str]:
    """Return the answers that entries give, the commonest first, at most so many. What is no text is left out.

    It is Vqa.problems that refuses such entries, with all else that is wrong.
    """
    counts = Counter(answer for entry in entries for answer in given_answers(entry) if isinstance(answer, str))
    return [answer for answer, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]]


def clean_question(text: str, max_words: int) -> str:
    """Normalise a question as published: unlike a caption it keeps runs of white space, and words between them.

    Lower case; , . ' ! ? " ( ) * # : ; ~ deleted; - and / to a space; spaces at the end dropped.
    """
    text = re.sub(r"[-/]", " ", re.sub(r"[,.'!?\"()*#:;~]", "", text.lower())).rstrip(" ")
    return " ".join(text.split(" ")[:max_words])
