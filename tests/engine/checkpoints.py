"""Whole checkpoints without a run: as save_checkpoint lays them out, from two ranks' shares."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from simla_ds.config import Config
from simla_ds.engine.checkpoint_folder import QUEUE, STATE, WEIGHTS, describe_file, publish, write_manifest
from simla_ds.engine.tensor_files import Piece, write_index, write_pieces


def write_checkpoint(path: Path, config: Config, weights: dict[str, Tensor], teacher: dict[str, Tensor]) -> None:
    """Write path (.../step_N) with a student, a teacher and zero moments."""
    temporary = path.with_name(f".{path.name}.partial")
    (temporary / WEIGHTS).mkdir(parents=True)
    zeros = {name: torch.zeros_like(value) for name, value in weights.items()}
    kinds = {"weight": weights, "exp_avg": zeros, "exp_avg_sq": zeros, "teacher": teacher}
    shares: list[list[Piece]] = [[], []]
    for kind, tensors in kinds.items():
        for name, value in tensors.items():
            half = value.numel() // 2
            for share, part, start in zip(shares, value.flatten().tensor_split([half]), (0, half), strict=True):
                share.append(Piece(f"{kind}/{name}", tuple(value.shape), start, part))
    write_index(temporary / WEIGHTS, [write_pieces(temporary / WEIGHTS, r, pieces) for r, pieces in enumerate(shares)])
    save_file({"image": torch.ones(2, 3)}, temporary / QUEUE)
    state = {"step": 7, "samples_seen": 56, "model": asdict(config.model), "config": asdict(config), "world_size": 2}
    (temporary / STATE).write_text(json.dumps(state))
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    write_manifest(temporary, {str(file.relative_to(temporary)): describe_file(file) for file in files})
    publish(temporary, path)
