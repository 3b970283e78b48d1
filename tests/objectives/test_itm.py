"""Image-text matching: whom it draws, what it does where nobody can be drawn, and its loss."""

import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2
from torch import Tensor

from simla_ds.config import MatchingConfig
from simla_ds.objectives.itm import SMOOTHING, ImageTextMatching
from simla_ds.task import PretrainTask
from simla_ds.types import Batch, StepFeatures
from tests.tiny import make_batch, make_task, run_config

ROWS = 5


def make_step(
    image_id: list[int], fidelity: str = "corrected", rows: int = ROWS
) -> tuple[PretrainTask, ImageTextMatching, Batch, StepFeatures]:
    task = make_task(run_config(fidelity=fidelity))
    batch = make_batch([6, 4, 7, 5, 3][:rows])
    batch["image_id"] = torch.tensor(image_id)
    objective = task.objectives["itm"]
    assert isinstance(objective, ImageTextMatching)
    with torch.no_grad():
        features = task.features(batch)
    return task, objective, batch, features


def weights(similarity: Tensor, image_id: list[int], smoothing: float) -> Tensor:
    """Return the (B, B) probabilities of each wrong partner, by the definition, in float64."""
    ids = torch.tensor(image_id)
    w = similarity[:, : len(ids)].double().softmax(-1) + smoothing
    w = w.masked_fill(ids[:, None] == ids[None], 0.0)
    return w / w.sum(-1, keepdim=True)


@pytest.mark.parametrize(("fidelity", "smoothing"), [("corrected", SMOOTHING), ("official", 0.0)])
def test_draws_follow_the_weights_over_20000_draws_and_never_take_the_own_picture(fidelity: str, smoothing: float):
    # official knows no pictures, only pairs; corrected: pairs 0 and 3 show the same one
    image_id = [0, 1, 2, 0, 4] if fidelity == "corrected" else [0, 1, 2, 3, 4]
    _, objective, batch, features = make_step(image_id, fidelity)
    features.keys.temperature = features.keys.temperature * 8  # no weight below 1 %
    candidates = objective.candidate_similarities(features)
    generator, repeats = torch.Generator().manual_seed(0), 4_000
    counts = torch.zeros(2, ROWS, ROWS)
    for _ in range(repeats):
        batch["itm_draws"] = torch.rand(ROWS, 2, generator=generator)
        for direction, drawn in enumerate(objective.draw_negatives(batch, features)):
            counts[direction, torch.arange(ROWS), drawn] += 1
    for direction, similarity in enumerate(candidates):
        wanted = weights(similarity, image_id, smoothing) * repeats
        impossible = wanted == 0
        assert not counts[direction][impossible].any()
        statistic = ((counts[direction].double() - wanted) ** 2 / wanted)[~impossible].sum().item()
        freedom = int((~impossible).sum()) - ROWS
        assert statistic < chi2.ppf(0.999, freedom)  # seeded: it holds or it does not


@pytest.mark.parametrize("uniform", [0.0, 1e-7, 0.5, 1 - 2**-24, math.nextafter(1.0, 0.0)])
@pytest.mark.parametrize("own", [0, 2, 4])  # the excluded column is the first, inside, the last
def test_inverse_cdf_stays_among_allowed_columns_at_its_ends(uniform: float, own: int, monkeypatch: pytest.MonkeyPatch):
    _, objective, batch, features = make_step([0, 1, 2, 3, 4])
    similarity = torch.zeros(ROWS, ROWS)
    similarity[:, own] = 200.0  # all of the softmax lies on one column, for row `own` its own
    monkeypatch.setattr(objective, "candidate_similarities", lambda _: (similarity, similarity))
    batch["itm_draws"] = torch.full((ROWS, 2), uniform)
    wrong_image, wrong_text = objective.draw_negatives(batch, features)
    for drawn in (wrong_image, wrong_text):
        assert ((drawn >= 0) & (drawn < ROWS) & (drawn != torch.arange(ROWS))).all()
    others = [c for c in range(ROWS) if c != own]
    wanted = others[min(int(uniform * 4), 3)]  # row `own` has four candidates with equal (smoothed) weights
    assert wrong_image[own] == wanted
    if 0.001 < uniform < 0.999:
        assert (wrong_image[others] == own).all()


def test_a_row_without_any_candidate_loses_its_wrong_rows_and_keeps_its_right_one():
    """Two pairs show one picture and nothing else is in the batch with them: only pair 2 has wrong partners."""
    task, objective, batch, _ = make_step([0, 0], rows=2)
    with torch.no_grad():
        alone = task(batch, alpha=0.4, keep=True)
    logits = task.model.match_head(torch.cat([alone["outputs"]["itm"][0], alone["outputs"]["itm"][1]])).double()
    wanted = F.cross_entropy(logits[:2], torch.ones(2, dtype=torch.long))
    torch.testing.assert_close(alone["losses"]["itm"].double(), wanted, atol=1e-6, rtol=0)
    counts = objective.measures(batch, alone["features"], alone["outputs"]["itm"])
    assert counts["itm/accuracy_matched"][1] == 2
    assert counts["itm/accuracy_unmatched"][1] == 0


def test_loss_is_the_mean_over_matched_and_drawable_rows():
    task, objective, batch, _ = make_step([0, 1, 2, 3, 4])
    wrong_image, wrong_text = torch.tensor([1, 2, 3, 4, 0]), torch.tensor([4, 0, 1, 2, 3])
    batch["negative_image"], batch["negative_text"] = wrong_image, wrong_text
    with torch.no_grad():
        result = task(batch, alpha=0.4, keep=True)
        model, image = task.model, result["features"].student.image_tokens
        ids, mask = batch["input_ids"], batch["text_mask"]
        logits = []
        for image_index, text_index in (
            (torch.arange(5), torch.arange(5)),
            (wrong_image, torch.arange(5)),
            (torch.arange(5), wrong_text),
        ):
            hidden, _ = model.text_over_image(ids[text_index], mask[text_index], image[image_index])
            logits.append(model.match_head(hidden[:, 0]))
    z = torch.cat(logits).double().log_softmax(-1)
    wanted = -(z[:5, 1].sum() + z[5:, 0].sum()) / 15
    torch.testing.assert_close(result["losses"]["itm"].double(), wanted, atol=1e-5, rtol=0)
    measures = objective.measures(batch, result["features"], result["outputs"]["itm"])
    assert measures["itm/accuracy_matched"].tolist() == [(z[:5, 1] > z[:5, 0]).sum(), 5]
    assert measures["itm/accuracy_unmatched"].tolist() == [(z[5:, 0] > z[5:, 1]).sum(), 10]


def test_a_batch_of_one_picture_trains_on_with_finite_numbers():
    task = make_task(run_config(itm=MatchingConfig(negatives="global")))
    for lengths in ([5], [5, 5, 5]):
        batch = make_batch(lengths)
        batch["image_id"] = torch.zeros(len(lengths), dtype=torch.long)
        task.zero_grad()
        result = task(batch, alpha=0.4)
        result["loss"].backward()
        assert result["loss"].isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in task.parameters())


def test_similarities_that_underflow_still_leave_every_candidate_a_chance(monkeypatch: pytest.MonkeyPatch):
    """A multinomial over exact zeros raises; the published code stops there (ALBEF issues 18, 93, 131)."""
    _, objective, batch, features = make_step([0, 1, 2, 3, 4])
    similarity = torch.full((ROWS, ROWS), -1e4).fill_diagonal_(1e4)
    monkeypatch.setattr(objective, "candidate_similarities", lambda _: (similarity, similarity))
    for uniform, wanted in ((0.1, [1, 0, 0, 0, 0]), (0.9, [4, 4, 4, 4, 3])):
        batch["itm_draws"] = torch.full((ROWS, 2), uniform)
        assert objective.draw_negatives(batch, features)[0].tolist() == wanted
