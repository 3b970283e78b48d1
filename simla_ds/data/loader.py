"""Batches in one exact global order, whatever the number of ranks and workers, that can be taken up again anywhere.

Workers turn chunks of this rank's consecutive global indices into pairs, or into the reason why a sample cannot be
used; the training process re-batches the in-order stream of good ones. A bad sample so shifts this rank's stream
only, and the position is one global index per rank.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from simla_ds.config import Config, DataConfig
from simla_ds.data.batch import Pair, PairMaker, Tokenizer, as_floats, collate
from simla_ds.data.order import EpochOrder, Order, Stream, WeightedOrder, sample_generator
from simla_ds.data.remote import ShardCache, ShardChanged, open_shards
from simla_ds.data.sample import Reason, SkipSample, stable_hash
from simla_ds.data.shards import ShardFiles, find_shards
from simla_ds.data.shared_index import share
from simla_ds.types import Batch

MOST_OPEN = 1024
"""Shard files that a process keeps open at most."""
RECENT = 20_000
"""Samples of a rank of which data.max_skipped is a share: one lost shard of 10,000 does not end a run."""
CHUNK = 16
"""Most samples that a worker reads between two deliveries."""


class StalledData(RuntimeError):
    """Loader processes have died or say nothing any more."""


@dataclass
class Chunk:
    """What a worker hands over: results in order, their pictures as one tensor each (one piece of shared memory)."""

    results: list[tuple[int, Pair | Reason]]
    """(global index, pair without its views or why it was skipped)."""
    images: Tensor | None
    """(pairs, 3, S, S) uint8; None when every sample was skipped."""
    visual_views: Tensor | None
    """(pairs, 3, V, V) uint8, or None."""
    retried: int
    """Fetches of remote shards that failed and were tried again meanwhile."""

    def unpack(self) -> Iterator[tuple[int, Pair | Reason]]:
        """Give the pairs their views back."""
        row = 0
        for index, result in self.results:
            if isinstance(result, Pair):
                assert self.images is not None
                result.image = self.images[row]
                result.visual_view = None if self.visual_views is None else self.visual_views[row]
                row += 1
            yield index, result


class PairDataset(Dataset):
    """Pairs by global index, over all epochs."""

    def __init__(
        self, files: ShardFiles, maker: PairMaker, order: Order, seed: int, sources: Sequence[tuple[str, int]] = ()
    ):
        """sources: name and number of shards of each of several sources; empty for one."""
        self.files, self.maker, self.order, self.seed = files, maker, order, seed
        self.last_shards = np.cumsum([shards for _, shards in sources])
        self.salts = [stable_hash(name) for name, _ in sources]

    def __getitem__(self, global_index: int) -> Pair:
        """Read one pair. Raises SkipSample."""
        shard, number = self.order.locate(global_index)
        source = int(np.searchsorted(self.last_shards, shard, side="right")) if self.salts else None
        salt = 0 if source is None else self.salts[source]
        pair = read_pair(self.files, self.maker, shard, number, self.seed, global_index, salt)
        pair.source = source
        return pair

    def __getitems__(self, global_indices: list[int]) -> Chunk:
        """Read several, as a worker does."""
        results: list[tuple[int, Pair | Reason]] = []
        images, visual_views = [], []
        retried = self.files.retried
        for index in global_indices:
            try:
                pair = self[index]
            except SkipSample as skip:
                results.append((index, skip.reason))
                continue
            images.append(pair.image)
            if pair.visual_view is not None:
                visual_views.append(pair.visual_view)
            pair.image = pair.visual_view = None
            results.append((index, pair))
        return Chunk(
            results,
            torch.stack(images) if images else None,
            torch.stack(visual_views) if visual_views else None,
            self.files.retried - retried,
        )


def read_pair(
    files: ShardFiles, maker: PairMaker, shard: int, number: int, seed: int, index: int, salt: int = 0
) -> Pair:
    """Sample `number` of a shard with the random draws of (seed, index); salt as read_record's. Raises SkipSample."""
    try:
        members = files.read(shard, number)
    except ShardChanged:
        raise SkipSample("shard changed") from None
    except OSError:
        raise SkipSample("sample unreadable") from None
    return maker.make(files.shards[shard].key(number), members, sample_generator(seed, index), salt)


class StreamLoader(ABC):
    """Endless iterator over one rank's training batches, whatever an item is.

    `skipped` counts, by reason, the samples that were passed over before the last batch handed out; `retried` the
    fetches of remote shards that failed and were tried again.
    """

    def __init__(self, config: Config, dataset: Dataset, epoch_size: int, rank: int = 0, world_size: int = 1):
        """dataset: items by global index; its __getitems__ returns what has `unpack()` (see Chunk).

        Raises ValueError when an epoch holds fewer samples than one batch of all ranks.
        """
        self.config, self.rank, self.world_size = config, rank, world_size
        self.dataset, self.epoch_size = dataset, epoch_size
        self.sources: dict[str, Any] = {}
        """Samples and weight of each of several sources that are mixed, as JSON."""
        self.fingerprint = ""
        """What there is, as a person reads it, with a digest: equal where ranks read the same data."""
        self._check_size()
        self.skipped: Counter[str] = Counter()
        self._recent = deque[str | None]()
        """Why each of the last samples was passed over, if it was."""
        self._recently = Counter[str]()
        """How many of them were, by reason."""
        self.retried = 0
        self._stream = Stream()
        self._element = rank
        """Number in _stream of the next sample that no batch has passed."""
        self._pending: deque[tuple[int, Any]] = deque()
        self._chunks: Iterator[Any] | None = None
        self._ending = multiprocessing.Event()
        """Set when loader processes may be ended."""

    @abstractmethod
    def collate(self, items: list[Any]) -> Any:
        """Make a batch of train.batch_size items."""

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next batch of train.batch_size good samples."""
        pairs: list[Any] = []
        passed: Counter[str] = Counter()
        in_a_row = 0
        while len(pairs) < self.config.train.batch_size:
            result = self._next_result()
            if not isinstance(result, str):  # a Reason is
                self._remember(None)
                pairs.append(result)
                in_a_row = 0
                continue
            passed[result] += 1
            in_a_row += 1
            self._remember(result)
            if self._recently.total() > self.config.data.max_skipped * RECENT:
                self.close()
                raise ValueError(
                    f"{self.config.data.named}: {self._recently.total()} of the last {RECENT} samples of rank "
                    f"{self.rank} are not usable ({_counted(self._recently)}); mend the data or their storage and "
                    f"start again, or raise data.max_skipped, now {self.config.data.max_skipped:g}"
                )
            if in_a_row * self.world_size >= self.epoch_size:  # this rank's share of an epoch
                self.close()
                raise ValueError(f"{self.config.data.named}: none of {in_a_row} samples is usable ({_counted(passed)})")
        self.skipped += passed
        return self.collate(pairs)

    def _remember(self, reason: str | None) -> None:
        self._recent.append(reason)
        gone = self._recent.popleft() if len(self._recent) > RECENT else None
        self._recently.update([reason] if reason else [])
        self._recently.subtract([gone] if gone else [])

    def local_position(self) -> int:
        """Global index of the first sample of this rank that no batch has passed; what is prefetched does not count."""
        return self._stream.global_index(self._element)

    def state_dict(self, positions: Sequence[int] | None = None) -> dict[str, Any]:
        """The position as JSON. positions: local_position() of every rank, needed when there are several."""
        if positions is None and self.world_size == 1:
            positions = [self.local_position()]
        if positions is None or len(positions) != self.world_size:
            raise ValueError(f"state_dict needs local_position() of all {self.world_size} ranks, got {positions}")
        return {
            "epoch_size": self.epoch_size,
            "sources": self.sources,
            "fingerprint": self.fingerprint,
            "seed": self.config.train.seed,
            "shuffle_window": self.config.data.shuffle_window,
            "left_over": list(self._stream.left_over),
            "start": self._stream.start,
            "next": list(positions),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where state_dict() was taken, at the same or another number of ranks: every sample once per epoch.

        Raises ValueError when the data or the order are not those of the state.
        """
        for name, setting, now in (
            ("epoch_size", "samples of the training data", self.epoch_size),
            ("sources", "data.sources", self.sources),
            ("fingerprint", self.config.data.named, self.fingerprint),
            ("seed", "train.seed", self.config.train.seed),
            ("shuffle_window", "data.shuffle_window", self.config.data.shuffle_window),
        ):
            if state.get(name, now) != now:
                raise ValueError(
                    f"{setting}: {now} now, {state[name]} in the checkpoint, whose position in the data means nothing "
                    "here; restore it, or start afresh in another --output"
                )
        self.close()
        self._recent.clear()
        self._recently.clear()
        stream = Stream(tuple(state.get("left_over", ())), state.get("start", 0))
        following = state["next"]
        if len(following) == self.world_size:
            self._stream, self._element = stream, stream.element(following[self.rank])
        else:
            self._stream, self._element = stream.resumed(following), self.rank

    def close(self) -> None:
        """End the workers. Iterating again starts new ones at the current position."""
        self._pending.clear()
        self._ending.set()
        self._chunks = None  # torch's iterator ends its processes when it is dropped

    def _next_result(self) -> Any:
        if self._chunks is None:
            self._chunks = iter(self._data_loader())
        while not self._pending:
            with stalled_data(f"rank {self.rank}: {self.config.data.named}", self.config.data):
                chunk = next(self._chunks)
            self.retried += chunk.retried
            self._pending.extend(chunk.unpack())
        _, result = self._pending.popleft()
        self._element += self.world_size
        return result

    def _data_loader(self) -> DataLoader:
        batch_size = self.config.train.batch_size
        chunks = _chunked(self._stream, self._element, self.world_size, min(CHUNK, batch_size))
        self._ending = multiprocessing.Event()
        atexit.register(self._ending.set)  # before multiprocessing ends what is left, and waits for it
        return read_ahead(self.dataset, chunks, self.config.data, batch_size, self._ending)

    def _check_size(self) -> None:
        batch_size = self.config.train.batch_size
        if self.epoch_size < batch_size * self.world_size:
            raise ValueError(
                f"{self.config.data.named} holds {self.epoch_size} samples, fewer than one batch of {batch_size} pairs "
                f"on {self.world_size} rank(s); set train.batch_size <= {self.epoch_size // self.world_size} or add "
                "data"
            )


class PairLoader(StreamLoader):
    """Pretraining's batches, out of the shards of data.train."""

    def __init__(self, config: Config, tokenizer: Tokenizer, visual_view_size: int, rank: int = 0, world_size: int = 1):
        """visual_view_size: side in pixels of Batch.visual_view; 0 leaves it out.

        Raises ValueError when data.train matches no shards or holds fewer samples than one batch of all ranks.
        """
        data, seed = config.data, config.train.seed
        found = {
            name: find_shards(source.shards, f"data.sources.{name}", True) for name, source in data.sources.items()
        }
        paths = [*chain(*found.values())] if found else find_shards(data.train, remote=True)
        files = _open(config, paths)
        sizes = [len(shard) for shard in files.shards]
        counts = [(name, len(shards)) for name, shards in found.items()]
        order = make_order(config, sizes, counts)
        maker = PairMaker(config, tokenizer, visual_view_size, train=True)
        super().__init__(config, PairDataset(files, maker, order, seed, counts), len(order), rank, world_size)
        for name, shards in counts:
            self.sources[name] = {"samples": sum(sizes[:shards]), "weight": data.sources[name].weight}
            sizes = sizes[shards:]
        # of an address without its query, which may be signed anew for each run
        names = "\n".join(f"{Path(shard.path.partition('?')[0]).name} {len(shard)}" for shard in files.shards)
        self.fingerprint = f"{len(files.shards)} shards, {sum(map(len, files.shards))} samples, {stable_hash(names):x}"
        self.vocabulary = tokenizer.vocabulary
        self.retried = files.retried
        # A shard's damage is one skip of the whole run, hence of one rank
        self.skipped.update(shard.problem for shard in files.shards if shard.problem and rank == 0)

    def collate(self, items: list[Pair]) -> Batch:
        """Stack pairs (see data.batch.collate); captions that are exchanged between ranks must be of one length."""
        shared = self.world_size > 1 and self.config.objectives.itm.negatives == "global"
        return collate(items, self.vocabulary, pad_to=self.config.data.max_tokens if shared else 0)


def make_order(config: Config, sizes: Sequence[int], sources: Sequence[tuple[str, int]]) -> Order:
    """The order of shards of these sizes; sources: name and number of shards of each of several."""
    window, seed = config.data.shuffle_window, config.train.seed
    weights = [config.data.sources[name].weight for name, _ in sources]
    if not any(weights):
        return EpochOrder(sizes, window, seed)
    orders, first = [], 0
    for number, (name, shards) in enumerate(sources):
        orders.append(EpochOrder(sizes[first : first + shards], window, seed + (number << 32)))
        if not len(orders[-1]):
            raise ValueError(f"data.sources.{name}: none of {shards} shards holds a sample; take the source out")
        first += shards
    return WeightedOrder(orders, weights, seed)


def read_ahead(
    dataset: Dataset, chunks: Iterable[list[int]], data: DataConfig, batch_size: int, ending: Event
) -> DataLoader:
    """What dataset.__getitems__ makes of each chunk of indices, in order, by data.workers processes; 0: by this one.

    They are two batches ahead at least. ending: to be set when they may be ended; until then they outlive a SIGTERM.
    """
    workers, chunk = data.workers, min(CHUNK, batch_size)
    return DataLoader(
        dataset,
        batch_sampler=chunks,
        num_workers=workers,
        timeout=data.timeout if workers else 0,
        prefetch_factor=max(2, -(-2 * batch_size // (chunk * workers))) if workers else None,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_start_worker, ending),
        generator=torch.Generator(),  # or starting workers would draw from the generator that dropout uses
    )


@contextmanager
def stalled_data(what: str, data: DataConfig) -> Iterator[None]:
    """Call torch's word for a worker that is silent or gone StalledData, naming what was read."""
    try:
        yield
    except RuntimeError as error:
        if not data.workers:
            raise
        raise StalledData(
            f"{what}: a loader process is stuck or gone (data.timeout={data.timeout} s): {str(error).splitlines()[0]}"
        ) from error


def eval_batches(
    config: Config,
    shards: str,
    tokenizer: Tokenizer,
    visual_view_size: int,
    *,
    limit: int = 0,
    batch_size: int = 0,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Batch, list[dict[str, str]]]]:
    """Held-out batches: whole pictures, masks and draws fixed by (seed, number of the sample), in file order.

    shards: as data.val. limit: look at the first so many samples only (0: all); those that cannot be used are left
    out. batch_size: 0 takes eval.batch_size; the last batch may be smaller. Rank r gets samples r, r + world_size, ...
    Yields each batch with `key` and (cleaned) `caption` of its samples.
    """
    files = _open(config, find_shards(shards, "data.val", remote=True))
    maker = PairMaker(config, tokenizer, visual_view_size, train=False)
    places = [(shard, number) for shard, index in enumerate(files.shards) for number in range(len(index))]
    pairs: list[Pair] = []

    def finished() -> tuple[Batch, list[dict[str, str]]]:
        batch = as_floats(collate(pairs, tokenizer.vocabulary))
        return batch, [{"key": pair.key, "caption": pair.caption} for pair in pairs]

    for index in range(rank, min(limit or len(places), len(places)), world_size):
        try:
            pairs.append(read_pair(files, maker, *places[index], seed, index))
        except SkipSample:
            continue
        if len(pairs) == (batch_size or config.eval.batch_size):
            yield finished()
            pairs = []
    if pairs:
        yield finished()


def _open(config: Config, paths: list[str]) -> ShardFiles:
    """Shards, wherever they are."""
    data, folder = config.data, Path(config.data.cache_dir).expanduser()
    cache = ShardCache(folder, int(data.cache_gb * 1e9), data.fetch_tries)
    # the shards that are shuffled together are read by turns, and those of the next window already
    keep_open = min(2 * data.shuffle_window * max(1, len(data.sources)), MOST_OPEN)
    # what chose a shard's samples has done so: every process would hold it
    shards = share((replace(shard, note="") for shard in open_shards(paths, cache)), folder / "indexes")
    return ShardFiles(shards, keep_open, cache)


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common() if count)


def _chunked(stream: Stream, element: int, step: int, size: int) -> Iterator[list[int]]:
    """Global indices of every step-th element of the stream, `size` at a time, without end."""
    while True:
        yield [stream.global_index(element + i * step) for i in range(size)]
        element += size * step


def _as_it_is(chunk: Any) -> Any:
    return chunk


def _start_worker(ending: Event, _worker: int) -> None:
    """Leave Ctrl-C and the launcher's SIGTERM to the whole tree to the training process: it saves, then ends us."""

    def end(*_: Any) -> None:
        if ending.is_set():
            os._exit(0)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
