"""One process or many: accelerate's set-up, exchanges between ranks, and full state dicts of sharded models.

Checkpoints hold full, named tensors, so that a run can resume with another number of ranks or another sharding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from .config import INT4, TrainConfig
from .optim import LOW_DTYPES
from .qlora import num_weights

_ACCELERATE_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_KNOWN = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU, DistributedType.FSDP)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """accelerate as `accelerate launch` set it up.

    Raises:
        ValueError: a tracker is not installed, or accelerate is set up for something unsupported.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    if missing := [name for name in config.trackers if name not in available]:  # accelerate would skip it
        raise ValueError(f"trackers: {missing[0]!r} is not installed; there are {', '.join(available) or 'none'}.")
    accelerator = Accelerator(
        mixed_precision=_ACCELERATE_PRECISION[config.precision],
        log_with=config.trackers if config.trackers else None,
        project_dir=config.run_dir,
    )
    distributed_type = accelerator.distributed_type
    if distributed_type not in _KNOWN or (is_sharded(accelerator) and not accelerator.is_fsdp2):
        raise ValueError(
            f"accelerate is set up for {distributed_type.value}; this trainer supports one process, DDP and FSDP "
            "with fsdp_version 2: see train/configs/accelerate/."
        )
    if is_sharded(accelerator) and config.lora.base == INT4:
        raise ValueError(
            "lora.base: int4 does not go with FSDP, which shards weights but not bitsandbytes' quantization scales. "
            "Use train/configs/accelerate/ddp.yaml, or set lora.base to null."
        )
    if is_sharded(accelerator):
        # accelerate's default rounds the loss and the gradients' reduction to 16 bits
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=LOW_DTYPES.get(config.precision), reduce_dtype=torch.float32
        )
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each rank holds only a shard of the weights (FSDP)."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def ranks_line(accelerator: Accelerator, objective: nn.Module) -> str:
    """A line about the number of ranks, and how much of the model the first one holds."""
    num_total = sum(map(num_weights, objective.parameters()))
    num_local = sum(p.to_local().numel() if isinstance(p, DTensor) else num_weights(p) for p in objective.parameters())
    return f"{accelerator.num_processes} ranks; the first holds {num_local:,} of {num_total:,} parameters."


def gather_weights(accelerator: Accelerator, objective: nn.Module) -> dict[str, Tensor]:
    """The model's weights by their names in the model; sharded ones are gathered on the first rank only."""
    weights: dict[str, Tensor] = accelerator.get_state_dict(objective)
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def gather_optimizer(objective: nn.Module, optimizer: AcceleratedOptimizer) -> dict[str, Any]:
    """The optimizer's state by parameter name; sharded ones are gathered on the first rank only."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(objective, optimizer.optimizer, options=options)


def load_optimizer_(
    accelerator: Accelerator, objective: nn.Module, optimizer: AcceleratedOptimizer, state: dict[str, Any]
) -> None:
    """Load what `gather_optimizer` returned on the first rank. The param groups' settings stay as they are."""
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_sharded(accelerator))
    set_optimizer_state_dict(objective, optimizer.optimizer, state, options=options)
    for group, group_settings in zip(optimizer.param_groups, settings, strict=True):
        group.update(group_settings)  # rates and decay of this run's config, not of the checkpoint's


def exchange(accelerator: Accelerator, numbers: list[int]) -> list[list[int]]:
    """The numbers of every rank, in the order of ranks. All ranks take part; a single process waits for no device."""
    if accelerator.num_processes == 1:
        return [numbers]
    rows: list[list[int]] = accelerator.gather(torch.tensor([numbers], device=accelerator.device)).tolist()
    return rows


def on_first_rank(accelerator: Accelerator, function: Callable[[], None]) -> None:
    """Run a function on the first rank; all take part.

    Raises:
        ValueError: on every rank, what the function raised on the first.
    """
    error = ""
    if accelerator.is_main_process:
        try:
            function()
        except ValueError as first_error:
            error = str(first_error)
    raise_on_all_ranks(error)


def raise_on_all_ranks(error: str) -> None:
    """Raise the first rank's error that is not empty, on every rank, so that none waits for another. All take part.

    Raises:
        ValueError: with that error.
    """
    if errors := [rank_error for rank_error in gather_object([error]) if rank_error]:
        raise ValueError(errors[0])
