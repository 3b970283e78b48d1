"""`simla plan`: options, and the recipe's keys behind them."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from simla_ds.config import Config
from simla_ds.planner.cards import CARDS, GIB
from simla_ds.planner.memory import LAYOUTS, Zero
from simla_ds.planner.plan import Hardware, make_plan
from simla_ds.planner.table import as_json, render


def run(arguments: argparse.Namespace, config: Config) -> int:
    """Print the plan of a configuration and return the exit status."""
    card = CARDS[arguments.card]
    if arguments.memory:
        card = replace(card, memory=arguments.memory * GIB)
    hardware = Hardware(card=card, nodes=arguments.nodes, cards=arguments.cards, utilisation=arguments.utilisation)
    layouts = LAYOUTS if arguments.deepspeed is None else (Zero.of(_read(arguments.deepspeed)),)
    plan = make_plan(config, hardware, layouts, pairs=arguments.pairs or 0, caption_tokens=arguments.caption_tokens)
    if arguments.json:
        json.dump(as_json(plan), sys.stdout, indent=1)
        print()
    else:
        print(render(plan, markdown=arguments.markdown))
    return 0


def _read(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--deepspeed {path} is not JSON: {error}") from None
