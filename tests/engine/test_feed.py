"""Batches on their way to the step: the same ones, in the same order, whether or not one is made ready ahead."""

from typing import Any

import pytest
import torch

from simla_ds.data.batch import as_floats
from simla_ds.engine.checkpoint_folder import read_state
from simla_ds.engine.feed import Feed
from tests.data.test_loader import good, loader, write_shards
from tests.engine.launching import ROOT, launch
from tests.engine.runs import keys, losses, scenes

MICRO_STEPS, STEPS = 2, 6
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """53 samples, three of them unusable: batches of 5 do not divide epochs."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(good(bad=(3, 11, 12)), folder, shard_size=7)
    return str(folder)


def feed_of(shards, *, ahead, prepare=as_floats):
    feed = Feed(loader(shards), prepare, CPU, micro_steps=MICRO_STEPS)
    feed.ahead = ahead
    return feed


def steps(feed, count=STEPS):
    """Yield what a training loop sees: micro-batches, and the position that it would save after each step."""
    for step in range(count):
        for _ in range(MICRO_STEPS):
            batch = feed.next()
            if step + 1 < count:
                feed.look_ahead()
            yield batch, feed.position


def test_looking_ahead_changes_neither_batches_nor_positions(shards):
    plain, ahead = (list(steps(feed_of(shards, ahead=ahead))) for ahead in (False, True))
    assert [position for _, position in plain] == [position for _, position in ahead]
    for (one, _), (other, _) in zip(plain, ahead, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    source = loader(shards)
    assert [position for _, position in plain] == [next(source) and source.local_position() for _ in plain]


def test_a_position_saved_while_looking_ahead_is_where_the_next_batch_begins(shards):
    feed = feed_of(shards, ahead=True)
    seen = list(steps(feed, 3))
    feed.look_ahead()
    assert feed.loader.local_position() > feed.position == seen[-1][1]
    resumed = loader(shards)
    resumed.load_state(feed.loader.state_dict([feed.position]))
    fed, begun = feed.next(), next(resumed)
    assert torch.equal(fed["sample_id"], begun["sample_id"])


def test_an_error_on_the_way_arrives_in_the_training_thread(shards):
    def broken(batch):
        raise FloatingPointError("the tokeniser fails")

    feed = feed_of(shards, ahead=True, prepare=broken)
    with pytest.raises(FloatingPointError, match="the tokeniser fails"):
        feed.look_ahead()


def test_waiting_for_the_loader_is_counted(shards):
    feed = feed_of(shards, ahead=True)
    list(steps(feed, 2))
    assert feed.waited > 0


@pytest.mark.gpu
def test_batches_made_ready_on_a_stream_of_their_own_are_whole():
    device = torch.device("cuda")
    weight = torch.randn(2048, 2048, device=device)

    class Numbers:
        number = 0

        def local_position(self):
            return self.number

        def __next__(self):
            self.number += 1
            return {"image": torch.full((2048, 2048), float(self.number)).pin_memory()}

    def prepare(batch):
        image = batch["image"].to(device, non_blocking=True)
        return {"image": image + 0 * (image @ weight @ weight)}  # busy for a while

    source: Any = Numbers()
    feed = Feed(source, prepare, device, micro_steps=1)
    assert feed.ahead
    for number in range(1, 40):
        image = feed.next()["image"]
        feed.look_ahead()
        assert image.eq(number).all().item(), number


@pytest.mark.launcher
@pytest.mark.slow
def test_a_run_that_looks_ahead_stops_and_resumes_with_bit_equal_losses(tmp_path):
    data = scenes(tmp_path / "data")
    more = ["--train.steps", "6", "--train.batch_size", "4", "--train.grad_accumulation", "2"]
    more += ["--optim.schedule", "constant", "--deepspeed", str(ROOT / "ds_configs" / "zero1.json")]
    done = launch("tests.engine.workers.ahead", str(tmp_path), *keys(data, *more), ranks=1)
    assert done.returncode == 0, done.stderr[-3000:]
    stopped = done.stderr.count("stopped by a signal: saved at step 4")
    assert stopped == 1, done.stderr[-3000:]
    plain, ahead = (losses(tmp_path / name) for name in ("plain", "ahead"))
    assert list(ahead) == [1, 2, 3, 4, 5, 6]
    assert ahead == plain
    ends = [read_state(tmp_path / name / "checkpoints" / "step_00000006")["data"] for name in ("plain", "ahead")]
    assert ends[0] == ends[1]
