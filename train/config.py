"""The schema of a training run's config; `config_file.py` reads and checks one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from .config_decoder import DistillConfig, ExpertsConfig
from .config_image import ImageConfig
from .schedule import COSINE, BatchSizes

PREFERENCE = "preference"
SAMPLE_FORMATS = ("caption", "chat", "text", PREFERENCE)
LONG_TEXTS = SKIP, SPLIT, PACK = "skip", "split", "pack"
OBJECTIVES = LIKELIHOOD, DPO = "likelihood", "dpo"
FROM_MODEL, FROM_SHARDS = "model", "shards"
LORA = "lora"
INT4 = "int4"
PRECISIONS = ("fp32", "bf16", "fp16")
ROPE_SCALINGS = ("linear", "yarn")


@dataclass
class TowerConfig:
    """An open_clip vision tower: its model name, and a pretrained tag or weight file (null: random weights)."""

    name: str = MISSING
    pretrained: str | None = None


@dataclass
class RopeConfig:
    """Other rotary positions than the model has that the run starts from; they are saved with the trained model.

    theta: base of the frequencies; null: the model's.
    scaling: `linear` or `yarn` (arXiv 2309.00071) by `factor`; null: the model's, which is none for all of Yi's.
    max_positions: most tokens of a sequence; null: the model's, with `scaling` those times `factor`.
    """

    theta: float | None = None
    scaling: str | None = None
    factor: float | None = None
    max_positions: int | None = None


@dataclass
class ConnectorConfig:
    """A fresh connector in place of the model's; null: its paper's size. See `yi_vl.connector.config.ConnectorConfig`.

    type: `mlp`, Yi-VL's projector; `qformer`, `resampler`, `abstractor` or `cross_attention`.
    every: with cross_attention, the last of so many layers of the language model comes after a gated block (4).
    """

    type: str = MISSING
    num_tokens: int | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    every: int | None = None


@dataclass
class InitConfig:
    """Where the weights come from: a checkpoint, or a tower and a language model with a fresh connector.

    checkpoint: a folder or hub id in any layout that `yi_vl.load` reads; LoRA adapters are merged.
    connector: null: the checkpoint's, from parts Yi-VL's projector.
    """

    checkpoint: str | None = None
    tower: TowerConfig | None = None
    language_model: str | None = None
    connector: ConnectorConfig | None = None
    rope: RopeConfig | None = None


@dataclass
class TrainableConfig:
    """Which components are trained. Frozen ones keep their weights and batch statistics to the last bit.

    language: true, false, or `lora`, which freezes it and trains adapters instead (see `LoraConfig`); or a list of
        layers and patterns of parameter names, such as [28-, lm_head.*], which freezes all others: see `trainable.py`.
    """

    vision: bool = True
    projector: bool = True
    language: Any = True  # bool | str | list[str], a union that OmegaConf does not know


@dataclass
class LoraConfig:
    """LoRA (arXiv 2106.09685) on every linear layer of the language model's blocks, not on its head.

    A layer's output gains alpha / rank x B A x: A (rank, inputs), B (outputs, rank). dropout: of x, on that path.
    base: storage of the frozen layers: null, like all weights; or `int4` (QLoRA, arXiv 2305.14314).
    """

    rank: int = 128
    alpha: float = 256
    dropout: float = 0.05
    base: str | None = None


@dataclass
class DpoConfig:
    """Direct preference optimization (arXiv 2305.18290), with `objective: dpo`. Its reference is the initial model.

    beta: a reward is beta times the log-ratio of an answer's probabilities under the model and under the reference.
    reference: `model`: the reference's log-probabilities are computed at each step, with the adapters switched off
        (LoRA) or by a frozen copy of the initial weights; `shards`: read, as `train.shards reference` wrote them.
    label_smoothing: the probability that a preference is wrong (conservative DPO).
    length_normalized: rewards are divided by the answers' numbers of tokens.
    sft_weight: weight of the chosen answers' cross entropy per token, added to the loss.
    """

    beta: float = 0.1
    reference: str = FROM_MODEL
    label_smoothing: float = 0.0
    length_normalized: bool = False
    sft_weight: float = 0.0


@dataclass
class LearningRateConfig:
    """The peak learning rate of each component."""

    vision: float = 1e-4
    projector: float = 1e-4
    language: float = 1e-4


@dataclass
class ComponentScheduleConfig:
    """What differs from the run's schedule for one component; null: nothing."""

    shape: str | None = None
    warmup: float | None = None
    decay_fraction: float | None = None
    final: float | None = None


@dataclass
class ScheduleConfig:
    """The learning rate over the run: a factor on the peak rates of `lr`; see schedule.py.

    shape: after warm-up, `cosine` or `linear` to `final` at the end; `constant`: 1 to the end; or `wsd`
        (warmup-stable-decay, arXiv 2404.06395): 1, then linear to `final` over the last steps.
    warmup: linear from 0; a fraction of the steps below 1, else a number of steps.
    decay_fraction: of the steps, which `wsd` decays over.
    final: the factor after the last step.
    vision, projector, language: the same settings for one component where it differs.
    """

    shape: str = COSINE
    warmup: float = 0.03
    decay_fraction: float = 0.1
    final: float = 0.0
    vision: ComponentScheduleConfig = field(default_factory=ComponentScheduleConfig)
    projector: ComponentScheduleConfig = field(default_factory=ComponentScheduleConfig)
    language: ComponentScheduleConfig = field(default_factory=ComponentScheduleConfig)


@dataclass
class OptimizerConfig:
    """AdamW. One-dimensional parameters (norms, biases) have no weight decay."""

    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0


@dataclass
class SourceConfig:
    """A set of shards.

    shards: paths, globs, URLs or `pipe:` commands with {000..999} braces; several joined by `::`, as in webdataset.
    weight: sampling weight, relative to the other sources; or [start, end]: linear from the run's first to its last
        step.
    max_samples: samples per epoch of this source; each epoch has another order.
    format: null: data.format.
    """

    name: str = MISSING
    shards: str = MISSING
    weight: Any = 1.0  # float | list[float], which OmegaConf has no type for; checked in config_file.py
    max_samples: int | None = None
    format: str | None = None

    @property
    def weights(self) -> tuple[float, float]:
        """The weight at the run's first and last step."""
        start, end = self.weight if isinstance(self.weight, list) else (self.weight, self.weight)
        return start, end


@dataclass
class DataConfig:
    """The stream of samples.

    format: default of the sources': `caption` (images with KEY.txt, or the one answer of KEY.json; plain prompt),
        `chat` (KEY.json, the model's chat format), `text` (KEY.txt alone, plain prompt) or `preference` (KEY.json with
        two versions of the last answer, the model's chat format; only with `objective: dpo`).
    ignore: member suffixes and keys of KEY.json to ignore; other unknown ones make a sample a broken one.
    long_text: what becomes of samples of the format text with more than max_tokens tokens: `skip` skips and counts
        them, `split` cuts them into pieces, `pack` joins all documents into rows of max_tokens tokens, for continued
        pre-training; see data/documents.py. A source's weight is then its share of the rows.
    workers: loading processes per rank; 0 loads in the training process.
    shuffle_buffer: samples per worker that are permuted together, divided among the sources by weight.
    max_broken_fraction: the run stops when a larger fraction of a worker's samples is broken.
    fast_pixels: decode large JPEGs at reduced size and resize with torch (data/fast_image.py), which differs slightly
        from the transform of inference; false: the pixels are exactly those of inference.
    """

    format: str = "caption"
    sources: list[SourceConfig] = MISSING
    long_text: str = SKIP
    workers: int = 2
    shuffle_buffer: int = 1000
    max_broken_fraction: float = 0.01
    ignore: list[str] = field(default_factory=list)
    fast_pixels: bool = True


@dataclass
class CheckpointConfig:
    """When to save, and how many of the newest checkpoints to keep; the finished model is saved in any case.

    keep_best: keep the checkpoint with the lowest `validation_loss` too; `run_dir/best` links to it. It is saved when
        the loss is measured, so it costs no more saves where `validation.every_steps` is a multiple of `every_steps`.
    """

    every_steps: int = 1000
    keep_last: int = 2
    keep_best: bool = False


@dataclass
class SpikeGuardConfig:
    """Steps with a NaN, infinite or outlying gradient norm are skipped: no update, counted as `steps_skipped`.

    max_norm_ratio: a gradient norm is an outlier above this many times the median of the last 100 (null: never).
    stop_after: the run stops after this many consecutive skipped steps.
    """

    max_norm_ratio: float | None = 100.0
    stop_after: int = 10


@dataclass
class GenerationsConfig:
    """Answers generated for held-out samples during training, to look at.

    shards: as in `SourceConfig`, but held out from training; the first `count` samples are used.
    format: null: data.format. For captions the prompt is the image alone, as in training.
    """

    shards: str = MISSING
    format: str | None = None
    every_steps: int = 500
    count: int = 4
    max_new_tokens: int = 64


@dataclass
class ValidationSourceConfig:
    """A set of shards held out from training.

    shards: as in `SourceConfig`.
    max_samples: use fewer than `ValidationConfig.samples` of this source.
    format: null: data.format.
    """

    name: str = MISSING
    shards: str = MISSING
    max_samples: int | None = None
    format: str | None = None


@dataclass
class ValidationConfig:
    """The loss on held-out samples, at the start, at every `every_steps`th step, and at the end; see validation.py.

    samples: how many of each source are used, the first in the order of its shards. They are kept in memory after the
        image transform (0.6 MB per image of 448 px, divided among the ranks).
    """

    sources: list[ValidationSourceConfig] = MISSING
    every_steps: int = 500
    samples: int = 64


@dataclass
class TrainConfig:
    """A training run. Exactly one of `steps` and `epochs`; `epochs` needs `samples`, the length of one epoch."""

    run_dir: str = MISSING
    seed: int = 0
    resume: bool = True  # from the newest complete checkpoint in run_dir; false refuses a run_dir that has one
    init_from: InitConfig = MISSING
    chat_format: str | None = None  # yi-vl or chatml, see yi_vl/chat.py; null: the checkpoint's, from parts yi-vl
    image_size: int = 448
    image: ImageConfig = field(default_factory=ImageConfig)
    objective: str = LIKELIHOOD  # of the supervised tokens; or dpo, on sources of the format preference
    dpo: DpoConfig = field(default_factory=DpoConfig)  # with objective: dpo
    distill: DistillConfig = field(default_factory=DistillConfig)
    trainable: TrainableConfig = field(default_factory=TrainableConfig)
    experts: ExpertsConfig = field(default_factory=ExpertsConfig)  # of a language model that has them
    lora: LoraConfig = field(default_factory=LoraConfig)  # with trainable.language: lora
    lr: LearningRateConfig = field(default_factory=LearningRateConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    clip_norm: float | None = 1.0
    global_batch: int = MISSING  # samples (of preferences: pairs) per optimizer step, over all ranks
    batch_ramp: list[list[int]] = field(default_factory=list)  # [[step, size], ...]: global_batch after `step` steps
    micro_batch: int = MISSING  # samples per forward pass on one rank
    steps: int | None = None
    epochs: float | None = None
    samples: int | None = None
    max_tokens: int = 2048  # longer samples are skipped and counted, never cut; for texts see data.long_text
    neftune: float | None = None  # alpha of the noise on text embeddings in training, such as 5; see neftune.py
    precision: str = "bf16"
    activation_checkpointing: bool = False  # recompute layers in the backward pass; see train.plan
    compile: bool = False  # the language model's layers; about a minute at the start, then 15% less time on a CPU
    data: DataConfig = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    validation: ValidationConfig | None = None
    generations: GenerationsConfig | None = None
    spike_guard: SpikeGuardConfig = field(default_factory=SpikeGuardConfig)
    log_every: int = 10
    log_samples: bool = False  # the names of each step's samples, in run_dir/samples-RANK.jsonl
    trackers: list[str] = field(default_factory=list)


def batch_sizes(config: TrainConfig) -> BatchSizes:
    """The samples of each step, over all ranks."""
    return BatchSizes(config.global_batch, tuple((step, size) for step, size in config.batch_ramp))


def num_steps(config: TrainConfig) -> int:
    """Optimiser steps of the run."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None and config.samples is not None
    return max(1, batch_sizes(config).num_steps(int(config.samples * config.epochs)))
