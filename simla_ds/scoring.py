"""A model over shards, one after the other: `simla embed` writes features, `simla score` what ITC and ITM say of pairs.

    OUT/features-000000.parquet | features-000000.{image,text}.npy, .jsonl      a row per caption
    OUT/scores-000000.jsonl     shard-000000.tar (pairs above the thresholds)
    OUT/record-000000.json      counts of the shard; it is done when this is there
    OUT/run.json                model, shards and options;  OUT/manifest.json   all counts, at the end

A run that was stopped goes on after its last whole shard, to the same bytes: no batch reaches over two shards.
B pictures, T captions, E width of the contrastive space.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

from simla_ds.data.outputs import Rows, copy_pairs, write_features, write_text
from simla_ds.data.processor import SimlaProcessor
from simla_ds.data.samples import Sample, Samples, open_files
from simla_ds.data.shards import ShardFiles, shard_name
from simla_ds.hub import load_model_folder, resolve_weights
from simla_ds.model.simla import Simla

MANIFEST, RUN = "manifest.json", "run.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What decides the bytes written, beside model and shards."""

    weights: Literal["student", "teacher"] = "student"
    batch_size: int = 64
    """Pictures a forward."""
    format: Literal["parquet", "npy"] = "parquet"
    """Of features."""
    min_itc: float | None = None
    """Least cosine of a pair that is copied into OUT's own shards."""
    min_itm: float | None = None
    """Least probability, likewise."""

    @property
    def filters(self) -> bool:
        """Whether shards are written."""
        return self.min_itc is not None or self.min_itm is not None

    def keeps(self, itc: float, itm: float) -> bool:
        """Whether a pair is above the thresholds."""
        return itc >= (-1.0 if self.min_itc is None else self.min_itc) and itm >= (self.min_itm or 0.0)


def embed(shards: str, model: Path, out: Path, options: Options, workers: int = 1) -> dict[str, Any]:
    """Write features of all pictures and captions of shards; return the manifest. Raises ValueError, OSError."""
    if options.format == "parquet" and find_spec("pyarrow") is None:
        raise ValueError("--format parquet needs pyarrow: pip install 'simla_ds[data]', or take npy")

    @torch.no_grad()
    def forward(network: Simla, image: Tensor, ids: Tensor, mask: Tensor, of: Tensor) -> dict[str, Tensor]:
        features = network.image_feature(network.image_encoder(image)).index_select(0, of)
        return {"image_feature": features, "text_feature": _text_feature(network, ids, mask)}

    def write(network: Simla, files: ShardFiles, number: int, rows: Rows) -> int:
        write_features(out / f"features-{number:06d}", rows, network.config.projection_size, options.format)
        return len(rows)

    return _run("embed", forward, write, shards, model, out, options, workers)


def score(shards: str, model: Path, out: Path, options: Options, workers: int = 1) -> dict[str, Any]:
    """Write the cosine (itc) and ITM's probability (itm) of every pair of shards; return the manifest.

    With thresholds also shards of the pairs above them; `kept` counts captions. Raises ValueError, OSError.
    """

    @torch.no_grad()
    def forward(network: Simla, image: Tensor, ids: Tensor, mask: Tensor, of: Tensor) -> dict[str, Tensor]:
        encoded = network.image_encoder(image)
        features = network.image_feature(encoded).index_select(0, of)
        hidden, _ = network.text_over_image(ids, mask, encoded, of)
        return {
            "itc": (features * _text_feature(network, ids, mask)).sum(-1),
            "itm": network.match_head(hidden[:, 0]).float().softmax(-1)[:, 1],
        }

    def write(network: Simla, files: ShardFiles, number: int, rows: Rows) -> int:
        for row in rows:
            row.update({name: round(float(row[name]), 6) for name in ("itc", "itm")})
        said = [{name: row[name] for name in ("key", "caption", "itc", "itm")} for row in rows]
        write_text(out / f"scores-{number:06d}.jsonl", "".join(f"{json.dumps(row)}\n" for row in said))
        kept = [row for row in rows if options.keeps(row["itc"], row["itm"])]
        if options.filters:
            copy_pairs(files, number, kept, out / shard_name(number))
        return len(kept)

    return _run("score", forward, write, shards, model, out, options, workers)


def _run(
    command: str,
    forward: Callable[[Simla, Tensor, Tensor, Tensor, Tensor], dict[str, Tensor]],
    write: Callable[[Simla, ShardFiles, int, Rows], int],
    shards: str,
    model: Path,
    out: Path,
    options: Options,
    workers: int,
) -> dict[str, Any]:
    """Go through the shards that have no record yet; write the manifest when all have one."""
    folder = resolve_weights(model, options.weights)
    processor = SimlaProcessor.from_pretrained(folder)
    network, _ = load_model_folder(folder, device="auto")
    device = next(network.parameters()).device
    paths, files = open_files(shards)
    with open(folder / "model.safetensors", "rb") as file:
        weights = hashlib.file_digest(file, "sha256").hexdigest()
    sizes, contents = [len(shard) for shard in files.shards], hashlib.sha256()
    for path, shard in zip(paths, files.shards, strict=True):
        contents.update(Path(path).name.encode() + shard.names.tobytes() + shard.members.tobytes())
    identity = {"samples": sum(sizes), "data_sha256": contents.hexdigest()}
    _same_run(out, {"command": command, "model_sha256": weights, **identity, "options": vars(options)})
    records = {number: out / f"record-{number:06d}.json" for number in range(len(paths))}
    left = [number for number, record in records.items() if not record.is_file()]
    dataset = Samples(files, [(number, i) for number in left for i in range(sizes[number])], processor)
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, prefetch_factor=64 if workers else None)
    total, samples = sum(sizes), iter(loader)
    with tqdm(total=total, initial=total - len(dataset), unit=" pictures", disable=not sys.stderr.isatty()) as bar:
        for number in left:
            rows, skipped, pictures = [], Counter[str](), 0
            for batch in _batches(samples, sizes[number], options.batch_size):
                bar.update(len(batch))
                skipped.update(sample.reason for sample in batch if sample.reason)
                usable = [sample for sample in batch if not sample.reason]
                pictures += len(usable)
                rows += _rows(forward, network, usable, processor, device)
            if problem := files.shards[number].problem:
                skipped[problem] += 1
            kept = write(network, files, number, rows)
            record = {"shard": paths[number], "pictures": pictures, "captions": len(rows), "kept": kept}
            write_text(records[number], json.dumps({**record, "skipped": dict(skipped)}))
    return _finish(out, [json.loads(record.read_text()) for record in records.values()])


def _batches(samples: Iterator[Sample], count: int, size: int) -> Iterator[list[Sample]]:
    for start in range(0, count, size):
        yield [next(samples) for _ in range(min(size, count - start))]


def _rows(
    forward: Callable[..., dict[str, Tensor]],
    network: Simla,
    samples: list[Sample],
    processor: SimlaProcessor,
    device: torch.device,
) -> Rows:
    """Run one batch: B pictures and all T captions of theirs."""
    if not samples:
        return []
    image = torch.stack([sample.image for sample in samples if sample.image is not None])
    of = torch.tensor([number for number, sample in enumerate(samples) for _ in sample.captions])
    tokens = [torch.tensor(ids) for sample in samples for ids in sample.tokens]
    ids = pad_sequence(tokens, batch_first=True, padding_value=processor.tokenizer.vocabulary.pad)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(row) for row in tokens])[:, None]
    made = forward(network, *(tensor.to(device) for tensor in (image, ids, mask, of)))
    columns = {name: values.float().cpu().numpy() for name, values in made.items()}
    said = [(sample, number) for sample in samples for number in range(len(sample.captions))]
    return [
        {
            "key": sample.key,
            "place": sample.place[1],
            "caption_number": number,
            "caption": sample.captions[number],
            **{name: values[row] for name, values in columns.items()},
        }
        for row, (sample, number) in enumerate(said)
    ]


def _text_feature(network: Simla, ids: Tensor, mask: Tensor) -> Tensor:
    return network.text_feature(network.stream(network.stream.embeddings(ids), mask)[0])


def _finish(out: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
    skipped: Counter[str] = Counter()
    for record in records:
        skipped.update(record["skipped"])
    totals = {name: sum(record[name] for record in records) for name in ("pictures", "captions", "kept")}
    manifest = {**totals, "skipped": dict(skipped), "shards": records}
    write_text(out / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    return manifest


def _same_run(out: Path, wanted: dict[str, Any]) -> None:
    """Start OUT, or refuse one that another command is writing or has written."""
    path = out / RUN
    if not path.is_file():
        if out.is_dir() and any(out.iterdir()):
            raise FileExistsError(f"{out} holds other files: name a new folder")
        out.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(wanted))
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in wanted.items():
        if found.get(name) != value:
            raise FileExistsError(
                f"{out} was begun with another {name} ({found.get(name)}, now {value}): remove it or name a new folder"
            )
