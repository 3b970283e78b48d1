"""Checkpoints: the engine's state, and beside it what DeepSpeed does not keep, whole or not at all.

    checkpoints/step_00000100/   engine/ (DeepSpeed's files)  teacher.safetensors  queue.safetensors
                                 rng_rank00000.safetensors ...  state.json  MANIFEST.json (sizes and hashes)
    checkpoints/latest           name of the newest

A checkpoint is written under a temporary name and renamed when it is whole; `latest` moves after that; then old ones
are deleted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from safetensors.torch import load_file, save_file

from simla_ds.engine.distributed import Ranks, broadcast_object
from simla_ds.objectives import FeatureQueue
from simla_ds.teacher import Teacher

MANIFEST = "MANIFEST.json"


class DamagedCheckpoint(ValueError):
    """A checkpoint whose files are not those of its manifest."""


def save_checkpoint(
    folder: Path, engine: DeepSpeedEngine, teacher: Teacher, queue: FeatureQueue, state: dict[str, Any], ranks: Ranks
) -> Path:
    """Write folder/step_N from every rank and return its path; state (JSON) holds at least `step`."""
    final = folder / f"step_{state['step']:08d}"
    temporary = folder / f".{final.name}.partial"
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(temporary), tag="engine", save_latest=False)
    save_file(_random_state(ranks.device), str(temporary / f"rng_rank{ranks.rank:05d}.safetensors"))
    if ranks.is_main:
        save_file({k: v.contiguous().cpu() for k, v in teacher.state_dict().items()}, temporary / "teacher.safetensors")
        save_file({k: v.contiguous().cpu() for k, v in queue.state_dict().items()}, temporary / "queue.safetensors")
        (temporary / "state.json").write_text(json.dumps(state, indent=1))
    dist.barrier()  # every rank's files are there before they are counted
    if ranks.is_main:
        (temporary / MANIFEST).write_text(json.dumps(_describe(temporary), indent=1))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _write_atomically(folder / "latest", final.name + "\n")
    dist.barrier()
    return final


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and leftovers of interrupted ones (main rank only)."""
    for path in sorted(folder.glob("step_*"))[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path)


def find_checkpoint(output: Path, resume: str, ranks: Ranks) -> Path | None:
    """Return the checkpoint to resume from, or None for a fresh start; the same on every rank.

    With `auto` the newest whole one; damaged ones are named and passed over.

    Raises:
        ValueError: `none` in a folder that holds checkpoints, or a path that is no whole checkpoint.
    """
    found: Path | ValueError | None = None
    if ranks.is_main:
        try:
            found = _choose(output / "checkpoints", resume, ranks)
        except ValueError as error:
            found = error
    found = broadcast_object(found)
    if isinstance(found, ValueError):
        raise found
    return found


def _choose(folder: Path, resume: str, ranks: Ranks) -> Path | None:
    present = sorted(folder.glob("step_*"), reverse=True)
    if resume == "none":
        if present:
            raise ValueError(
                f"{folder} already holds {len(present)} checkpoint(s), newest {present[0].name}; "
                "set --resume auto to go on from it, or another --output"
            )
        return None
    if resume != "auto":
        check_whole(Path(resume))
        return Path(resume)
    for path in present:
        try:
            check_whole(path)
        except DamagedCheckpoint as error:
            ranks.say(f"passing over {path}: {error}")
        else:
            return path
    return None


def check_whole(path: Path) -> None:
    """Raise DamagedCheckpoint unless every file is there with the size and hash of the manifest."""
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise DamagedCheckpoint(f"{path} is no whole checkpoint: {MANIFEST} is missing")
    try:
        expected = json.loads(manifest.read_text())
    except ValueError:
        raise DamagedCheckpoint(f"{manifest} is damaged: not JSON") from None
    for name, entry in expected.items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file} is missing")
        if file.stat().st_size != entry["bytes"]:
            raise DamagedCheckpoint(f"{file} has {file.stat().st_size} bytes, the manifest says {entry['bytes']}")
        if _hash(file) != entry["blake2b"]:
            raise DamagedCheckpoint(f"{file} is damaged: its hash is not the manifest's")


def read_state(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint."""
    return json.loads((path / "state.json").read_text())


def load_checkpoint(
    path: Path, engine: DeepSpeedEngine, teacher: Teacher, queue: FeatureQueue, ranks: Ranks
) -> dict[str, Any]:
    """Restore engine, teacher, queue and random state from a whole checkpoint; return its state.json."""
    state = read_state(path)
    loaded, _ = engine.load_checkpoint(str(path), tag="engine")
    if loaded is None:
        raise DamagedCheckpoint(f"DeepSpeed could not load {path}/engine")
    teacher.load_state_dict(load_file(path / "teacher.safetensors", device=str(ranks.device)))
    queue.load_state_dict(load_file(path / "queue.safetensors", device=str(ranks.device)))
    _restore_random_state(load_file(path / f"rng_rank{ranks.rank:05d}.safetensors"), ranks.device)
    return state


def _describe(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "blake2b": _hash(p)} for p in files}


def _hash(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
