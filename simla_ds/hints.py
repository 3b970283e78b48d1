"""What to say about a key that isn't there, or a value of another type, in place of jsonargparse's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_UNKNOWN_KEY = (
    re.compile(r"unrecognized arguments: --(?P<key>[^\s=]+)"),
    re.compile(r"Group '(?P<group>[^']+)' does not accept option '(?P<key>[^']+)'"),
    re.compile(r"Option '(?P<key>[^']+)' is not accepted"),
)
"""jsonargparse's words for a key it doesn't know: on the command line, in a recipe's group, at a recipe's top."""
_WRONG_TYPE = re.compile(r'(?:Parser key )?"?(?P<key>[\w.]+)"?:\s.*(?:Got|Given) value: (?P<value>.*)', re.DOTALL)
"""Its words for a value of another type."""
_EVERYDAY = {
    "lr": "optim.learning_rate",
    "learning_rate": "optim.learning_rate",
    "wd": "optim.weight_decay",
    "warmup": "optim.warmup_samples",
    "warmup_steps": "optim.warmup_samples",
    "epochs": "train.samples",
    "max_steps": "train.steps",
    "bs": "train.batch_size",
    "batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.grad_accumulation",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "num_workers": "data.workers",
    "output_dir": "output",
    "pretrained": "init.checkpoint",
    "annotations": "data.train",
    "image_root": "data.image_root",
}
"""What keys are called elsewhere."""
_ELSEWHERE = {"task": "launch/finetune.py"}
"""Keys of other programmes."""
_LAUNCHERS = ("num_accelerators", "num_gpus", "num_nodes", "include", "exclude", "hostfile", "master_port")
"""Options of DeepSpeed's launcher, which reads them only before the script."""
_CLOSE = 0.8
"""Likeness (difflib's ratio) of what may be meant."""


def explain(message: str, program: str, kind: type, keys: Sequence[str]) -> str:
    """Return jsonargparse's message in our words where it is about a key or a type; else as it is.

    kind: the dataclass that is configured. keys: all that are known, dotted.
    """
    for pattern in _UNKNOWN_KEY:
        if match := pattern.search(message):
            key = ".".join(match.groupdict().values())
            if key in _ELSEWHERE:
                return f"there is no key {key} here; it is one of {_ELSEWHERE[key]}"
            if key in _LAUNCHERS:
                return f"there is no key {key}; it is an option of the launcher: deepspeed --{key} ... {program} ..."
            near = nearest(key, keys)
            return f"there is no key {key}{f'; did you mean --{near}?' if near else f'; see {program} --help'}"
    if (wrong := _WRONG_TYPE.match(message)) and (words := _words(_type_of(kind, wrong["key"]))):
        return f"{wrong['key']}: expected {words}, got {wrong['value']}"
    return re.sub(r'Parser key "([^"]+)":', r"\1:", message)


def nearest(key: str, keys: Sequence[str]) -> str | None:
    """Return the key that may be meant: one with a like last part, or what is called so elsewhere."""
    last = key.replace("-", "_").rpartition(".")[2]
    like = [k for k in keys if not is_group([f"--{k}"], keys) and _may_be_meant(k.rpartition(".")[2], last)]
    scores = {k: difflib.SequenceMatcher(None, k, key).ratio() for k in like}
    best = max(like, key=scores.__getitem__, default=None)
    if best is None or scores[best] < 0.9:
        everyday = _EVERYDAY.get(last)
        best = everyday if everyday in keys else best
    return best


def is_group(options: Sequence[str], keys: Sequence[str]) -> bool:
    """Whether an option is that of a group of keys, such as --train (and not a mapping, which has only .help below)."""
    below = [key for option in options for key in keys if key.startswith(f"{option[2:]}.")]
    return any(not key.endswith(".help") for key in below)


def _may_be_meant(known: str, given: str) -> bool:
    begun = len(given) > 2 and known.startswith(given)
    return begun or difflib.SequenceMatcher(None, known, given).ratio() >= _CLOSE


def _type_of(kind: Any, key: str) -> Any:
    """Return the type of a dotted key; None when there is no such key."""
    for name in key.split("."):
        kind = get_type_hints(kind).get(name) if is_dataclass(kind) else None
    return kind


def _words(kind: Any) -> str:
    """Return what a type accepts, in words; nothing for types that have none."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return f"{', '.join(inner[:-1])} or {inner[-1]}"
    if origin in (Union, UnionType):
        return f"{_words(inner[0])} or null" if inner[1:] == (NoneType,) else ""
    if origin is tuple:
        return f"a list of {len(inner)} numbers, such as [0.5, 1.0]"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}.get(kind, "")
