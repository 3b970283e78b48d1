"""Evaluate a model folder: `python launch/evaluate.py --task retrieval --model DIR --annotations FILE [--json OUT]`.

Exit status: 0 done, 1 a process that reads pictures is stuck or gone, 2 wrong use or bad input (one line says what to
change).
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from simla_ds.threads import set_threads

set_threads()  # before torch is imported

from simla_ds.downstream.config import FORMATS, TaskName  # noqa: E402  the thread count must be set first

PROBES = """  probes     files of Winoground, ARO, SugarCrepe or VL-CheckList as published, or
             {"images": [path, ...], "captions": [text, ...], "kind": optional}: caption i is right for picture i"""
TASKS = (*get_args(TaskName), "probes")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; exits with status 2 on wrong use."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        epilog=FORMATS + PROBES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", required=True, choices=TASKS, help="what to evaluate")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, such as RUN/final")
    parser.add_argument("--weights", default="student", choices=("student", "teacher"), help="whose (default: student)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotations", type=Path, metavar="FILE", help="JSON list or .jsonl of entries (see below)")
    source.add_argument("--data", metavar="SHARDS", help="WebDataset shards: pairs for retrieval, else scenes")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="where paths start (default: FILE's folder)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--rerank", type=int, metavar="K", help="retrieval: candidates that ITM orders; 0: none (default: 128)"
    )
    how.add_argument(
        "--protocol",
        choices=("official", "fast"),
        help="official: 128 candidates, 256 of more than 2,000 pictures, at 384 px; fast: 16, at the model's own size",
    )
    parser.add_argument(
        "--answers", type=Path, metavar="FILE", help="VQA: JSON list of answers to rank (default: DIR's)"
    )
    parser.add_argument(
        "--fidelity", default="corrected", choices=("corrected", "official"), help="VQA: how answers are ranked"
    )
    parser.add_argument("--predictions", type=Path, metavar="OUT", help="also write each prediction, as JSONL")
    parser.add_argument("--submission", type=Path, metavar="OUT", help="VQA: also write the evaluation server's JSON")
    parser.add_argument(
        "--inputs", default="both", choices=("both", "text", "image"), help="blank the other one (default: both)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers to this file")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read pictures, 0: this one, as for probes and for retrieval by --annotations (default: 1)",
    )
    parser.add_argument(
        "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a CUDA card where there is one"
    )
    arguments = parser.parse_args(argv)
    pretrained = arguments.task in ("retrieval", "probes")
    if pretrained and (arguments.inputs != "both" or arguments.predictions):
        parser.exit(2, f"evaluate.py: error: --inputs and --predictions are not for {arguments.task}\n")
    if arguments.task != "vqa" and (arguments.submission or arguments.answers or arguments.fidelity != "corrected"):
        parser.exit(2, "evaluate.py: error: --submission, --answers and --fidelity are for vqa\n")
    if arguments.image_root and arguments.data:
        parser.exit(2, "evaluate.py: error: --image-root is for --annotations; shards hold their pictures\n")
    if (arguments.protocol or arguments.rerank is not None) and arguments.task != "retrieval":
        parser.exit(2, "evaluate.py: error: --protocol and --rerank are for retrieval\n")
    alone = arguments.task == "probes" or (arguments.task == "retrieval" and arguments.annotations)
    if arguments.workers is not None and (alone or arguments.workers < 0):
        parser.exit(
            2,
            f"evaluate.py: error: --workers {arguments.workers} must be 0 or more, and is not for probes nor for "
            "retrieval by --annotations\n",
        )
    arguments.workers = 1 if arguments.workers is None else arguments.workers
    for option in ("predictions", "submission", "json"):  # before hours of predictions
        out = getattr(arguments, option)
        if out and not out.absolute().parent.is_dir():
            parser.exit(2, f"evaluate.py: error: --{option} {out}: there is no folder {out.absolute().parent}\n")
    if arguments.rerank is None:
        arguments.rerank = 128
    if arguments.rerank < 0:
        parser.exit(2, f"evaluate.py: error: --rerank must be 0 or more, got {arguments.rerank}\n")
    return arguments


def evaluate_task(arguments: argparse.Namespace) -> int:
    """Load, predict, print the protocol's measures."""
    from simla_ds.downstream.evaluation import evaluate_folder, write_predictions
    from simla_ds.downstream.vqa import submission
    from simla_ds.hub import resolve_weights

    measures, predictions, annotations = evaluate_folder(
        arguments.task,
        resolve_weights(arguments.model, arguments.weights),
        str(arguments.annotations or arguments.data),
        str(arguments.image_root or ""),
        answers=arguments.answers,
        inputs=arguments.inputs,
        device=arguments.device,
        official=arguments.fidelity == "official",
        workers=arguments.workers,
    )
    if arguments.predictions:
        write_predictions(arguments.predictions, annotations, predictions)
    if arguments.submission:
        answers = submission(annotations.entries, predictions)
        arguments.submission.write_text(json.dumps(answers), encoding="utf-8")
    return report(measures, arguments.json, {"fidelity": arguments.fidelity} if arguments.task == "vqa" else {})


def evaluate_probes(arguments: argparse.Namespace) -> int:
    """Load, score right and wrong captions, print how many are told apart."""
    from simla_ds.downstream.probes import probe_folder
    from simla_ds.hub import resolve_weights

    folder = resolve_weights(arguments.model, arguments.weights)
    source, root = str(arguments.annotations or arguments.data), str(arguments.image_root or "")
    return report(probe_folder(folder, source, root, device=arguments.device), arguments.json)


def report(measures: dict[str, float], json_out: Path | None, how: Mapping[str, str] = MappingProxyType({})) -> int:
    """Print the numbers and how they were made, and write them where asked."""
    width = max(map(len, (*measures, *how)))
    print("\n".join(f"{name:<{width}}  {value:>8}" for name, value in how.items()), end="\n" if how else "")
    print("\n".join(f"{name:<{width}}  {value:8.2f}" for name, value in measures.items()))
    if json_out:
        json_out.write_text(json.dumps({**measures, **how}, indent=1) + "\n", encoding="utf-8")
    return 0


def evaluate_retrieval(arguments: argparse.Namespace) -> int:
    """Load, retrieve, print."""
    from collections import Counter

    from simla_ds.data.samples import Samples, open_files
    from simla_ds.downstream.annotations import read_annotations
    from simla_ds.downstream.retrieval import PROTOCOLS, annotated, retrieve, sharded
    from simla_ds.downstream.retrieval_tuning import Retrieval
    from simla_ds.hub import SimlaProcessor, load_model_folder, resolve_weights
    from simla_ds.report import retrieval_table

    folder = resolve_weights(arguments.model, arguments.weights)
    model, _ = load_model_folder(folder, device=arguments.device)
    processor = SimlaProcessor.from_pretrained(folder)
    protocol = PROTOCOLS[arguments.protocol] if arguments.protocol else None
    processor.image_size = (protocol and protocol.image_size) or processor.image_size
    tokenizer = processor.tokenizer
    tokenizer.max_tokens = (protocol and protocol.max_tokens) or tokenizer.max_tokens
    skipped = Counter[str]()
    if arguments.annotations:
        found = read_annotations(arguments.annotations, arguments.image_root)
        batches = annotated(Retrieval().checked(found, train=False), processor)
    else:
        _, files = open_files(str(arguments.data), "--data")
        places = [(shard, number) for shard, index in enumerate(files.shards) for number in range(len(index))]
        batches = sharded(Samples(files, places, processor), skipped, workers=arguments.workers)
    result = retrieve(model, batches, rerank=protocol or arguments.rerank, progress=sys.stderr.isatty())
    if skipped:
        reasons = ", ".join(f"{reason} {count}" for reason, count in skipped.items())
        print(f"{skipped.total()} sample(s) left out: {reasons}", file=sys.stderr)
    print(
        f"protocol {arguments.protocol or 'of your own'}: ITM orders {result.rerank} candidates, "
        f"{processor.image_size} px, {tokenizer.max_tokens} tokens"
    )
    print(retrieval_table(result))
    if arguments.json:
        how = {"protocol": arguments.protocol, "rerank": result.rerank, "image_size": processor.image_size}
        how |= {"max_tokens": tokenizer.max_tokens, "left_out": skipped.total()}
        arguments.json.write_text(json.dumps({**result.measures(), **how}, indent=1) + "\n", encoding="utf-8")
    return 0


def main() -> int:
    """Bad input is told, all that is wrong with an annotation file at once, and status 2."""
    arguments = parse(sys.argv[1:])
    from simla_ds.data.loader import StalledData

    try:
        run = {"retrieval": evaluate_retrieval, "probes": evaluate_probes}.get(arguments.task, evaluate_task)
        return run(arguments)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {error}", file=sys.stderr)
        return 2
    except StalledData as error:
        print(f"evaluate.py: stopped: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
