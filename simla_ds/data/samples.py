"""Samples of shards as models read them outside training: a whole picture with all of its captions, in file order."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from simla_ds.config import DataConfig
from simla_ds.data.processor import SimlaProcessor
from simla_ds.data.remote import ShardCache, open_shards
from simla_ds.data.sample import SkipSample, clean_caption, read_picture, read_record
from simla_ds.data.shards import ShardFiles, find_shards


@dataclass
class Sample:
    """A picture with its captions, or why there is none."""

    place: tuple[int, int]
    """Number of the shard, and of the sample in it."""
    key: str
    image: Tensor | None = None
    """(3, S, S) float32, normalised."""
    image_id: str | None = None
    """What samples of one picture share; None: the picture is this sample's alone."""
    captions: tuple[str, ...] = ()
    """As they are in the shard."""
    tokens: list[list[int]] = field(default_factory=list)
    reason: str = ""


class Samples(Dataset):
    """All samples of some shards, in file order."""

    def __init__(self, files: ShardFiles, places: list[tuple[int, int]], processor: SimlaProcessor):
        self.files, self.places, self.processor = files, places, processor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> Sample:
        shard, place = self.places[number]
        sample = Sample((shard, place), self.files.shards[shard].key(place))
        try:
            members = self.files.read(shard, place)
            record = read_record(sample.key, members)
            sample.image = self.processor(read_picture(members))["pixel_values"][0]
        except OSError:
            sample.reason = "sample unreadable"
        except SkipSample as skip:
            sample.reason = skip.reason
        else:
            sample.captions, sample.image_id = record.captions, record.image_name
            cleaned = [clean_caption(caption, self.processor.max_words) for caption in record.captions]
            sample.tokens = [self.processor.tokenizer.encode(caption)[0] for caption in cleaned]
        return sample


def open_files(shards: str, name: str = "SHARDS") -> tuple[list[str], ShardFiles]:
    """Return the addresses of shards, wherever they are, and the shards; ValueError calls them by `name`."""
    paths, data = find_shards(shards, name, remote=True), DataConfig()
    cache = ShardCache(Path(data.cache_dir).expanduser(), int(data.cache_gb * 1e9), data.fetch_tries)
    return paths, ShardFiles([*open_shards(paths, cache)], cache=cache)
