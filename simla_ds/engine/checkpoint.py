"""Saving and restoring a run: every rank writes what it owns, and reads what it will hold, whatever the layout was.

The files are described in checkpoint_folder. Weights and moments go in and out by parameter name, so that any ZeRO
stage, offload and number of ranks can follow any other. Memory: one parameter's piece at a time.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from simla_ds.engine.checkpoint_folder import (
    QUEUE,
    STATE,
    WEIGHTS,
    DamagedCheckpoint,
    candidates,
    check_whole,
    describe_file,
    publish,
    read_state,
    write_manifest,
)
from simla_ds.engine.distributed import Ranks, all_or_none, broadcast_object, gather_objects
from simla_ds.engine.tensor_files import INDEX, Listing, Piece, Pieces, save_tensors, write_index, write_pieces
from simla_ds.engine.zero_layout import (
    Engine,
    HeldPiece,
    adamw_moments,
    adamw_step,
    after_loading,
    before_loading,
    forget_adamw,
    held_pieces,
    loss_scale_state,
    of_teacher,
    owned_pieces,
    set_adamw_step,
    set_loss_scale_state,
)
from simla_ds.objectives import FeatureQueue
from simla_ds.teacher import Teacher


def save_checkpoint(
    folder: Path, engine: Engine, teacher: Teacher, queue: FeatureQueue, state: dict[str, Any], ranks: Ranks
) -> Path:
    """Write folder/step_N from every rank and return its path; state (JSON) holds at least `step`.

    Raises:
        OSError: on every rank, when any could not write; nothing is left but the checkpoints there were.
    """
    final = folder / f"step_{state['step']:08d}"
    temporary = folder / f".{final.name}.partial"
    try:
        all_or_none(partial(_make_folder, temporary, ranks))
        written = all_or_none(partial(_write_own, temporary, engine, teacher, ranks))
        state = {**state, "world_size": ranks.world_size, "loss_scale": loss_scale_state(engine.optimizer)}
        all_or_none(partial(_complete, temporary, final, queue, state, written, ranks))
    except OSError as error:
        if ranks.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{final} could not be saved, earlier checkpoints are kept: {error}") from error
    return final


def _make_folder(temporary: Path, ranks: Ranks) -> None:
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / WEIGHTS).mkdir(parents=True)


def _write_own(
    temporary: Path, engine: Engine, teacher: Teacher, ranks: Ranks
) -> tuple[Listing, dict[str, int], dict[str, dict[str, Any]]]:
    """Write this rank's pieces and random state; return their listing, AdamW's counts, and what else was written."""
    student, pieces, steps = held_pieces(engine), [], {}
    for held in owned_pieces(student, ranks.rank, ranks.world_size):
        values = {"weight": held.weight.float()}
        if held.optimizer is not None:
            values |= adamw_moments(held)
            steps[held.name] = adamw_step(held)
        pieces += [Piece(f"{kind}/{held.name}", held.shape, held.start, value) for kind, value in values.items()]
    for held in owned_pieces(of_teacher(student, teacher.master), ranks.rank, ranks.world_size):
        pieces.append(Piece(f"teacher/{held.name}", held.shape, held.start, held.weight))
    listing = write_pieces(temporary / WEIGHTS, ranks.rank, pieces)
    random = temporary / f"rng_rank{ranks.rank:05d}.safetensors"
    save_tensors(_random_state(ranks.device), random)
    return listing, steps, {random.name: describe_file(random)}


def _complete(
    temporary: Path,
    final: Path,
    queue: FeatureQueue,
    state: dict[str, Any],
    written: list[tuple[Listing, dict[str, int], dict[str, dict[str, Any]]]],
    ranks: Ranks,
) -> None:
    """Write what there is once, the manifest last, and give the checkpoint its name (main rank)."""
    if not ranks.is_main:
        return
    files: dict[str, dict[str, Any]] = {}
    for rank, (listing, _, others) in enumerate(written):
        files |= {f"{WEIGHTS}/{listing.file}": listing.entry, **others}
        if not (temporary / WEIGHTS / listing.file).is_file():
            raise OSError(f"what rank {rank} wrote is not to be seen here; set --output to a folder all nodes share")
    write_index(temporary / WEIGHTS, [listing for listing, _, _ in written])
    save_tensors({name: value.contiguous().cpu() for name, value in queue.state_dict().items()}, temporary / QUEUE)
    steps = {name: step for _, counts, _ in written for name, step in counts.items()}
    (temporary / STATE).write_text(json.dumps({**state, "adamw_steps": steps}, indent=1))
    for name in (f"{WEIGHTS}/{INDEX}", QUEUE, STATE):
        files[name] = describe_file(temporary / name)
    write_manifest(temporary, files)
    publish(temporary, final)


def find_checkpoint(output: Path, resume: str, ranks: Ranks) -> Path | None:
    """Return the checkpoint to resume from, or None for a fresh start; the same on every rank.

    With `auto` the newest whole one; damaged ones are named and passed over. Ranks share the checking of hashes.

    Raises:
        ValueError: `none` in a folder that holds checkpoints, or a path that is no whole checkpoint.
    """
    found: list[Path] | ValueError = []
    if ranks.is_main:
        try:
            found = candidates(output / "checkpoints", resume)
        except ValueError as error:
            found = error
    found = broadcast_object(found)
    if isinstance(found, ValueError):
        raise found
    for path in found:
        problem = None
        try:
            check_whole(path, ranks.rank, ranks.world_size)
        except (DamagedCheckpoint, OSError) as error:  # told to all, who wait for it
            problem = str(error)
        problems = [problem for problem in gather_objects(problem) if problem]
        if not problems:
            return path
        if resume != "auto":
            raise DamagedCheckpoint(problems[0])
        ranks.say(f"passing over {path}: {problems[0]}")
    return None


@torch.no_grad()
def load_checkpoint(path: Path, engine: Engine, teacher: Teacher, queue: FeatureQueue, ranks: Ranks) -> dict[str, Any]:
    """Restore engine, teacher, queue and random state from a whole checkpoint; return its state.json.

    Random states are per rank: at another number of ranks they are drawn afresh.

    Raises:
        ValueError: the checkpoint is of another model or queue.
    """
    state = read_state(path)
    stored = Pieces(path / WEIGHTS)
    _load_student(stored, state["adamw_steps"], engine)
    _load_weights(stored, "teacher", of_teacher(held_pieces(engine), teacher.master))
    teacher.refresh()
    set_loss_scale_state(engine.optimizer, state["loss_scale"])
    queue.load_state_dict(load_file(path / QUEUE, device=str(ranks.device)))
    if state["world_size"] == ranks.world_size:
        _restore_random_state(load_file(path / f"rng_rank{ranks.rank:05d}.safetensors"), ranks.device)
    else:
        torch.manual_seed(hash((state["step"], ranks.rank, ranks.world_size)) % 2**63)
    engine.global_steps, engine.global_samples = state["step"], state["samples_seen"]
    engine.micro_steps = state["step"] * engine.gradient_accumulation_steps()
    return state


def _load_student(stored: Pieces, steps: dict[str, int], engine: Engine) -> None:
    before_loading(engine)
    pieces = held_pieces(engine)
    _load_weights(stored, "weight", pieces)
    forget_adamw(pieces)
    for held in pieces:
        if held.optimizer is not None and held.name in steps:  # else it was frozen until now
            set_adamw_step(held, steps[held.name])
            for kind, moment in adamw_moments(held).items():
                moment.copy_(stored.read(f"{kind}/{held.name}", held.start, held.count))
    after_loading(engine)


def _load_weights(stored: Pieces, kind: str, pieces: list[HeldPiece]) -> None:
    for held in pieces:
        name = f"{kind}/{held.name}"
        if (shape := stored.shape(name) if name in stored else None) != held.shape:
            raise ValueError(f"the checkpoint's {name} is {shape}, this model's {held.shape}")
        held.weight.copy_(stored.read(name, held.start, held.count))


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
