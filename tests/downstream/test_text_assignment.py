"""Text assignment: what is drawn, by which chance; the loss by hand; NLVR2 starts from it."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from simla_ds.data.text import TextTokenizer, train_tokenizer
from simla_ds.downstream.config import FinetuneConfig, FinetuneInit
from simla_ds.downstream.nlvr2 import Nlvr2, PairNetwork
from simla_ds.downstream.text_assignment import AssignmentNetwork, TextAssignment, assign
from simla_ds.engine import finetune
from simla_ds.hub import save_model_folder
from simla_ds.model.simla import Simla
from tests.tiny import make_batch, model_config, spread_weights


def features(count, seed=0):
    return F.normalize(torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)), dim=-1)


def draws(rows, seed):
    return torch.rand(rows, 3, generator=torch.Generator().manual_seed(seed))


def test_the_own_picture_comes_first_second_or_not_at_all_each_as_often():
    labels = Counter()
    for seed in range(200):
        first, second, label, counts = assign(features(6), torch.arange(6), draws(6, seed))
        assert counts.all()
        for own, (one, other, said) in enumerate(zip(first.tolist(), second.tolist(), label.tolist(), strict=True)):
            assert one != other  # two pictures, always
            assert (one == own, other == own) == (said == 0, said == 1)
            labels[said] += 1
    assert min(labels.values()) > 330
    assert max(labels.values()) < 470  # of 1,200; three standard deviations are 49


def test_other_pictures_are_drawn_by_similarity():
    feature, drawn = features(5), torch.zeros(5)
    wanted = (feature @ feature.T / 0.07).softmax(-1).fill_diagonal_(0)[0]
    for seed in range(1200):
        first, second, label, _ = assign(feature, torch.arange(5), draws(5, seed))
        if label[0] < 2:
            drawn[second[0] if label[0] == 0 else first[0]] += 1
    torch.testing.assert_close(drawn / drawn.sum(), wanted / wanted.sum(), atol=0.06, rtol=0)


def test_captions_of_one_picture_are_never_each_others_other_picture():
    ids = torch.tensor([7, 7, 7, 8, 8, 9])
    feature = features(3)[[0, 0, 0, 1, 1, 2]]  # twins are as similar as can be
    for seed in range(100):
        first, second, label, counts = assign(feature, ids, draws(6, seed))
        assert counts.all()
        assert bool((ids[first] != ids[second]).all())
        assert torch.equal(ids[first] == ids, label == 0)
        assert torch.equal(ids[second] == ids, label == 1)


def test_two_pictures_alone_serve_and_one_alone_counts_for_nothing():
    first, second, label, counts = assign(features(2), torch.tensor([4, 5]), torch.tensor([[0.5, 0.5, 0.9]] * 2))
    assert (first.tolist(), second.tolist(), label.tolist()) == ([1, 0], [1, 0], [2, 2])
    assert counts.all()
    for count in (1, 3):
        assert not assign(features(count), torch.full((count,), 4), draws(count, 0))[3].any()


def test_a_draw_that_float32_rounds_up_to_one_is_still_a_class():
    first, second, label, _ = assign(features(3), torch.arange(3), torch.ones(3, 3))
    assert label.tolist() == [2, 2, 2]
    assert max(*first.tolist(), *second.tolist()) < 3


@pytest.fixture
def network():
    return spread_weights(AssignmentNetwork(model_config()))


def batch():
    made = make_batch([7, 4, 6])
    return {k: made[k] for k in ("input_ids", "text_mask", "token_index", "image")} | {
        "number": torch.tensor([5, 9, 2]),
        "image_id": torch.tensor([1, 2, 3]),
        "draws": draws(3, 5),
    }


def test_the_loss_is_that_of_each_caption_over_its_two_pictures(network):
    given = batch()
    image = network.image_encoder(given["image"])
    feature = F.normalize(network.image_projection(image[:, 0]), dim=-1)
    first, second, label, _ = assign(feature.detach(), given["image_id"], given["draws"])
    losses = []
    for row, (one, other) in enumerate(zip(first.tolist(), second.tolist(), strict=True)):
        length = int(given["text_mask"][row].sum())
        alone = {
            "input_ids": given["input_ids"][row : row + 1, :length],
            "text_mask": given["text_mask"][row : row + 1, :length],
            "token_index": torch.arange(length),
        }
        logits = network.head(network.fused(alone, image[one][None], image[other][None]))
        losses.append(F.cross_entropy(logits, label[row : row + 1]))
    loss = TextAssignment().loss(network, network, given, 0.4)
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    loss.backward()
    assert network.image_projection.weight.grad is None
    assert float(network.head.weight.grad.abs().sum()) > 0


def test_captions_of_a_batch_with_one_picture_teach_and_measure_nothing(network):
    given = batch() | {"image_id": torch.tensor([1, 1, 1])}
    loss = TextAssignment().loss(network, network, given, 0.4)
    assert loss == 0
    loss.backward()
    said = TextAssignment().predict(network, given)
    assert [one["drawn"] for one in said] == [None] * 3
    counted = [{"label": 0, "drawn": 0}, {"label": 2, "drawn": 1}, *said]
    assert TextAssignment().measures([], counted) == {"accuracy": 50.0, "captions": 2}
    with pytest.raises(ValueError, match="3 held-out captions: no batch has two pictures"):
        TextAssignment().measures([], said)


def test_nlvr2_starts_from_it_and_it_from_pretraining(network):
    pretrained = spread_weights(Simla(model_config()), seed=3)
    network.start_from(pretrained)
    assert torch.equal(network.image_projection.weight, pretrained.image_projection.weight)
    spread_weights(network.stream, seed=4)
    pair = PairNetwork(model_config())
    pair.start_from(network)
    for name, parameter in pair.named_parameters():
        if not name.startswith("head."):
            assert torch.equal(parameter, network.get_parameter(name)), name


def test_an_nlvr2_run_takes_its_folder_and_has_a_head_of_its_own(tmp_path):
    train_tokenizer(["a red dog"] * 3, tmp_path / "tokenizer", 60)
    vocabulary = replace(TextTokenizer(tmp_path / "tokenizer").vocabulary, visual_size=20)
    network = AssignmentNetwork(replace(model_config(), vocabulary=vocabulary))
    save_model_folder(network, tmp_path / "model", tmp_path / "tokenizer")
    config = FinetuneConfig(task="nlvr2", init=FinetuneInit(checkpoint=str(tmp_path / "model")))
    config, pretrained = finetune._with_pretrained(config)
    started = finetune._network(Nlvr2(), config, pretrained)
    assert type(started) is PairNetwork
    name = "stream.layers.0.cross_attention.key.weight"
    assert torch.equal(started.get_parameter(name), network.get_parameter(name))
    with pytest.raises(ValueError, match="holds a model for 'text_assignment', not for 'pretrain'"):
        finetune._with_pretrained(replace(config, task="vqa"))
