"""The DeepSpeed JSON and config.py: what is filled, what passes, what is refused and with which words."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig

from simla_ds.config import Config, OptimConfig, TrainConfig
from simla_ds.engine.deepspeed_config import KNOWN, resolve_deepspeed_config, resolve_precision
from simla_ds.engine.trainer import add_monitors

FILES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
CONFIG = Config(train=TrainConfig(batch_size=32, grad_accumulation=2), optim=OptimConfig(learning_rate=3e-4))


def resolve(settings, config=CONFIG, *, world_size=4, precision="fp32", device_type="cpu"):
    return resolve_deepspeed_config(settings, config, world_size, precision, device_type)


def test_monitors_are_added_and_those_of_the_json_stand():
    settings = {"csv_monitor": {"enabled": False}, "tensorboard": {"job_name": "mine"}}
    add_monitors(settings, CONFIG)
    assert settings["csv_monitor"]["enabled"] is False
    assert settings["tensorboard"] == {"enabled": True, "output_path": CONFIG.output, "job_name": "mine"}
    assert "wandb" not in settings


def test_fp16_at_stage_0_is_refused():
    with pytest.raises(ValueError, match=r"stage 0 does not train in fp16.*zero1\.json"):
        resolve({}, precision="fp16")


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        (name, precision)
        for name in FILES
        for precision in ("fp32", "bf16", "fp16")
        if (name[4], precision) != ("0", "fp16")
    ],
)
def test_every_shipped_json_is_filled_and_accepted_by_deepspeed(project_root, name, precision):
    settings = resolve(project_root / "ds_configs" / f"{name}.json", precision=precision, world_size=1)
    assert "auto" not in json.dumps(settings)
    assert settings["train_micro_batch_size_per_gpu"] == 32
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["gradient_clipping"] == 1.0
    assert settings["bf16"]["enabled"] is (precision == "bf16")
    assert settings["fp16"]["enabled"] is (precision == "fp16")
    assert settings["optimizer"]["params"]["lr"] == 3e-4
    assert settings["communication_data_type"] == "fp32"
    stage = int(name[4])
    assert settings["data_types"]["grad_accum_dtype"] == (precision if stage == 0 else "fp32")
    parsed = DeepSpeedConfig(settings)
    assert parsed.zero_optimization_stage == stage
    assert parsed.train_batch_size == 64


def test_nothing_given_is_stage_0_with_everything_from_config():
    settings = resolve({})
    assert settings["zero_optimization"] == {"stage": 0}
    assert settings["train_batch_size"] == 32 * 2 * 4
    assert settings["optimizer"]["params"]["betas"] == [0.9, 0.999]


def test_the_callers_dict_is_left_alone():
    given = {"zero_optimization": {"stage": 1}}
    resolve(given)
    assert given == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_optimizer_is_torchs_on_a_cpu_and_deepspeeds_when_offloaded(project_root, name):
    folder = project_root / "ds_configs"
    assert resolve(folder / f"{name}.json")["optimizer"]["params"]["torch_adam"] is True
    assert resolve(folder / f"{name}_offload.json")["optimizer"]["params"]["torch_adam"] is False


def test_equal_values_pass():
    same = {
        "train_batch_size": 256,
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "bf16": {"enabled": False},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.0003, "betas": [0.9, 0.999], "weight_decay": 0.02}},
    }
    assert resolve(same)["gradient_clipping"] == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 16}, ["train_micro_batch_size_per_gpu=16", "train.batch_size is 32"]),
        ({"gradient_accumulation_steps": 1}, ["gradient_accumulation_steps=1", "train.grad_accumulation is 2"]),
        ({"train_batch_size": 128}, ["train_batch_size=128", "32 x 2 x 4 is 256"]),
        ({"gradient_clipping": 0.5}, ["gradient_clipping=0.5", "optim.clip is 1.0"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled=true", "train.precision=fp32"]),
        ({"optimizer": {"params": {"lr": 0.001}}}, ["optimizer.params.lr=0.001", "optim.learning_rate is 0.0003"]),
        ({"optimizer": {"params": {"weight_decay": 0.1}}}, ["weight_decay=0.1", "optim.weight_decay is 0.02"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type", "Lamb", "AdamW"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["grad_accum_dtype", "bf16", "fp32", "stage 0"]),
    ],
)
def test_a_different_value_is_refused_with_both(settings, words):
    with pytest.raises(ValueError, match=r"\S") as caught:
        resolve(settings)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"amp": {"enabled": True}}, ["amp", "DeepSpeed 0.19", "train.precision"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "optim.warmup_samples"]),
        ({"bf16": {"bf16_master_weights_and_grads": True}}, ["bf16_master_weights_and_grads", "teacher"]),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, ["round_robin_gradients"]),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["offload_param", "nvme", "cpu"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}, ["nvme", "the teacher", "cpu"]),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}}},
            ["offload_optimizer.ratio=0.3", "second AdamW", "write 1"],
        ),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["stage >= 3", "stage 2"]),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, ["stage >= 1", "stage 0"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, ["zero_hpz_partition_size=8", "4 rank(s)"]),
        ({"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}}, ["zero_hpz_partition_size=2", "stage 2"]),
        ({"zero_optimization": {"stage": 4}}, ["stage", "4"]),
        ({"zero_optimization": True}, ["zero_optimization", "object"]),
        ({"zero_optimisation": {"stage": 2}}, ["zero_optimisation", "did you mean zero_optimization?"]),
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, ["overlap_com", "zero_optimization.overlap_comm?"]),
        ({"wall_clock_breakdown": "auto"}, ["wall_clock_breakdown", "auto"]),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(settings, words):
    with pytest.raises(ValueError, match=r"\S") as caught:
        resolve(settings)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_auto_in_the_zero_section_is_left_to_deepspeed():
    settings = resolve({"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}})
    assert settings["zero_optimization"] == {"stage": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ('{"a": 1, "a": 2}', "a is given twice"),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, content, words):
    path = tmp_path / "zero.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=words) as caught:
        resolve(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_official_clips_nothing_and_zero_passes():
    config = replace(CONFIG, optim=OptimConfig(clip=0.0))
    assert resolve({}, config)["gradient_clipping"] == 0.0


def test_every_known_key_is_read_by_the_installed_deepspeed():
    folder = Path(str(__import__("deepspeed").__file__)).parent
    names = ("runtime", "monitor", "comm", "profiling", "utils")
    source = "".join(p.read_text() for name in names for p in (folder / name).rglob("*.py"))
    assert {key for key in KNOWN if not re.search(rf'["\x27]{key}["\x27]', source)} == set()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16")],
)
def test_auto_on_a_cpu_is_bf16_only_with_bf16_units(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_precision("auto", "cpu") == expected


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp16")])
def test_auto_on_a_gpu_counts_native_bf16_only(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert resolve_precision("auto", "cuda") == expected


def test_what_is_asked_for_is_given():
    assert resolve_precision("bf16", "cpu") == "bf16"
    assert resolve_precision("fp32", "cuda") == "fp32"


def test_fp16_where_it_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: None)  # what DeepSpeed answers on most CPUs
    with pytest.raises(ValueError, match=r"train\.precision=fp16 .* cpu"):
        resolve_precision("fp16", "cpu")
