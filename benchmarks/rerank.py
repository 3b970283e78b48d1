"""ITM re-ranking: `python -m benchmarks rerank`.

Pairs of pictures and captions at base size (ViT-B/16's width, a BERT-base stack, random weights), scored as evaluation
does it (each picture's keys and values projected once for its captions, no padding, [CLS] alone in the last layer)
against every layer anew for each pair, captions padded. Then the memory that 1,000 pictures x 5,000 captions take, in a
process of its own: pictures' tokens are made up, captions run through a stack of one layer.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.agreement import SAME_ARITHMETIC, largest_difference, objection
from benchmarks.command import add_timing, conclude, new_result, parse_timing
from benchmarks.peak_memory import fresh_environment, peak_mib, restart_peak
from benchmarks.step_sizes import COCO_TOKENS, SIZES, changed
from benchmarks.timing import Clock, alternate, environment
from simla_ds.config import ModelConfig
from simla_ds.downstream.gallery import Gallery, PictureTokens, match_scores
from simla_ds.downstream.retrieval import retrieve
from simla_ds.model.simla import Simla

CASES = {"25 full tokens": (25.0, 0.0, 25), "14 of 30 tokens": (14.0, COCO_TOKENS[1], 30)}
"""Mean and spread of the captions' tokens, and the length that the plain order pads to."""
PICTURES, CAPTIONS = 2, 32
"""Pictures, and candidate captions of each."""
BATCH = 256
"""Pairs of a picture at a time, as `retrieve` has it: here all captions of one."""
PLAIN_BATCHES = (16, CAPTIONS, PICTURES * CAPTIONS)
"""Pairs at a time of the plain order, whose best counts: few stay in a CPU's caches, many fill a card."""


def random_gallery(config: ModelConfig, mean: float, spread: float) -> Gallery:
    """Return pictures' tokens as normalised as an encoder's and captions of random words."""
    generator = torch.Generator().manual_seed(0)
    tokens = PictureTokens()
    tokens.append(torch.randn(PICTURES, config.vision.patches + 1, config.vision.width, generator=generator))
    lengths = (mean + spread * torch.randn(CAPTIONS, generator=generator)).round().long().clamp(4, 30)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.randint(1000, config.vocabulary.size, mask.shape, generator=generator)
    feature = torch.zeros(PICTURES, config.projection_size)
    return Gallery(
        image_feature=feature,
        image_tokens=tokens,
        text_feature=feature[:1].expand(CAPTIONS, -1),
        input_ids=ids.masked_fill(~mask, 0),
        text_mask=mask,
        text_of_caption=torch.arange(CAPTIONS),
        image_of_caption=torch.zeros(CAPTIONS, dtype=torch.long),
    )


@torch.no_grad()
def every_layer_anew(model: Simla, gallery: Gallery, image: Tensor, text: Tensor, width: int, batch: int) -> Tensor:
    """Score pairs (P,) as a plain loop over batches of pairs does: (P,) float32, on the host."""
    assert gallery.image_tokens is not None
    device, scores = next(model.parameters()).device, []
    pad = (0, width - gallery.text_mask.shape[1])
    ids, mask = nn.functional.pad(gallery.input_ids, pad), nn.functional.pad(gallery.text_mask, pad)
    for images, texts in zip(image.split(batch), text.split(batch), strict=True):
        pictures, of_pair = images.unique_consecutive(return_inverse=True)  # what is timed is layers, not reading
        tokens = gallery.image_tokens.read(pictures).to(device)[of_pair.to(device)]
        hidden, _ = model.text_over_image(ids[texts].to(device), mask[texts].to(device), tokens)
        scores.append(model.match_head(hidden[:, 0])[:, 1].float().cpu())
    return torch.cat(scores)


def compare(repeats: int, clock: Clock, size: str) -> dict[str, dict[str, Any]]:
    """Time both orders in turn, for each case, the plain one with several batches; check that they score alike."""
    found = {}
    for name, (mean, spread, width) in CASES.items():
        torch.manual_seed(0)
        config = SIZES[size].model
        model, gallery = Simla(config).eval().to(clock.device), random_gallery(config, mean, spread)
        image = torch.arange(PICTURES).repeat_interleave(CAPTIONS)
        text = torch.arange(CAPTIONS).repeat(PICTURES)
        contenders: dict[str, Callable[[], Tensor]] = {
            f"plain, {batch} pairs a batch": partial(every_layer_anew, model, gallery, image, text, width, batch)
            for batch in PLAIN_BATCHES
        }
        contenders["ours"] = partial(match_scores, model, gallery, image, text, batch_size=BATCH)
        scores = {contender: run() for contender, run in contenders.items()}  # which warms up
        times = alternate(contenders, repeats, clock.time, warmup=0)
        medians = {contender: time["median"] for contender, time in times.items()}
        ours = medians.pop("ours")
        plain = min(medians, key=medians.__getitem__)  # its best: what a user would have chosen
        found[name] = {
            "plain_ms_per_pair": medians[plain] / len(image),
            "ours_ms_per_pair": ours / len(image),
            "times_as_fast": medians[plain] / ours,
            "ms_per_pair": {contender: time["median"] / len(image) for contender, time in times.items()},
            "score_difference": largest_difference(
                [scores["ours"]] * len(medians), [scores[other] for other in medians]
            ),
            "mean_tokens": float(gallery.text_mask.sum(1).float().mean()),
        }
    return found


class MadeUpTokens(nn.Module):
    """An image encoder that costs nothing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.shape = (config.vision.patches + 1, config.vision.width)

    def forward(self, image: Tensor) -> Tensor:
        """Return (B, N, D) random tokens."""
        return torch.randn(len(image), *self.shape)


def made_up_batches(
    config: ModelConfig, pictures: int, batch: int = 20, captions: int = 5
) -> Iterator[Mapping[str, Any]]:
    """Yield pictures with five captions of 14 words each."""
    side = config.vision.image_size
    for start in range(0, pictures, batch):
        count = batch * captions
        yield {
            "image": torch.zeros(1, 3, side, side).expand(count, -1, -1, -1),
            "input_ids": torch.randint(1000, config.vocabulary.size, (count, 14)),
            "text_mask": torch.ones(count, 14, dtype=torch.bool),
            "image_id": torch.arange(start, start + batch).repeat_interleave(captions),
        }


def print_growth(pictures: int, rerank: int) -> None:
    """Print the MiB that retrieval adds to this process: features, tokens of all pictures at 384 px, both rankings."""
    base = SIZES["full"].model
    config = changed(base, vision__image_size=384, vision__layers=1, stream__layers=1, stream__max_positions=600)
    model = Simla(config).eval()
    model.image_encoder = MadeUpTokens(config)  # pyright: ignore[reportAttributeAccessIssue]  a stand-in
    retrieve(model, made_up_batches(config, 20), rerank=2)  # what libraries keep
    before = restart_peak()
    result = retrieve(model, made_up_batches(config, pictures), rerank=rerank)
    print(result.pictures, result.captions, peak_mib() - before)


def memory(pictures: int, rerank: int) -> dict[str, float]:
    """Measure print_growth in a fresh process."""
    command = [sys.executable, "-m", "benchmarks", "rerank", "--growth", str(pictures), str(rerank)]
    ran = subprocess.run(
        command, cwd=Path(__file__).parent.parent, env=fresh_environment(), capture_output=True, text=True, check=True
    )
    counts = ran.stdout.split()
    return {
        "pictures": float(counts[0]),
        "captions": float(counts[1]),
        "rerank": rerank,
        "growth_mib": float(counts[2]),
    }


def describe(result: dict[str, Any]) -> str:
    """Return what is printed."""
    lines = [
        f"{name}: {at['times_as_fast']:.2f} times as fast ({at['plain_ms_per_pair']:.3g} -> "
        f"{at['ours_ms_per_pair']:.3g} ms a pair), scores {at['score_difference']:.0e} apart; "
        + ", ".join(f"{contender} {ms:.3g}" for contender, ms in at["ms_per_pair"].items())
        for name, at in result["speed"].items()
    ]
    at = result["memory"]
    if at:
        lines.append(
            f"{at['pictures']:.0f} pictures x {at['captions']:.0f} captions, {at['rerank']:.0f} re-ranked: memory grew "
            f"by {at['growth_mib']:.0f} MiB on the CPU (made-up pictures' tokens at 384 px, a stack of one layer)"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and on request store."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks rerank", description=(__doc__ or "").splitlines()[0])
    add_timing(parser, repeats=3, of="timed rounds")
    parser.add_argument("--size", choices=SIZES, default="full", help="of the model (default: full)")
    parser.add_argument(
        "--pictures", type=int, default=1000, metavar="N", help="for memory; 0: leave out (default: 1000)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="store the result")
    parser.add_argument("--growth", type=int, nargs=2, help=argparse.SUPPRESS)
    arguments = parse_timing(parser, argv)
    if arguments.growth:
        print_growth(*arguments.growth)
        return 0
    speed = compare(arguments.repeats, Clock(arguments.clock, arguments.device), arguments.size)
    result = new_result(
        "rerank",
        environment(arguments.device),
        clock=arguments.clock,
        speed=speed,
        memory=memory(arguments.pictures, rerank=1) if arguments.pictures else {},
        objections=[
            line
            for name, at in speed.items()
            for line in objection(f"a score of {name}", at["score_difference"], SAME_ARITHMETIC)
        ],
    )
    return conclude(result, describe(result), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
