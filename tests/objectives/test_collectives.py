"""Gathering over ranks: global order, summed gradients, and the identity without a process group."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from simla_ds.objectives.collectives import gather_rows, gather_rows_with_gradient, own_rows, rank, world_size
from simla_ds.objectives.feature_queue import FeatureQueue

RANKS, ROWS = 2, 3


def global_rows() -> torch.Tensor:
    """Return (6, 2) rows; sample i is on rank i mod 2."""
    return torch.arange(12.0).view(6, 2)


def work(own_rank: int, folder: str) -> None:
    """Run every collective on one of two gloo ranks and save what came out."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=own_rank, world_size=RANKS)
    rows = global_rows()[own_rank::RANKS].clone().requires_grad_()
    gathered = gather_rows_with_gradient(rows)
    # each rank weighs the gathered rows differently: the gradient of a row is the sum over the ranks' weights
    weights = torch.arange(12.0).view(6, 2) * 10**own_rank
    (gathered * weights).sum().backward()
    queue = FeatureQueue(5, 2)
    queue.push(rows.detach(), -rows.detach(), torch.tensor([0, 2, 4]) + own_rank)
    results = {
        "rank": torch.tensor([rank(), world_size()]),
        "gathered": gathered.detach(),
        "gradient": rows.grad,
        "plain": gather_rows(rows),
        "ids": gather_rows(torch.tensor([0, 2, 4]) + own_rank),
        "mask": gather_rows(torch.tensor([True, False, own_rank == 1])),
        "own": own_rows(ROWS, rows.device),
        **{f"queue_{name}": value for name, value in queue.state_dict().items()},
    }
    torch.save(results, f"{folder}/rank{own_rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, torch.Tensor]]:
    """Return what each of two real processes got."""
    folder: Path = tmp_path_factory.mktemp("gloo")
    spawn(work, args=(str(folder),), nprocs=RANKS)
    return [torch.load(folder / f"rank{r}.pt") for r in range(RANKS)]


def test_two_ranks_see_all_rows_in_global_order(ranks: list[dict[str, torch.Tensor]]):
    for own_rank, got in enumerate(ranks):
        assert got["rank"].tolist() == [own_rank, RANKS]
        assert torch.equal(got["gathered"], global_rows())
        assert torch.equal(got["plain"], global_rows())
        assert not got["plain"].requires_grad
        assert got["ids"].tolist() == [0, 1, 2, 3, 4, 5]
        assert got["mask"].tolist() == [True, True, False, False, False, True]
        assert torch.equal(global_rows()[got["own"]], global_rows()[own_rank::RANKS])


def test_a_rows_gradient_is_summed_over_the_ranks_that_read_it(ranks: list[dict[str, torch.Tensor]]):
    wanted = torch.arange(12.0).view(6, 2) * (1 + 10)
    for own_rank, got in enumerate(ranks):
        assert torch.equal(got["gradient"], wanted[own_rank::RANKS])


def test_every_rank_queues_the_same_rows(ranks: list[dict[str, torch.Tensor]]):
    """Six rows into a queue of five: the newest five, oldest first."""
    for got in ranks:
        assert torch.equal(got["queue_image"], global_rows()[1:])
        assert torch.equal(got["queue_text"], -global_rows()[1:])
        assert got["queue_image_id"].tolist() == [1, 2, 3, 4, 5]
        assert (got["queue_pointer"].item(), got["queue_filled"].item()) == (0, 5)


def test_without_a_process_group_gathering_is_the_identity():
    rows = global_rows().requires_grad_()
    assert (rank(), world_size()) == (0, 1)
    assert torch.equal(gather_rows(rows), rows)
    assert not gather_rows(rows).requires_grad
    assert gather_rows_with_gradient(rows) is rows
    assert own_rows(4, rows.device).tolist() == [0, 1, 2, 3]
