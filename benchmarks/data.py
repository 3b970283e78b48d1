"""From JPEG bytes to training views, in pictures per second of one core: `python -m benchmarks data`.

The contenders make 256 px views of the same pictures in one process on one thread, in turns, and are timed by its CPU
seconds: the others on the machine do not count. The pictures are the embedded kit's photographs, which are small: set
side by side at about their own size ("640x480": 4, "2000x1500": 25), as detailed as a photograph can be, and once a
single one enlarged to six times its width, with far less in it than a camera sees. Real ones lie between: compare the
bits per pixel.
"""

from __future__ import annotations

import argparse
import io
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, features
from torchvision import transforms
from webdataset.compat import WebDataset

from benchmarks.command import conclude, new_result
from benchmarks.timing import CPU, Clock, alternate, environment
from simla_ds.data.sample import open_picture
from simla_ds.data.scenes.kit import kit
from simla_ds.data.shards import ShardFiles, open_shard, write_shards
from simla_ds.data.transforms import CLIP_MEAN, CLIP_STD, TrainTransform, normalise

SIZE = 256
CROP_SCALE = (0.2, 1.0)
"""The paper's."""
VISUAL_VIEW = 128
"""Side of the view that DALL-E's tokens are made of, on a grid of 16 x 16."""
RANDAUGMENT = (2, 7)
"""Operations and magnitude, the paper's."""
PICTURES = {"640x480": (640, 480, 2), "2000x1500": (2000, 1500, 5), "2000x1500, enlarged": (2000, 1500, 1)}
"""Width, height, photographs along each side."""
QUALITY = 90
OFFICIAL, OURS, LIMIT = "PIL + torchvision", "ours", "scaled decode alone"
AUGMENTED = ", RandAugment"


def make_pictures(width: int, height: int, tiles: int, count: int) -> list[bytes]:
    """JPEGs (quality 90, 4:2:0) of tiles x tiles of the kit's photographs."""
    rng = np.random.default_rng(0)
    photos = [photo.file for photo in kit().photos.values() if not photo.painting]
    tile = (width // tiles, height // tiles)
    made = []
    for _ in range(count):
        sheet = Image.new("RGB", (width, height))
        for place, photo in enumerate(rng.choice(len(photos), tiles * tiles)):
            picture = ImageOps.fit(kit().background(photos[photo], tile[1]), tile, Image.Resampling.LANCZOS)
            sheet.paste(picture, (place % tiles * tile[0], place // tiles * tile[1]))
        buffer = io.BytesIO()
        sheet.save(buffer, "JPEG", quality=QUALITY)
        made.append(buffer.getvalue())
    return made


def official_transform(randaugment: bool) -> Callable[[Image.Image], torch.Tensor]:
    """The published pipeline in torchvision's words; its OpenCV RandAugment is replaced by torchvision's."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, CROP_SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            *([transforms.RandAugment(*RANDAUGMENT)] if randaugment else []),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )


def from_files(paths: list[Path], transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """What ALBEF's data sets do: a file per picture, PIL, RGB, transform; then a batch."""
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def from_webdataset(shard: Path, transform: Callable[[Image.Image], torch.Tensor]) -> torch.Tensor:
    """webdataset's own reader and picture decoder, then the same transform."""
    samples: Any = WebDataset(str(shard), shardshuffle=False).decode("pil")
    return torch.stack([transform(sample["jpg"]) for sample in samples])


def from_shard(files: ShardFiles, transform: TrainTransform, rng: np.random.Generator) -> torch.Tensor:
    """This project's reader and transform, and the normalising of a batch."""
    views = []
    for number in range(len(files.shards[0])):
        data = files.read(0, number)["jpg"]
        assert data is not None
        views.append(torch.from_numpy(transform(open_picture(data), "", rng)[0]))
    return normalise(torch.stack(views))


def decode_scaled(pictures: list[bytes]) -> list[Image.Image]:
    """libjpeg-turbo alone: whole, at the smallest size whose shorter side is not below the view's."""

    def decoded(data: bytes) -> Image.Image:
        picture = Image.open(io.BytesIO(data))
        shrink = max(s for s in (1, 2, 4, 8) if s == 1 or min(picture.size) // s >= SIZE)
        picture.draft("RGB", (picture.width // shrink, picture.height // shrink))
        picture.load()
        return picture

    return [decoded(data) for data in pictures]


def our_transform(operations: int, visual_view: int = 0) -> TrainTransform:
    """As a run with the paper's settings makes it."""
    return TrainTransform(
        image_size=SIZE,
        visual_view_size=visual_view,
        crop_scale=CROP_SCALE,
        flip=0.5,
        augment_ops=operations,
        augment_magnitude=RANDAUGMENT[1],
    )


def contenders(pictures: list[bytes], folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, each over all pictures."""
    (shard,) = write_shards(((f"{i:04d}", {"jpg": data}) for i, data in enumerate(pictures)), folder, len(pictures))
    paths = [folder / f"{i:04d}.jpg" for i in range(len(pictures))]
    for path, data in zip(paths, pictures, strict=True):
        path.write_bytes(data)
    files, rng = ShardFiles([open_shard(str(shard))]), np.random.default_rng(0)
    plain, augmenting = official_transform(False), official_transform(True)
    ours, ours_augmenting, both = our_transform(0), our_transform(RANDAUGMENT[0]), our_transform(0, VISUAL_VIEW)
    return {
        OFFICIAL: lambda: from_files(paths, plain),
        "webdataset": lambda: from_webdataset(shard, plain),
        OURS: lambda: from_shard(files, ours, rng),
        "ours, and the visual tokeniser's view": lambda: from_shard(files, both, rng),
        OFFICIAL + AUGMENTED: lambda: from_files(paths, augmenting),
        OURS + AUGMENTED: lambda: from_shard(files, ours_augmenting, rng),
        LIMIT: lambda: decode_scaled(pictures),
    }


def measure(names: Iterable[str], count: int, repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each kind of pictures with what was found."""
    for name in names:
        width, height, tiles = PICTURES[name]
        pictures = make_pictures(width, height, tiles, count)
        with tempfile.TemporaryDirectory() as folder:
            timed = alternate(contenders(pictures, Path(folder)), repeats, Clock("cpu").time)
        speed = {who: 1e3 * count / times["median"] for who, times in timed.items()}
        yield (
            name,
            {
                "bits_per_pixel": 8 * sum(map(len, pictures)) / (count * width * height),
                "pictures_per_second_per_core": speed,
                "ratio_vs_pil_torchvision": speed[OURS] / speed[OFFICIAL],
                "ratio_vs_webdataset": speed[OURS] / speed["webdataset"],
                "ratio_with_randaugment": speed[OURS + AUGMENTED] / speed[OFFICIAL + AUGMENTED],
                "share_of_scaled_decode": speed[OURS] / speed[LIMIT],
            },
        )


def describe(found: dict[str, dict[str, Any]]) -> str:
    """Return a Markdown table: pictures per second of each contender, then ratios."""
    lines = ["| pictures/s per core | " + " | ".join(found) + " |", "|---" * (1 + len(found)) + "|"]
    for who in next(iter(found.values()))["pictures_per_second_per_core"]:
        speeds = [result["pictures_per_second_per_core"][who] for result in found.values()]
        lines.append(f"| {who} | " + " | ".join(f"{speed:.0f}" for speed in speeds) + " |")
    for name in next(iter(found.values())):
        if name != "pictures_per_second_per_core":
            values = [f"{result[name]:.2f}" for result in found.values()]
            lines.append(f"| {name.replace('_', ' ')} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks data", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help=f"kinds with TEXT in their name: {list(PICTURES)}")
    parser.add_argument("--pictures", type=int, default=16, metavar="N", help="of each kind (default: 16)")
    parser.add_argument("--repeats", type=int, default=15, metavar="N", help="timed rounds (default: 15)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the result")
    arguments = parser.parse_args(argv)
    names = [name for name in PICTURES if arguments.only in name]
    if not names or min(arguments.pictures, arguments.repeats) < 1:
        parser.error(f"--only must fit one of {', '.join(PICTURES)}; --pictures and --repeats must be >= 1")
    torch.set_num_threads(1)
    found = {}
    for name, result in measure(names, arguments.pictures, arguments.repeats):
        found[name] = result
        print(f"{name}: {result['ratio_vs_pil_torchvision']:.2f} times {OFFICIAL}", file=sys.stderr, flush=True)
    where = {**environment(CPU), "pillow": Image.__version__, "libjpeg_turbo": features.version("libjpeg_turbo")}
    result = new_result("data", where, clock="cpu", view=SIZE, jpeg_quality=QUALITY, pictures=found)
    return conclude(result, describe(found), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
