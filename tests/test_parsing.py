"""Recipes, dotted keys and launcher arguments: what they give, and the one line that wrong use gets."""

import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import get_args

import pytest

from launch import finetune
from simla_ds.config import Config, DataConfig, ObjectivesConfig, OptimConfig, SourceConfig, TeacherConfig, TrainConfig
from simla_ds.downstream.config import TaskName
from simla_ds.parsing import LaunchArguments, dump_config, parse_config

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe and return its path."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def refused(capsys):
    """Parse, expect status 2 and nothing on stdout, and return the one line on stderr."""

    def parse(*argv: str) -> str:
        with pytest.raises(SystemExit) as exit:
            parse_config(list(argv))
        out, err = capsys.readouterr()
        assert (exit.value.code, out) == (2, "")
        assert err.startswith("pretrain.py: error: ")
        assert err.count("\n") == 1
        return err.removeprefix("pretrain.py: error: ").strip()

    return parse


def test_nothing_given_is_the_default(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert parse_config([]) == (Config(), LaunchArguments(deepspeed=None, local_rank=0))


def test_later_recipes_win_and_keys_win_over_recipes_wherever_they_stand(recipe):
    first = recipe("train: {batch_size: 8, steps: 5}\noutput: a\n", "1.yaml")
    second = recipe(
        "train.steps: 6\ndata: {crop_scale: [0.2, 1]}\noptim: {learning_rate: 1e-4, clip: null}\n", "2.yaml"
    )
    config, _ = parse_config(["--train.seed", "3", "--output=b", "--config", first, f"--config={second}"])
    assert (config.train.batch_size, config.train.steps, config.train.seed, config.output) == (8, 6, 3, "b")
    assert config.data.crop_scale == (0.2, 1.0)
    assert config.optim == OptimConfig(learning_rate=1e-4)


@pytest.mark.parametrize(
    ("argv", "file", "rank"),
    [
        (["--deepspeed", "{json}"], True, 0),
        (["--deepspeed={json}", "--local-rank=0"], True, 0),
        (["--deepspeed", "--deepspeed_config", "{json}", "--local_rank", "1"], True, 1),
        (["--local_rank=3", "--train.seed", "4", "--deepspeed_config={json}", "--deepspeed"], True, 3),
        (["--local-rank=2"], False, 2),
    ],
)
def test_every_spelling_of_the_launcher_is_read(argv, file, rank, recipe):
    json = recipe("{}", "zero.json")
    _, launch = parse_config([argument.format(json=json) for argument in argv])
    assert launch == LaunchArguments(deepspeed=json if file else None, local_rank=rank)


def test_torchrun_tells_the_local_rank_by_the_environment(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert parse_config([])[1].local_rank == 5


def test_wrong_deepspeed_arguments_are_refused(refused, recipe):
    one, two = recipe("{}", "1.json"), recipe("{}", "2.json")
    assert "names no file" in refused("--deepspeed")
    assert "differ; give one file" in refused("--deepspeed", one, "--deepspeed_config", two)
    assert refused("--deepspeed", "missing.json") == "--deepspeed missing.json: no such file"


@pytest.mark.parametrize(
    ("argv", "key", "nearest"),
    [
        (["--train.batch_sise", "64"], "train.batch_sise", "train.batch_size"),
        (["--train.batch_sise=64"], "train.batch_sise", "train.batch_size"),
        (["--batch_size", "64"], "batch_size", "train.batch_size"),
        (["--train.batch", "64"], "train.batch", "train.batch_size"),  # no abbreviations
        (["--optim.lerning_rate", "1"], "optim.lerning_rate", "optim.learning_rate"),
        (["--outptu", "x"], "outptu", "output"),
        (["--train.lr", "1"], "train.lr", "optim.learning_rate"),  # what everybody calls it; not the group --train
        (["--epochs", "3"], "epochs", "train.samples"),
        (["--evla.batch_size", "3"], "evla.batch_size", "eval.batch_size"),
    ],
)
def test_an_unknown_key_gets_the_nearest_name(refused, argv, key, nearest):
    assert refused(*argv) == f"there is no key {key}; did you mean --{nearest}?"


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("train: {batch_sise: 64}", "train.batch_sise", "train.batch_size"),
        ("trian: {batch_size: 64}", "trian.batch_size", "train.batch_size"),
        ("objectives: {itc: {queue: 64}}", "objectives.itc.queue", "objectives.itc.queue_size"),
        ("train.batch_sise: 64", "train.batch_sise", "train.batch_size"),
    ],
)
def test_an_unknown_key_in_a_recipe_gets_the_nearest_name(refused, recipe, text, key, nearest):
    assert refused("--config", recipe(text)) == f"there is no key {key}; did you mean --{nearest}?"


@pytest.mark.parametrize("key", ["zzzzz", "train.mark", "model.foo"])
def test_a_key_like_no_other_points_to_the_help(refused, key):
    assert refused(f"--{key}", "3") == f"there is no key {key}; see pretrain.py --help"


def test_an_option_of_the_launcher_behind_the_script_is_told_where_it_goes(refused):
    said = "there is no key num_accelerators; it is an option of the launcher: deepspeed --num_accelerators ... "
    assert refused("--num_accelerators", "2") == said + "pretrain.py ..."


def test_a_key_of_another_programme_names_it(refused):
    assert refused("--task", "vqa") == "there is no key task here; it is one of launch/finetune.py"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--model.vision.image_size", "130"], "model.vision.image_size=130 is not a multiple of"),
        (["--model.vision.width", "256"], "model.vision.width=256 must equal model.stream.width=128"),
        (["--train.batch_size", "1"], "train.batch_size=1 leaves ITM"),
        (["--train.batch_size", "many"], "train.batch_size: expected a whole number, got many"),
        (["--objectives.fidelity", "exact"], "objectives.fidelity: expected corrected or official, got exact"),
        (["--train.precision", "float16"], "train.precision: expected auto, bf16, fp16 or fp32, got float16"),
        (["--teacher.dropout", "maybe"], "teacher.dropout: expected true or false or null, got maybe"),
        (["--optim.betas", "1"], "optim.betas: expected a list of 2 numbers, such as"),
        (["--optim.clip", "none"], "optim.clip: expected a number or null, got none"),
        (["stray"], "unrecognized arguments: stray"),
        (["--local_rank=x"], "argument --local_rank/--local-rank: invalid int value: 'x'"),
        (["--config", "missing.yaml"], "--config missing.yaml: no such file"),
        (["--config"], "--config names no file"),
    ],
)
def test_wrong_values_get_one_line(refused, argv, line):
    assert line in refused(*argv)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("train:\noutput: x\n", "train: expected keys of its own, got nothing"),
        ("objectives: {xmm: 5}", "objectives.xmm: expected keys of its own, got 5"),
        ("train: {steps: }", "train.steps: expected a value, got nothing"),
        ("objectives: {fidelity: }", "objectives.fidelity: expected a value, got nothing"),
        ("train: {steps: 1.5}", "train.steps: expected a whole number, got 1.5"),
        ("seed: 1\ntrain: [1", "recipe.yaml: line 2: expected ',' or ']'"),
        ("", "it is empty or a list"),
        ("- a", "it is empty or a list"),
    ],
)
def test_wrong_recipes_get_one_line(refused, recipe, text, line):
    assert line in refused("--config", recipe(text))


def test_a_recipe_that_is_not_utf8_gets_one_line(refused, tmp_path):
    (tmp_path / "bad.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in refused("--config", str(tmp_path / "bad.yaml"))


def tuned(capsys, *argv: str) -> str:
    """Parse as launch/finetune.py does, expecting it to end, and return what it says."""
    with pytest.raises(SystemExit):
        finetune.parse(list(argv))
    return "".join(capsys.readouterr())


def test_fine_tuning_takes_its_model_by_a_short_name(capsys):
    config, _ = finetune.parse(["--model", "a", "--task=nlvr2"])
    assert (config.init.checkpoint, config.task) == ("a", "nlvr2")
    assert finetune.parse(["--model=b", "--model.stream.layers", "3"])[0].init.checkpoint == "b"
    assert tuned(capsys, "--model") == "finetune.py: error: argument --model: expected one argument\n"
    text = tuned(capsys, "--help")
    assert "--model VALUE  --init.checkpoint VALUE" in text
    assert "Path to a configuration file" not in text
    assert all(task in text.split("JSON list of objects")[1] for task in get_args(TaskName))


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("init.text", "init.text=x is for pretraining only; name a pretrained model folder: --model DIR"),
        ("init.vision", "init.vision=x is for pretraining only; name a pretrained model folder: --model DIR"),
        ("data.visual_tokenizer", "data.visual_tokenizer=x is for pretraining only"),
        ("annotations", "there is no key annotations; did you mean --data.train?"),
        ("image-root", "there is no key image-root; did you mean --data.image_root?"),
    ],
)
def test_fine_tuning_refuses_what_it_would_not_read(capsys, key, told):
    assert f"finetune.py: error: {told}" in tuned(capsys, f"--{key}", "x")


def test_other_ranks_end_the_same_without_a_word(capfd):
    for argv, status in ((["--train.batch_sise", "1"], 2), (["--train.batch_size", "1"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as exit:
            parse_config([*argv, "--local_rank=1"])
        assert exit.value.code == status
    assert capfd.readouterr() == ("", "")


def test_help_documents_every_key_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    for key in _keys(Config):
        assert f"--{key} " in text
    assert "Pairs per rank and micro-step. (type: int, default: 32)" in text
    assert all(argument in text for argument in ("--deepspeed", "--deepspeed_config", "--local_rank", "--config"))


def _keys(kind: type, prefix: str = "") -> list[str]:
    keys = []
    for item in fields(kind):
        group = item.default_factory
        nested = is_dataclass(group)
        keys += _keys(type(group()), f"{prefix}{item.name}.") if nested else [prefix + item.name]
    return keys


@pytest.mark.parametrize("output", ["runs/x", "1e-5", "null", "true", "", " a: #b", "0x1F", 'q"uo\\te', "größe/🦊"])
def test_a_dumped_config_is_read_back_equal(recipe, output):
    config = Config(
        output=output,
        resume="none",
        objectives=ObjectivesConfig(fidelity="official", alpha=1 / 3),
        teacher=TeacherConfig(dropout=True),
        data=DataConfig(crop_scale=(0.123456789012345, 1.0), train="shard-{000000..000019}.tar"),
        optim=OptimConfig(eps=1e-12, clip=0.5, betas=(0.9, 0.98)),
        train=TrainConfig(steps=7),
    )
    read, _ = parse_config(["--config", recipe(dump_config(config))])
    assert read == config
    assert isinstance(read.data.crop_scale, tuple)


def test_sources_are_read_from_a_recipe_and_dumped(recipe, capsys):
    coco, crawl = "{shards: 'data/coco-{00..11}.tar', weight: 2}", "{shards: data/crawl, weight: .5}"
    config, _ = parse_config(["--config", recipe(f"data: {{sources: {{coco: {coco}, crawl: {crawl}}}}}")])
    assert config.data.sources == {
        "coco": SourceConfig(shards="data/coco-{00..11}.tar", weight=2.0),
        "crawl": SourceConfig(shards="data/crawl", weight=0.5),
    }
    assert parse_config(["--config", recipe(dump_config(config))])[0] == config
    wrong = {
        "{coco: {weight: 2}}": "data.sources.coco.shards is missing",
        "{coco: {shards: a, wieght: 2}}": "no key wieght; did you mean --weight",
        "[a, b]": "sources",
        "{coco: {shards: a, weight: x}}": "weight",
    }
    for sources, message in wrong.items():
        with pytest.raises(SystemExit) as exit:
            parse_config(["--config", recipe(f"data: {{sources: {sources}}}")])
        assert exit.value.code == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert message in said


def test_the_default_recipe_is_the_default(project_root):
    config, _ = parse_config(["--config", str(project_root / "launch/recipes/scenes_tiny.yaml")])
    assert config == Config(output="runs/scenes_tiny")


def test_the_small_recipe_is_the_size_it_says(project_root):
    config, _ = parse_config(["--config", str(project_root / "launch/recipes/scenes_small.yaml")])
    assert (config.model.vision.width, config.model.vision.layers, config.model.stream.depth) == (256, 6, 12)
    assert config.objectives.itc.queue_size <= config.data.scenes_train // 4


def test_the_base_recipe_is_the_papers(project_root):
    config, _ = parse_config(["--config", str(project_root / "launch/recipes/simla_base.yaml")])
    model = config.model
    assert (model.vision.grid, model.vision.width, model.vision.layers, model.stream.depth) == (16, 768, 12, 12)
    assert model.vision.patches + 1 <= model.stream.max_positions
    assert (config.optim.reference_batch, config.optim.warmup_samples) == (512, 2_000 * 512)
    assert config.learning_rate_scale(8 * config.train.batch_size) == 1.0
    assert config.teacher_momentum(8 * config.train.batch_size) == 0.995
    assert (config.train.samples, config.objectives.alpha_ramp_samples) == (120_000_000, 4_000_000)
    assert round(config.objectives.xmm.mask_ratio * model.vision.patches) == 75
    assert replace(config, output="x").data.crop_scale == (0.2, 1.0)


@pytest.mark.parametrize("path", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_read_by_its_programme(path):
    _, tuned, task = path.stem.rpartition("finetune_")
    if not tuned:
        assert parse_config(["--config", str(path)])[0].output == f"runs/{path.stem}"
        return
    config, _ = finetune.parse(["--config", str(path)])
    assert (config.task, config.output) == (task, f"runs/{path.stem}")
    assert config.learning_rate_scale(2 * config.train.batch_size) == 1.0  # published on two processes


def test_parsing_needs_no_torch():
    script = "import sys, simla_ds.parsing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
