"""One process or many: what accelerate is asked for, and whole weights and optimiser states where they are spread.

Checkpoints hold everything whole and by name, so that a run may go on with other ranks, or spread in another way.
Called by loop.py; calls optim.py, accelerate and torch's distributed checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.tracking import get_available_trackers
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
        ValueError: a tracker is not installed, or accelerate is set up for what this trainer does not do.
    """
    available = [str(tracker) for tracker in get_available_trackers()]
    if missing := [name for name in config.trackers if name not in available]:  # accelerate would leave it out
        raise ValueError(f"trackers: {missing[0]!r} is not installed; there are {', '.join(available) or 'none'}.")
    accelerator = Accelerator(
        mixed_precision=_ACCELERATE_PRECISION[config.precision],
        log_with=config.trackers if config.trackers else None,
        project_dir=config.run_dir,
    )
    kind = accelerator.distributed_type
    if kind not in _KNOWN or (is_sharded(accelerator) and not accelerator.is_fsdp2):
        raise ValueError(
            f"accelerate is set up for {kind.value}; this trainer knows one process, plain data parallelism and FSDP "
            "with fsdp_version 2: see train/configs/accelerate/."
        )
    if is_sharded(accelerator) and config.lora.base == INT4:
        raise ValueError(
            "lora.base: int4 does not go with FSDP, which spreads weights but not the scales that bitsandbytes keeps "
            "beside them. Use train/configs/accelerate/ddp.yaml, or set lora.base to null."
        )
    if is_sharded(accelerator):
        # accelerate's own would round the loss, and the sum of all ranks' gradients, to 16 bits
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=LOW_DTYPES.get(config.precision), reduce_dtype=torch.float32
        )
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each rank holds only a part of the weights."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def ranks_line(accelerator: Accelerator, objective: nn.Module) -> str:
    """How the work is divided, for people."""
    whole = sum(map(num_weights, objective.parameters()))
    here = sum(p.to_local().numel() if isinstance(p, DTensor) else num_weights(p) for p in objective.parameters())
    return f"{accelerator.num_processes} ranks; the first holds {here:,} of {whole:,} parameters."


def gather_weights(accelerator: Accelerator, objective: nn.Module) -> dict[str, Tensor]:
    """The model's weights by their names in the model; where they are spread, whole on the first rank only."""
    weights: dict[str, Tensor] = accelerator.get_state_dict(objective)
    return {name.removeprefix("model."): tensor for name, tensor in weights.items()}


def gather_optimiser(objective: nn.Module, optimiser: AcceleratedOptimizer) -> dict[str, Any]:
    """The optimiser's state by the names of weights; where they are spread, whole on the first rank only."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_optimizer_state_dict(objective, optimiser.optimizer, options=options)


def load_optimiser_(
    accelerator: Accelerator, objective: nn.Module, optimiser: AcceleratedOptimizer, state: dict[str, Any]
) -> None:
    """Give each rank its part of what `gather_optimiser` returned on the first."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=is_sharded(accelerator))
    set_optimizer_state_dict(objective, optimiser.optimizer, state, options=options)
