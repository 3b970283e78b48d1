"""All downstream tasks by name, and where their entries come from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from simla_ds.data.text import TextTokenizer
from simla_ds.downstream.annotations import Annotations, read_annotations
from simla_ds.downstream.base import Downstream
from simla_ds.downstream.grounding import Grounding
from simla_ds.downstream.nlvr2 import Nlvr2
from simla_ds.downstream.retrieval_tuning import Retrieval
from simla_ds.downstream.scenes import scene_annotations
from simla_ds.downstream.snli_ve import SnliVe
from simla_ds.downstream.text_assignment import TextAssignment
from simla_ds.downstream.vqa import Vqa

ANSWERS = "answers.json"
"""The answer list in a VQA model folder."""

TASKS: dict[str, Callable[..., Downstream]] = {
    "retrieval": lambda tokenizer, answers, official, rerank: Retrieval(rerank),
    "grounding": lambda tokenizer, answers, official, rerank: Grounding(rerank),
    "vqa": lambda tokenizer, answers, official, rerank: Vqa(tokenizer, answers, official=official),
    "nlvr2": lambda tokenizer, answers, official, rerank: Nlvr2(),
    "snli_ve": lambda tokenizer, answers, official, rerank: SnliVe(),
    "text_assignment": lambda tokenizer, answers, official, rerank: TextAssignment(),
}


def make_task(
    name: str,
    tokenizer: TextTokenizer | None,
    answers: list[str] | None = None,
    *,
    official: bool = False,
    rerank: int = 16,
) -> Downstream:
    """Return a task. answers: VQA's list. official: published arithmetic. rerank: retrieval's candidates."""
    return TASKS[name](tokenizer, answers or [], official, rerank)


def load_annotations(task: str, source: str, image_root: str = "", *, limit: int = 0) -> Annotations:
    """Return a task's entries, unchecked: of an annotation file (*.json, *.jsonl), or made of scenes' shards.

    limit: scenes used, 0: all. Raises ValueError.
    """
    if source.endswith((".json", ".jsonl")):
        if not Path(source).is_file():
            raise ValueError(f"{source} is not there; give a JSON annotation file, or a folder of scenes' shards")
        return read_annotations(Path(source), Path(image_root) if image_root else None)
    return scene_annotations(task, source, limit=limit)


def read_answers(file: Path) -> list[str]:
    """Read an answer list: a JSON list of different texts. Raises ValueError."""
    try:
        answers = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as an answer list: {error}") from error
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"{file} must hold a list of answers (texts)")
    if len(set(answers)) < len(answers):
        raise ValueError(f"{file} holds {len(answers) - len(set(answers))} answer(s) twice")
    return answers
