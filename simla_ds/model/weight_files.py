"""Tensors from a file or folder on disk, without running what a pickle may hide."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_NAMES = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".pkl")
_WRAPPERS = ("model", "state_dict")
_MODULES = (
    *(f"dall_e.{name}" for name in ("encoder.Encoder", "encoder.EncoderBlock", "utils.Conv2d")),
    *(f"torch.nn.modules.{n}" for n in ("container.Sequential", "activation.ReLU", "pooling.MaxPool2d")),
    "torch.nn.modules.linear.Identity",
)
"""Classes of the one published file that is a whole pickled module: DALL-E's encoder.pkl."""
_RESAVE = 'save it again as torch.save({"model": model.state_dict()}, FILE) where you trust it'
_UNREADABLE = (
    *(OSError, EOFError, RuntimeError, SafetensorError, pickle.UnpicklingError),
    *(AttributeError, LookupError, TypeError),  # of a pickle that is none of torch's
)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict onto the CPU from a file, or from the one weights file of a folder.

    A dict under "model" or "state_dict", as training scripts save it, is unwrapped; its other entries are left out. Of
    a pickled module (DALL-E's encoder.pkl) the parameters are read, its classes are neither imported nor run.

    Raises:
        ValueError: there is no such file, several could be meant, or the content isn't tensors by name.
    """
    file = find_weights(path)
    try:
        content = load_file(file) if file.suffix == ".safetensors" else _unpickle(file)
        if isinstance(content, _Module):
            content = dict(_parameters(content))
    except _UNREADABLE as error:
        raise ValueError(f"{file} cannot be read as weights: {_first_line(error)}; copy it again") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"{file} holds no state dict (tensors by name, bare or under {' or '.join(_WRAPPERS)})")
    return content


def find_weights(path: Path) -> Path:
    """Return the weights file that path is or holds; ValueError when there is none or more than one."""
    if path.is_file():
        if path.suffix not in _SUFFIXES:
            raise ValueError(f"{path} is no weights file: its name ends in none of {', '.join(_SUFFIXES)}")
        return path
    if not path.is_dir():
        raise ValueError(f"{path} does not exist")
    for name in _NAMES:
        if (path / name).is_file():
            return path / name
    if (path / "MANIFEST.json").is_file():
        raise ValueError(f"{path} is a training checkpoint; make a model folder of it with `simla export`")
    found = sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    if len(found) == 1:
        return found[0]
    names = ", ".join(file.name for file in found[:4])
    raise ValueError(
        f"{path} holds several weights files ({names}); name one of them"
        if found
        else f"{path} holds no weights file ({', '.join(_NAMES)}, or one that ends in {', '.join(_SUFFIXES)})"
    )


def _unpickle(file: Path) -> Any:
    """Load a pickled file; ValueError when it asks for anything but tensors, plain values and what _MODULES names."""
    try:
        with torch.serialization.safe_globals([(_Module, name) for name in _MODULES]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "load of storage is allowed" in str(error):  # a module of torch < 1.6, its classes' source text with it
            raise ValueError(
                f"{file} is refused: its modules are pickled as torch before 1.6 did, with their source text; {_RESAVE}"
            ) from error
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{file} is refused: besides tensors it holds {wanted[1]}, and loading that could run code; {_RESAVE}"
            ) from error
        raise


class _Module:
    """Stands in for the class of a pickled module: keeps what was saved of it and does nothing."""


def _parameters(module: _Module, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors as its state_dict would; AttributeError, TypeError or KeyError when it is no module."""
    saved = vars(module)
    for name, value in saved["_parameters"].items():
        if value is not None:
            yield prefix + name, value.detach()
    for name, child in saved["_modules"].items():
        yield from _parameters(child, f"{prefix}{name}.")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
