"""FLOPs and saved bytes of a micro-batch, counted by torch on a model without weights.

Models of three layers or fewer are run: both counts are linear in the number of layers and of tower blocks, from the
second on (the first's input may need no gradient). In a hybrid decoder, or where `trainable.language` is a list, layers
differ: all are run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, LlamaModel
from transformers.integrations.moe import ExpertsInterface

from yi_vl.config import YiVLConfig
from yi_vl.decoder.config import YiHybridConfig
from yi_vl.decoder.gated_config import YiGatedConfig
from yi_vl.decoder.image_keys import ImageRuns
from yi_vl.model import YiVLForConditionalGeneration

from ..config import INT4, TrainConfig
from ..experts import has_experts
from ..lora import add_adapters_, uses_adapters
from ..optim import LOW_DTYPES, checkpoint_activations_, component_parameters, components, set_trainable_
from .flops import Row, num_blocks

_UNMASKED = "unmasked"
_BALANCED = "balanced"


@dataclass(frozen=True)
class SavedBytes:
    """What a forward pass leaves for the backward pass.

    weight_copies: of fp32 matrices, made by autocast and saved.
    forward_copies: of other fp32 weights that are trained; autocast keeps them until the forward pass ends.
    largest_layer: the activations of one layer or tower block, were it not checkpointed.
    """

    activations: int
    weight_copies: int
    forward_copies: int
    largest_layer: int


def meta_model(model_config: YiVLConfig, config: TrainConfig, is_low: bool = False) -> YiVLForConditionalGeneration:
    """The model as the trainer prepares it, without weights.

    What `cast_frozen_` casts is in the products' dtype here, too, as released weights are exact in it. An int4 base
    stands as a matrix in the products' dtype: a product with it saves as much.

    Args:
        is_low: hold all weights in the products' dtype, as FSDP gathers them.
    """
    with torch.device("meta"):
        model = YiVLForConditionalGeneration(model_config)
        if uses_adapters(config):
            add_adapters_(model, config)
    set_trainable_(model, config)
    if config.activation_checkpointing:
        checkpoint_activations_(model)
    if (low := LOW_DTYPES.get(config.precision)) is None:
        return model
    if is_low:
        return model.to(dtype=low)  # type: ignore[no-any-return,call-arg]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    linears = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    frozen = [weight for weight in linears if id(weight) not in tables]
    if config.lora.base == INT4:
        frozen += [*model.model.language_model.parameters(), *model.lm_head.parameters()]
        for module in model.modules():
            if hasattr(module, "lora_A"):
                # As PEFT's adapters on bitsandbytes' layers, which cast no inputs.
                module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    for parameter in frozen:
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(low)
    return model


def count_saved_bytes(
    model_config: YiVLConfig, config: TrainConfig, row: Row, num_rows: int, is_low: bool, device: str = "cuda"
) -> SavedBytes:
    """Of a micro-batch of rows alike, the logits' own excepted; with fused attention, on fake tensors of `device`.

    Args:
        is_low: see `meta_model`.
    """
    plain = _saved_bytes(model_config, replace(config, activation_checkpointing=False), row, num_rows, is_low, device)
    if not config.activation_checkpointing:
        return plain
    checkpointed = _saved_bytes(model_config, config, row, num_rows, is_low, device)
    return replace(checkpointed, largest_layer=plain.largest_layer)


def _saved_bytes(
    model_config: YiVLConfig, config: TrainConfig, row: Row, num_rows: int, is_low: bool, device: str
) -> SavedBytes:
    depths = (model_config.text_config.num_hidden_layers, num_blocks(model_config))
    runs_all = _layers_differ(model_config, config)
    run_depths = (depths[0] if runs_all else 3, 3)
    model = _shallow_model(model_config, config, *run_depths, is_low)
    language_model = model.model.language_model
    layers = (
        [*language_model.layers, language_model.norm]
        if _layers_differ(model_config, config)
        else language_model.layers[1:3]
    )
    stacks = (layers, _blocks(model)[1:3])
    with FakeTensorMode(allow_non_fake_inputs=True), _autocast(device, config.precision):
        model.to_empty(device=device)
        counter = _SavedCounter(model)
        starts: list[list[tuple[int, ...]]] = [[], []]
        for modules, start in zip(stacks, starts):
            for module in modules:
                module.register_forward_pre_hook(lambda *_, start=start: start.append(counter.counts()))
        with _FusedAttention(), counter, torch.autograd.graph.saved_tensors_hooks(counter.pack, _unpack):
            loss = _loss(model, row, num_rows, device)  # holds the graph, which holds what is saved
            counts = counter.counts()
        del loss
    largest_layer = 0
    for depth, run_depth, start in zip(depths, run_depths, starts):
        of_layers = [[end - begin for begin, end in zip(*pair)] for pair in pairwise(start)]
        if of_layers:
            counts = tuple(count + (depth - run_depth) * added for count, added in zip(counts, of_layers[0]))
            largest_layer = max(largest_layer, *(of_layer[0] for of_layer in of_layers))
    log_probabilities = 4 * num_rows * row.supervised * model_config.text_config.vocab_size
    activations, copies, forward_copies = counts
    return SavedBytes(activations - log_probabilities, copies, forward_copies, largest_layer)


def count_flops(model_config: YiVLConfig, config: TrainConfig, row: Row, num_rows: int = 1) -> int:
    """Floating-point operations for a micro-batch of rows alike, forward and backward, recomputation included.

    Attention is counted whole, its causal half not taken off (as Chowdhery et al. 2022, appendix B). What bitsandbytes
    does to make an int4 base's matrices again is not counted.
    """

    def count(num_layers: int, num_blocks: int) -> int:
        model = _shallow_model(model_config, config, num_layers, num_blocks).float()
        with FlopCounterMode(display=False) as counter:
            _loss(model, row, num_rows, "meta").backward()  # type: ignore[no-untyped-call]
        return counter.get_total_flops()

    num_layers = model_config.text_config.num_hidden_layers
    run_layers = num_layers if _layers_differ(model_config, config) else 2
    base = count(run_layers, 2)
    layers = (num_layers - run_layers) * (count(run_layers + 1, 2) - base) if num_layers != run_layers else 0
    return base + layers + (num_blocks(model_config) - 2) * (count(run_layers, 3) - base)


def _layers_differ(model_config: YiVLConfig, config: TrainConfig) -> bool:
    is_other = isinstance(model_config.text_config, (YiHybridConfig, YiGatedConfig))
    return is_other or isinstance(config.trainable.language, list)


def _loss(model: YiVLForConditionalGeneration, row: Row, num_rows: int, device: str) -> Tensor:
    """`Objective`'s, for rows that begin with their image or are texts. Its masks need values, which these tensors
    lack."""
    features = _image_features(model, row, num_rows, device)  # (B K, P, D)
    is_cross_attention = model.config.connector_config.is_cross_attention
    hidden = (_attending if is_cross_attention else _joined)(model, features, row, num_rows, device)  # (B, S, D)
    targets = torch.empty(num_rows * row.supervised, dtype=torch.long, device=device)
    logits = model.lm_head(hidden.flatten(0, 1).index_select(0, targets))  # (B K, V)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    if not row.has_image and features is not None and not is_cross_attention:
        losses = losses + (features * 0.0).sum()
    return losses.sum()


def _joined(
    model: YiVLForConditionalGeneration, features: Tensor | None, row: Row, num_rows: int, device: str
) -> Tensor:
    """Hidden states (B, S, D) of a language model that has image features among its embeddings."""
    num_text = row.tokens - row.num_inputs * model.config.num_image_tokens
    ids = torch.empty(num_rows, num_text, dtype=torch.long, device=device)
    language_model = model.model.language_model
    embeds = language_model.embed_tokens(ids)  # of a text (B, S, D), beside an image (B, S - K P, D)
    if row.has_image and features is not None:
        images = features.to(embeds.dtype).unflatten(0, (num_rows, row.num_inputs)).flatten(1, 2)  # (B, K P, D)
        embeds = torch.cat([images, embeds], dim=1)  # (B, S, D)
    return language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def _attending(
    model: YiVLForConditionalGeneration, features: Tensor | None, row: Row, num_rows: int, device: str
) -> Tensor:
    """The same of one that attends to image features, by the layers alone: it would look which tokens do."""
    ids = torch.empty(num_rows, row.tokens, dtype=torch.long, device=device)
    runs = None
    if features is not None:
        every = torch.empty(ids.numel(), dtype=torch.long, device=device)
        rows = torch.empty(num_rows, dtype=torch.long, device=device)
        unused = ImageRuns.unused(num_rows, torch.device(device))
        runs = ImageRuns(every, every, every, rows, rows) if row.has_image else unused
    return LlamaModel.forward(  # type: ignore[no-any-return]
        model.model.language_model, input_ids=ids, use_cache=False, image_features=features, image_runs=runs
    ).last_hidden_state


def _image_features(model: YiVLForConditionalGeneration, row: Row, num_rows: int, device: str) -> Tensor | None:
    """Of one image per row, and its tiles; for a micro-batch of texts, of a blank one if the tower or the projector is
    trained."""
    of_component = component_parameters(model)
    is_trained = any(parameter.requires_grad for name in ("vision", "projector") for parameter in of_component[name])
    num_images = num_rows * row.num_inputs if row.has_image else int(is_trained)
    if not num_images:
        return None
    size_px = model.config.vision_config.image_size
    return model.model.encode_images(torch.empty(num_images, 3, size_px, size_px, device=device))


def _shallow_model(
    model_config: YiVLConfig, config: TrainConfig, num_layers: int, num_run: int, is_low: bool = False
) -> YiVLForConditionalGeneration:
    """`meta_model` with `num_layers` layers and at most as many tower blocks that run."""
    shallow = copy.deepcopy(model_config)
    shallow.text_config.num_hidden_layers = num_layers
    shallow.vision_config.feature_layer = num_blocks(model_config) - 1 - model_config.vision_config.num_hidden_layers
    model = meta_model(shallow, config, is_low)
    model.model.language_model.set_attn_implementation(_UNMASKED)
    if has_experts(shallow.text_config):
        model.model.language_model.set_experts_implementation(_BALANCED)
    del _blocks(model)[num_run : num_blocks(model_config)]
    return model


def _blocks(model: YiVLForConditionalGeneration) -> nn.ModuleList:
    visual: Any = components(model)["vision"][0].visual
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class _Saved:
    tensor: Tensor


def _unpack(saved: _Saved) -> Tensor:
    return saved.tensor


class _SavedCounter(TorchDispatchMode):
    """The bytes that autograd saves besides the weights, each storage once; and copies of the weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._weights = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._copies: dict[int, tuple[Tensor, bool]] = {}
        self._saved: WeakSet[_Saved] = WeakSet()  # checkpointing drops what a frozen block has saved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and _storage(args[0]) in self._weights:
            is_cached = isinstance(args[0], nn.Parameter) and args[0].requires_grad  # autocast caches no views
            self._copies[_storage(result)] = result, is_cached
        return result

    def pack(self, tensor: Tensor) -> _Saved:
        """The pack hook of `saved_tensors_hooks`."""
        self._saved.add(saved := _Saved(tensor))
        return saved

    def counts(self) -> tuple[int, ...]:
        """Bytes of activations, of copies that are saved, and of cached copies that are not."""
        saved = {_storage(saved.tensor): saved.tensor for saved in self._saved}
        activations = [tensor for key, tensor in saved.items() if key not in self._weights and key not in self._copies]
        copies = [copy for key, (copy, _) in self._copies.items() if key in saved]
        others = [copy for key, (copy, is_cached) in self._copies.items() if is_cached and key not in saved]
        return _nbytes(activations), _nbytes(copies), _nbytes(others)


def _attend_unmasked(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
    """Attention of rows without padding for transformers, whose own reads the values of masks.

    A window takes as many keys as it has tokens, whichever they are.
    """
    window = getattr(module, "sliding_window", None)
    key, value = key[:, :, :window], value[:, :, :window]
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return attended.transpose(1, 2), None


def _run_balanced_experts(module: Any, hidden_states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Experts that get the same number of tokens each, for transformers, whose kernels read how many each gets.

    (T, D), (T, K), (T, K) -> (T, D), with the products and the copies of its grouped kernel.
    """
    (num_tokens, num_places), num_experts = ids.shape, module.num_experts
    num_rows = num_tokens * num_places
    order = F.pad(ids.flatten().sort().indices, (0, -num_rows % num_experts))
    rows = hidden_states[order // num_places].unflatten(0, (num_experts, -1))  # (E, rows, D)
    gate, up = torch.bmm(rows, module.gate_up_proj.transpose(1, 2)).chunk(2, dim=-1)
    outputs = torch.bmm(module.act_fn(gate) * up, module.down_proj.transpose(1, 2)).flatten(0, 1)[:num_rows]
    weighted = outputs * weights.flatten()[order[:num_rows]].unsqueeze(1)
    return weighted[order[:num_rows]].view(num_tokens, num_places, -1).sum(1).to(hidden_states.dtype)


class _FusedAttention(TorchFunctionMode):
    """Attention that saves no scores, as flash kernels do; torch selects none of them without the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        is_causal = bool((kwargs or {}).get("is_causal"))
        device = args[0].device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else args[0].dtype
        query_key_value = [tensor.to(dtype) for tensor in args[:3]]
        return torch.ops.aten._scaled_dot_product_flash_attention(*query_key_value, 0.0, is_causal)[0]


@contextmanager
def _autocast(device: str, precision: str) -> Iterator[None]:
    """torch.autocast, which disables itself without the device."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, precision in LOW_DTYPES)
    torch.set_autocast_dtype(device, LOW_DTYPES.get(precision, torch.bfloat16))
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


AttentionInterface.register(_UNMASKED, _attend_unmasked)
ExpertsInterface.register(_BALANCED, _run_balanced_experts)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)
