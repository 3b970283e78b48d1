"""A rank of tests/engine/test_zero_init.py: builds networks in parts and whole, and compares them bit by bit.

Arguments: a folder with a BERT in bert/ and a ViT in vit.safetensors, the training scenes, and where the report goes.
"""

import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import deepspeed
import torch
from torch import Tensor

from benchmarks.peak_memory import peak_mib, restart_peak
from simla_ds.config import InitConfig, ModelConfig, StreamConfig, VisionConfig, VocabularyConfig
from simla_ds.downstream.nlvr2 import PairNetwork
from simla_ds.downstream.snli_ve import EntailmentNetwork
from simla_ds.downstream.text_assignment import AssignmentNetwork
from simla_ds.downstream.vqa import AnswerNetwork
from simla_ds.engine import trainer
from simla_ds.engine.distributed import Ranks, finish, gather_objects, start
from simla_ds.engine.zero_init import ZeroInit
from simla_ds.engine.zero_teacher import EngineSource
from simla_ds.model.network import Network
from simla_ds.model.pretrained import initialise
from simla_ds.model.simla import Simla
from simla_ds.model.weight_decay import parameter_groups
from simla_ds.parsing import parse_config
from tests.engine.launching import ROOT
from tests.engine.runs import keys
from tests.model.test_pretrained import tiny
from tests.tiny import ALBEF, model_config

SETTINGS = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
LARGE = ModelConfig(
    vision=VisionConfig(image_size=64, patch_size=8, width=512, layers=8, heads=8),
    stream=StreamConfig(layers=8, width=512, heads=8, intermediate_size=2048, max_positions=65),
    vocabulary=VocabularyConfig(size=20_000, visual_size=512),
)
"""Large enough that memory is that of weights."""


def from_pretrained(kind: Any) -> Callable[[], Network]:
    """The network that it starts from is built as well, and gone before the end."""

    def build() -> Network:
        network, start = kind(model_config(ALBEF)), Simla(model_config(ALBEF))
        network.start_from(start)
        return network

    return build


def from_files(folder: Path) -> Callable[[], Network]:
    def build() -> Network:
        model = tiny()
        initialise(model, InitConfig(text=str(folder / "bert"), vision=str(folder / "vit.safetensors")))
        with torch.no_grad():
            model.temperature.value.fill_(9.0)
        model.temperature.clamp_()
        return model

    return build


def built(build: Callable[[], Network], within: AbstractContextManager[Any]) -> tuple[Network, Tensor]:
    """Return what was built, and the generator's state afterwards."""
    torch.manual_seed(3)
    with within:
        network = build()
    return network, torch.get_rng_state()


def compare(build: Callable[[], Network], ranks: Ranks) -> dict[str, Any]:
    whole, drawn = built(build, nullcontext())
    parts, drawn_in_parts = built(build, ZeroInit(SETTINGS, torch.float32, ranks.device))
    names = [name for name, _ in parts.named_parameters()]
    held = sum(parameter.numel() for parameter in parts.parameters())
    parameters: Any = list(parts.parameters())  # with DeepSpeed's own attributes
    shares = [parameter.ds_tensor.numel() for parameter in parameters]
    different = []
    for name, parameter in parts.named_parameters():
        wanted = whole.get_parameter(name)
        with deepspeed.zero.GatheredParameters([parameter]):
            if not torch.equal(parameter, wanted) or parameter.requires_grad != wanted.requires_grad:
                different.append(name)
    groups = [
        [
            [p.ds_shape if hasattr(p, "ds_shape") else p.shape for p in group["params"]]
            for group in parameter_groups(network, 0.1, official=official)
        ]
        for network in (whole, parts)
        for official in (True, False)
    ]
    return {
        "same_names": names == [name for name, _ in whole.named_parameters()],
        "different": different,
        "same_draws": torch.equal(drawn, drawn_in_parts),
        "whole_afterwards": held,
        "shares": gather_objects(sum(shares)),
        "parameters": sum(p.numel() for p in whole.parameters()),
        "same_groups": groups[:2] == groups[2:],
        "buffers": len(list(parts.buffers())),
    }


def peak(within: AbstractContextManager[Any]) -> float:
    """Return MiB that building the large model takes at its highest, beyond what was held before."""
    before = restart_peak()
    with within:
        model = Simla(LARGE)
    del model
    return peak_mib() - before


def memory(ranks: Ranks) -> dict[str, Any]:
    with torch.device("meta"):
        sizes = [p.numel() for p in Simla(LARGE).parameters()]
    return {
        "parameters_mib": sum(sizes) * 4 / 2**20,
        "largest_mib": max(sizes) * 4 / 2**20,
        "whole": gather_objects(peak(nullcontext())),
        "parts": gather_objects(peak(ZeroInit(SETTINGS, torch.float32, ranks.device))),
    }


def train(data: Path, output: Path, ranks: Ranks) -> dict[str, Tensor]:
    """Train a few steps at stage 3 in bf16; return the float32 weights at the start and at the end."""
    arguments = [*("--train.steps", "3", "--train.batch_size", "4", "--output", str(output))]
    arguments += ["--optim.warmup_samples", "0", "--train.precision", "bf16"]
    config, _ = parse_config(keys(data, *arguments))
    run = trainer.Trainer(config, str(ROOT / "ds_configs" / "zero3.json"), ranks)
    weights = {f"start/{name}": value for name, value in whole(run.source).items()}
    run.fit()
    return weights | {f"end/{name}": value for name, value in whole(run.source).items()}


def whole(source: EngineSource) -> dict[str, Tensor]:
    shapes = {n: p.ds_shape for n, p in source.engine.module.model.named_parameters()}
    values = {name: torch.empty(shape) for name, shape in shapes.items()}
    source.fill(values, source.shards())
    return values


def training(data: Path, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """Compare a run whose model was built in parts with one whose model DeepSpeed itself takes apart."""
    parts = train(data, folder / "parts", ranks)
    with patch.object(trainer, "ZeroInit", lambda *_: nullcontext()):
        first_whole = train(data, folder / "whole", ranks)
    names = [name.removeprefix("end/") for name in parts if name.startswith("end/")]
    return {
        "different": [name for name, value in parts.items() if not torch.equal(value, first_whole[name])],
        "moved": sum(not torch.equal(parts[f"start/{name}"], parts[f"end/{name}"]) for name in names),
    }


def failing(ranks: Ranks) -> dict[str, Any]:
    """What goes wrong within comes out as it is, and nothing lingers."""
    said = ""
    try:
        with ZeroInit(SETTINGS, torch.float32, ranks.device):
            raise ValueError("a file is missing")
    except ValueError as error:
        said = str(error)
    return {"said": said, "numel": torch.nn.Linear(3, 5).weight.mul(2).numel()}


def main() -> None:
    files, data, out = [Path(argument) for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    ranks = start()
    try:
        report: dict[str, Any] = {"memory": memory(ranks), "failing": failing(ranks)}
        for kind in (AnswerNetwork, PairNetwork, EntailmentNetwork, AssignmentNetwork):
            report[kind.__name__] = compare(from_pretrained(kind), ranks)
        report["scratch"] = compare(lambda: Simla(model_config()), ranks)
        report["files"] = compare(from_files(files), ranks)
        report["training"] = training(data, out.parent / "runs", ranks)
        if ranks.is_main:
            out.write_text(json.dumps(report))
    finally:
        finish()


if __name__ == "__main__":
    main()
