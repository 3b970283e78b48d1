"""The whole network: its features, temperature, tied head, and activation checkpointing."""

import math

import pytest
import torch
import torch.nn.functional as F

from simla_ds.config import ModelConfig
from simla_ds.model.heads import LanguageHead, Temperature
from simla_ds.model.simla import Simla
from tests.tiny import make_batch, make_task, model_config, run_config, spread_weights


@pytest.mark.parametrize("fidelity", ["corrected", "official"])
def test_activation_checkpointing_changes_no_loss_and_no_gradient(fidelity: str):
    results = []
    for on in (False, True):
        task = make_task(run_config(fidelity=fidelity))
        task.model.set_activation_checkpointing(on)
        result = task(make_batch([7, 4, 6, 5]), alpha=0.4)
        result["loss"].backward()
        results.append((result["losses"], {n: p.grad for n, p in task.named_parameters()}))
    (losses, gradients), (losses_on, gradients_on) = results
    for name, loss in losses.items():
        torch.testing.assert_close(losses_on[name], loss, atol=1e-6, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_on[name], gradient, atol=1e-6, rtol=1e-6)


def test_activation_checkpointing_recomputes_every_block_and_layer(monkeypatch: pytest.MonkeyPatch):
    """Saved tensors are fewer: without this the switch might be read by nobody."""
    sizes = []
    for on in (False, True):
        model = Simla(model_config())
        model.set_activation_checkpointing(on)
        saved: list[int] = []

        def keep(t: torch.Tensor, saved: list[int] = saved) -> torch.Tensor:
            saved.append(t.numel())
            return t

        batch = make_batch([7, 4, 6, 5])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model.features(batch["image"], batch["input_ids"], batch["text_mask"])
        sizes.append(sum(saved))
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize(("value", "bounded"), [(0.07, 0.07), (0.5, 0.5), (0.9, 0.5), (0.0005, 0.001), (-0.05, 0.001)])
def test_temperature_is_bounded_in_the_forward_and_its_gradient_passes_straight_through(value: float, bounded: float):
    temperature = Temperature(ModelConfig())
    with torch.no_grad():
        temperature.value.fill_(value)
    out = temperature()
    assert out.item() == pytest.approx(bounded, rel=1e-5)
    (1 / out).sum().backward()
    assert temperature.value.grad is not None
    assert temperature.value.grad.item() == pytest.approx(-1 / bounded**2, rel=1e-4)  # as if it were unbounded
    assert temperature.value.item() == pytest.approx(value)  # the parameter itself is left to the optimizer
    temperature.clamp_()
    assert temperature.value.item() == pytest.approx(bounded)


def test_temperature_starts_as_configured_and_is_float32_and_one_dimensional():
    temperature = Temperature(ModelConfig(temperature=0.1)).bfloat16()
    assert temperature.value.shape == (1,)
    assert temperature().dtype == torch.float32
    assert temperature().item() == pytest.approx(0.1, rel=2**-8)


def test_features_are_unit_vectors_of_the_projected_cls_rows():
    model = Simla(model_config())
    spread_weights(model)
    batch = make_batch([7, 4, 6])
    features = model.features(batch["image"], batch["input_ids"], batch["text_mask"], batch["patch_mask"])
    pairs = (
        (features.image_feature, features.image_tokens, model.image_projection),
        (features.text_feature, features.text_tokens, model.text_projection),
    )
    for feature, tokens, projection in pairs:
        projected = tokens[:, 0].double() @ projection.weight.double().T + projection.bias.double()
        wanted = projected / projected.square().sum(-1, keepdim=True).sqrt()
        torch.testing.assert_close(feature.double(), wanted, atol=1e-6, rtol=0)
    assert features.masked_image_tokens is not None
    assert (features.masked_image_tokens - features.image_tokens).abs().max() > 0.1
    assert model.features(batch["image"], batch["input_ids"], batch["text_mask"]).masked_image_tokens is None


def test_language_head_is_tied_to_the_word_embeddings_and_follows_its_definition():
    model = Simla(model_config())
    spread_weights(model)
    head = model.language_head
    assert head.decoder.weight is model.stream.embeddings.word.weight
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    x = hidden.double() @ head.transform.weight.double().T + head.transform.bias.double()
    x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    x = F.layer_norm(x, (32,), head.norm.weight.double(), head.norm.bias.double(), 1e-12)
    wanted = x @ model.stream.embeddings.word.weight.double().T + head.decoder.bias.double()
    torch.testing.assert_close(head(hidden).double(), wanted, atol=1e-5, rtol=0)
    assert isinstance(head, LanguageHead)
    assert sum(p is head.decoder.weight for p in model.parameters()) == 1


def test_a_vocabulary_that_nobody_filled_in_is_refused():
    with pytest.raises(ValueError, match=r"model.vocabulary.size=0 and visual_size=0 must be >= 1"):
        Simla(ModelConfig())
