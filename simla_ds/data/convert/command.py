"""The commands `simla prepare SOURCE`, one per source, with the options common to all."""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from simla_ds.data.convert import SOURCES


def add_sources(add_command) -> None:
    """Add a command per source; add_command(name, summary, run, detail) returns its parser."""
    for name, (summary, detail, add_options) in _SOURCES.items():
        parser = add_command(name, summary, _run, detail)
        parser.set_defaults(source=name)
        add_options(parser)
        _add_common(parser, out_required=name != "img2dataset")


def _add_common(parser: argparse.ArgumentParser, out_required: bool) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        required=out_required,
        metavar="DIR",
        help="new folder; the same command goes on where a stopped one left off",
    )
    parser.add_argument("--shard-size", type=int, default=1000, metavar="N", help="pictures per shard")
    parser.add_argument(
        "--shorter-side", type=int, default=0, metavar="PIXELS", help="make larger pictures smaller, aspect kept; 0: no"
    )
    parser.add_argument("--quality", type=int, default=90, metavar="Q", help="JPEG quality of pictures made smaller")
    parser.add_argument("--licence", default="", metavar="TEXT", help="kept in the manifest")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one per core)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    filters = parser.add_argument_group("filters", "all off unless asked for; the manifest records each")
    number: dict[str, Any] = {"type": int, "default": 0, "metavar": "N"}
    filters.add_argument("--min-side", **number, help="drop pictures with a shorter side below N pixels")
    filters.add_argument(
        "--max-aspect", type=float, default=0, metavar="X", help="drop pictures X times as long as wide"
    )
    filters.add_argument(
        "--captions",
        choices=("as-is", "reference", "modern"),
        default="as-is",
        help="reference: as the official implementation cleans them; modern: mended, case and punctuation kept",
    )
    filters.add_argument("--min-words", **number, help="drop captions with fewer words")
    filters.add_argument("--max-words", **number, help="drop captions with more words")
    filters.add_argument(
        "--language", default="", metavar="CODE", help="drop captions clearly in another (en, de, ...)"
    )
    filters.add_argument("--drop-boilerplate", action="store_true", help='drop "stock photo", file names and the like')
    filters.add_argument(
        "--duplicates",
        choices=("off", "exact", "near"),
        default="off",
        help="drop pictures that were there before under another image id: the same file, or the same look",
    )
    filters.add_argument(
        "--near-distance", type=int, default=4, metavar="BITS", help="of 64 in which same looks may differ"
    )
    filters.add_argument(
        "--against", nargs="+", default=(), metavar="SHARDS", help="drop pictures that are in these evaluation sets"
    )


def _run(arguments: argparse.Namespace) -> int:
    from simla_ds.data.convert.in_place import check_in_place
    from simla_ds.data.convert.settings import Settings
    from simla_ds.data.convert.writer import convert

    given = vars(arguments)
    chosen: dict[str, Any] = {field.name: given[field.name] for field in fields(Settings)}
    settings = Settings(**{**chosen, "against": tuple(given["against"])})
    running: dict[str, Any] = {"workers": arguments.workers, "progress": not arguments.quiet}
    if arguments.out is None:
        manifest = check_in_place(arguments.shards, settings, **running)
    else:
        rows = importlib.import_module(SOURCES[arguments.source]).rows
        options = {name: given[name] for name in inspect.signature(rows).parameters}
        manifest = convert(arguments.source, options, arguments.out, settings, **running)
    print(_summary(manifest), file=sys.stderr)
    return 0


def _summary(manifest: dict[str, Any]) -> str:
    dropped = manifest["dropped"]
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items())
    kept = f"{manifest['kept']:,} pictures with {manifest['captions']:,} captions in {len(manifest['shards']):,} shards"
    return f"{kept}; dropped {sum(dropped.values()):,} of {manifest['rows']:,}{f' ({reasons})' if reasons else ''}"


# Names of options are keywords of the sources' rows()


def _add_albef_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="FILE", help="JSON lists")
    parser.add_argument("--images", type=Path, default=Path(), metavar="DIR", help="where relative paths start")
    parser.add_argument(
        "--replace",
        nargs="+",
        default=(),
        metavar="OLD=NEW",
        help="what paths start with in the file, and here (/export/share/datasets=/data)",
    )


def _add_coco(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--annotations", type=Path, nargs="+", required=True, metavar="FILE", help="captions JSON")
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="DIR", help="folders of pictures, or one above them"
    )
    parser.add_argument(
        "--split", choices=("train", "val", "test"), help="of Karpathy's files (train: with restval); needed there"
    )


def _add_visual_genome(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--regions", type=Path, required=True, metavar="FILE", help="region_descriptions.json")
    parser.add_argument(
        "--images", type=Path, nargs="+", required=True, metavar="DIR", help="folders of pictures (VG_100K VG_100K_2)"
    )
    parser.add_argument("--image-data", type=Path, metavar="FILE", help="image_data.json: tells which are in COCO too")


def _add_img2dataset(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shards", required=True, metavar="SHARDS", help="folder, file or brace pattern of tars")


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="the folder")
    parser.add_argument("--table", type=Path, metavar="FILE", help="captions as .csv, .tsv, .jsonl or .parquet")
    parser.add_argument("--delimiter", metavar="C", help="between columns (default: comma, tab in .tsv)")
    parser.add_argument("--image-column", metavar="NAME", help="default: file_name, image, path or alike")
    parser.add_argument("--caption-column", metavar="NAME", help="default: caption, text or alike")


_SOURCES = {
    "albef-json": (
        "ALBEF's JSON lists of image and caption",
        'Each file is a JSON list of {"image": PATH, "caption": TEXT or [TEXT, ...], "image_id": optional}.',
        _add_albef_json,
    ),
    "coco": (
        "COCO captions (official or Karpathy's, Flickr30k too)",
        (
            "Reads captions_train2017.json and the like, or dataset_coco.json, dataset_flickr30k.json with --split. "
            "One sample per picture with all its captions."
        ),
        _add_coco,
    ),
    "visual-genome": (
        "Visual Genome's region descriptions",
        "One sample per picture, with the phrases of all its regions.",
        _add_visual_genome,
    ),
    "img2dataset": (
        "img2dataset's WebDataset output (SBU, CC3M, CC12M, LAION)",
        "Without --out: check every sample where it is and write an index of the good ones beside each tar.",
        _add_img2dataset,
    ),
    "folder": (
        "a folder of pictures with .txt files or a table of captions",
        "Without --table: metadata.csv, .jsonl, .parquet in the folder or NAME.txt beside NAME.jpg (a caption a line).",
        _add_folder,
    ),
}
