"""Launch configurations that were timed on a card, in a file: read only where SIMLA_KERNELS_TUNED names one.

    {card: {"KERNEL | SIZE CLASS": {"tiles": {"BLOCK_M": 64, ...}, "num_warps": 4, "num_stages": 2}}}

A card is told by its name and Triton's version: what is fastest for one compiler need not be for the next.
"""

from __future__ import annotations

import json
import os
import uuid
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from simla_kernels.launching import LaunchConfig, triton_version

VARIABLE = "SIMLA_KERNELS_TUNED"
Configs = dict[tuple[str, str], LaunchConfig]
"""(kernel, size class) -> configuration."""


def configs(device: torch.device) -> Configs:
    """Return what the file holds for a device; nothing where no file is named. ValueError when it cannot be read."""
    path = os.environ.get(VARIABLE)
    return _of_card(Path(path), _card(device)) if path and device.type == "cuda" else {}


def store(path: Path, device: torch.device, found: Configs) -> None:
    """Add configurations of a device to a file, whole or not at all."""
    content = _read(path) if path.is_file() else {}
    entry = {" | ".join(key): asdict(config) for key, config in found.items()}
    content[_card(device)] = {**content.get(_card(device), {}), **entry}
    replace_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
    _of_card.cache_clear()


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all, while other processes on this or other nodes may do so too. Raises OSError."""
    whole = path.with_suffix(f".{uuid.uuid4().hex}")
    whole.write_text(text, encoding="utf-8")
    whole.replace(path)


@cache
def _of_card(path: Path, card: str) -> Configs:
    entries = _read(path).get(card, {})
    try:
        return {_key(name): LaunchConfig(**entry) for name, entry in entries.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{VARIABLE}={path}: an entry of {card} is no launch configuration ({error})") from error


def _key(name: str) -> tuple[str, str]:
    kernel, size_class = name.split(" | ")
    return kernel, size_class


def _read(path: Path) -> dict[str, dict[str, dict]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{VARIABLE}={path} cannot be read ({error}); make it anew or unset {VARIABLE}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{VARIABLE}={path} is not a JSON object; make it anew or unset {VARIABLE}")
    return content


def _card(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name} | triton {triton_version()}"
