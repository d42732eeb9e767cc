"""Builds the parts of a run from its config: model, data loader, held-out samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

from .attention.cpu import keep_memory, use_short_attention_
from .attention.packing import use_varlen_attention_
from .config import TrainConfig, batch_sizes, num_steps
from .data.loader import StepLoader
from .data.stream import expand_shards
from .distributed import is_sharded
from .generations import HeldOut
from .init import check_positions, initial_model, load_float32
from .lora import Adapters, add_adapters_, uses_adapters
from .optim import cast_frozen_, checkpoint_activations_, set_trainable_
from .validation import VALIDATION_KEY


def check_shards(config: TrainConfig) -> None:
    """
    Raises:
        ValueError: the shards of a source are not there.
    """
    for source in config.data.sources:
        expand_shards(source)
    for held_out in config.validation.sources if config.validation is not None else ():
        expand_shards(held_out, VALIDATION_KEY)


def build_model(
    config: TrainConfig, accelerator: Accelerator, directory: Path | None
) -> tuple[YiVLForConditionalGeneration, YiVLProcessor, YiVLForConditionalGeneration | Adapters]:
    """The model, ready to train, its processor, and what checkpoints save: the model, or its adapters.

    Args:
        directory: the checkpoint to resume from, if any.
    """
    has_adapters = uses_adapters(config)
    if directory is None or has_adapters:
        model, processor = initial_model(config, accelerator.device)
    else:
        model, processor = load_float32(directory)
        check_positions(model.config, config)
    saved = add_adapters_(model, config, directory) if has_adapters else model
    set_trainable_(model, config)
    cast_frozen_(model, config.precision)
    if config.activation_checkpointing:
        checkpoint_activations_(model)
    if accelerator.device.type == "cpu":
        keep_memory()
        use_short_attention_(model)
    else:
        use_varlen_attention_(model.model.language_model, config.precision)
    return model, processor, saved


def build_loader(
    config: TrainConfig, accelerator: Accelerator, processor: YiVLProcessor, state: dict[str, Any] | None
) -> StepLoader:
    """This rank's data, continued from a checkpoint's state, if any.

    Raises:
        ValueError: the ranks cannot divide the batch, or the state is of other data.
    """
    world_size = accelerator.num_processes
    return StepLoader(
        processor, config.data, config.max_tokens, config.seed, accelerator.process_index, world_size,
        batch_sizes(config).split(world_size, "ranks"), config.micro_batch,
        [rank_state["data"] for rank_state in state["ranks"]] if state is not None else None,
        state["step"] if state is not None else 0, num_steps(config),
    )  # fmt: skip


def build_held_out(
    config: TrainConfig, accelerator: Accelerator, model: YiVLForConditionalGeneration, processor: YiVLProcessor
) -> HeldOut | None:
    """The held-out samples on the first rank; checked on all."""
    if config.generations is None:
        return None
    if is_sharded(accelerator):
        raise ValueError("generations: a model sharded by FSDP cannot generate here; set generations to null.")
    max_prompt_tokens = model.config.text_config.max_position_embeddings - 1  # leaves one for the answer
    held_out = HeldOut(config.generations, config.data, processor, Path(config.run_dir), max_prompt_tokens)
    return held_out if accelerator.is_main_process else None
