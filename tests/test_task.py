"""PretrainTask: what is summed, what each part depends on, and that two ranks compute what one does."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from simla_ds.config import Config, CrossModalConfig, MatchingConfig, PseudoLabelConfig, SourceConfig
from simla_ds.task import PretrainTask
from simla_ds.types import Batch
from tests.tiny import labelled, make_batch, make_task, run_config, with_masks

NAMES = ("itc", "itm", "mlm", "xmm", "psl")
RANKS = 2


def weighted(config: Config, **weights: float) -> Config:
    """Return the configuration with other weights of objectives."""
    objectives = config.objectives
    changed = {n: dataclasses.replace(getattr(objectives, n), weight=w) for n, w in weights.items()}
    return dataclasses.replace(config, objectives=dataclasses.replace(objectives, **changed))


def gradients(task: PretrainTask) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}


def test_weights_scale_each_term_of_the_total_and_its_gradient():
    weights = {"itc": 0.5, "itm": 2.0, "mlm": 3.0, "xmm": 0.25, "psl": 10.0}
    batch, terms = make_batch([7, 4, 6, 5]), {}
    for name in NAMES:
        alone = make_task(weighted(run_config(), **{n: float(n == name) for n in NAMES}))
        alone(batch, alpha=0.4)["loss"].backward()
        terms[name] = gradients(alone)
    task = make_task(weighted(run_config(), **weights))
    result = task(batch, alpha=0.4)
    result["loss"].backward()
    assert result["loss"].item() == pytest.approx(sum(weights[n] * result["losses"][n].item() for n in NAMES), rel=1e-6)
    for name, gradient in gradients(task).items():
        wanted = sum(weights[n] * terms[n][name] for n in NAMES if name in terms[n])
        torch.testing.assert_close(gradient, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("off", NAMES)
def test_an_objective_that_is_switched_off_leaves_the_others_losses_alone(off: str):
    batch = make_batch([7, 4, 6, 5])
    with torch.no_grad():
        every = make_task(run_config())(batch, alpha=0.4)["losses"]
        some = make_task(weighted(run_config(), **{off: 0.0}))(batch, alpha=0.4)["losses"]
    assert some.keys() == set(NAMES) - {off}
    for name, loss in some.items():
        torch.testing.assert_close(loss, every[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum_over_words"])
def test_losses_of_single_rows_have_the_losses_as_their_mean_and_add_up_by_source(reduction: Any):
    config = run_config(psl=PseudoLabelConfig(reduction=reduction))
    sources = {name: SourceConfig(shards=name) for name in ("a", "b", "c")}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=sources))
    batch = make_batch([7, 4, 6, 5])
    batch["image_id"] = torch.tensor([0, 1, 1, 3])  # two captions of one picture: no negatives of each other
    plain = make_task(config)(batch, alpha=0.4)
    assert "by_source" not in plain
    batch["source"] = torch.tensor([0, 2, 2, 0])
    task = make_task(config)
    result = task(batch, alpha=0.4, keep=True)
    assert all(torch.equal(result["losses"][name], plain["losses"][name]) for name in NAMES)
    assert result["by_source"]["pairs"][:, 1].tolist() == [2, 0, 2]
    for name in NAMES:
        losses, weights, pairs = task.objectives[name].row_losses(
            batch, result["features"], result["outputs"][name], 0.4
        )
        mean = (losses * weights).sum() / weights.sum()
        torch.testing.assert_close(mean, result["losses"][name], atol=1e-5, rtol=1e-5)
        sums = result["by_source"][name]
        assert sums[1].tolist() == [0, 0]
        of_first = (pairs == 0) | (pairs == 3)
        torch.testing.assert_close(sums[0, 0], (losses * weights)[of_first].sum())
        torch.testing.assert_close(sums[:, 1].sum(), weights.sum())


def test_xmm_runs_at_every_kth_step_only_and_costs_nothing_at_the_others():
    task, batch = make_task(run_config(xmm=CrossModalConfig(every=3))), make_batch([7, 4, 6, 5])
    with torch.no_grad():
        ran = {step: task(batch, alpha=0.4, step=step, keep=True) for step in range(7)}
    assert [step for step, result in ran.items() if "xmm" in result["losses"]] == [0, 3, 6]
    for step, result in ran.items():
        passes = [result["features"].student.masked_image_tokens, result["features"].teacher.masked_image_tokens]
        assert all((tokens is None) == (step % 3 != 0) for tokens in passes)
        assert result["loss"].item() == pytest.approx(sum(x.item() for x in result["losses"].values()), rel=1e-6)


@pytest.mark.parametrize("fidelity", ["corrected", "official"])
def test_every_student_parameter_gets_a_gradient_and_the_teacher_none(fidelity: str):
    task = make_task(run_config(fidelity=fidelity))
    task(make_batch([7, 4, 6, 5]), alpha=0.4)["loss"].backward()
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    assert all(p.grad is None for p in task.teacher.module.parameters())
    assert not {id(p) for p in task.parameters()} & {id(p) for p in task.teacher.module.parameters()}
    assert len(list(task.parameters())) == len(list(task.model.parameters()))
    assert not any("teacher" in name for name in task.state_dict())


def test_the_task_changes_neither_queue_nor_teacher_by_itself():
    """The trainer does, after the step: a forward for evaluation must leave no trace."""
    task, batch = make_task(run_config()), make_batch([7, 4, 6, 5])
    queue, master = task.queue.image.clone(), {n: t.clone() for n, t in task.teacher.master.items()}
    result = task(batch, alpha=0.4)
    assert torch.equal(task.queue.image, queue)
    assert all(torch.equal(t, master[n]) for n, t in task.teacher.master.items())
    task.queue.push(**result["queue_rows"])
    torch.testing.assert_close(task.queue.image[:4], task.features(batch).teacher.image_feature, atol=1e-6, rtol=0)


# --- one process with 8 pairs against two with 4 each ---------------------------------------------------------------


def take(batch: Batch, rows: Tensor, ranks: int) -> Batch:
    """Return a rank's rows, the counts being the mean number per rank of the whole batch."""
    part: dict[str, Any] = {
        name: value[rows]
        for name, value in batch.items()
        if isinstance(value, Tensor) and len(value) == len(batch["image"]) and value.dim() and "index" not in name
    }
    part["word_index"] = batch["word_index"][rows]
    if "negative_image" in batch and "negative_text" in batch:
        for name in ("negative_image", "negative_text"):
            part[name] = part[name] // ranks  # within one parity: global row g is local row g // 2
    whole: Any = {**batch, **part}
    cut = with_masks(whole, labelled(batch)[rows], batch["patch_mask"][rows])
    return {
        **cut,
        "mlm_input_ids": batch["mlm_input_ids"][rows],
        "label_count": batch["label_count"] / ranks,
        "masked_count": batch["masked_count"] / ranks,
    }


def scenario(name: str) -> tuple[PretrainTask, Batch]:
    """Return a task and the global batch; captions as long as each other, since ranks pad for themselves."""
    task = make_task(run_config(itm=MatchingConfig(negatives="global" if name == "global" else "local")))
    batch = make_batch([7, 4, 6, 5, 3, 7, 2, 7], seed=2)
    batch["image_id"] = torch.tensor([0, 1, 2, 3, 4, 0, 6, 7])  # pairs 0 and 5 share a picture, on different ranks
    if name == "injected":
        batch["negative_image"] = torch.tensor([2, 3, 4, 5, 6, 7, 0, 1])
        batch["negative_text"] = torch.tensor([6, 7, 0, 1, 2, 3, 4, 5])
    return task, batch


def run_share(name: str, own_rank: int, ranks: int) -> dict[str, Any]:
    """Run a rank's share; return its losses, gradients and the queue afterwards."""
    task, batch = scenario(name)
    result = task(take(batch, torch.arange(own_rank, 8, ranks), ranks), alpha=0.4)
    result["loss"].backward()
    task.queue.push(**result["queue_rows"])
    return {"losses": result["losses"], "gradients": gradients(task), "queue": task.queue.state_dict()}


def work(own_rank: int, folder: str) -> None:
    """Run both scenarios as one of two gloo ranks."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=own_rank, world_size=RANKS)
    torch.save({n: run_share(n, own_rank, RANKS) for n in ("injected", "global")}, f"{folder}/rank{own_rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shares(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Return what each of two real processes computed."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{r}.pt") for r in range(RANKS)]


def assert_agree(one: dict[str, Any], parts: list[dict[str, Any]], names: tuple[str, ...] = NAMES) -> None:
    for name in names:
        mean = sum(part["losses"][name] for part in parts) / len(parts)
        torch.testing.assert_close(mean, one["losses"][name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["injected", "global"])
def test_two_ranks_give_the_losses_and_gradients_of_one(name: str, shares: list[dict[str, Any]]):
    """ITC, MLM, XMM and PSL always; ITM with negatives that both can choose, injected or drawn over all ranks."""
    one, parts = run_share(name, 0, 1), [share[name] for share in shares]
    assert_agree(one, parts)
    assert any(abs(parts[0]["losses"][n] - parts[1]["losses"][n]) > 1e-3 for n in NAMES)  # shares do differ
    for parameter, gradient in one["gradients"].items():
        mean = sum(part["gradients"][parameter] for part in parts) / RANKS
        torch.testing.assert_close(mean, gradient, atol=1e-5, rtol=1e-4, msg=parameter)


def test_two_ranks_fill_the_queue_as_one_does(shares: list[dict[str, Any]]):
    one = run_share("injected", 0, 1)["queue"]
    for share in shares:
        for name, value in share["injected"]["queue"].items():
            torch.testing.assert_close(value, one[name], atol=1e-6, rtol=0)
    assert one["image_id"].tolist() == [0, 1, 2, 3, 4, 0, 6, 7]
