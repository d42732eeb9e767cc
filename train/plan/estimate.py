"""What a training step costs, by arithmetic: the memory of one GPU by what holds it. For operations see flops.py.

S tokens of a row, K of them supervised, V vocabulary, Q width of the language model's queries.

The arithmetic is that of a GPU with fused attention, which keeps no scores. A tower from timm is reckoned as
open_clip's own of its dimensions; a convolutional stem's maps are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from yi_vl.config import YiVLConfig
from yi_vl.model import YiVLForConditionalGeneration

from ..config import INT4, LoraConfig, TrainableConfig, TrainConfig
from ..lora import add_adapters_, uses_adapters
from ..optim import component_parameters, set_trainable_
from ..qlora import BYTES_PER_WEIGHT
from .flops import Row, num_blocks


@dataclass(frozen=True)
class Parameters:
    """How many there are, by component; and how many of them matter for what."""

    total: dict[str, int]
    trained: dict[str, int]
    cast_trained: int  # in matrices of which autocast keeps a copy for the backward pass
    cast_frozen: int  # likewise, for the gradient that is passed on
    kept_low: int  # frozen, held in the product's dtype, and so in no need of a copy
    largest_unit: int  # of the layers that FSDP and ZeRO-3 gather one by one
    largest_trained_unit: int
    outside_units: int  # tables, head, projector: gathered throughout
    originals: int  # that PEFT keeps beside their copies, which learn
    int4: int  # in four bits
    largest_int4: int  # matrix of those


@dataclass(frozen=True)
class Elements:
    """Bytes of a number: in matrix products, on the language model's residual stream, kept by a LayerNorm.

    Under autocast with fp32 weights the embedding table makes the stream fp32, and CUDA runs LayerNorm in fp32 (a CPU
    does not). With bf16 weights the stream is bf16.
    """

    product: int = 2
    stream: int = 4
    norm: int = 4


@dataclass(frozen=True)
class Strategy:
    """Bytes of a parameter on all GPUs that share it: all of them if it is sharded, else one.

    DDP: fp32 weights; gradients twice, once in the buckets that are exchanged (`gradient_as_bucket_view` is off);
    AdamW's two moments. FSDP: the same without buckets, in shards. ZeRO-3: everything in the product's dtype but the
    optimiser, which holds fp32 weights beside the moments: 2 + 2 + 12 (Rajbhandari et al. 2019, section 3.1).
    """

    name: str
    is_sharded: bool
    weight: int
    gradient: int
    optimiser: int
    elements: Elements


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, as if all were held at once; in truth gradients grow while activations go."""

    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimiser + self.activations + self.logits


def strategies(precision: str, is_int4: bool = False) -> tuple[Strategy, ...]:
    """Those that accelerate offers, in a precision of `config.PRECISIONS`; adapters on an int4 base have but one."""
    low = 4 if precision == "fp32" else 2
    master = 0 if low == 4 else 4
    if is_int4:
        return (Strategy("DDP", False, 4, 8, 8, Elements(low, low, 4)),)
    return (
        Strategy("DDP", False, 4, 8, 8, Elements(low, 4, 4)),
        Strategy("FSDP", True, 4, 4, 8, Elements(low, low, 4)),
        Strategy("ZeRO-3", True, low, low, 8 + master, Elements(low, low, 4)),
    )


def count_parameters(model_config: YiVLConfig, config: TrainConfig) -> Parameters:
    """Counted on a model without weights, frozen as the trainer freezes it.

    Frozen matrices are taken to hold nothing finer than bf16, as the released ones do: see `cast_frozen_`. What is
    left of a language model around an int4 base is held so, too.
    """
    with torch.device("meta"):
        model = YiVLForConditionalGeneration(model_config)
    if uses_adapters(config):
        add_adapters_(model, config)
    set_trainable_(model, config)
    tower, head = model.model.vision_tower, model.lm_head.weight
    not_cast = {
        id(p) for module in tower.visual.unused_modules(tower.config.feature_layer) for p in module.parameters()
    }
    not_cast |= {id(p) for name, p in model.named_parameters() if name.endswith(("embed_tokens.weight", "_embedding"))}
    not_cast -= {id(head)}  # a tied table
    linears = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    linears -= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    int4, around_int4 = _int4_base(model) if config.lora.base == INT4 else ({}, {})
    linears -= int4.keys()
    low = {id(p): p for p in model.parameters() if id(p) in linears and not p.requires_grad}
    low = around_int4 | (low if config.precision == "bf16" else {})
    not_cast |= int4.keys() | low.keys()

    total: dict[str, int] = {}
    trained: dict[str, int] = {}
    cast_trained = cast_frozen = 0
    for name, own in component_parameters(model).items():
        total[name] = _count(own)
        trained[name] = _count(parameter for parameter in own if parameter.requires_grad)
        matrices = [parameter for parameter in own if parameter.ndim == 2 and id(parameter) not in not_cast]
        cast_trained += _count(parameter for parameter in matrices if parameter.requires_grad)
        if any(trained.values()):  # something before it learns, by the gradient that this passes on
            cast_frozen += _count(parameter for parameter in matrices if not parameter.requires_grad)

    kinds = {name for m in model.modules() if isinstance(m, PreTrainedModel) for name in m._no_split_modules or ()}
    units = [list(module.parameters()) for module in model.modules() if type(module).__name__ in kinds]
    sizes = [_count(unit) for unit in units]
    sizes_trained = [size for size, unit in zip(sizes, units) if unit[0].requires_grad]
    return Parameters(
        total, trained, cast_trained, cast_frozen, _count(low.values()), max(sizes), max(sizes_trained, default=0),
        outside_units=sum(total.values()) - sum(sizes), originals=_count(model.parameters()) - sum(total.values()),
        int4=_count(int4.values()), largest_int4=max(map(torch.numel, int4.values()), default=0),
    )  # fmt: skip


def _int4_base(model: YiVLForConditionalGeneration) -> tuple[dict[int, nn.Parameter], dict[int, nn.Parameter]]:
    """Of an adapted language model what int4.py holds in four bits, and what else is frozen; by `id`."""
    under = {id(p): p for name, p in model.named_parameters() if name.endswith(".base_layer.weight")}
    frozen = {id(p): p for p in component_parameters(model)["language"] if not p.requires_grad}
    return under, {key: p for key, p in frozen.items() if key not in under}


def step_memory(
    model: YiVLConfig, parameters: Parameters, trains: TrainableConfig, strategy: Strategy, num_gpus: int,
    num_rows: int, row: Row, is_checkpointed: bool, lora: LoraConfig | None = None,
) -> Memory:  # fmt: skip
    """What a GPU holds in a step.

    Besides its share of the weights: under DDP autocast's copies of matrices in fp32, kept for the backward pass (a
    frozen one only as long as its layer runs when activations are checkpointed, a trained one until the forward pass
    ends); when sharded, the gathered weights of two layers, the next being fetched, and of what lies outside layers,
    and likewise two layers' gradients; of an int4 base, the one matrix that is made again for its product.
    """
    total, trained = sum(parameters.total.values()), sum(parameters.trained.values())
    low = strategy.elements.product
    share = num_gpus if strategy.is_sharded else 1
    whole = total + parameters.originals - parameters.int4
    weights, gradients = strategy.weight * whole / share, strategy.gradient * trained / share
    weights -= (strategy.weight - low) * parameters.kept_low / share
    weights += BYTES_PER_WEIGHT * parameters.int4 + low * parameters.largest_int4
    if strategy.is_sharded:
        weights += low * (parameters.outside_units + 2 * parameters.largest_unit)
        gradients += low * 2 * parameters.largest_trained_unit
    elif low < strategy.weight:
        weights += low * (parameters.cast_trained + (0 if is_checkpointed else parameters.cast_frozen))
    return Memory(
        weights=weights,
        gradients=gradients,
        optimiser=strategy.optimiser * trained / share,
        activations=num_rows * activation_bytes(model, trains, strategy.elements, row, is_checkpointed, lora),
        logits=num_rows * logit_bytes(model, row),
    )


def activation_bytes(
    model: YiVLConfig, trains: TrainableConfig, elements: Elements, row: Row, is_checkpointed: bool,
    lora: LoraConfig | None = None,
) -> int:  # fmt: skip
    """What autograd keeps of one row from the forward to the backward pass, the head and its loss excepted.

    With checkpointing: each layer's input, and one layer whole, the one that is run again. Frozen layers are reckoned
    as checkpointed, too; transformers does that in training mode only.

    Args:
        lora: the language model's adapters, if it learns by them.
    """
    vision, text = model.vision_config, model.text_config
    num_patches, width = vision.num_patches, text.hidden_size
    layer = row.tokens * language_layer_bytes(model, trains, elements)
    if lora is not None:
        layer += row.tokens * adapter_bytes(model, lora, elements)
    kept = row.tokens * width * elements.stream if is_checkpointed else layer
    kept *= text.num_hidden_layers
    kept += row.tokens * _rms_norm_bytes(width, elements, trains.language is True)
    block = 0
    if trains.vision:
        block = (num_patches + 1) * tower_block_bytes(model, elements)
        boundary = (num_patches + 1) * vision.hidden_size * elements.product
        kept += num_blocks(model) * (boundary if is_checkpointed else block)
        kept += num_patches * 3 * vision.patch_size**2 * elements.product  # the pixels, for the patch embedding
        kept += (num_patches + 1) * _layer_norm_bytes(vision.hidden_size, elements)
    if trains.vision or trains.projector:
        kept += num_patches * projector_bytes(model, trains, elements)
    return kept + (max(layer, block) if is_checkpointed else 0)


def language_layer_bytes(model: YiVLConfig, trains: TrainableConfig, elements: Elements) -> int:
    """Of a token, in a Llama layer. What only a weight's gradient needs is not kept when the layer is frozen.

    Two norms, see below. Attention: rotated queries and keys, values and output, and a log-sum-exp per head; the output
    is what the next product's weight needs, too. Feed-forward: gate, silu(gate), up, and their product for the weight
    behind it. The inputs of q, k, v and of gate, up: under autocast each product makes its own copy.
    """
    text, low = model.text_config, elements.product
    width, learns = text.hidden_size, trains.language is True
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
    attention = low * 2 * head * (heads + kv_heads) + 4 * heads
    feed_forward = low * text.intermediate_size * (4 if learns else 3)
    num_copies = 5 if elements.stream > low else 2
    inputs = low * width * num_copies if learns else 0
    return 2 * _rms_norm_bytes(width, elements, learns) + attention + feed_forward + inputs


def adapter_bytes(model: YiVLConfig, lora: LoraConfig, elements: Elements) -> int:
    """Of a token, in the seven adapters of a Llama layer: the inputs of A and of B, for their gradients.

    Dropout gives every A an input of its own, and keeps a mask of a byte a number; so does a cast, without a mask. With
    neither q, k, v and gate, up share theirs, and that of o is the attention's output.
    """
    text, low = model.text_config, elements.product
    width, inner = text.hidden_size, text.intermediate_size
    attention = (getattr(text, "head_dim", None) or width // text.num_attention_heads) * text.num_attention_heads
    if lora.dropout:
        inputs = (low + 1) * (5 * width + attention + inner)
    else:
        inputs = low * ((5 * width + attention if elements.stream > low else 2 * width) + inner)
    return inputs + low * 7 * lora.rank


def tower_block_bytes(model: YiVLConfig, elements: Elements) -> int:
    """Of a token, in a block of a tower that learns: two norms; the inputs of its four products; q, k, v; GELU's input.

    The input of the second product is the attention's output; a log-sum-exp per head comes with it.
    """
    vision, low = model.vision_config, elements.product
    width, inner = vision.hidden_size, vision.intermediate_size
    products = low * (width + width + width + inner)
    return (
        2 * _layer_norm_bytes(width, elements) + products + low * (3 * width + inner) + 4 * vision.num_attention_heads
    )


def projector_bytes(model: YiVLConfig, trains: TrainableConfig, elements: Elements) -> int:
    """Of a patch: two norms, GELU's input, which is a norm's output, and the inputs of two products."""
    width = model.text_config.hidden_size
    inputs = elements.product * (model.vision_config.hidden_size + width) if trains.projector else 0
    return 2 * _layer_norm_bytes(width, elements) + elements.norm * width + inputs


def logit_bytes(model: YiVLConfig, row: Row) -> int:
    """Three fp32 tables (K, V) when the backward pass begins: log-probabilities, their gradient, and the logits'.

    Only the K supervised tokens have logits; see objective.py.
    """
    return 3 * 4 * row.supervised * model.text_config.vocab_size


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _rms_norm_bytes(width: int, elements: Elements, learns: bool) -> int:
    """Of a token: the input in fp32 and its scale; the normalised input for the weight's gradient."""
    return 4 * width + 4 + (elements.stream * width if learns else 0)


def _layer_norm_bytes(width: int, elements: Elements) -> int:
    """Of a token: the input, its mean and its scale."""
    return elements.norm * width + 8
