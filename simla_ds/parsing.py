"""From dataclasses to the command line and YAML: what launch/pretrain.py and launch/finetune.py accept.

    pretrain.py [--deepspeed FILE.json] [--config RECIPE.yaml ...] [--KEY.SUBKEY VALUE ...]

Keys, types, defaults and help come from simla_ds.config. Recipes are read in the order given, later ones win, and keys
on the command line win over all of them. Wrong use ends with exit status 2 and one line, printed once per node.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from simla_ds.config import Config
from simla_ds.hints import explain, is_group

C = TypeVar("C", bound=Config)
_USAGE = "%s [--deepspeed FILE.json] [--config RECIPE.yaml ...] [--KEY.SUBKEY VALUE ...]"


@dataclass(frozen=True, kw_only=True)
class LaunchArguments:
    """What the launcher decides, apart from the run's configuration."""

    deepspeed: str | None = None
    """DeepSpeed JSON: ZeRO and communication. None when the command line names none."""
    local_rank: int = 0
    """This process's number on its node."""


def parse_config(
    argv: list[str],
    kind: type[C] = Config,
    program: str = "pretrain.py",
    purpose: str = "Pretrain SIMLA.",
    *,
    short: Mapping[str, str] | None = None,
    notes: str = "",
) -> tuple[C, LaunchArguments]:
    """Return the run's configuration, of a kind, and the launcher's arguments.

    program and purpose are for messages, notes for the end of the help. short: options that stand for a key.
    Exits with status 0 after --help and 2 on wrong use; only local rank 0 prints.
    """
    options, rest = _launch_parser(program).parse_known_args(argv)
    with contextlib.ExitStack() as stack:
        if options.local_rank > 0:
            silence = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        parser = _config_parser(kind, program, purpose)
        parser.kind, parser.short, parser.notes = kind, short or {}, notes
        config = _build(parser, kind, rest)
        return config, LaunchArguments(deepspeed=_deepspeed_file(parser, options), local_rank=options.local_rank)


def dump_config(config: Config) -> str:
    """Return YAML that parse_config(["--config", FILE]) reads back to an equal Config."""
    return "".join(_yaml_lines(asdict(config)))


def _yaml_lines(values: dict[str, Any], indent: str = "") -> Iterator[str]:
    """JSON scalars are YAML too, and their quotes keep an output folder called 1e-5 a string."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:\n"
            yield from _yaml_lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {json.dumps(value, ensure_ascii=False)}\n"


class _OneLineParser(ArgumentParser):
    """A parser whose errors are one line, with the nearest name to an unknown key."""

    kind: type = Config
    short: Mapping[str, str] = MappingProxyType({})
    """Options that stand for a key, as `--model` for `init.checkpoint`."""
    typed: Mapping[str, str] = MappingProxyType({})
    """Those of them that were given, for messages."""
    notes: str = ""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line to stderr and exit with status 2."""
        for option, key in self.typed.items():
            message = message.replace(f"argument --{key}:", f"argument {option}:")
        _fail(self.prog, explain(message, self.prog, self.kind, self._keys()))

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help of every key, and of the launcher's arguments."""
        for action in self._actions:
            if is_group(action.option_strings, self._keys()):
                action.help = argparse.SUPPRESS  # jsonargparse's "Path to a configuration file" of each group
        parts = [super().format_help(*args, **kwargs), _launch_parser(self.prog).format_help()]
        if self.short:
            parts.append("Short:\n" + "".join(f"  {o} VALUE  --{key} VALUE\n" for o, key in self.short.items()))
        return "\n".join(filter(None, [*parts, self.notes]))

    def long(self, argv: list[str]) -> list[str]:
        """Write short options out."""
        options = [argument.partition("=") for argument in argv]
        self.typed = {option: self.short[option] for option, _, _ in options if option in self.short}
        return [f"--{self.typed[o]}{sep}{value}" if o in self.typed else o + sep + value for o, sep, value in options]

    def _keys(self) -> list[str]:
        return [name[2:] for action in self._actions for name in action.option_strings if name.startswith("--")]


class _LaunchParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(self.prog, message)


def _fail(program: str, message: str) -> NoReturn:
    print(f"{program}: error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _launch_parser(program: str) -> argparse.ArgumentParser:
    parser = _LaunchParser(prog=program, add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS)
    group = parser.add_argument_group("Launching")
    group.add_argument("--deepspeed", nargs="?", const="", metavar="FILE.json", help="DeepSpeed JSON (default: none)")
    group.add_argument("--deepspeed_config", metavar="FILE.json", help="the same, after a bare --deepspeed")
    group.add_argument(
        "--local_rank",
        "--local-rank",
        type=int,
        default=int(os.environ.get("LOCAL_RANK", 0)),
        metavar="N",
        help="this process's number on its node, given by the launcher (default: LOCAL_RANK, or 0)",
    )
    return parser


def _config_parser(kind: type[Config], program: str, purpose: str) -> _OneLineParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _OneLineParser(prog=program, usage=_USAGE % program, allow_abbrev=False, description=purpose)
    parser.add_argument("--config", action="config", help="Recipe (YAML); may be given several times, later ones win.")
    parser.add_class_arguments(kind)
    return parser


def _build(parser: _OneLineParser, kind: type[C], argv: list[str]) -> C:
    try:
        recipes, others = _apart(parser.long(argv))
        for recipe in recipes:
            _check_recipe(recipe)
        values = parser.parse_args([*(f"--config={recipe}" for recipe in recipes), *others])
        if (problem := _empty_key(kind, values)) is not None:
            raise ValueError(f"{problem}; see launch/recipes for an example, or leave out its line")
        built = parser.instantiate(values)
        return kind(**{item.name: built[item.name] for item in fields(kind)})
    except ValueError as error:  # a dataclass refused its values
        parser.error(str(error))


def _empty_key(kind: type, values: Namespace, prefix: str = "") -> str | None:
    """Say which key a recipe leaves empty, or which group it gives a plain value; jsonargparse lets both through."""
    for item in fields(kind):
        key, value, group = prefix + item.name, values[item.name], item.default_factory
        if is_dataclass(group):
            if not isinstance(value, Namespace):
                return f"{key}: expected keys of its own, got {'nothing' if value is None else value}"
            if (problem := _empty_key(group, value, f"{key}.")) is not None:
                return problem
        elif value is None and item.default is not None:
            return f"{key}: expected a value, got nothing"
    return None


def _apart(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the recipes and the other arguments: jsonargparse lets whatever comes later win, also a recipe over a key.

    ValueError when a --config names no file.
    """
    recipes, others = [], []
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            recipe = next(arguments, None)
            if recipe is None:
                raise ValueError("--config names no file; give a recipe, such as launch/recipes/scenes_tiny.yaml")
            recipes.append(recipe)
        elif argument.startswith("--config="):
            recipes.append(argument.removeprefix("--config="))
        else:
            others.append(argument)
    return recipes, others


def _check_recipe(recipe: str) -> None:
    """Raise ValueError, naming the file, when a recipe is not there or holds no keys."""
    if not Path(recipe).is_file():
        raise ValueError(f"--config {recipe}: no such file")
    try:
        content = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {recipe} is not UTF-8 text: {error}") from error
    except yaml.MarkedYAMLError as error:
        place = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ValueError(f"--config {recipe}:{place} {error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a control character
        raise ValueError(f"--config {recipe} is no YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {recipe} must hold keys, as those in launch/recipes; it is empty or a list")


def _deepspeed_file(parser: _OneLineParser, options: argparse.Namespace) -> str | None:
    if options.deepspeed and options.deepspeed_config and options.deepspeed != options.deepspeed_config:
        parser.error(
            f"--deepspeed {options.deepspeed} and --deepspeed_config {options.deepspeed_config} differ; give one file"
        )
    file = options.deepspeed or options.deepspeed_config
    if options.deepspeed == "" and not file:
        parser.error("--deepspeed names no file; give one, such as --deepspeed ds_configs/zero2.json")
    if file and not os.path.isfile(file):
        parser.error(f"--deepspeed {file}: no such file")
    return file
