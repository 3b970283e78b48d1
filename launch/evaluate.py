"""Evaluate a model folder: `python launch/evaluate.py --task retrieval --model DIR --annotations FILE [--json OUT]`.

Exit status: 0 done, 2 wrong use or bad input (one line says what to change).
"""

import argparse
import json
import sys
from pathlib import Path

from simla_ds.threads import set_threads

set_threads()  # before torch is imported

TASKS = ("retrieval", "grounding", "vqa", "nlvr2", "snli_ve")


def parse(argv: list[str]) -> argparse.Namespace:
    """Read the command line; exits with status 2 on wrong use."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--task", required=True, choices=TASKS, help="what to evaluate")
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="model folder, such as RUN/final")
    parser.add_argument("--weights", default="student", choices=("student", "teacher"), help="whose (default: student)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--annotations", type=Path, metavar="FILE", help='JSON list of {"image": path, "caption": [text, ...]}'
    )
    source.add_argument("--data", metavar="SHARDS", help="WebDataset shards, as data.val of pretrain.py")
    parser.add_argument("--image-root", type=Path, metavar="DIR", help="where paths start (default: FILE's folder)")
    parser.add_argument(
        "--rerank", type=int, default=128, metavar="K", help="candidates that ITM orders; 0: none (default: 128)"
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers to this file")
    arguments = parser.parse_args(argv)
    if arguments.task != "retrieval":
        parser.exit(2, f"evaluate.py: error: --task {arguments.task} is not there yet; only retrieval is\n")
    if arguments.rerank < 0:
        parser.exit(2, f"evaluate.py: error: --rerank must be 0 or more, got {arguments.rerank}\n")
    return arguments


def evaluate(arguments: argparse.Namespace) -> int:
    """Load, retrieve, print."""
    from simla_ds.config import Config, DataConfig
    from simla_ds.data.loader import eval_batches
    from simla_ds.downstream.retrieval import annotated, retrieve
    from simla_ds.hub import SimlaProcessor, load_model_folder, resolve_weights
    from simla_ds.report import retrieval_table

    folder = resolve_weights(arguments.model, arguments.weights)
    model, config = load_model_folder(folder)
    processor = SimlaProcessor.from_pretrained(folder)
    if arguments.annotations:
        root = arguments.image_root or arguments.annotations.parent
        batches = annotated(arguments.annotations, root, processor)
    else:
        settings = Config(model=config, data=DataConfig(max_words=processor.max_words))
        batches = (batch for batch, _ in eval_batches(settings, arguments.data, processor.tokenizer, 0))
    result = retrieve(model, batches, rerank=arguments.rerank, progress=sys.stderr.isatty())
    print(retrieval_table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result.measures(), indent=1) + "\n", encoding="utf-8")
    return 0


def main() -> int:
    """Bad input is one line and status 2."""
    arguments = parse(sys.argv[1:])
    try:
        return evaluate(arguments)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
