"""The memory of one GPU in a training step, by what holds it: counted parameters and activations, and a strategy."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from yi_vl.config import YiVLConfig

from ..config import INT4, TrainConfig
from ..experts import has_experts
from ..optim import component_parameters
from ..qlora import BYTES_PER_WEIGHT
from .count import SavedBytes, meta_model
from .flops import Row

_LOGIT_TABLES = 3  # fp32 (K, V), when the backward pass begins: log-probabilities, their gradient, the logits' gradient


@dataclass(frozen=True)
class Parameters:
    """How many there are, by component; and how many of them matter for what."""

    total: dict[str, int]
    trained: dict[str, int]
    num_bytes: int  # of all but those in four bits; fp32, but for frozen matrices: see `cast_frozen_`
    count: int  # of those, what PEFT keeps beside the copies that it trains included
    largest_unit: int  # of the layers that FSDP and ZeRO-3 gather one by one
    largest_trained_unit: int
    outside_units: int  # tables, head, projector: gathered throughout
    int4: int  # in four bits
    largest_int4: int  # matrix of those


@dataclass(frozen=True)
class Strategy:
    """Bytes of a parameter on all GPUs that share it: all of them if it is sharded, else one.

    DDP: fp32 weights; gradients twice, once in the buckets that are exchanged (`gradient_as_bucket_view` is off);
    AdamW's two moments. FSDP: the same without buckets, in shards. ZeRO-3: everything in the product's dtype but the
    optimizer, which holds fp32 weights beside the moments: 2 + 2 + 12 (Rajbhandari et al. 2019, section 3.1).
    """

    name: str
    is_sharded: bool
    weight: int | None  # None: as in `Parameters.num_bytes`
    gradient: int
    optimizer: int
    product: int  # of a number in a matrix product


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, as if all were held at once; in truth gradients grow while activations go."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


def strategies(precision: str, is_int4: bool = False) -> tuple[Strategy, ...]:
    """Those that accelerate offers, in a precision of `config.PRECISIONS`; adapters on an int4 base have but one."""
    low = 4 if precision == "fp32" else 2
    master = 0 if low == 4 else 4
    ddp = Strategy("DDP", False, None, 8, 8, low)
    if is_int4:
        return (ddp,)
    return ddp, Strategy("FSDP", True, None, 4, 8, low), Strategy("ZeRO-3", True, low, low, 8 + master, low)


def count_parameters(model_config: YiVLConfig, config: TrainConfig) -> Parameters:
    """Counted on a model without weights, frozen as the trainer freezes it."""
    model = meta_model(model_config, config)
    under_adapters = {id(p): p for name, p in model.named_parameters() if name.endswith(".base_layer.weight")}
    int4 = under_adapters if config.lora.base == INT4 else {}
    held = [parameter for parameter in model.parameters() if id(parameter) not in int4]
    by_component = component_parameters(model)
    total = {name: _count(parameters) for name, parameters in by_component.items()}
    trained = {name: _count(p for p in parameters if p.requires_grad) for name, parameters in by_component.items()}

    unit_names = {name for m in model.modules() if isinstance(m, PreTrainedModel) for name in m._no_split_modules or ()}
    units = [list(module.parameters()) for module in model.modules() if type(module).__name__ in unit_names]
    sizes = [_count(unit) for unit in units]
    sizes_trained = [_count(parameter for parameter in unit if parameter.requires_grad) for unit in units]
    return Parameters(
        total, trained, sum(parameter.nbytes for parameter in held), _count(held), max(sizes),
        max(sizes_trained, default=0), outside_units=sum(total.values()) - sum(sizes), int4=_count(int4.values()),
        largest_int4=max((parameter.numel() for parameter in int4.values()), default=0),
    )  # fmt: skip


def describe_experts(model: YiVLConfig) -> list[str]:
    """A line about how many of the experts' parameters a token gets; none without experts."""
    text = model.text_config
    if not has_experts(text):
        return []
    each = 3 * text.hidden_size * text.intermediate_size * text.num_hidden_layers
    total, active = text.num_experts * each / 1e6, text.num_routed * each / 1e6
    most = " at most" if text.router_top_p is not None else ""
    return [
        f"experts: {text.num_experts} in each layer, {total:,.1f} M parameters; counted for each token are "
        f"{text.num_routed}{most}, {active:,.1f} M"
    ]


def step_memory(
    parameters: Parameters, strategy: Strategy, num_gpus: int, saved: SavedBytes, logits: int, is_checkpointed: bool
) -> Memory:
    """What a GPU holds in a step.

    Besides its share of the weights: under DDP autocast's copies of fp32 matrices; when sharded, the gathered weights
    of two layers, the next being fetched, and of what lies outside layers, and likewise two layers' gradients; of an
    int4 base, the one matrix that is made again for its product. Checkpointed, one layer is run again as a whole.
    """
    trained, low = sum(parameters.trained.values()), strategy.product
    share = num_gpus if strategy.is_sharded else 1
    weights = (strategy.weight * parameters.count if strategy.weight else parameters.num_bytes) / share
    weights += BYTES_PER_WEIGHT * parameters.int4 + low * parameters.largest_int4
    gradients = strategy.gradient * trained / share
    if strategy.is_sharded:
        weights += low * (parameters.outside_units + 2 * parameters.largest_unit)
        gradients += low * 2 * parameters.largest_trained_unit
    else:
        weights += saved.weight_copies + saved.forward_copies
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=strategy.optimizer * trained / share,
        activations=saved.activations + (saved.largest_layer if is_checkpointed else 0),
        logits=logits,
    )


def logit_bytes(model: YiVLConfig, row: Row) -> int:
    """Of a row. Not counted: hooks do not see what the backward pass itself makes."""
    return _LOGIT_TABLES * 4 * row.supervised * model.text_config.vocab_size


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
