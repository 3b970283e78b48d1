"""The feature queue against a Python list of everything that was ever pushed."""

import pytest
import torch

from simla_ds.objectives.feature_queue import FeatureQueue


def make_rows(start: int, count: int) -> dict[str, torch.Tensor]:
    """Return rows whose values tell which push they came from."""
    number = torch.arange(start, start + count)
    value = number[:, None].float()
    return {"image_feature": value.repeat(1, 3), "text_feature": -value.repeat(1, 3), "image_id": number + 100}


def lengths(queue: FeatureQueue) -> list[int]:
    image, text, image_id = queue.keys()
    return [len(image), len(text), len(image_id)]


@pytest.mark.parametrize(
    "sizes",
    [
        [2, 2, 2, 2, 2],  # divides the queue of 8: the pointer returns to 0
        [3, 3, 3, 3, 3],  # does not: pushes straddle the end
        [5, 1, 7, 2, 8, 3],  # any mixture, one as large as the queue
        [3, 11, 2, 20],  # larger than the queue: the newest stay
    ],
    ids=str,
)
def test_queue_holds_the_newest_rows_and_overwrites_the_oldest(sizes: list[int]):
    queue, pushed = FeatureQueue(8, 3), 0
    for count in sizes:
        queue.push(**make_rows(pushed, count))
        pushed += count
        image, text, ids = queue.keys()
        newest = list(range(max(0, pushed - 8), pushed))
        assert sorted(ids.tolist()) == [100 + n for n in newest]  # only filled rows are handed out
        assert torch.equal(image[:, 0] + 100, ids.float())
        assert torch.equal(text, -image)
        if queue.filled == 8:  # the pointer stands at the oldest row
            assert ids.roll(-queue.pointer).tolist() == [100 + n for n in newest]


def test_rows_are_kept_in_float32_whatever_comes_in():
    queue = FeatureQueue(4, 3)
    rows = make_rows(1, 2)
    queue.push(rows["image_feature"].bfloat16(), rows["text_feature"].bfloat16(), rows["image_id"])
    assert queue.image.dtype == torch.float32
    assert queue.image[1, 0] == 2.0


def test_a_young_queue_hands_out_nothing_and_a_queue_of_size_zero_never_does():
    for size in (0, 8):
        queue = FeatureQueue(size, 3)
        assert lengths(queue) == [0, 0, 0]
    queue = FeatureQueue(0, 3)
    queue.push(**make_rows(0, 2))
    assert lengths(queue) == [0, 0, 0]


def test_a_random_queue_is_full_of_different_unit_vectors_that_follow_from_the_seed():
    queue = FeatureQueue.random(64, 16, seed=3)
    assert queue.filled == 64
    for features in (queue.image, queue.text):
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(64))
        assert (features @ features.T - torch.eye(64)).abs().max() < 0.95
    assert torch.equal(FeatureQueue.random(64, 16, seed=3).text, queue.text)
    assert not torch.equal(FeatureQueue.random(64, 16, seed=4).text, queue.text)


def test_a_restored_queue_goes_on_where_the_saved_one_stood():
    queue, other = FeatureQueue(8, 3), FeatureQueue(8, 3)
    queue.push(**make_rows(0, 5))
    other.load_state_dict({name: value.clone() for name, value in queue.state_dict().items()})
    for q in (queue, other):
        q.push(**make_rows(5, 6))
    assert other.image_id.tolist() == queue.image_id.tolist()
    assert torch.equal(other.image, queue.image)
    assert (other.pointer, other.filled) == (queue.pointer, queue.filled) == (3, 8)


def test_a_queue_of_another_size_is_refused_with_both_sizes_and_the_setting():
    with pytest.raises(ValueError, match=r"\(8, 3\), this run's is \(16, 3\); set objectives.itc.queue_size"):
        FeatureQueue(16, 3).load_state_dict(FeatureQueue(8, 3).state_dict())
