"""Pseudo-labelled keywords: who may be one, how ties break, and the loss against its definition."""

from typing import Any, Literal

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch import Tensor

from simla_ds.config import MOST_KEYWORDS, ObjectivesConfig, PseudoLabelConfig, VocabularyConfig
from simla_ds.objectives.base import Networks
from simla_ds.objectives.psl import PseudoLabelledKeywords, average_precision
from simla_ds.types import Batch
from simla_kernels.linear_soft_bce import MOST_KEYWORDS as OF_THE_LOSS
from tests.tiny import make_batch, make_task, run_config

PAD, CLS, SEP = 0, 2, 3


def make_objective(fidelity: Literal["corrected", "official"] = "corrected", **psl: Any) -> PseudoLabelledKeywords:
    config = ObjectivesConfig(fidelity=fidelity, psl=PseudoLabelConfig(**psl))
    no_head: Any = None
    networks = Networks(no_head, no_head)
    return PseudoLabelledKeywords(networks, config, VocabularyConfig(size=50))


def caption(*ids: int, words: list[int] | None = None) -> Batch:
    """Return a batch of one caption; `words` numbers the word of each token."""
    batch, row = make_batch([5]), torch.tensor([ids])
    word = row.masked_fill(row < 5, -1) if words is None else torch.tensor([words])
    return {**batch, "input_ids": row, "text_mask": row != PAD, "word_index": word}


def keywords(objective: PseudoLabelledKeywords, batch: Batch, attention: list[list[float]]) -> set[int]:
    """Return the ids that become keywords; attention is a row per head."""
    return set(objective.targets(batch, torch.tensor([attention]))[0].nonzero()[:, 0].tolist())


def test_special_tokens_are_never_keywords_and_take_up_no_place():
    batch = caption(CLS, 10, 11, 4, 12, 1, SEP, PAD, PAD)
    attention = [[0.5, 0.01, 0.02, 0.2, 0.03, 0.1, 0.14, 0.0, 0.0]] * 2
    assert keywords(make_objective(votes_per_head=2, keywords=2), batch, attention) == {11, 12}
    assert keywords(make_objective(votes_per_head=4, keywords=5), batch, attention) == {10, 11, 12}


def test_official_fidelity_lets_specials_take_places_and_removes_cls_alone():
    batch = caption(CLS, 10, 11, SEP, PAD, PAD)
    attention = [[0.5, 0.1, 0.15, 0.25, 0.0, 0.0]] * 2
    objective = make_objective("official", votes_per_head=3, keywords=3)
    assert keywords(objective, batch, attention) == {11, SEP}
    # fewer tokens than keywords: padding gets a place, as published
    assert PAD in keywords(make_objective("official", votes_per_head=4, keywords=5), batch, attention)


def test_most_votes_win_whatever_the_attention():
    batch = caption(CLS, 10, 11, 12, 13)
    # two heads vote 10 and 11 narrowly; one votes 12 and 13 with nearly all its attention
    attention = [[0, 0.3, 0.3, 0.2, 0.2], [0, 0.3, 0.3, 0.2, 0.2], [0, 0.0, 0.0, 0.6, 0.4]]
    assert keywords(make_objective(votes_per_head=2, keywords=2), batch, attention) == {10, 11}


def test_equal_votes_go_to_the_higher_mean_attention():
    batch = caption(CLS, 10, 11, 12, 13)
    attention = [[0, 0.4, 0.1, 0.3, 0.2], [0, 0.1, 0.45, 0.2, 0.25]]  # head votes: 10 and 12; 11 and 13
    assert keywords(make_objective(votes_per_head=2, keywords=2), batch, attention) == {11, 10}  # means .275, .25
    assert keywords(make_objective(votes_per_head=2, keywords=3), batch, attention) == {11, 10, 12}  # .25 over .225


def test_equal_votes_and_attention_go_to_the_earlier_position():
    batch = caption(CLS, *range(10, 40))  # longer than any sort's insertion-sort cutoff
    attention = [[0.0, *([1 / 30] * 30)]] * 4
    objective = make_objective(votes_per_head=30, keywords=5)
    assert keywords(objective, batch, attention) == {10, 11, 12, 13, 14}
    positions, valid = objective.keyword_positions(batch, torch.tensor([attention]))
    assert positions.tolist() == [[1, 2, 3, 4, 5]]
    assert valid.all()


@pytest.mark.parametrize("words", [0, 1, 3])  # an empty caption; fewer than the votes; fewer than the keywords
def test_short_captions_have_as_many_keywords_as_words(words: int):
    for padding in (0, 6):
        batch = caption(CLS, *range(10, 10 + words), SEP, *[PAD] * padding)
        length = batch["input_ids"].shape[1]
        attention = torch.rand(1, 4, length, generator=torch.Generator().manual_seed(0))
        hot = make_objective().targets(batch, attention)
        assert set(hot[0].nonzero()[:, 0].tolist()) == set(range(10, 10 + words))


def test_a_position_without_a_vote_is_no_keyword_even_when_places_are_left():
    batch = caption(CLS, 10, 11, 12, 13, 14)
    assert keywords(make_objective(votes_per_head=2, keywords=5), batch, [[0, 0.5, 0.3, 0.1, 0.06, 0.04]]) == {10, 11}


def test_whole_words_labels_every_piece_of_a_picked_word():
    batch = caption(CLS, 10, 11, 12, 13, SEP, words=[-1, 0, 0, 1, 2, -1])
    attention = [[0.3, 0.1, 0.3, 0.05, 0.2, 0.05]]
    assert keywords(make_objective(votes_per_head=1, keywords=1), batch, attention) == {11}
    assert keywords(make_objective(votes_per_head=1, keywords=1, whole_words=True), batch, attention) == {10, 11}


def test_a_vote_for_no_word_labels_none_even_when_all_special_tokens_are_voted_for_as_published():
    batch = caption(CLS, 10, 11, 12, SEP, PAD, words=[-1, 0, 0, 1, -1, -1])
    votes_on_cls = [[0.5, 0.3, 0.1, 0.05, 0.03, 0.02]]
    objective = make_objective("official", votes_per_head=2, keywords=2, whole_words=True)
    assert keywords(objective, batch, votes_on_cls) == {10, 11}


def test_a_word_said_twice_counts_once():
    hot = make_objective().targets(caption(CLS, 10, 10, 11), torch.tensor([[[0.1, 0.3, 0.3, 0.3]]]))
    assert hot.sum() == 2
    assert hot.max() == 1


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum_over_words"])
def test_loss_equals_two_binary_cross_entropies(alpha: float, reduction: Literal["mean", "sum_over_words"]):
    task = make_task(run_config(psl=PseudoLabelConfig(reduction=reduction)))
    with torch.no_grad():
        result = task(make_batch([7, 4, 6]), alpha=alpha, keep=True)
        features, objective = result["features"], task.objectives["psl"]
        assert isinstance(objective, PseudoLabelledKeywords)
        hard = objective.targets(make_batch([7, 4, 6]), result["outputs"]["psl"][0]).double()
        z = task.model.concept_head(features.student.image_feature).double()
        soft = task.teacher.module.concept_head(features.teacher.image_feature).double().sigmoid()

    def cross_entropy(target: Tensor) -> Tensor:
        losses = -(target * z.sigmoid().log() + (1 - target) * (1 - z.sigmoid()).log())
        return losses.mean() if reduction == "mean" else losses.sum() / 3

    wanted = (1 - alpha) * cross_entropy(hard) + alpha * cross_entropy(soft)
    torch.testing.assert_close(result["losses"]["psl"].double(), wanted, atol=1e-6, rtol=1e-6)


def test_attention_is_the_momentum_networks_over_the_students_picture():
    task, batch = make_task(run_config()), make_batch([7, 4, 6])
    with torch.no_grad():
        result = task(batch, alpha=0.4, keep=True)
        arguments = batch["input_ids"], batch["text_mask"], result["features"].student.image_tokens
        _, wanted = task.teacher.module.text_over_image(*arguments, cls_attention=True)
    torch.testing.assert_close(result["outputs"]["psl"][0], wanted, atol=1e-6, rtol=0)


def test_gradients_reach_the_image_encoder_and_no_text_parameter():
    task, batch = make_task(run_config()), make_batch([7, 4, 6])
    features, objective = task.features(batch), task.objectives["psl"]
    objective.loss(batch, features, task.outputs(batch, features, {"psl": objective})["psl"], 0.4).backward()
    touched = {name.split(".")[0] for name, p in task.model.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched == {"image_encoder", "image_projection", "concept_head"}


def test_average_precision_equals_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    logits, hot = torch.randn(6, 50, generator=generator), (torch.rand(6, 50, generator=generator) < 0.1).float()
    hot[2] = 0  # a caption without keywords is left out
    hot[3] = 1
    rows = [average_precision_score(hot[r], logits[r]) for r in range(6) if r != 2]
    total, count = average_precision(logits, hot).tolist()
    assert count == 5
    assert total == pytest.approx(sum(rows), rel=1e-6)


def test_the_configuration_knows_how_many_keywords_the_loss_takes():
    assert MOST_KEYWORDS == OF_THE_LOSS
