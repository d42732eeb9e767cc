"""Builds the parts of a run from its config: model, objective, data loader, held-out samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from yi_vl.checkpoint.find import find
from yi_vl.checkpoint.load import read_max_tiles
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

from .attention.cpu import keep_memory, use_short_attention_
from .attention.packing import use_varlen_attention_
from .config import DPO, FROM_MODEL, FROM_SHARDS, TrainConfig, batch_sizes, num_steps
from .data.loader import StepLoader
from .data.reference import ReferenceModel
from .data.stream import expand_shards
from .distill import DistillObjective, check_teacher, teacher_config
from .distributed import is_sharded
from .dpo import PreferenceObjective
from .experts import check_experts
from .generations import HeldOut
from .init import check_positions, fingerprint, initial_model, load_float32
from .lora import Adapters, add_adapters_, uses_adapters
from .loss import Objective
from .optim import cast_frozen_, checkpoint_activations_, set_trainable_
from .validation import VALIDATION_KEY, eval_mode


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
    start = config.init_from.checkpoint or config.init_from.language_model
    check_experts(model.config.text_config, config, str(start))
    saved = add_adapters_(model, config, directory) if has_adapters else model
    set_trainable_(model, config)
    cast_frozen_(model, config.precision)
    if config.activation_checkpointing:
        checkpoint_activations_(model)
    _use_fast_attention_(model, config, accelerator)
    return model, processor, saved


def _use_fast_attention_(model: YiVLForConditionalGeneration, config: TrainConfig, accelerator: Accelerator) -> None:
    if accelerator.device.type == "cpu":
        keep_memory()
        use_short_attention_(model)
    else:
        use_varlen_attention_(model.model.language_model, config.precision)


def build_objective(
    config: TrainConfig,
    accelerator: Accelerator,
    model: YiVLForConditionalGeneration,
    saved: YiVLForConditionalGeneration | Adapters,
) -> tuple[Objective, str | None]:
    """The loss of the run's objective, and a line about the reference model's memory, if it takes any.

    Raises:
        ValueError: the reference model is not there, or the model is sharded and no other is there whole.
    """
    num_sources = len(config.data.sources)
    if config.distill.teacher is not None:
        teacher = _frozen_model(teacher_config(config, config.distill.teacher), accelerator)
        check_teacher(teacher.config, model.config, config.distill.teacher)
        note = f"The teacher {config.distill.teacher} takes {_gigabytes(teacher):.2f} GB on each rank."
        return DistillObjective(model, num_sources, config.distill, lambda: teacher, config.neftune), note
    if config.objective != DPO:
        return Objective(model, num_sources, config.neftune), None
    if config.dpo.reference == FROM_SHARDS:
        return PreferenceObjective(model, num_sources, config.dpo), None
    if is_sharded(accelerator):
        raise ValueError(
            f"dpo.reference: {FROM_MODEL} does not go with FSDP, whose ranks hold no whole model; compute the "
            "reference log-probabilities once (python -m train.shards reference), and set dpo.reference to "
            f"{FROM_SHARDS}."
        )
    if isinstance(saved, Adapters):

        @contextmanager
        def without_adapters() -> Iterator[YiVLForConditionalGeneration]:
            with saved.disabled(), eval_mode(model):
                yield model

        return PreferenceObjective(model, num_sources, config.dpo, without_adapters), None
    reference = _frozen_model(config, accelerator)
    note = (
        f"The reference is a frozen copy of {config.init_from.checkpoint}, {_gigabytes(reference):.2f} GB on each "
        f"rank; with dpo.reference {FROM_SHARDS}, or adapters (trainable.language: lora), there is none."
    )
    return PreferenceObjective(model, num_sources, config.dpo, lambda: nullcontext(reference)), note


def _frozen_model(config: TrainConfig, accelerator: Accelerator) -> YiVLForConditionalGeneration:
    """The model that a run starts from, in eval mode on this rank's device."""
    model, _ = initial_model(config, accelerator.device)
    model.requires_grad_(False).eval()
    cast_frozen_(model, config.precision)
    _use_fast_attention_(model, config, accelerator)
    return model.to(accelerator.device)  # type: ignore[no-any-return,call-arg]


def _gigabytes(model: YiVLForConditionalGeneration) -> float:
    return sum(parameter.nbytes for parameter in model.parameters()) / 1e9


def reference_model(config: TrainConfig) -> ReferenceModel | None:
    """The model whose log-probabilities the run's shards must hold; None when they need none.

    Raises:
        ValueError: the weights that the run starts from are not there.
    """
    if config.objective != DPO or config.dpo.reference == FROM_MODEL:
        return None
    assert config.init_from.checkpoint is not None  # load_config checks it
    checkpoint, tiles = config.init_from.checkpoint, config.image.tiles
    tiles = read_max_tiles(find(checkpoint)) if tiles is None else tiles
    return ReferenceModel(fingerprint(checkpoint), config.image_size, config.data.fast_pixels, tiles)


def build_loader(
    config: TrainConfig, accelerator: Accelerator, processor: YiVLProcessor, state: dict[str, Any] | None,
    reference: ReferenceModel | None = None,
) -> StepLoader:  # fmt: skip
    """This rank's data, continued from a checkpoint's state, if any.

    Raises:
        ValueError: the ranks cannot divide the batch, or the state is of other data.
    """
    world_size = accelerator.num_processes
    return StepLoader(
        processor, config.data, config.max_tokens, config.seed, accelerator.process_index, world_size,
        batch_sizes(config).split(world_size, "ranks"), config.micro_batch,
        [rank_state["data"] for rank_state in state["ranks"]] if state is not None else None,
        state["step"] if state is not None else 0, num_steps(config), reference,
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
