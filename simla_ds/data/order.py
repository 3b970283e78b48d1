"""Which sample comes when: the epoch's permutation, and how the one global stream is dealt to ranks.

Global index g counts pairs over all epochs: epoch g // n, position g % n in that epoch's permutation. The order depends
on the seed alone, never on ranks or workers; a rank's position in it is one number.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

import numpy as np

_SHARDS, _WINDOW, _SAMPLE, _SOURCE = 1, 2, 3, 4  # so that no two uses of a seed draw the same numbers


def sample_generator(seed: int, global_index: int) -> np.random.Generator:
    """The generator that every random draw about one pair comes from."""
    return np.random.default_rng([_SAMPLE, seed, global_index])


class Order(Protocol):
    """Which sample comes when."""

    def __len__(self) -> int:
        """Samples there are."""
        ...

    def locate(self, global_index: int) -> tuple[int, int]:
        """Number of the shard, and of the sample in it, at a global index."""
        ...


class EpochOrder:
    """The permutation of every epoch: shards permuted, taken `window` at a time, their samples permuted together."""

    def __init__(self, sizes: Sequence[int], window: int, seed: int):
        """sizes: samples of each shard; an epoch has their sum."""
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.first = np.cumsum(self.sizes) - self.sizes
        self.window, self.seed = window, seed
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self.sizes.sum())

    def locate(self, global_index: int) -> tuple[int, int]:
        """Number of the shard, and of the sample in it, at a global index."""
        epoch, position = divmod(global_index, len(self))
        shards, starts = self._epoch(epoch)
        window = int(np.searchsorted(starts, position, side="right")) - 1
        flat = self._permuted(epoch, window, shards)[position - starts[window]]
        shard = int(np.searchsorted(self.first, flat, side="right")) - 1
        return shard, int(flat - self.first[shard])

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards that hold samples in this epoch's order, and the position where each window starts."""
        if epoch not in self._epochs:
            shards = np.flatnonzero(self.sizes)
            shards = np.random.default_rng([_SHARDS, self.seed, epoch]).permutation(shards)
            ends = np.cumsum(self.sizes[shards])
            starts = (ends - self.sizes[shards])[:: self.window]
            _keep(self._epochs, epoch, (shards, starts), limit=2)
        return self._epochs[epoch]

    def _permuted(self, epoch: int, window: int, shards: np.ndarray) -> np.ndarray:
        """Flat sample numbers of one window in this epoch's order."""
        if (epoch, window) not in self._windows:
            members = shards[window * self.window : (window + 1) * self.window]
            flat = np.concatenate([self.first[shard] + np.arange(int(self.sizes[shard])) for shard in members])
            generator = np.random.default_rng([_WINDOW, self.seed, epoch, window])
            _keep(self._windows, (epoch, window), generator.permutation(flat), limit=3)
        return self._windows[epoch, window]


class WeightedOrder:
    """Sources in given proportions, each in its own endless order.

    Exact, not drawn: of any first m pairs source s has m * weight_s / total, to less than BLOCK pairs.
    """

    BLOCK = 1024
    """Pairs within which the sources' places are permuted."""

    def __init__(self, sources: Sequence[EpochOrder], weights: Sequence[float], seed: int):
        """sources: over shards numbered on from one source to the next."""
        self.sources, self.seed = sources, seed
        total = sum(map(Fraction, weights))
        self.shares = [Fraction(weight) / total for weight in weights]
        self._heaviest = self.shares.index(max(self.shares))
        shards = [len(source.sizes) for source in sources]
        self._first_shard = [sum(shards[:number]) for number in range(len(shards))]
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def locate(self, global_index: int) -> tuple[int, int]:
        """Number of the shard, and of the sample in it, at a global index."""
        number, place = divmod(global_index, self.BLOCK)
        source, index = (int(values[place]) for values in self._block(number))
        shard, sample = self.sources[source].locate(index)
        return self._first_shard[source] + shard, sample

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Source of each place, and which of that source's pairs it is."""
        if number not in self._blocks:
            before, after = self._counts(number * self.BLOCK), self._counts((number + 1) * self.BLOCK)
            counts = [b - a for a, b in zip(before, after, strict=True)]
            sources = np.repeat(np.arange(len(counts)), counts)
            indices = np.concatenate([np.arange(a, b) for a, b in zip(before, after, strict=True)])
            # a permutation of the sources' places alone: each source's own pairs stay in its order
            sources = np.random.default_rng([_SOURCE, self.seed, number]).permutation(sources)
            in_order = np.empty_like(indices)
            in_order[np.argsort(sources, kind="stable")] = indices
            _keep(self._blocks, number, (sources, in_order), limit=2)
        return self._blocks[number]

    def _counts(self, pairs: int) -> list[int]:
        """Pairs of each source among the first `pairs`, which they add up to."""
        counts = [int(pairs * share) for share in self.shares]
        counts[self._heaviest] += pairs - sum(counts)
        return counts


@dataclass(frozen=True)
class Stream:
    """The global indices still to be read, in order, after resuming: some left over below `start`, then all from it.

    Element number j of the stream goes to rank j mod world_size. A fresh run has nothing left over and starts at 0, so
    that element j is global index j.
    """

    left_over: tuple[int, ...] = ()
    start: int = 0

    def global_index(self, element: int) -> int:
        """Global index of element j."""
        behind = element - len(self.left_over)
        return self.left_over[element] if behind < 0 else self.start + behind

    def element(self, global_index: int) -> int:
        """The j of a global index that is in the stream."""
        if global_index < self.start:
            return self.left_over.index(global_index)
        return global_index - self.start + len(self.left_over)

    def resumed(self, following: Sequence[int]) -> Stream:
        """What is left when rank r of len(following) ranks has read its share below global index following[r].

        Ranks that skipped bad samples have run ahead of others, so the rest is not contiguous at first.
        """
        elements = [self.element(index) for index in following]
        low, high = min(elements), max(elements)
        unread = [j for j in range(low, high) if j >= elements[j % len(elements)]]
        left_over = (*map(self.global_index, unread), *self.left_over[high:])
        return Stream(left_over, self.start + max(0, high - len(self.left_over)))


def _keep(cache: OrderedDict, key: object, value: object, limit: int) -> None:
    cache[key] = value
    if len(cache) > limit:
        cache.popitem(last=False)
