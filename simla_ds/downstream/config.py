"""What can be set when fine-tuning: pretraining's keys, with other defaults and a few of a task's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from simla_ds.config import (
    Config,
    DataConfig,
    EvalConfig,
    InitConfig,
    ObjectivesConfig,
    OptimConfig,
    TeacherConfig,
    TrainConfig,
)

TaskName = Literal["retrieval", "grounding", "vqa", "nlvr2", "snli_ve", "text_assignment"]
FORMATS = """annotations, a JSON list of objects or JSON Lines (.jsonl); paths start at the picture root:
  retrieval  {"image": path, "caption": [text, ...]}; text_assignment takes the same
  grounding  {"image": path, "text": expression, "box": [x, y, w, h], "size": [width, height], "proposals": optional
              list of boxes, "split": optional name}
  vqa        {"image": path, "question": text, "question_id": number, "answer": [ten texts] or text or left out}
  nlvr2      {"images": [path, path], "sentence": text, "label": "True" or "False", "identifier": optional}
  snli_ve    {"image": path (".jpg" is added), "sentence": text, "label": contradiction, neutral or entailment}
"""
"""For helps."""


@dataclass(frozen=True, kw_only=True)
class FinetuneInit(InitConfig):
    """Start weights."""

    text: str = ""
    """For pretraining only: a task starts from a whole model."""
    vision: str = ""
    """For pretraining only: a task starts from a whole model."""
    checkpoint: str = ""
    """Model folder of this project, such as RUN/final; --model for short. Empty: the task is learnt from scratch."""


@dataclass(frozen=True, kw_only=True)
class FinetuneData(DataConfig):
    """Where a task's examples come from."""

    visual_tokenizer: str = ""
    """For pretraining only: no task reads visual tokens."""
    image_root: str = ""
    """Folder that the annotations' picture paths start from. Empty: the annotation file's own folder."""
    answers: str = ""
    """VQA: JSON list of the answers to rank. Empty: all answers of the training file, the commonest first."""
    max_answers: int = 3_200
    """VQA: answers kept when the list is made from the training file."""
    max_words: int = 0
    """Words kept of a text; 0: as many as published for the task (VQA 50, else 30), and no other number is known."""
    LEAST_WORDS: ClassVar[int] = 0
    max_tokens: int = 50
    """Tokens kept of a text, [CLS] and [SEP] included."""
    scenes_dir: str = "data/scenes"
    """Folder of the embedded scenes. When it is not there, scenes_used of them are prepared in scenes_dir_N."""
    scenes_used: int = 4_000
    """Training scenes that examples are made of, when data.train is a folder of scenes; 0: all."""

    def __post_init__(self):
        super().__post_init__()
        if self.sources:
            raise ValueError("data.sources is pretraining's: name a task's annotation file in data.train")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Config):
    """A fine-tuning run. Of `objectives` all tasks read fidelity, alpha and its ramp; retrieval and grounding more."""

    task: TaskName = "vqa"
    """What to train for."""
    inputs: Literal["both", "text", "image"] = "both"
    """What the model gets to see: `text` blanks the pictures and `image` the words, to learn what a task gives away."""
    init: FinetuneInit = field(default_factory=FinetuneInit)
    """Start weights."""
    objectives: ObjectivesConfig = field(default_factory=lambda: ObjectivesConfig(alpha_ramp_samples=4_000))
    """Teacher's share; retrieval's losses."""
    teacher: TeacherConfig = field(default_factory=lambda: TeacherConfig(momentum=0.995))
    """The momentum teacher."""
    data: FinetuneData = field(default_factory=FinetuneData)
    """The examples. data.train, data.val: annotations (JSON, .jsonl) or folders of scenes' shards; empty: scenes."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(learning_rate=1e-3, min_learning_rate=1e-6, warmup_samples=1_000)
    )
    """The optimizer."""
    train: TrainConfig = field(
        default_factory=lambda: TrainConfig(samples=16_000, diagnose_every=0, checkpoint_every=500)
    )
    """The loop."""
    eval: EvalConfig = field(default_factory=lambda: EvalConfig(every=100, samples=1_000, patience=3))
    """The held-out evaluation, which picks the best weights and ends the run when they get no better."""
    output: str = "runs/finetune"
    """Run folder."""

    def __post_init__(self):
        super().__post_init__()
        for key, value, instead in (
            ("init.text", self.init.text, "name a pretrained model folder: --model DIR"),
            ("init.vision", self.init.vision, "name a pretrained model folder: --model DIR"),
            ("data.visual_tokenizer", self.data.visual_tokenizer, "leave it out: no task reads visual tokens"),
        ):
            if value:
                raise ValueError(f"{key}={value} is for pretraining only; {instead}")

    @property
    def runs_itm(self) -> bool:
        """Whether pairs are matched: by the tasks that are trained as pretraining is."""
        return super().runs_itm and self.task in ("retrieval", "grounding")

    @property
    def reads_visual_tokens(self) -> bool:
        """Whether the run needs a visual tokeniser: never."""
        return False
