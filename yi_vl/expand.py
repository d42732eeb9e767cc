"""What `yi-vl expand` does: write a checkpoint that has copies of some of its language model's layers, to train on."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .arguments import ranges
from .checkpoint import Checkpoint, holds_adapters, open_checkpoint
from .checkpoint.find import find
from .checkpoint.key_map import LANGUAGE
from .checkpoint.load import fetch
from .conversion import write

_LAYER_NAME = re.compile(re.escape(LANGUAGE) + r"layers\.(\d+)\.(.+)")
_AFTERWARDS = {  # what makes such a language model
    "yi_hybrid": "upcycle the result",
    "yi_gated": "give the result its connector (init_from.connector)",
}
_ADDS_TO_RESIDUAL = ("self_attn.o_proj.", "mlp.down_proj.")  # what a layer adds to the residual stream comes from these


@dataclass(frozen=True)
class Layer:
    """A layer of the expanded model: which of the source's it is; a copy, if it is new."""

    source: int
    is_new: bool = False


def layers_after_every(num_layers: int, interval: int) -> list[Layer]:
    """A copy of every `interval`-th layer behind it (LLaMA Pro, arXiv 2401.02415).

    Raises:
        ValueError: the model has fewer layers than `interval`.
    """
    if not 1 <= interval <= num_layers:
        raise ValueError(f"--after-every is {interval}; expected 1 to {num_layers}, the number of layers.")
    layers: list[Layer] = []
    for number in range(num_layers):
        layers.append(Layer(number))
        if (number + 1) % interval == 0:
            layers.append(Layer(number, is_new=True))
    return layers


def layers_doubled(num_layers: int, first: int, end: int) -> list[Layer]:
    """A copy of layers `first` to `end - 1` behind them, as one block.

    Raises:
        ValueError: the model has no such layers.
    """
    if not 0 <= first < end <= num_layers:
        raise ValueError(
            f"--double is {first}:{end}; expected A:B for layers A to B - 1, with A below B and B at most "
            f"{num_layers}, the number of layers."
        )
    old = [Layer(number) for number in range(num_layers)]
    return [*old[:end], *(Layer(number, is_new=True) for number in range(first, end)), *old[end:]]


def expand(source: Checkpoint, layers: Sequence[Layer], keeps_function: bool) -> Checkpoint:
    """The checkpoint with these layers instead of its own; no tensor is read yet.

    Args:
        keeps_function: new layers begin with zeros where they add to the residual stream, and so change nothing.

    Raises:
        ValueError: the checkpoint is quantized, or its language model is no Llama.
    """
    if getattr(source.config, "quantization_config", None) is not None:
        raise ValueError(f"{source.folder} is quantised, and its copies could not be trained. Give the original.")
    if (model_type := source.config.text_config.model_type) != "llama":
        raise ValueError(
            f"{source.folder} has a language model of the type {model_type}, whose layers differ. Expand the dense "
            f"model that it was made from, and {_AFTERWARDS[model_type]}."
        )
    positions: dict[int, list[int]] = {}
    for position, layer in enumerate(layers):
        positions.setdefault(layer.source, []).append(position)
    tensors = {}
    for name, tensor in source.tensors.items():
        match = _LAYER_NAME.fullmatch(name)
        if match is None:
            tensors[name] = tensor
            continue
        for position in positions[int(match[1])]:
            is_zero = keeps_function and layers[position].is_new and match[2].startswith(_ADDS_TO_RESIDUAL)
            layer_tensor = replace(tensor, change=torch.zeros_like) if is_zero else tensor
            tensors[f"{LANGUAGE}layers.{position}.{match[2]}"] = layer_tensor
    config = copy.deepcopy(source.config)
    config.text_config.num_hidden_layers = len(layers)
    return replace(source, config=config, tensors=tensors)


def run_expansion(source: str, target: Path, after_every: int | None, doubled: tuple[int, int] | None) -> None:
    """Expand `source` into the new folder `target`, in the native layout; print which layers are new.

    Args:
        after_every, doubled: exactly one of them; see `layers_after_every` and `layers_doubled`.

    Raises:
        ValueError: the source holds adapters, is quantized or damaged, or has no such layers; or as `convert`.
    """
    folder = fetch(find(source), with_weights=True)
    if holds_adapters(folder):
        raise ValueError(
            f"{folder} holds adapters; merge them first (yi-vl convert {source} MERGED) and expand the merged model."
        )
    checkpoint = open_checkpoint(folder)
    num_layers = checkpoint.config.text_config.num_hidden_layers
    if doubled is not None:
        layers = layers_doubled(num_layers, *doubled)
        effect = "They are copies, so it computes something else than before: train it before use"
    else:
        assert after_every is not None
        layers = layers_after_every(num_layers, after_every)
        effect = "They add nothing yet, so it computes what it did before"
    write(expand(checkpoint, layers, keeps_function=doubled is None), target, "yi-vl", "f16")
    new = ranges([position for position, layer in enumerate(layers) if layer.is_new])
    print(f"{target} is written: {len(layers)} layers instead of {num_layers}, of which {', '.join(new)} are new.")
    print(f"{effect}. To train them alone, put into the training config:")
    print(f"trainable: {{vision: false, projector: false, language: [{', '.join(new)}]}}")
