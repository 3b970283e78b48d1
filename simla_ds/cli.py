"""The console command `simla`.

Exit status: 0 done; 1 failed (a check out of tolerance); 2 wrong use or bad input, with one line on stderr that says
what to change. Each command imports what it needs when it runs, so that `simla --help` is instant.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from simla_ds import __version__
from simla_ds.config import Config

DONE, FAILED, WRONG_USE = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    arguments.settings = rest  # a recipe's keys, behind the options of `plan`
    if rest and arguments.run is not _plan:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return arguments.run(arguments)
    except (ValueError, OSError) as error:  # bad input, a missing file, a full disk: not a bug, so no traceback
        print(f"simla: error: {' '.join(str(error).split())}", file=sys.stderr)
        return WRONG_USE


def _prepare_scenes(arguments: argparse.Namespace) -> int:
    from simla_ds.data.scenes.prepare import prepare_scenes

    prepare_scenes(
        arguments.out, train=arguments.train, seed=arguments.seed, size=arguments.size, workers=arguments.workers
    )
    return DONE


def _prepare_visual_tokenizer(arguments: argparse.Namespace) -> int:
    from simla_ds.data.fit_tokens import prepare_visual_tokenizer

    options = {name: getattr(arguments, name) for name in ("kind", "grid", "codes", "pictures", "steps", "seed")}
    found = prepare_visual_tokenizer(arguments.shards, arguments.out, **options)
    print(f"{arguments.out}: {found['psnr']:.2f} dB on pictures left out, {found['codes_used']:.0%} of the codes used")
    return DONE


def _prepare_refcoco(arguments: argparse.Namespace) -> int:
    from simla_ds.downstream.refer import convert_refer

    options = {name: getattr(arguments, name) for name in ("proposals", "pictures")}
    found = convert_refer(arguments.refs, arguments.instances, arguments.out, **options)
    print(f"{arguments.out}: {', '.join(f'{name}: {count}' for name, count in found.items())}")
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    from simla_ds.verify import verify_reference

    agrees = verify_reference(
        arguments.reference,
        loss_tolerance=arguments.loss_tolerance,
        tolerance=arguments.tolerance,
        passes=arguments.passes,
        json_out=arguments.json,
    )
    return DONE if agrees else FAILED


def _inspect(arguments: argparse.Namespace) -> int:
    from simla_ds.data.inspection.inspect import run

    return run(arguments)


def _export(arguments: argparse.Namespace) -> int:
    from simla_ds.engine.export import export_checkpoint

    export_checkpoint(arguments.checkpoint, arguments.out, arguments.tokenizer)
    return DONE


def _embed(arguments: argparse.Namespace) -> int:
    from simla_ds.scoring import Options, embed

    options = Options(weights=arguments.weights, batch_size=arguments.batch_size, format=arguments.format)
    _say_counts(embed(arguments.shards, arguments.model, arguments.out, options, arguments.workers), arguments.out)
    return DONE


def _score(arguments: argparse.Namespace) -> int:
    from simla_ds.scoring import Options, score

    options = Options(
        weights=arguments.weights,
        batch_size=arguments.batch_size,
        min_itc=arguments.min_itc,
        min_itm=arguments.min_itm,
    )
    manifest = score(arguments.shards, arguments.model, arguments.out, options, arguments.workers)
    _say_counts(manifest, arguments.out)
    if options.filters:
        print(f"kept {manifest['kept']} of {manifest['captions']} captions in shards of {arguments.out}")
    return DONE


def _say_counts(manifest: dict[str, Any], out: Path) -> None:
    skipped = ", ".join(f"{reason}: {count}" for reason, count in manifest["skipped"].items()) or "none"
    print(f"{out}: {manifest['pictures']} pictures, {manifest['captions']} captions; skipped: {skipped}")


def _import(arguments: argparse.Namespace) -> int:
    from simla_ds.importing import import_checkpoint

    report = import_checkpoint(
        arguments.checkpoint, arguments.out, arguments.tokenizer, image_size=arguments.image_size, heads=arguments.heads
    )
    print(f"{report}\n{arguments.out} written")
    return DONE


def _visualize(arguments: argparse.Namespace) -> int:
    from simla_ds.visualize import visualize

    probability = visualize(
        arguments.model, arguments.image, arguments.text, arguments.out, arguments.layer, arguments.device
    )
    print(f"{arguments.out}: the text matches with probability {probability:.2f}")
    return DONE


def _doctor(arguments: argparse.Namespace) -> int:
    from simla_ds.engine.doctor import examine

    return examine()


def _plan(arguments: argparse.Namespace) -> int:
    from simla_ds.parsing import parse_config
    from simla_ds.planner.command import run

    config, _ = parse_config(arguments.settings, Config, "simla plan", "Plan a training run.")
    return run(arguments, config)


def _demo(arguments: argparse.Namespace) -> int:
    from simla_ds.demo import run_demo

    return run_demo(arguments.out, arguments.seed)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but none that is nothing: None, empty, a switch that is off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, "", ()) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="simla",
        description="SIMLA: single-stream multi-level alignment for vision and language.",
        epilog="Training and measuring: launch/pretrain.py, launch/finetune.py, launch/evaluate.py, each with --help. "
        "Exit status: 0 done, 1 failed, 2 wrong use or bad input.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"simla {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_prepare(commands)
    _add_inspect(commands)
    _add_verify(commands)
    _add_export(commands)
    _add_over_shards(commands)
    _add_import(commands)
    _add_visualize(commands)
    _add_plan(commands)
    _add_demo(commands)
    _command(
        commands,
        "doctor",
        "say what is installed, what would be used, and whether training could start",
        _doctor,
        "Ends with status 1 when it could not.",
    )
    return parser


def _command(
    commands, name: str, summary: str, run: Callable | None = None, detail: str = ""
) -> argparse.ArgumentParser:
    """Add a command whose help shows every default."""
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}. {detail}".strip(),
        formatter_class=_Help,
        allow_abbrev=False,
    )
    if run is not None:
        command.set_defaults(run=run)
    return command


def _add_prepare(commands) -> None:
    from simla_ds.data.convert.command import add_sources

    prepare = _command(commands, "prepare", "make training data")
    kinds = prepare.add_subparsers(title="kinds of data", metavar="KIND", required=True)
    scenes = _command(
        kinds,
        "scenes",
        "compose the embedded scenes into shards",
        _prepare_scenes,
        "Writes shards of every split, the tokeniser, the patch codebook and a contact sheet; the same options give "
        "the same files.",
    )
    scenes.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    scenes.add_argument("--train", type=_positive, default=20_000, metavar="N", help="training scenes")
    scenes.add_argument("--seed", type=int, default=0, metavar="N", help="every random choice follows from it")
    scenes.add_argument("--size", type=_positive, default=128, metavar="PIXELS", help="side of a picture")
    scenes.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per core)")
    tokenizer = _command(
        kinds,
        "visual-tokenizer",
        "fit XMM's visual tokens to the pictures of shards",
        _prepare_visual_tokenizer,
        "Codes of patches of 4 x 4 pixels, by k-means or a small VQ; --data.visual_tokenizer DIR trains with them.",
    )
    tokenizer.add_argument("shards", metavar="SHARDS", help="folder, file or brace pattern, as data.train")
    tokenizer.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder")
    tokenizer.add_argument(
        "--kind", choices=("codebook", "vq"), default="codebook", help="vq: gives back more, takes minutes to train"
    )
    tokenizer.add_argument("--grid", type=_positive, default=8, metavar="G", help="tokens a side: the model's patches")
    tokenizer.add_argument("--codes", type=_positive, default=512, metavar="K", help="visual tokens to choose from")
    tokenizer.add_argument("--pictures", type=_positive, default=4000, metavar="N", help="looked at, a tenth left out")
    tokenizer.add_argument(
        "--steps", type=_positive, default=2000, metavar="N", help="of training a VQ, 64 pictures each"
    )
    tokenizer.add_argument("--seed", type=int, default=0, metavar="N", help="every random choice follows from it")
    refcoco = _command(
        kinds,
        "refcoco",
        "write RefCOCO's, RefCOCO+'s or RefCOCOg's annotations as grounding's",
        _prepare_refcoco,
        "OUT/train.json, val.json, testA.json, ... for launch/finetune.py and evaluate.py, --task grounding. Nothing "
        "that a pickle holds is run.",
    )
    refcoco.add_argument("--refs", type=Path, required=True, metavar="FILE", help="refs(unc).p, refs(umd).p, ...")
    refcoco.add_argument("--instances", type=Path, required=True, metavar="FILE", help="instances.json beside it")
    refcoco.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder; these splits are replaced")
    refcoco.add_argument(
        "--proposals", type=Path, metavar="FILE", help="a detector's boxes: {image id: [[x, y, w, h]]}"
    )
    refcoco.add_argument(
        "--pictures", default="train2014", metavar="DIR", help="of the pictures, below what will be --image-root"
    )
    add_sources(partial(_command, kinds))


def _add_inspect(commands) -> None:
    inspect = _command(
        commands,
        "inspect",
        "look through shards: counts, captions, duplicates, bad samples",
        _inspect,
        "Ends with status 1 when training would stop on them.",
    )
    inspect.add_argument("shards", metavar="SHARDS", help="folder, file or brace pattern, as data.train")
    inspect.add_argument(
        "--out", type=Path, metavar="DIR", help="write index.html, contact_sheet.png, report.json here"
    )
    inspect.add_argument("--json", action="store_true", help="print the report as JSON")
    inspect.add_argument("--tokenizer", type=Path, metavar="DIR", help="default: `tokenizer` beside the shards' folder")
    inspect.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="pairs that a batch needs")
    inspect.add_argument("--limit", type=int, default=0, metavar="N", help="look at N samples, evenly spread; 0: all")
    inspect.add_argument("--workers", type=_positive, metavar="N", help="processes (default: one per core)")
    inspect.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_verify(commands) -> None:
    verify = _command(
        commands,
        "verify",
        "re-run a recorded training step and compare",
        _verify,
        "Losses, gradients, norms, teacher, queue and optimizer step of the training classes against the recording. "
        "Ends with status 0 only if all are within tolerance.",
    )
    verify.add_argument("--reference", type=Path, required=True, metavar="DIR", help="folder of the recording")
    verify.add_argument("--json", type=Path, metavar="OUT", help="also write the comparisons to this file")
    verify.add_argument(
        "--loss-tolerance", type=float, default=1e-5, metavar="X", help="largest relative error of a loss"
    )
    verify.add_argument(
        "--tolerance",
        type=float,
        default=1e-4,
        metavar="X",
        help="largest error of a tensor over its largest magnitude",
    )
    verify.add_argument("--passes", choices=("fast", "plain"), default="fast", help="how the step is computed")


def _add_export(commands) -> None:
    export = _command(
        commands,
        "export",
        "make a model folder from a training checkpoint",
        _export,
        "Student, and teacher in OUT/teacher, as Hugging Face folders in float32; from any number of ranks and ZeRO "
        "stage. Needs no GPU and no deepspeed; one tensor is in memory at a time.",
    )
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="RUN/checkpoints/step_N")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder; an old one is replaced")
    export.add_argument("--tokenizer", type=Path, metavar="DIR", help="its folder (default: where the run had it)")


def _add_over_shards(commands) -> None:
    resumed = "Goes shard by shard; started again, it goes on after the last whole one."
    for name, summary, run, detail in (
        (
            "embed",
            "write the features of all pictures and captions of shards",
            _embed,
            "Unit vectors, a row per caption.",
        ),
        (
            "score",
            "write how well pictures and captions of shards agree, and keep those that do",
            _score,
            "itc: cosine of the features, -1 to 1. itm: probability that they match.",
        ),
    ):
        command = _command(commands, name, summary, run, f"{detail} {resumed}")
        command.add_argument("shards", metavar="SHARDS", help="folder, file, brace pattern or address, as data.train")
        command.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder, such as RUN/final")
        command.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder, or a stopped run's")
        command.add_argument("--weights", choices=("student", "teacher"), default="student", help="whose")
        command.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="pictures a forward")
        command.add_argument("--workers", type=int, default=1, metavar="N", help="processes that decode; 0: none")
        if name == "embed":
            command.add_argument("--format", choices=("parquet", "npy"), default="parquet", help="of the features")
        else:
            above = "also write shards of the pairs whose {} is at least X"
            command.add_argument("--min-itc", type=float, metavar="X", help=above.format("cosine"))
            command.add_argument("--min-itm", type=float, metavar="X", help=above.format("ITM probability"))


def _add_import(commands) -> None:
    command = _command(
        commands,
        "import",
        "make a model folder from published SIMLA, ALBEF or DALL-E dVAE weights",
        _import,
        "Pretraining's or a downstream task's: which it is, and its sizes, are read off the weights. Momentum copies "
        "go to OUT/teacher. A model folder is taken too, to change its resolution. DALL-E's encoder.pkl becomes the "
        "folder of a visual tokeniser, for data.visual_tokenizer. Nothing that a pickle holds is run.",
    )
    command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help=".pth, .pkl, .safetensors, model folder")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="model folder; an old one is replaced")
    command.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="such as bert-base-uncased's (default: a model folder's own)"
    )
    command.add_argument(
        "--image-size", type=_positive, metavar="PIXELS", help="resample positions for it (default: the checkpoint's)"
    )
    command.add_argument(
        "--heads", type=_positive, metavar="N", help="attention heads, which no shape shows (default: width / 64)"
    )


def _add_visualize(commands) -> None:
    command = _command(
        commands,
        "visualize",
        "draw where in a picture the model finds what a text says",
        _visualize,
        "Grad-CAM of the cross-attention, beside the picture.",
    )
    command.add_argument("image", type=Path, metavar="IMAGE", help="picture")
    command.add_argument("text", metavar="TEXT", help='what to look for, such as "a red dog"')
    command.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder, such as RUN/final")
    command.add_argument("--out", type=Path, default=Path("heat.png"), metavar="PNG", help="file to write")
    command.add_argument(
        "--layer", type=int, metavar="N", help="from 0 (default: at the height of the published 8 of 12)"
    )
    command.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a CUDA card where there is one"
    )


def _add_plan(commands) -> None:
    plan = _command(
        commands,
        "plan",
        "compute memory, speed and network of a training run, before there is one",
        _plan,
        "Further options are a recipe's, as for launch/pretrain.py: --config launch/recipes/NAME.yaml, "
        "--train.batch_size N, ... One row per ZeRO layout of ds_configs, with and without activation checkpointing. "
        "Every figure is computed, none is measured.",
    )
    plan.add_argument(
        "--card",
        choices=("A100-40", "A100-80", "H100", "H200", "L40S", "24GB", "CPU"),
        default="A100-80",
        help="what each rank has",
    )
    plan.add_argument("--nodes", type=_positive, default=1, metavar="N", help="machines")
    plan.add_argument("--cards", type=_positive, default=8, metavar="N", help="cards, hence ranks, of each node")
    plan.add_argument("--pairs", type=_positive, metavar="N", help="pairs to train on (default: the recipe's)")
    plan.add_argument(
        "--utilisation",
        type=_share,
        default=0.35,
        metavar="X",
        help="share of the card's peak that is reached; a guess",
    )
    plan.add_argument("--memory", type=float, metavar="GIB", help="of each rank, in place of the card's")
    plan.add_argument(
        "--caption-tokens", type=float, default=13.5, metavar="X", help="mean of a caption; COCO's is 13.5"
    )
    plan.add_argument("--deepspeed", type=Path, metavar="FILE.json", help="this layout alone, with its buckets")
    output = plan.add_mutually_exclusive_group()
    output.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    output.add_argument("--json", action="store_true", help="print all figures, in bytes and seconds")


def _add_demo(commands) -> None:
    demo = _command(
        commands,
        "demo",
        "prepare scenes, train, evaluate and draw the results",
        _demo,
        "9 to 12 minutes on two cores.",
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder of the results")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of the training; the scenes stay the same")


def _share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, got {text!r}")
    return number


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
