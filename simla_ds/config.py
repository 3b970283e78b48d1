"""Everything that can be set, as frozen dataclasses: one line of why per field, checked when built.

The defaults are the recipe `scenes_tiny`: what `deepspeed launch/pretrain.py` trains with no other flag. Recipes
(launch/recipes/*.yaml) and the command line (`--train.batch_size 64`) override them by dotted keys. The DeepSpeed JSON
owns ZeRO and communication; everything else is here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image encoder: a pre-LN ViT."""

    image_size: int = 128
    """Side of the (square) picture in pixels; a multiple of patch_size."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    width: int = 128
    """Token width; equals stream.width, since one transformer reads both."""
    layers: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads; divides width."""
    mlp_ratio: float = 4.0
    """Width of the feed-forward layer over width."""

    def __post_init__(self):
        _require(
            self.image_size % self.patch_size == 0,
            f"model.vision.image_size={self.image_size} is not a multiple of model.vision.patch_size={self.patch_size}"
            f"; set model.vision.image_size to {max(1, self.image_size // self.patch_size) * self.patch_size}",
        )
        _require(
            self.width % self.heads == 0,
            f"model.vision.width={self.width} is not a multiple of model.vision.heads={self.heads}",
        )
        _require(
            min(self.layers, self.heads, self.patch_size) >= 1, "model.vision: layers, heads, patch_size must be >= 1"
        )

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of a picture."""
        return self.grid**2


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """The text/fusion transformer: post-LN BERT layers with cross-attention."""

    shared: bool = True
    """True (SIMLA): the same layers serve text alone, text over image and image over text. False (ALBEF): the first
    text_layers read text alone, fusion_layers on top of them fuse."""
    layers: int = 6
    """Layers when shared."""
    text_layers: int = 6
    """Layers for text alone when not shared."""
    fusion_layers: int = 6
    """Layers with cross-attention when not shared."""
    width: int = 128
    """Token width."""
    heads: int = 4
    """Attention heads; divides width."""
    intermediate_size: int = 512
    """Width of the feed-forward layer."""
    max_positions: int = 128
    """Rows of the position table; image rows use them too (SIMLA adds text positions to the image stream)."""
    image_positions: int = 0
    """Patches of the pictures that those rows were trained with: at another resolution they are resampled as a grid.
    0: as many as model.vision has."""
    dropout: float = 0.1
    """Dropout of embeddings, attention and residual branches."""
    token_types: bool = False
    """Add token-type row 0 to every token, as ALBEF does."""

    def __post_init__(self):
        _require(
            self.width % self.heads == 0,
            f"model.stream.width={self.width} is not a multiple of model.stream.heads={self.heads}",
        )
        _require(0.0 <= self.dropout < 1.0, f"model.stream.dropout must be in [0, 1), got {self.dropout}")
        _require(self.depth >= 1, "model.stream needs at least one layer")

    @property
    def depth(self) -> int:
        """Layers of a fused pass."""
        return self.layers if self.shared else self.text_layers + self.fusion_layers

    @property
    def text_depth(self) -> int:
        """Layers of a text-only pass."""
        return self.layers if self.shared else self.text_layers


@dataclass(frozen=True, kw_only=True)
class VocabularyConfig:
    """What the model must know of its tokenisers. Zeros are filled in from the tokenisers before training."""

    size: int = 0
    """Words."""
    pad: int = 0
    """Id of [PAD]; its embedding row gets no gradient from lookups."""
    unk: int = 1
    """Id of [UNK]."""
    cls: int = 2
    """Id of [CLS]."""
    sep: int = 3
    """Id of [SEP]."""
    mask: int = 4
    """Id of [MASK]."""
    add_sep: bool = True
    """End captions with [SEP]. False for published SIMLA weights, which never saw one."""
    visual_size: int = 0
    """Visual tokens (8,192 for the DALL-E dVAE)."""

    @property
    def special(self) -> tuple[int, ...]:
        """Ids that are never keywords and never masked."""
        return (self.pad, self.unk, self.cls, self.sep, self.mask)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Image encoder."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """Text and fusion transformer."""
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    """Tokenisers' sizes and special ids."""
    projection_size: int = 64
    """Width of the contrastive space (256 in the paper)."""
    temperature: float = 0.07
    """Start value of the learned softmax temperature of ITC."""
    temperature_min: float = 0.001
    """Lower bound of the temperature."""
    temperature_max: float = 0.5
    """Upper bound of the temperature."""

    def __post_init__(self):
        _require(
            self.vision.width == self.stream.width,
            f"model.vision.width={self.vision.width} must equal model.stream.width={self.stream.width}: "
            "one transformer reads both streams",
        )
        _require(
            self.stream.max_positions > self.image_positions,
            f"model.stream.max_positions={self.stream.max_positions} is too small for {self.image_positions} patches "
            f"and [CLS], which run through the stream too; set model.stream.max_positions >= {self.image_positions + 1}"
            ", or model.stream.image_positions to the patches that the positions were trained with",
        )
        _require(
            0 < self.temperature_min <= self.temperature <= self.temperature_max,
            f"model.temperature={self.temperature} must lie in [{self.temperature_min}, {self.temperature_max}]",
        )

    @property
    def image_positions(self) -> int:
        """Patches whose positions image rows of the stream have; those of other resolutions are resampled."""
        return self.stream.image_positions or self.vision.patches


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig:
    """ITC: image-text contrast with a momentum queue and soft targets (MoCo, ALBEF)."""

    weight: float = 1.0
    """Weight in the summed loss; 0 switches the objective off."""
    queue_size: int = 0
    """Teacher features kept as further negatives, per modality; 0 switches the queue off (65,536 in the paper). At most
    a quarter of the data: a larger queue would hold many features of the very pictures it is contrasted with. Off for
    models that start from nothing: their features drift so fast that old keys are told from new ones by age alone, and
    captions collapse to one point (seen on scenes within 2,000 pairs, at 512 and 1,024 keys)."""
    positives: Literal["pair", "image"] = "pair"
    """What counts as right: a picture's own caption, or (retrieval) every caption of the same picture alike."""

    def __post_init__(self):
        _require(self.queue_size >= 0, f"objectives.itc.queue_size must be >= 0, got {self.queue_size}")


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """ITM: does this caption describe this picture?"""

    weight: float = 1.0
    """Weight in the summed loss; 0 switches the objective off."""
    negatives: Literal["local", "global"] = "local"
    """Where wrong pictures and captions are drawn from: this rank's batch, or those of all ranks."""


@dataclass(frozen=True, kw_only=True)
class MaskedLanguageConfig:
    """MLM: masked words from the picture and the other words."""

    weight: float = 1.0
    """Weight in the summed loss; 0 switches the objective off."""
    probability: float = 0.15
    """Chance of each token to be predicted (80% masked, 10% random, 10% kept, as BERT)."""

    def __post_init__(self):
        _require(0 < self.probability < 1, f"objectives.mlm.probability must be in (0, 1), got {self.probability}")


@dataclass(frozen=True, kw_only=True)
class CrossModalConfig:
    """XMM: masked visual tokens from the caption and the other patches, the mirror of MLM."""

    weight: float = 1.0
    """Weight in the summed loss; 0 switches the objective off."""
    mask_ratio: float = 75 / 256
    """Share of the patches that block masking aims at (75 of 256 in the paper), on any grid."""
    text_keys: Literal["embeddings", "encoded"] = "embeddings"
    """What the image stream attends to: the caption's embedding layer (published) or its encoded tokens."""
    distill: bool = True
    """Mix the teacher's predictions into the targets. Without: 104 of the published step's 798 GFLOP per pair less."""
    every: int = 1
    """Compute XMM at every k-th optimizer step only. A step without it has 415 of those 798 GFLOP per pair less."""
    visible_only: bool = False
    """Of masked pictures encode the visible patches only (MAE); hidden ones join the stream as mask tokens, which know
    their place by the stream's positions. 54 of those 798 GFLOP per pair less, and another model."""

    def __post_init__(self):
        _require(0 < self.mask_ratio < 1, f"objectives.xmm.mask_ratio must be in (0, 1), got {self.mask_ratio}")
        _require(self.every >= 1, f"objectives.xmm.every must be >= 1, got {self.every}")


MOST_KEYWORDS = 64
"""Of a picture, in simla_kernels.linear_soft_bce."""


@dataclass(frozen=True, kw_only=True)
class PseudoLabelConfig:
    """PSL: keywords picked by attention and suggested by the teacher, predicted by the image encoder."""

    weight: float = 1.0
    """Weight in the summed loss; 0 switches the objective off."""
    votes_per_head: int = 4
    """Positions that each head of the last layer votes for."""
    keywords: int = 5
    """Positions with most votes that become keywords."""
    reduction: Literal["mean", "sum_over_words"] = "mean"
    """Mean over pictures and words (published), or mean over pictures of the sum over words."""
    whole_words: bool = False
    """Label every piece of a keyword, not only the piece that was picked."""

    def __post_init__(self):
        _require(
            min(self.votes_per_head, self.keywords) >= 1, "objectives.psl: votes_per_head and keywords must be >= 1"
        )
        _require(
            self.keywords <= MOST_KEYWORDS,
            f"objectives.psl.keywords={self.keywords} is more than the {MOST_KEYWORDS} that the loss takes",
        )


@dataclass(frozen=True, kw_only=True)
class ObjectivesConfig:
    """The five objectives."""

    fidelity: Literal["corrected", "official"] = "corrected"
    """`official` reproduces the published implementation's arithmetic, quirks included; `corrected` what it meant."""
    itc: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    """Image-text contrast."""
    itm: MatchingConfig = field(default_factory=MatchingConfig)
    """Image-text matching."""
    mlm: MaskedLanguageConfig = field(default_factory=MaskedLanguageConfig)
    """Masked language modelling."""
    xmm: CrossModalConfig = field(default_factory=CrossModalConfig)
    """Cross-modal reconstruction of visual tokens."""
    psl: PseudoLabelConfig = field(default_factory=PseudoLabelConfig)
    """Pseudo-labelled keywords."""
    alpha: float = 0.4
    """Weight of the teacher's targets against the hard ones, after the ramp."""
    alpha_ramp_samples: int = 20_000
    """Pairs over which alpha rises from 0 (one epoch in the paper)."""

    def __post_init__(self):
        _require(0 <= self.alpha <= 1, f"objectives.alpha must be in [0, 1], got {self.alpha}")
        weights = {name: getattr(self, name).weight for name in self.names}
        for name, weight in weights.items():
            _require(weight >= 0, f"objectives.{name}.weight must be >= 0, got {weight}")
        _require(bool(self.enabled), "objectives: every weight is 0; give at least one objective a weight")
        _require(
            self.xmm.every == 1 or self.enabled != ("xmm",),
            f"objectives.xmm.every={self.xmm.every}: XMM is the only objective, steps without it would train nothing",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all objectives: the fields with a weight of their own."""
        return tuple(item.name for item in fields(self) if hasattr(getattr(self, item.name), "weight"))

    @property
    def enabled(self) -> tuple[str, ...]:
        """Names of the objectives with a weight, in the order they are computed."""
        return tuple(name for name in self.names if getattr(self, name).weight > 0)


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The momentum teacher."""

    momentum: float = 0.97
    """Share of itself that the teacher keeps per optimizer step at optim.reference_batch pairs; at b pairs it is
    momentum ** (b / reference_batch), so that it forgets per pair and not per step (.995 in the
    paper, whose model starts from BERT and DeiT)."""
    dropout: bool | None = None
    """Dropout in the teacher's passes. Default: off when corrected, on when official."""

    def __post_init__(self):
        _require(0 <= self.momentum < 1, f"teacher.momentum must be in [0, 1), got {self.momentum}")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Start weights, from local files. What is asked for and cannot be loaded is an error."""

    text: str = ""
    """Folder of a Hugging Face BERT for the stream (config.json with model.safetensors or pytorch_model.bin)."""
    vision: str = ""
    """timm ViT or DeiT weights for the image encoder (.safetensors, .pth, or a folder with one)."""
    checkpoint: str = ""
    """A whole model: an official SIMLA or ALBEF .pth, or a model folder of this project."""


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several data sets that are mixed."""

    shards: str = ""
    """As data.train; not empty."""
    weight: float = 0.0
    """Its share of the pairs is weight over the sum of all weights; within it every sample comes once before any comes
    twice. 0, for all sources: an epoch holds every sample of every source once."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where pairs come from and what is done to them."""

    train: str = ""
    """WebDataset shards: a folder, a file or a brace pattern (shard-{000000..000019}.tar). Empty: the embedded scenes,
    prepared into scenes_dir when they are not there."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several data sets instead of data.train, by name; losses are logged for each: {coco: {shards: data/coco, weight:
    2}, crawl: {shards: data/crawl, weight: 1}}."""
    val: str = ""
    """Held-out shards for eval.every. Empty: `val` beside a folder called `train`, if there is one."""
    tokenizer: str = ""
    """Folder of a Hugging Face tokenizer. Empty: `tokenizer` beside the (first source's) shards' folder."""
    visual_tokenizer: str = ""
    """Folder of a patch codebook, a VQ or a FlavaImageCodebook, for XMM. Empty: `visual_tokens` beside that folder."""
    scenes_dir: str = "data/scenes"
    """Folder of the embedded scenes."""
    scenes_train: int = 20_000
    """Training scenes to prepare there."""
    max_words: int = 30
    """Words kept of a caption."""
    LEAST_WORDS: ClassVar[int] = 1
    max_tokens: int = 25
    """Tokens kept of a caption, [CLS] and [SEP] included."""
    crop_scale: tuple[float, float] = (0.8, 1.0)
    """Area of the random resized crop, as a share of the picture ((0.2, 1.0) in the paper). Scenes' captions name
    things near the border, which a small crop would cut off. (1.0, 1.0): the whole picture, whatever its aspect."""
    flip: float = 0.5
    """Chance of a horizontal flip; never for captions that say left or right."""
    augment_ops: int = 0
    """Operations of RandAugment (2 in the paper); 0 switches it off: scenes' captions name colours and places."""
    augment_magnitude: int = 7
    """Strength of RandAugment, 0 to 10."""
    workers: int = 1
    """Loader processes per rank; 0 loads in the training process."""
    timeout: int = 600
    """Seconds without anything from the loader processes after which the run ends; 0: waits for ever."""
    shuffle_window: int = 64
    """Shards whose samples are shuffled together: the epoch permutes the shards, then samples within each window."""
    cache_dir: str = "~/.cache/simla_ds/shards"
    """Where copies of remote shards (http://, s3://, pipe:) are kept, and what all ranks of a machine share of
    the index of more than some 15 million samples (70 bytes each)."""
    cache_gb: float = 50.0
    """Most gigabytes of them; should hold shuffle_window shards, or some are fetched again and again."""
    fetch_tries: int = 8
    """Tries to fetch a shard, after waits from 0.2 to 30 s; then its samples are skipped."""
    max_skipped: float = 0.5
    """Share of a rank's last 20,000 samples that may be unusable, or the run ends: a storage that fails would use up
    the epoch. 1: it never ends for this."""

    def __post_init__(self):
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, f"data.crop_scale must satisfy 0 < low <= high <= 1, got {self.crop_scale}")
        weights = {name: source.weight for name, source in self.sources.items()}
        _require(not (self.sources and self.train), f"data.train={self.train} and data.sources: give one of them")
        _require(
            all(re.fullmatch(r"[A-Za-z][\w-]*", name) for name in self.sources),
            f"data.sources: names must be letters, digits, _ and -, got {', '.join(self.sources)}",
        )
        for name, source in self.sources.items():
            _require(bool(source.shards), f"data.sources.{name}.shards is missing: name its shards")
        _require(len(self.sources) <= 32, f"data.sources: at most 32 can be mixed, got {len(self.sources)}")
        _require(
            min(weights.values(), default=0) > 0 or not any(weights.values()),
            f"data.sources: give all a weight > 0, or all none; got {weights}",
        )
        least = self.LEAST_WORDS
        _require(self.max_words >= least, f"data.max_words must be >= {least}, got {self.max_words}")
        _require(self.max_tokens >= 3, f"data.max_tokens must be >= 3, got {self.max_tokens}")
        _require(0 <= self.flip <= 1, f"data.flip must be in [0, 1], got {self.flip}")
        _require(self.augment_ops >= 0, f"data.augment_ops must be >= 0, got {self.augment_ops}")
        _require(self.shuffle_window >= 1, f"data.shuffle_window must be >= 1, got {self.shuffle_window}")
        _require(self.workers >= 0, f"data.workers must be >= 0, got {self.workers}")
        _require(self.cache_gb > 0, f"data.cache_gb must be > 0, got {self.cache_gb}")
        _require(0 < self.max_skipped <= 1, f"data.max_skipped must be in (0, 1], got {self.max_skipped}")
        _require(self.fetch_tries >= 1, f"data.fetch_tries must be >= 1, got {self.fetch_tries}")
        _require(
            0 <= self.augment_magnitude <= 10,
            f"data.augment_magnitude must be in [0, 10], got {self.augment_magnitude}",
        )

    @property
    def named(self) -> str:
        """What training pairs are made of, as messages name it."""
        return f"data.sources={', '.join(self.sources)}" if self.sources else f"data.train={self.train}"


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule, counted in pairs so that a recipe means the same at any batch size."""

    learning_rate: float = 1e-3
    """Peak learning rate at reference_batch."""
    min_learning_rate: float = 1e-5
    """Learning rate at the end of the cosine, at reference_batch."""
    start_learning_rate: float = 1e-5
    """Learning rate at the start of the warm-up, at reference_batch."""
    warmup_samples: int = 2_000
    """Pairs of linear warm-up."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: down to min_learning_rate, or as it is."""
    reference_batch: int = 32
    """Pairs per optimizer step that the learning rates and the teacher's momentum are stated for."""
    scale: Literal["sqrt", "linear", "none"] = "sqrt"
    """How learning rates follow the batch: by the square root of batch / reference_batch, linearly, or not."""
    weight_decay: float = 0.02
    """Decoupled weight decay on matrices."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's moment decays."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float | None = None
    """Largest gradient norm; 0 switches clipping off. Default: 1.0 when corrected, 0 when official."""

    def __post_init__(self):
        _require(self.learning_rate > 0, f"optim.learning_rate must be > 0, got {self.learning_rate}")
        _require(self.reference_batch >= 1, f"optim.reference_batch must be >= 1, got {self.reference_batch}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop."""

    steps: int = 0
    """Optimizer steps; 0: as many as `samples` make."""
    samples: int = 200_000
    """Pairs to train on in all, when steps is 0."""
    batch_size: int = 32
    """Pairs per rank and micro-step."""
    grad_accumulation: int = 1
    """Micro-steps per optimizer step. ITC's and ITM's negatives are those of one micro-step, and the queue."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Training dtype. auto: bf16 where it is fast, fp16 on cards without it, fp32 on CPUs without bf16 units."""
    seed: int = 0
    """Every random draw follows from it."""
    passes: Literal["fast", "plain"] = "fast"
    """How the step is computed, with the same result up to rounding. fast: requests merged into one pass per direction
    and network, no padding, last layers only where a loss reads them. plain: each request as a pass of its own."""
    activation_checkpointing: bool = False
    """Recompute activations in backward: less memory, about a quarter more time."""
    log_every: int = 10
    """Optimizer steps between lines in metrics.jsonl."""
    diagnose_every: int = 200
    """Optimizer steps between measurements of each objective's share of the gradient; 0: never."""
    checkpoint_every: int = 1_000
    """Optimizer steps between checkpoints; 0: only at the end."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    max_bad_steps: int = 10
    """Steps in a row with losses or gradients that are not finite, each skipped, after which the run ends."""
    wandb_project: str = ""
    """Weights & Biases project to log to (extra `track`); empty: off."""

    def __post_init__(self):
        _require(self.batch_size >= 1, f"train.batch_size must be >= 1, got {self.batch_size}")
        _require(self.grad_accumulation >= 1, f"train.grad_accumulation must be >= 1, got {self.grad_accumulation}")
        _require(self.seed >= 0, f"train.seed must be >= 0, got {self.seed}")
        _require(self.steps >= 0 and self.samples >= 1, "train.steps must be >= 0 and train.samples >= 1")
        _require(self.max_bad_steps >= 1, f"train.max_bad_steps must be >= 1, got {self.max_bad_steps}")
        _require(self.keep_checkpoints >= 1, f"train.keep_checkpoints must be >= 1, got {self.keep_checkpoints}")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Watching it learn, on held-out pairs."""

    every: float = 500
    """Optimizer steps between evaluations. Below 1 a share of the run, however many pairs a step has: 0.125 is eight
    times. 0: never."""
    samples: int = 500
    """Held-out pairs used."""
    batch_size: int = 50
    """Pairs per forward."""
    rerank: int = 16
    """Candidates re-ranked by ITM in zero-shot retrieval; 0: ITC only."""
    metric: str = ""
    """Held-out measure (higher is better) whose best weights are kept in the run folder's best/, such as
    eval/student/retrieval/itm/text_to_image/r1. Empty: none when pretraining, the task's own when fine-tuning."""
    patience: int = 0
    """Evaluations without a better eval.metric after which the run ends early; 0: never."""

    def __post_init__(self):
        _require(self.patience >= 0, f"eval.patience must be >= 0, got {self.patience}")
        whole = self.every < 1 or self.every == int(self.every)
        _require(self.every >= 0 and whole, f"eval.every must be whole steps or a share below 1, got {self.every}")

    def is_due(self, step: int, total: int) -> bool:
        """Whether an evaluation comes after this step of `total`, besides those at the start and at the end."""
        steps = self.every * total if self.every < 1 else self.every
        return steps > 0 and step // steps > (step - 1) // steps


@dataclass(frozen=True, kw_only=True)
class Config:
    """A training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    init: InitConfig = field(default_factory=InitConfig)
    """Start weights."""
    objectives: ObjectivesConfig = field(default_factory=ObjectivesConfig)
    """The losses."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """The momentum teacher."""
    data: DataConfig = field(default_factory=DataConfig)
    """The pairs."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimizer."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """The loop."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """The held-out evaluation."""
    output: str = "runs/pretrain"
    """Run folder."""
    resume: str = "auto"
    """auto: go on from the run folder's newest whole checkpoint if there is one; none: start afresh (refused if the
    folder holds checkpoints); or the path of a checkpoint."""

    def __post_init__(self):
        _require(
            not (self.runs_itm and self.train.batch_size < 2 and self.objectives.itm.negatives == "local"),
            f"train.batch_size={self.train.batch_size} leaves ITM (objectives.itm.weight={self.objectives.itm.weight}) "
            "without a wrong picture to choose; set train.batch_size >= 2 or objectives.itm.weight 0",
        )
        _require(
            not (self.official and self.objectives.itm.negatives == "global"),
            "objectives.itm.negatives=global: the published arithmetic (objectives.fidelity=official) draws among a "
            "rank's own pairs; set itm.negatives=local or fidelity=corrected",
        )
        psl, tokens = self.objectives.psl, self.data.max_tokens
        _require(
            not (psl.weight > 0 and psl.whole_words and tokens > MOST_KEYWORDS),
            f"objectives.psl.whole_words labels up to data.max_tokens={tokens} tokens of a caption, the loss takes "
            f"{MOST_KEYWORDS}; set data.max_tokens <= {MOST_KEYWORDS} or whole_words false",
        )
        _require(
            not (self.official and self.data.sources),
            "data.sources: losses of single pairs are known to objectives.fidelity=corrected only; set it, or name all "
            "shards in data.train",
        )

    @property
    def official(self) -> bool:
        """Whether the published arithmetic is asked for."""
        return self.objectives.fidelity == "official"

    @property
    def runs_itm(self) -> bool:
        """Whether pairs are matched, which takes a wrong picture for each."""
        return self.objectives.itm.weight > 0

    @property
    def reads_visual_tokens(self) -> bool:
        """Whether the run has a visual tokeniser: XMM needs one, and one that is named gives the visual head's size."""
        return self.objectives.xmm.weight > 0 or bool(self.data.visual_tokenizer)

    @property
    def visible_patches(self) -> int:
        """Patches of a masked picture that the image encoder sees; 0: all, hidden ones behind the mask token."""
        patches, xmm = self.model.vision.patches, self.objectives.xmm
        hidden = min(max(round(xmm.mask_ratio * patches), 1), patches - 1)  # data.masking's aim
        return patches - hidden if xmm.visible_only else 0

    @property
    def teacher_dropout(self) -> bool:
        """Dropout in the teacher's passes, after the default."""
        return self.official if self.teacher.dropout is None else self.teacher.dropout

    @property
    def clip(self) -> float:
        """Largest gradient norm, after the default; 0 means none."""
        return (0.0 if self.official else 1.0) if self.optim.clip is None else self.optim.clip

    def learning_rate_scale(self, global_batch: int) -> float:
        """Factor on the learning rates for an optimizer step over global_batch pairs."""
        ratio = global_batch / self.optim.reference_batch
        return {"sqrt": ratio**0.5, "linear": ratio, "none": 1.0}[self.optim.scale]

    def teacher_momentum(self, global_batch: int) -> float:
        """Teacher momentum for an optimizer step over global_batch pairs; as stated when official."""
        if self.official:
            return self.teacher.momentum
        return self.teacher.momentum ** (global_batch / self.optim.reference_batch)

    def total_steps(self, global_batch: int) -> int:
        """Optimizer steps of the run."""
        return self.train.steps or -(-self.train.samples // global_batch)
