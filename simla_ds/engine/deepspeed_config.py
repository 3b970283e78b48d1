"""The DeepSpeed JSON, completed from config.py.

The JSON owns ZeRO and communication; config.py owns batch, accumulation, learning rate, clipping and precision. Where
the JSON says "auto" or nothing, config.py fills it; an equal value passes; a different one is refused. DeepSpeed itself
crashes on some "auto" values and ignores others without a word.

Gradient accumulation dtype, as DeepSpeed 0.19 allows it:
    stage 0      the training dtype; fp32 with bf16 or fp16 is refused by DeepSpeed
    stage 1      fp32 (in bf16 this selects BF16_Optimizer; with the optimizer offloaded, the flat partition)
    stages 2, 3  fp32
Gradients are reduced in fp32 unless the JSON says otherwise: twice the bytes of bf16, and sums as exact as on one rank.
"""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path
from typing import Any

import torch

from simla_ds.config import Config

AUTO = "auto"
NEVER = 2**31 - 1
"""Steps between lines that DeepSpeed would print; the trainer prints its own."""

_KNOWN = """
    activation_checkpointing bf16 checkpoint comet comms_logger communication_data_type csv_monitor data_types
    disable_allgather disable_python_gc dump_state flops_profiler fp16 gradient_accumulation_steps
    gradient_allreduce_op gradient_clipping gradient_predivide_factor log_level memory_breakdown optimizer
    prescale_gradients steps_per_print tensorboard timers train_batch_size train_micro_batch_size_per_gpu
    use_node_local_storage wall_clock_breakdown wandb zero_allow_untested_optimizer zero_force_ds_cpu_optimizer
    zero_optimization
"""
KNOWN = frozenset(_KNOWN.split())
"""Top-level keys handed on to DeepSpeed, which keeps no such list and ignores what it does not know."""

REFUSED = {
    "amp": "DeepSpeed 0.19 dropped Apex AMP; remove it and set train.precision",
    "torch_autocast": "remove it and set train.precision: weights are held in the training dtype beside fp32 masters",
    "scheduler": "remove it: the schedule is optim.schedule, optim.warmup_samples and the learning rates beside them",
    "bf16.bf16_master_weights_and_grads": "remove it: the teacher follows fp32 masters, which it does away with",
    "fp16.fp16_master_weights_and_grads": "remove it: the teacher follows fp32 masters, which it does away with",
    "zero_optimization.zenflow": "remove it: it updates late, and the teacher would follow old weights",
    "zero_optimization.offload_optimizer.super_offload": "remove it: it updates late, and the teacher would lag",
    "zero_optimization.round_robin_gradients": "remove it: DeepSpeed 0.19 then mistakes whose fp32 weights are whose",
    "zero_optimization.cpu_offload": 'write "offload_optimizer": {"device": "cpu"}',
    "zero_optimization.cpu_offload_param": 'write "offload_param": {"device": "cpu"}',
}
"""Dotted key -> what to do instead. A value of false is let pass."""


def resolve_precision(requested: str, device_type: str) -> str:
    """Return the training dtype for `train.precision` on a kind of device ("cpu", "cuda", ...).

    auto: bf16 where the device computes in it natively, fp16 on accelerators without it, fp32 on CPUs without
    AVX512-BF16 or AMX. ValueError when fp16 is asked for and cannot be had.
    """
    if requested == AUTO:
        if device_type == "cpu":
            return "bf16" if _cpu_is_fast_in_bf16() else "fp32"
        return "bf16" if _accelerator_has_bf16(device_type) else "fp16"
    if requested not in ("bf16", "fp16", "fp32"):
        raise ValueError(f"train.precision={requested} is none of auto, bf16, fp16, fp32")
    if requested == "fp16" and not _accelerator().is_fp16_supported():
        raise ValueError(
            f"train.precision=fp16 cannot be had on this {device_type} device (DeepSpeed asks for native fp16); "
            "set train.precision to auto, bf16 or fp32"
        )
    return requested


def resolve_deepspeed_config(
    path: str | Path | dict[str, Any], config: Config, world_size: int, precision: str, device_type: str
) -> dict[str, Any]:
    """Return the settings to hand to deepspeed.initialize.

    Args:
        path: the JSON file, or what one would hold; {} is stage 0.
        config: fills every "auto".
        world_size: ranks.
        precision: from resolve_precision.
        device_type: "cpu", "cuda", ...

    Raises:
        ValueError: no such file, no JSON, an unknown or refused key, or a value that contradicts config.py.
    """
    settings = _read(path)
    where = "the DeepSpeed settings" if isinstance(path, dict) else str(path)
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict):
        raise ValueError(f'{where}: zero_optimization must be an object like {{"stage": 2}}, got {zero!r}')
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"{where}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    _refuse(settings, where)
    _check_names(settings, where)
    offloads = _check_offload(zero, where)
    _check_hierarchy(zero, world_size, where)
    settings["zero_optimization"] = {key: value for key, value in zero.items() if value != AUTO}
    _settle_batch(settings, config, world_size, where)
    _settle_precision(settings, precision, stage, where)
    _settle_optimizer(settings, config, offloads, device_type, where)
    if settings.setdefault("steps_per_print", NEVER) == AUTO:
        settings["steps_per_print"] = NEVER
    settings.setdefault("timers", {"throughput": {"enabled": False}})  # it waits for the device twice a micro-step
    if left := _find_auto(settings):
        raise ValueError(f'{where}: {left} is "auto", and nothing fills it; write a value or remove it')
    return settings


def _read(path: str | Path | dict[str, Any]) -> dict[str, Any]:
    if isinstance(path, dict):
        return copy.deepcopy(path)
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except OSError as error:
        raise ValueError(f"--deepspeed {path} cannot be read: {error.strerror}; see ds_configs/") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors too
        raise ValueError(f"--deepspeed {path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"--deepspeed {path} must hold a JSON object, not a {type(settings).__name__}")
    return settings


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is given twice")
    return result


def _refuse(settings: dict[str, Any], where: str) -> None:
    for key, advice in REFUSED.items():
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value not in (None, False):
            raise ValueError(f"{where}: {key} is not supported; {advice}")


def _check_names(settings: dict[str, Any], where: str) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    zero_keys = {name for key, field in fields.items() for name in (key, field.alias) if name}
    for prefix, keys, known in (
        ("", settings, KNOWN),
        ("zero_optimization.", settings["zero_optimization"], zero_keys),
    ):
        for key in keys:
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {prefix}{nearest[0]}?" if nearest else "; remove it"
                raise ValueError(f"{where}: {prefix}{key} is no DeepSpeed setting that this project knows{hint}")


def _check_offload(zero: dict[str, Any], where: str) -> bool:
    """Return whether the optimizer runs on the CPU beside an accelerator's (or the CPU's own) forward."""
    devices = {}
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        section = zero.get(key)
        devices[key] = (section or {}).get("device", "none") if section != AUTO else "none"
        if devices[key] == "nvme":
            raise ValueError(
                f"{where}: zero_optimization.{key}.device is nvme, which is not supported: the teacher and checkpoints "
                'read weights where they lie; write "cpu"'
            )
        if isinstance(section, dict) and section.get("ratio", 1) != 1:
            raise ValueError(
                f"{where}: zero_optimization.{key}.ratio={section['ratio']} is not supported: DeepSpeed 0.19 steps the "
                "rest with a second AdamW, whose learning rate no schedule reaches; write 1 or remove it"
            )
        if devices[key] != "none" and zero["stage"] < least:
            raise ValueError(
                f"{where}: zero_optimization.{key} needs stage >= {least}, got stage {zero['stage']}; "
                f"raise zero_optimization.stage or remove {key}"
            )
    return devices["offload_optimizer"] != "none"


def _check_hierarchy(zero: dict[str, Any], world_size: int, where: str) -> None:
    """ZeRO++ hpZ: each node's cards hold the weights once more between them."""
    size = zero.get("zero_hpz_partition_size", 1)
    if size > 1 and (zero["stage"] != 3 or world_size % size):
        raise ValueError(
            f"{where}: zero_optimization.zero_hpz_partition_size={size} needs stage 3 and ranks that it divides, got "
            f"stage {zero['stage']} and {world_size} rank(s); set it to the cards of a node or remove it"
        )


def _settle(section: dict[str, Any], name: str, wanted: Any, source: str, where: str) -> None:
    """Fill section[name] (name may be dotted from the top) or raise ValueError naming both values and settings."""
    *parents, key = name.split(".")
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ValueError(f"{where}: {parent} must be an object, got {section!r}")
    if section.setdefault(key, AUTO) == AUTO:
        section[key] = wanted
    elif section[key] != wanted or isinstance(section[key], bool) != isinstance(wanted, bool):
        raise ValueError(
            f'{where} says {name}={json.dumps(section[key])}, {source} is {json.dumps(wanted)}; write "auto" in the '
            "JSON or make the two equal"
        )


def _settle_batch(settings: dict[str, Any], config: Config, world_size: int, where: str) -> None:
    train = config.train
    total = train.batch_size * train.grad_accumulation * world_size
    product = f"train.batch_size x train.grad_accumulation x ranks = {train.batch_size} x {train.grad_accumulation} x "
    _settle(settings, "train_micro_batch_size_per_gpu", train.batch_size, "train.batch_size", where)
    _settle(settings, "gradient_accumulation_steps", train.grad_accumulation, "train.grad_accumulation", where)
    _settle(settings, "train_batch_size", total, f"{product}{world_size}", where)
    _settle(settings, "gradient_clipping", config.clip, "optim.clip", where)


def _settle_precision(settings: dict[str, Any], precision: str, stage: int, where: str) -> None:
    if stage == 0 and precision == "fp16":
        # DeepSpeed 0.19 divides gradients by a loss scale that it never applied
        raise ValueError(
            f"{where}: stage 0 does not train in fp16, which train.precision came to; take ds_configs/zero1.json, also "
            "on one rank, or set train.precision to bf16 or fp32"
        )
    for dtype in ("bf16", "fp16"):
        _settle(settings, f"{dtype}.enabled", precision == dtype, f"train.precision={precision}, so it", where)
    if settings.setdefault("communication_data_type", "fp32") == AUTO:
        settings["communication_data_type"] = "fp32"
    if stage == 0:
        source = f"what stage 0 can do at train.precision={precision} (stages 1 to 3 accumulate in fp32)"
        _settle(settings, "data_types.grad_accum_dtype", precision, source, where)
    else:
        types = settings.setdefault("data_types", {})
        if types.setdefault("grad_accum_dtype", "fp32") == AUTO:
            types["grad_accum_dtype"] = "fp32"


def _settle_optimizer(settings: dict[str, Any], config: Config, offloads: bool, device_type: str, where: str) -> None:
    """AdamW: DeepSpeed's CPUAdam when offloaded, its FusedAdam where that is built, else torch's fused AdamW."""
    optim = config.optim
    _settle(settings, "optimizer.type", "AdamW", "the optimizer of this project", where)
    _settle(settings, "optimizer.params.lr", optim.learning_rate, "optim.learning_rate", where)
    _settle(settings, "optimizer.params.betas", list(optim.betas), "optim.betas", where)
    _settle(settings, "optimizer.params.eps", optim.eps, "optim.eps", where)
    params = settings["optimizer"]["params"]
    if "weight_decay" in params:  # else it comes by parameter groups alone, which override this
        _settle(params, "weight_decay", optim.weight_decay, "optim.weight_decay", where)
    if params.setdefault("torch_adam", AUTO) == AUTO:
        params["torch_adam"] = not offloads and not (device_type == "cuda" and _has_fused_adam())
    if params["torch_adam"]:
        params.setdefault("fused", True)


def _find_auto(value: Any, name: str = "") -> str | None:
    """Return the dotted name of the first "auto" left."""
    if isinstance(value, dict):
        found = (_find_auto(inner, f"{name}.{key}" if name else key) for key, inner in value.items())
        return next((hit for hit in found if hit), None)
    return name if value == AUTO else None


def _cpu_is_fast_in_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def _accelerator_has_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)  # DeepSpeed's own answer counts emulation
    return _accelerator().is_bf16_supported()


def _accelerator() -> Any:
    from deepspeed.accelerator import get_accelerator  # seconds: not before it is needed

    return get_accelerator()


def _has_fused_adam() -> bool:
    """Whether DeepSpeed was installed with FusedAdam built. Building it here may fail hours into a queue: the nvcc at
    hand need not suit torch's CUDA, and torch's fused AdamW does the same."""
    from deepspeed.git_version_info import installed_ops

    return bool(installed_ops.get("fused_adam"))
