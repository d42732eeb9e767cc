"""Memory and time of runs: `python -m train.plan CONFIG... [key.sub=value ...] --gpus 128 --gpu-memory 80`.

For each config what it trains, its steps, schedule and tokens, the memory of a GPU by what holds it under DDP, FSDP
and ZeRO-3, and GPU-hours; then their sum. No weights are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from yi_vl import program
from yi_vl.checkpoint.fit import check_tiles
from yi_vl.config import PRESETS, YiVLConfig, preset

from ..config import DPO, FROM_MODEL, INT4, LORA, TrainConfig, batch_sizes, num_steps
from ..config_file import load_config
from ..describe import describe_batches, schedule_lines
from ..experts import check_experts, set_experts_
from ..init import check_positions, set_connector_, set_rope_
from ..qlora import BYTES_PER_WEIGHT
from .batch import AVERAGE, SampleTokens, average_rows, longest
from .count import SavedBytes, count_flops, count_saved_bytes
from .estimate import (
    Memory,
    Parameters,
    Strategy,
    count_parameters,
    describe_experts,
    logit_bytes,
    step_memory,
    strategies,
)
from .flops import Row, forward_flops
from .models import initial_model, read_model
from .tiles import ImageSize, as_image_size, average_inputs, planned_tiles, tile_assumptions

app = typer.Typer(add_completion=False)

_PUBLISHED_GPU_HOURS = {"6b": 9_216, "34b": 30_720}  # all three stages: 3 and 10 days on 128 GPUs; Yi-VL's model card
_TEACHER = "  distill: the teacher, whole on each GPU, and its forward passes are not counted"
USABLE = 0.9  # of a GPU's memory; the rest is CUDA's, NCCL's and lost between blocks
_SECONDS_PER_HOUR = 3600


@dataclass(frozen=True)
class Hardware:
    """`tflops` of a GPU at its peak, of which `utilisation` is reached, recomputation included."""

    num_gpus: int
    memory_bytes: float
    tflops: float
    utilisation: float

    def gpu_hours(self, flops: float) -> float:
        return flops / (self.tflops * 1e12 * self.utilisation) / _SECONDS_PER_HOUR


@dataclass(frozen=True, eq=False)
class Plan:
    """A config with the model it is for, and the average rows of its batches with their fractions."""

    path: str
    config: TrainConfig
    model: YiVLConfig
    parameters: Parameters
    rows: Sequence[tuple[float, Row]]

    @property
    def num_tokens(self) -> float:
        """Of all its samples."""
        return self.num_samples * sum(fraction * row.tokens for fraction, row in self.rows)

    @property
    def num_samples(self) -> int:
        return batch_sizes(self.config).num_samples(num_steps(self.config))

    @property
    def rows_per_sample(self) -> int:
        """A pair of answers is two rows."""
        return 2 if self.config.objective == DPO else 1

    @property
    def has_reference(self) -> bool:
        """Whether a second forward pass gives the reference log-probabilities of DPO."""
        return self.config.objective == DPO and self.config.dpo.reference == FROM_MODEL

    @property
    def reference_bytes(self) -> int:
        """Of the frozen copy that gives them: autocast's dtype, as if its tables had it too."""
        if not self.has_reference or self.config.trainable.language == LORA:
            return 0
        return sum(self.parameters.total.values()) * (4 if self.config.precision == "fp32" else 2)

    def rows_per_gpu(self, hardware: Hardware) -> int:
        """Of the largest micro-batch."""
        try:
            sizes = batch_sizes(self.config).split(hardware.num_gpus, "GPUs")
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        largest = max(size for _, size in sizes.stretches(num_steps(self.config)))
        return self.rows_per_sample * min(self.config.micro_batch, largest)

    def memory(self, hardware: Hardware, strategy: Strategy, row: Row, is_checkpointed: bool) -> Memory:
        """Of a GPU whose rows are all like `row`."""
        num_rows = self.rows_per_gpu(hardware)
        saved = self._saved_bytes(row, num_rows, strategy.is_sharded, is_checkpointed)
        logits = num_rows * logit_bytes(self.model, row)
        memory = step_memory(self.parameters, strategy, hardware.num_gpus, saved, logits, is_checkpointed)
        return replace(memory, weights=memory.weights + self.reference_bytes)

    @cache  # noqa: B019  # plans live as long as the command
    def _saved_bytes(self, row: Row, num_rows: int, is_low: bool, is_checkpointed: bool) -> SavedBytes:
        config = replace(self.config, activation_checkpointing=is_checkpointed)
        return count_saved_bytes(self.model, config, row, num_rows, is_low)

    @cache  # noqa: B019
    def flops(self, is_checkpointed: bool) -> int:
        """Of all its steps on all GPUs."""
        config = replace(self.config, activation_checkpointing=is_checkpointed)
        micro_batch = config.micro_batch * self.rows_per_sample
        flops = 0.0
        for fraction, row in self.rows:
            per_row = count_flops(self.model, config, row, micro_batch) / micro_batch
            if self.has_reference:  # the forward pass again: without gradients
                per_row += forward_flops(self.model, row)
            flops += fraction * per_row
        return round(self.num_samples * self.rows_per_sample * flops)


@app.command()
def plan(
    configs: Annotated[
        list[str],
        typer.Argument(metavar="CONFIG... [key.sub=value]...", help="YAML files, and settings that apply to all."),
    ],
    gpus: Annotated[int, typer.Option(min=1, help="Number of GPUs.")] = 128,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory per GPU in GB.")] = 80,
    tflops: Annotated[float, typer.Option(min=1, help="Peak bf16 TFLOP/s per GPU; an A100 has 312.")] = 312,
    utilisation: Annotated[
        float, typer.Option(min=0.01, max=1, help="The hardware FLOPs utilisation (HFU) to assume.")
    ] = 0.4,
    caption_tokens: Annotated[int, typer.Option(min=1, help="Average text tokens per sample in caption format.")] = 32,
    chat_tokens: Annotated[int, typer.Option(min=1, help="Average text tokens per sample in chat format.")] = 256,
    text_tokens: Annotated[int, typer.Option(min=2, help="Average tokens per document in text format.")] = 512,
    image_pixels: Annotated[
        str | None, typer.Option(help="Average image, WIDTHxHEIGHT, for image.tiles; by default one of all tiles.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"{', '.join(PRESETS)} or a model folder, instead of the config's.")
    ] = None,
    curves: Annotated[
        Path | None, typer.Option(help="Draw learning rates, batch sizes and the mixture over the steps to this PNG.")
    ] = None,
) -> None:
    """What runs will take: parameters, steps, tokens, memory and GPU-hours. No weights are read.

    Give the stages of a recipe together for their sum.
    """
    hardware = Hardware(gpus, gpu_memory * 1e9, tflops, utilisation)
    paths = [argument for argument in configs if "=" not in argument]
    overrides = [argument for argument in configs if "=" in argument]
    if not paths:
        raise ValueError("name at least one config file; the recipes are in train/configs/.")
    tokens = SampleTokens(caption_tokens, chat_tokens, text_tokens)
    image_size = None if image_pixels is None else as_image_size(image_pixels)
    plans = [make_plan(path, overrides, model, tokens, image_size) for path in paths]
    console = Console()
    for made in plans:
        for line in describe(made, hardware):
            console.print(line, highlight=False, soft_wrap=True)
        console.print(memory_table(made, hardware))
    console.print(sum_table(plans, hardware))
    for line in assumptions(plans, hardware, tokens, image_size):
        console.print(line, highlight=False, soft_wrap=True)
    if curves is not None:
        from .curves import draw_curves  # takes a second

        draw_curves({made.path: made.config for made in plans}, curves)


def make_plan(
    path: str | Path,
    overrides: Sequence[str],
    model: str | None = None,
    tokens: SampleTokens = AVERAGE,
    image_size: ImageSize | None = None,
) -> Plan:
    """
    Args:
        image_size: width and height of an average image; None: it has as many tiles as an image may have.

    Raises:
        ValueError: the config is wrong, or does not tell what model it is for.
    """
    config = load_config(path, overrides)
    shape = read_model(model) if model is not None else initial_model(config.init_from, Path(path))
    set_rope_(shape.text_config, config.init_from.rope)
    set_connector_(shape, config.init_from.connector)
    shape.vision_config.image_size = config.image_size
    try:
        config.image.tiles = planned_tiles(config, Path(path), model)
        check_tiles(shape, config.image.tiles)
        inputs = average_inputs(config.image.tiles, config.image_size, image_size)
        rows = average_rows(config, shape.num_image_tokens, tokens, inputs)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_positions(shape, config)
    check_experts(shape.text_config, config, str(path))
    set_experts_(shape.text_config, config.experts, num_steps(config) - 1)
    return Plan(str(path), config, shape, count_parameters(shape, config), rows)


def describe(made: Plan, hardware: Hardware) -> list[str]:
    """What a config trains, on how much."""
    config, parameters = made.config, made.parameters
    trained = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in parameters.trained.items() if count)
    share = (
        f"{sum(parameters.trained.values()) / 1e6:,.1f} M of {sum(parameters.total.values()) / 1e6:,.1f} M parameters"
    )
    bits = 8 * BYTES_PER_WEIGHT
    int4 = f"  {parameters.int4 / 1e6:,.1f} M frozen weights in {bits:.3f} bits each, which FSDP cannot spread"
    which = "the rows `checkpointed`" if config.activation_checkpointing else "the rows named by a strategy"
    return [
        f"\n{made.path}",
        f"  trains {trained}: {share}",
        *(f"  {line}" for line in describe_experts(made.model)),
        f"  {describe_batches(config)}, {made.rows_per_gpu(hardware)} at once on a GPU; {_describe_rows(made)}",
        *(f"  {line}" for line in schedule_lines(config)),
        f"  activation_checkpointing: {str(config.activation_checkpointing).lower()}, so {which} hold",
        *([int4] if parameters.int4 else []),
        *([_TEACHER] if config.distill.teacher is not None else []),
    ]


def _describe_rows(made: Plan) -> str:
    kinds = [
        f"{row.tokens:,} tokens a sample, {row.num_inputs * made.model.num_image_tokens:,} of them its image's"
        if row.has_image
        else f"{row.tokens:,} tokens a text"
        for _, row in made.rows
    ]
    return "; ".join(kinds) + (f" ({made.rows[1][0]:.0%} of the samples)" if len(kinds) > 1 else "")


def memory_table(made: Plan, hardware: Hardware) -> Table:
    """GB per GPU, by strategy; of a mixture, in a micro-batch of the kind of rows that takes more."""
    table = _table("GB per GPU", "weights", "grads", "optimizer", "activations", "logits", "total", "fits")
    for strategy in strategies(made.config.precision, made.config.lora.base == INT4):
        for is_checkpointed in (False, True):
            memories = [made.memory(hardware, strategy, row, is_checkpointed) for _, row in made.rows]
            memory = max(memories, key=lambda memory: memory.total)
            held = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.logits, memory.total)
            name = "checkpointed" if is_checkpointed else strategy.name
            cells = [f"{num_bytes / 1e9:,.1f}" for num_bytes in held]
            table.add_row(name, *cells, verdict(made, hardware, strategy, is_checkpointed))
    return table


def verdict(made: Plan, hardware: Hardware, strategy: Strategy, is_checkpointed: bool) -> str:
    """`yes`, `no`, or the longest row that fits. Memory grows with a row's tokens at a constant or increasing rate."""
    usable, most_tokens = USABLE * hardware.memory_bytes, made.config.max_tokens
    for _, row in made.rows:
        average = made.memory(hardware, strategy, row, is_checkpointed).total
        if average > usable:
            return "no"
        longer = longest(row, made.config, made.model.num_image_tokens)
        most = made.memory(hardware, strategy, longer, is_checkpointed).total
        if most > usable:
            fitting = row.tokens + int((longer.tokens - row.tokens) * (usable - average) / (most - average))
            most_tokens = min(most_tokens, fitting)
    return "yes" if most_tokens == made.config.max_tokens else f"to {most_tokens:,}"


def sum_table(plans: Sequence[Plan], hardware: Hardware) -> Table:
    """GPU-hours of each config and of all, beside the published ones."""
    table = _table(f"{hardware.num_gpus} GPUs", "samples", "tokens", "GPU-hours", "checkpointed", "days")
    sums = [0.0] * 4
    for made in plans:
        hours = [hardware.gpu_hours(made.flops(is_checkpointed)) for is_checkpointed in (False, True)]
        numbers = [made.num_samples / 1e6, made.num_tokens / 1e9, *hours]
        sums = [total + number for total, number in zip(sums, numbers)]
        table.add_row(Path(made.path).stem, *_sum_cells(numbers, hardware))
    table.add_row("together", *_sum_cells(sums, hardware))
    if (name := _released(plans)) is not None:
        published = _PUBLISHED_GPU_HOURS[name]
        table.add_row("published, 3 stages", "", "", f"{published:,}", "", f"{published / hardware.num_gpus / 24:.1f}")
    return table


def assumptions(
    plans: Sequence[Plan], hardware: Hardware, tokens: SampleTokens, image_size: ImageSize | None = None
) -> list[str]:
    """The assumptions behind the numbers."""
    has_texts = any(not row.has_image for made in plans for _, row in made.rows)
    texts = f"; {tokens.text} tokens in a text" if has_texts else ""
    lines = [
        f"Assumed: one image and {tokens.caption} tokens of text in a caption, {tokens.chat} in a chat{texts}; "
        f"{hardware.utilisation:.0%} of {hardware.tflops:g} TFLOP/s; {1 - USABLE:.0%} of the memory kept free; "
        "what is frozen was released in bf16.",
        *tile_assumptions(((each.config.image.tiles or 0, each.model.num_image_tokens) for each in plans), image_size),
        "`to N` fits as long as the longest row of a micro-batch has at most N tokens.",
    ]
    if (name := _released(plans)) is not None:
        hours = sum(hardware.gpu_hours(made.flops(is_checkpointed=False)) for made in plans)
        reached = hardware.utilisation * hours / _PUBLISHED_GPU_HOURS[name]
        lines.append(f"For this work the published {_PUBLISHED_GPU_HOURS[name]:,} GPU-hours are {reached:.0%} MFU.")
    return lines


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _sum_cells(numbers: Sequence[float], hardware: Hardware) -> list[str]:
    samples, tokens, plain, checkpointed = numbers
    days = " to ".join(f"{hours / hardware.num_gpus / 24:.1f}" for hours in (plain, checkpointed))
    return [f"{samples:,.1f} M", f"{tokens:,.1f} B", f"{plain:,.0f}", f"{checkpointed:,.0f}", days]


def _released(plans: Sequence[Plan]) -> str | None:
    """The release whose dimensions all have; a Yi-1.5's norms alone tell it from a Yi's."""
    for name in _PUBLISHED_GPU_HOURS:
        if all(_dimensions(made.model) == _dimensions(preset(name)) for made in plans):
            return name
    return None


def _dimensions(model: YiVLConfig) -> list[float | str]:
    keys = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "rms_norm_eps",
    )  # fmt: skip
    numbers = [getattr(part, key, 0) for part in (model.vision_config, model.text_config) for key in keys]
    return [model.text_config.model_type, model.connector_config.type, *numbers]


if __name__ == "__main__":
    program.run(app, "error")
