"""Each task's network, loss and measures, on a model that runs in milliseconds."""

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream import grounding, vqa
from simla_ds.downstream.annotations import Annotations, FolderPictures
from simla_ds.downstream.grounding import Grounding, hot_box, iou, rank_proposals
from simla_ds.downstream.nlvr2 import Nlvr2, PairNetwork, sources
from simla_ds.downstream.retrieval_tuning import Retrieval
from simla_ds.downstream.snli_ve import CLASSES, EntailmentNetwork, SnliVe
from simla_ds.downstream.vqa import AnswerNetwork, Vqa, answer_list, clean_question, submission
from simla_ds.model.simla import Simla
from tests.tiny import ALBEF, STREAM, make_batch, model_config, spread_weights

ANSWERS = ["red", "red dog", "blue", "a big boat", "boat"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([*ANSWERS, "what is it"] * 3, folder, 60)
    return TextTokenizer(folder)


def answering(tokenizer):
    config = model_config()
    config = replace(config, vocabulary=replace(config.vocabulary, size=tokenizer.vocabulary.size))
    return spread_weights(AnswerNetwork(config)).eval()


def batch_of(lengths=(7, 4, 6), pictures=1):
    batch = make_batch(list(lengths))
    image = torch.cat([batch["image"], *(batch["image"].flip(0) for _ in range(pictures - 1))])
    return {**{k: batch[k] for k in ("input_ids", "text_mask", "token_index")}, "image": image}


# --- answers


def test_answers_that_the_tokenizer_cannot_tell_apart_are_said(tokenizer):
    nothing = Annotations("x", [], FolderPictures(Path()))
    assert Vqa(tokenizer, ANSWERS).remarks(nothing) == []
    (told,) = Vqa(tokenizer, [*ANSWERS, "7", "8"]).remarks(nothing)  # it has learnt no digits
    assert "2 of 7 answers" in told
    assert "'7', '8'" in told


def test_one_persons_number_word_is_as_good_as_the_digit(tokenizer):
    entries = [{"answer": "two"}, {"answer": "2"}, {"answer": "two"}]
    said = [{"entry": n, "answer": answer} for n, answer in enumerate(("two", "two", "three"))]
    assert Vqa(tokenizer).measures(entries, said)["accuracy"] == pytest.approx(200 / 3)


def test_a_submission_has_ids_and_answers_alone():
    entries = [{"question_id": 40, "image": "a", "question": "b"}, {"question_id": 2, "image": "a", "question": "c"}]
    said = [{"entry": 1, "answer": "red", "probability": 0.5}, {"entry": 0, "answer": "a big boat", "probability": 1.0}]
    wanted = [{"question_id": 2, "answer": "red"}, {"question_id": 40, "answer": "a big boat"}]
    assert submission(entries, said) == wanted


def test_a_question_to_learn_from_needs_no_id_and_ids_are_their_data_sets_own():
    task, entry = Vqa(), {"image": "a.jpg", "question": "what is it", "answer": "red", "dataset": "vg"}
    assert list(task.problems(entry, train=True)) == []
    assert list(task.problems(entry, train=False)) == ["key 'question_id' must hold a number"]
    assert list(task.problems({**entry, "question_id": "7"}, train=True)) == ["key 'question_id' must hold a number"]
    assert task.identity(entry) is None
    numbered = [{**entry, "question_id": 7, "dataset": name} for name in ("vg", "vqa", "vg")]
    assert len({task.identity(each) for each in numbered}) == 2


def test_a_picture_is_not_flipped_where_an_answer_names_a_side():
    asked = {"question": "which way is it facing", "answer": ["left", "left", "right"]}
    assert Vqa().said(asked) == "which way is it facing left left right"
    assert Vqa().said({"question": "what is it"}) == "what is it"


def by_hand(network, question, ids):
    """Return the log-probability of each word of one answer after [CLS], each from a pass of its own, unpadded."""
    found = []
    for length in range(1, len(ids)):
        row = torch.tensor([ids[:length]])
        slot = torch.tensor([length - 1])
        logits = network.answer(question, row, torch.ones_like(row, dtype=torch.bool), torch.zeros(1).long(), slot)
        found.append(logits.log_softmax(-1)[0, ids[length]])
    return torch.stack(found)


def question_of(network, row):
    """Encode one question of the batch alone."""
    batch = batch_of()
    keep = int(batch["text_mask"][row].sum())
    return network.question(
        {
            "image": batch["image"][row : row + 1],
            "input_ids": batch["input_ids"][row : row + 1, :keep],
            "text_mask": batch["text_mask"][row : row + 1, :keep],
            "token_index": torch.arange(keep),
        }
    )


@torch.no_grad()
@pytest.mark.parametrize(("official", "at_once"), [(False, 512), (True, 512), (False, 2)])
def test_ranking_scores_each_answer_by_its_words(tokenizer, official, at_once, monkeypatch):
    monkeypatch.setattr(vqa, "ANSWERS_AT_ONCE", at_once)  # of 3 questions' answers, in passes of so many
    network = answering(tokenizer)
    task = Vqa(tokenizer, ANSWERS, official=official)
    chosen, probability = task._ranked(network, network.question(batch_of()))
    for row in range(3):
        scores = []
        for answer in ANSWERS:
            words = by_hand(network, question_of(network, row), tokenizer.encode(answer)[0])
            scores.append(words.sum() + (words[0] if official else 0))  # published: the first word counts twice
        wanted = torch.stack(scores).softmax(-1)[chosen[row]]
        torch.testing.assert_close(probability[row], wanted, atol=1e-5, rtol=1e-4)
    said = task.predict(network, batch_of())
    assert [ANSWERS.index(p["answer"]) for p in said] == [
        int(c[p.argmax()]) for c, p in zip(chosen, probability, strict=True)
    ]


@torch.no_grad()
def test_only_the_candidates_with_the_likeliest_first_words_are_read_whole(tokenizer):
    network = answering(tokenizer)
    chosen, _ = Vqa(tokenizer, ANSWERS, candidates=2)._ranked(network, network.question(batch_of()))
    for row in range(3):
        question = question_of(network, row)
        first = torch.stack([by_hand(network, question, tokenizer.encode(a)[0][:2])[0] for a in ANSWERS])
        assert first[chosen[row]].min() >= first.topk(2).values.min() - 1e-5


@torch.no_grad()
def test_free_answers_are_the_likeliest_word_each_time(tokenizer):
    network = answering(tokenizer)
    said = Vqa(tokenizer).predict(network, batch_of())
    for row, answer in enumerate(said):
        question, ids = question_of(network, row), [tokenizer.vocabulary.cls]
        while len(ids) <= 12 and ids[-1] != tokenizer.vocabulary.sep:
            now = torch.tensor([ids])
            logits = network.answer(
                question,
                now,
                torch.ones_like(now, dtype=torch.bool),
                torch.zeros(1).long(),
                torch.tensor([len(ids) - 1]),
            )
            ids.append(int(logits.argmax()))
        assert answer["answer"] == tokenizer.decode(ids)


def test_the_loss_weighs_each_answer_by_how_many_gave_it(tokenizer):
    network, task = answering(tokenizer), Vqa(tokenizer)
    entries = [
        {"answer": ["red"] * 7 + ["red dog"] * 3},
        {"answer": "a big boat", "dataset": "vg"},
        {"answer": "blue"},
    ]
    batch = {**batch_of(), **task.collate([task.fields(entry) for entry in entries])}
    wanted = 0.0
    for row, answers in enumerate(({"red": 0.7, "red dog": 0.3}, {"a big boat": 0.5}, {"blue": 1.0})):
        for answer, weight in answers.items():
            wanted -= weight * by_hand(network, question_of(network, row), tokenizer.encode(answer)[0]).sum().item()
    assert task.loss(network, network, batch, 0.0).item() == pytest.approx(wanted / 3, rel=1e-5)
    # a teacher that is the student: its cross-entropy is its entropy, not what the labels cost
    assert task.loss(network, network, batch, 0.4).item() != pytest.approx(wanted / 3, rel=1e-3)
    assert Vqa(tokenizer, official=True).loss(network, network, batch, 0.4).item() == pytest.approx(
        wanted / 3, rel=1e-5
    )


def test_answers_are_listed_by_how_often_they_are_given():
    entries = [{"answer": ["b", "a", "b"]}, {"answer": "c"}, {"answer": ["c", "c"]}]
    assert answer_list(entries, 10) == ["c", "b", "a"]
    assert answer_list(entries, 2) == ["c", "b"]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (
            'A man, riding/driving a T-bone.. <person> isn\'t   "OK"\n',
            "a man riding driving a t bone <person> isnt   ok\n",
        ),
        (" Hello  world ! \n", " hello  world  \n"),
        ("x - y", "x   y"),
        ("what is this? ", "what is this"),
    ],
)
def test_questions_are_cleaned_as_published(raw, clean):
    assert clean_question(raw, 30) == clean


# --- where the networks start


@pytest.mark.parametrize("stream", [STREAM, ALBEF])
def test_networks_start_from_the_pretrained_layers(stream):
    pretrained = spread_weights(Simla(model_config(stream)))
    pair, answers = PairNetwork(model_config(stream)), AnswerNetwork(model_config(stream))
    pair.start_from(pretrained)
    answers.start_from(pretrained)
    numbers = sources(stream)
    assert numbers == ([0, 1, 1] if stream.shared else [0, 1, 1, 2, 2])
    up = "stream.layers.{}.feed_forward.up.weight"
    for layer, number in enumerate(numbers):
        assert torch.equal(pair.get_parameter(up.format(layer)), pretrained.get_parameter(up.format(number)))
    key, depth = "{}.layers.{}.cross_attention.key.weight", len(answers.decoder.layers)
    for layer in range(depth):
        source = pretrained.get_parameter(key.format("stream", len(pretrained.stream.layers) - depth + layer))
        assert torch.equal(answers.get_parameter(key.format("decoder", layer)), source)
    first = numbers.index(1)
    one, other = pair.stream.cross_attention(first), pair.stream.cross_attention(first + 1)
    assert one.key is other.key
    assert one.query is not other.query


@torch.no_grad()
@pytest.mark.parametrize(("network", "pictures"), [(EntailmentNetwork, 1), (PairNetwork, 2)])
def test_padding_and_neighbours_do_not_matter(network, pictures):
    model = spread_weights(network(model_config())).eval()
    batch = batch_of(pictures=pictures)
    together = model(batch)
    for row in range(3):
        keep = int(batch["text_mask"][row].sum())
        alone = {
            "image": batch["image"][row::3],
            "input_ids": batch["input_ids"][row : row + 1, :keep],
            "text_mask": batch["text_mask"][row : row + 1, :keep],
            "token_index": torch.arange(keep),
        }
        torch.testing.assert_close(model(alone)[0], together[row], atol=1e-5, rtol=1e-5)


# --- heat maps


@torch.no_grad()
def test_attention_of_a_half_precision_network_is_normalised_in_float32():
    attention: Any = Simla(model_config()).bfloat16().stream.get_submodule("layers.1.cross_attention")
    x, source = (torch.randn(2, length, 32, generator=torch.Generator().manual_seed(length)) for length in (5, 10))
    weights, value = grounding._weights(attention, x.bfloat16(), source.bfloat16())
    assert (weights.dtype, value.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 5), atol=1e-6, rtol=0)  # bf16 rounds by 4e-3


def test_a_heat_map_is_attention_times_what_the_match_owes_it(monkeypatch):
    """The same from gradients of the model's own pass, whose kernel is replaced by one that keeps its weights."""
    from simla_ds.downstream.grounding import heat_maps
    from simla_ds.model import rows

    model = spread_weights(Simla(model_config(replace(STREAM, layers=3)))).eval()
    batch, kept = batch_of(), []

    def keeping(q, k, v, mask=None, index=None, p=0.0):
        weights = (
            (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
            .masked_fill(torch.zeros(()).bool() if mask is None else ~mask[:, None, None], float("-inf"))
            .softmax(-1)
        )
        weights.retain_grad()
        kept.append(weights)
        return weights @ v

    for layer in range(3):
        maps, logits = heat_maps(model, batch, layer)
        with monkeypatch.context() as patch:
            patch.setattr(rows, "cross_attention", keeping)
            kept.clear()
            fused, _ = model.text_over_image(
                batch["input_ids"], batch["text_mask"], model.image_encoder(batch["image"])
            )
            wanted = model.match_head(fused[:, 0])[:, 1]
            wanted.sum().backward()
        torch.testing.assert_close(logits, wanted.detach(), atol=1e-5, rtol=1e-5)
        attention = kept[2 * layer + 1]  # each layer's self-attention goes before
        cam = torch.zeros(3, 9)
        for row in range(3):
            for head in range(4):
                for word in range(int(batch["text_mask"][row].sum())):
                    gradient = attention.grad[row, head, word, 1:].clamp(min=0)
                    cam[row] += attention.detach()[row, head, word, 1:] * gradient
        torch.testing.assert_close(maps.flatten(1), cam / (4 * 7), atol=1e-7, rtol=1e-4)
        assert maps.max() > 0


def test_overlap_is_that_of_counted_pixels():
    random = Random(0)
    for _ in range(1000):
        a, b = ([random.randint(0, 6), random.randint(0, 6), random.randint(2, 6), random.randint(2, 6)] for _ in "ab")
        pixels = [{(x, y) for x in range(c[0], c[0] + c[2]) for y in range(c[1], c[1] + c[3])} for c in (a, b)]
        both = len(pixels[0] & pixels[1])
        shared_sides = [min(a[k] + a[k + 2], b[k] + b[k + 2]) - max(a[k], b[k]) for k in (0, 1)]
        if min(shared_sides) == 1:
            both = 0  # published: boxes that share a single row or column of pixels do not overlap
        assert iou(a, b) == pytest.approx(both / (a[2] * a[3] + b[2] * b[3] - both))


def test_proposals_and_boxes_follow_the_heat():
    heat = torch.zeros(10, 20)
    heat[2:5, 4:8] = 1.0
    assert rank_proposals(heat, [[0, 0, 20, 10], [4, 2, 4, 3], [10, 5, 4, 3], [4, 2, 2, 1]]) == 1
    assert rank_proposals(heat - 1, [[10, 5, 4, 3], [4, 2, 4, 3]]) == 1  # published: neither would be chosen
    assert hot_box(heat) == [4, 2, 4, 3]


def test_pointing_and_overlap_are_counted():
    cam = torch.zeros(4, 4)
    cam[0, 3] = 1.0
    entries = [
        {"box": [60, 0, 20, 20], "size": [80, 80], "proposals": [[0, 0, 10, 10], [60, 0, 20, 20]], "split": "a"},
        {"box": [0, 0, 50, 50], "size": [80, 80], "proposals": [[0, 0, 50, 50]], "split": "b"},
    ]
    found = Grounding().measures(entries, [{"entry": n, "map": cam.tolist()} for n in (0, 1)])
    assert (found["pointing"], found["pointing/a"], found["pointing/b"]) == (50, 100, 0)
    assert (found["proposal_iou50"], found["centre"]) == (100, 50)
    assert found["random"] == pytest.approx(100 * (400 + 2500) / 2 / 6400)
    without = [entries[0], {**entries[1], "proposals": []}]  # a detector that found nothing there
    found = Grounding().measures(without, [{"entry": n, "map": cam.tolist()} for n in (0, 1)])
    assert (found["proposal_iou50"], found["proposal_random"]) == (50, 25)
    found = Grounding().measures(without, [{"entry": 1, "map": cam.tolist()}])
    assert "proposal_iou50" not in found


# --- measures against counting


def test_accuracy_confusion_and_majority_are_counted():
    random = Random(0)
    entries = [{"label": random.choice(CLASSES)} for _ in range(200)]
    said = [{"entry": n, "label": random.choice(CLASSES)} for n in range(200)]
    random.shuffle(said)
    found = SnliVe().measures(entries, said)
    assert found["accuracy"] == sum(entries[p["entry"]]["label"] == p["label"] for p in said) / 2
    assert sum(found[f"confusion/{a}/{b}"] for a in CLASSES for b in CLASSES) == 200
    assert found["accuracy"] == sum(found[f"confusion/{a}/{a}"] for a in CLASSES) / 2
    assert found["majority"] == max(sum(e["label"] == c for e in entries) for c in CLASSES) / 2


def test_consistency_counts_statements_that_are_right_everywhere():
    right = {"label": "True"}
    entries = [
        {**right, "sentence": "s", "identifier": identifier}
        for identifier in ("dev-1-0-0", "dev-1-1-0", "dev-1-0-1", "dev-1-1-1", "dev-2-0-0")
    ]
    said = [{"entry": n, "label": label} for n, label in enumerate(("True", "True", "True", "False", "True"))]
    found = Nlvr2().measures(entries, said)
    assert found["accuracy"] == 80
    assert found["consistency"] == pytest.approx(100 * 2 / 3)  # 1-0 and 2-0 hold everywhere, 1-1 does not
    without = [{key: value for key, value in entry.items() if key != "identifier"} for entry in entries]
    assert Nlvr2().measures(without, said)["consistency"] == 0  # one sentence, once wrong


def test_retrieval_names_recall_as_published():
    ranks = {"image_to_text": [0, 3, 7], "text_to_image": [0, 0, 12, 4]}
    said = [{"entry": n, "direction": d, "rank": r} for d, rows in ranks.items() for n, r in enumerate(rows)]
    found = Retrieval().measures([{}] * 4, said)
    assert [found[f"txt_r{k}"] for k in (1, 5, 10)] == pytest.approx([100 / 3, 200 / 3, 100])
    assert [found[f"img_r{k}"] for k in (1, 5, 10)] == [50, 75, 75]
    assert found["r_mean"] == pytest.approx((200 / 3 + 200 / 3) / 2)
    assert found["captions"] == 4


def test_what_is_said_of_a_picture_names_its_first_caption():
    config = model_config()
    network = spread_weights(Simla(config)).eval()
    batches = [
        {**batch_of((7, 4, 6)), "image_id": torch.tensor([5, 5, 9]), "number": torch.tensor([0, 1, 2])},
        {**batch_of((3, 5)), "image_id": torch.tensor([9, 4]), "number": torch.tensor([3, 4])},
    ]
    said = Retrieval(rerank=0).predictions(network, batches)
    assert [p["entry"] for p in said if p["direction"] == "image_to_text"] == [0, 2, 4]
    assert [p["entry"] for p in said if p["direction"] == "text_to_image"] == [0, 1, 2, 3, 4]
