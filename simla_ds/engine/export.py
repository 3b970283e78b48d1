"""From a checkpoint to model folders: no GPU, no deepspeed, one tensor in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from simla_ds.data.processor import save_processor
from simla_ds.engine.checkpoint_folder import WEIGHTS, check_whole, read_state
from simla_ds.engine.tensor_files import Pieces, write_tensors
from simla_ds.hub import WEIGHTS as MODEL_WEIGHTS
from simla_ds.hub import SimlaConfig, SimlaModel, new_model_folder

PRETRAININGS_NETWORK = ("retrieval", "grounding")
"""Tasks that train pretraining's own network."""


def export_checkpoint(checkpoint: Path, out: Path, tokenizer: Path | None = None) -> None:
    """Write the student of a checkpoint as the model folder `out`, and the teacher as out/teacher.

    Args:
        checkpoint: .../checkpoints/step_N, saved at any number of ranks and ZeRO stage.
        out: written beside and renamed into place; a model folder already there is replaced.
        tokenizer: its folder; None: where the run had it.

    Raises:
        ValueError: the checkpoint is damaged or of a task with another network, the tokenizer is gone or another, `out`
            is something else.
    """
    check_whole(checkpoint)
    state = read_state(checkpoint)
    if (task := state["config"].get("task", "retrieval")) not in PRETRAININGS_NETWORK:
        raise ValueError(f"{checkpoint} is of the task {task}: its run's best/ and final/ are its model folders")
    data = state["config"]["data"]
    tokenizer = tokenizer or Path(data["tokenizer"])
    if not tokenizer.is_dir():
        raise ValueError(f"{tokenizer}, the tokenizer of {checkpoint}, is not there; give its folder with --tokenizer")
    origin = {"step": state["step"], "samples_seen": state["samples_seen"]}
    config = SimlaConfig(model=state["model"], training=origin, architectures=[SimlaModel.__name__], dtype="float32")
    with new_model_folder(out) as fresh:
        for prefix, folder in (("weight/", fresh), ("teacher/", fresh / "teacher")):
            folder.mkdir(parents=True)
            _write_weights(Pieces(checkpoint / WEIGHTS, prefix), config, folder / MODEL_WEIGHTS)
            config.save_pretrained(folder)
            save_processor(config.model_config, tokenizer, folder, data["max_words"], data["max_tokens"])


def _write_weights(weights: Pieces, config: SimlaConfig, file: Path) -> None:
    with torch.device("meta"):
        network = SimlaModel(config).model
    shapes: dict[str, tuple[int, ...]] = {name: tuple(p.shape) for name, p in network.named_parameters()}
    for name in sorted(shapes.keys() | weights.keys()):
        stored = weights.shape(name) if name in weights else None
        if stored != shapes.get(name):
            raise ValueError(f"{weights.folder} has {name} {stored}, its model {shapes.get(name)}")
    named = {f"model.{name}": shape for name, shape in shapes.items()}
    write_tensors(file, named, lambda name: weights[name.removeprefix("model.")], metadata={"format": "pt"})
