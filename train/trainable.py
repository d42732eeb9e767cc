"""The parameters of the language model that `trainable.language` selects when it is a list.

An entry is a layer, counted from 0, a range of layers with both ends (`4-7`; `28-` to the last layer), or a shell
pattern of parameter names, either as the language model alone has them (`model.layers.0.mlp.up_proj.weight`) or as a
Yi-VL is saved here (`model.language_model.layers.0.mlp.up_proj.weight`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from yi_vl.arguments import shown
from yi_vl.checkpoint.key_map import HEAD, LANGUAGE, OFFICIAL, from_native

from .config import LORA

_KEY = "trainable.language"
_LAYERS = re.compile(r"([0-9]{1,6})(?:\s*(-)\s*([0-9]{1,6})?)?")  # N, N-M, N-
_LAYER_NAME = re.compile(re.escape(LANGUAGE) + r"layers\.([0-9]+)\.(.+)")
_EXPERTS = ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
_ENTRIES = "layers (3, 4-7, 28-) and patterns of parameter names (lm_head.*)"


def parse_language(value: Any) -> bool | str | list[str]:
    """`trainable.language` as it is typed in YAML: true, false, lora, or its entries; a single one may lack the list.

    Raises:
        ValueError: it is none of these; whether the model has such layers and names is seen by `select`.
    """
    if isinstance(value, bool) or value == LORA:
        return value  # type: ignore[no-any-return]
    if not isinstance(value, list):
        if _is_entry(value):
            return [str(value).strip()]
        raise ValueError(
            f"{_KEY} is {shown(value)}; expected true, false or {LORA}, or a list of {_ENTRIES}.{_hint(value)}"
        )
    if not value:
        raise ValueError(f"{_KEY} is an empty list; set it to false, or list {_ENTRIES}.")
    for entry in value:
        if not _is_entry(entry):
            raise ValueError(f"{_KEY} lists {shown(entry)}; expected {_ENTRIES}.{_hint(entry)}")
    return [str(entry).strip() for entry in value]


def _is_entry(entry: Any) -> bool:
    if isinstance(entry, int) and not isinstance(entry, bool):
        return 0 <= entry < 10**6
    if not isinstance(entry, str):
        return False
    match = _LAYERS.fullmatch(entry.strip())
    if match is not None:
        return match[3] is None or int(match[1]) <= int(match[3])
    return not re.search(r"[\s,:]", entry.strip()) and re.search(r"[.*?[]", entry) is not None


def _hint(entry: Any) -> str:
    """What to write instead of a frequent mistake."""
    if entry == LORA:
        return f" {LORA} stands alone, not in a list: it adapts all layers."
    if isinstance(entry, bool):
        return " true and false stand alone, not in a list."
    if isinstance(entry, dict) or (isinstance(entry, str) and ":" in entry):
        return " A range of layers is written 4-7, with both ends."
    if isinstance(entry, str) and "," in entry:
        return " Several are a YAML list: [3, 4-7]."
    text = entry.strip() if isinstance(entry, str) else str(entry) if isinstance(entry, int) else ""
    if re.match(r"-\s*[0-9]", text):
        return " Layers are counted from 0."
    if _LAYERS.fullmatch(text):
        return " A range of layers begins with the lower one."
    return ""


def language_names(
    num_layers: int,
    attention_bias: bool = False,
    mlp_bias: bool = False,
    kv_sources: Sequence[int] = (),
    has_experts: bool = False,
) -> list[str]:
    """The names of all parameters of a Llama or a hybrid decoder and its head, in the native layout.

    Args:
        kv_sources: for each layer the one whose keys and values it attends to; empty: its own.
    """
    names = [f"{LANGUAGE}embed_tokens.weight"]
    for number in range(num_layers):
        has_keys = not kv_sources or kv_sources[number] == number
        layer = ["input_layernorm.weight", "post_attention_layernorm.weight"]
        layer += _linears("self_attn", "qkvo" if has_keys else "qo", attention_bias)
        layer += _EXPERTS if has_experts else _linears("mlp", ("gate", "up", "down"), mlp_bias)
        names += [f"{LANGUAGE}layers.{number}.{name}" for name in layer]
    return [*names, f"{LANGUAGE}norm.weight", HEAD]


def _linears(module: str, matrices: Sequence[str], has_bias: bool) -> list[str]:
    ends = ["weight", "bias"] if has_bias else ["weight"]
    return [f"{module}.{matrix}_proj.{end}" for matrix in matrices for end in ends]


def select(entries: Sequence[str], names: Collection[str]) -> set[str]:
    """The names that the entries select.

    Args:
        names: of the language model's parameters, in the native layout; others are never selected.

    Raises:
        ValueError: an entry selects nothing, or names a layer beyond the last.
    """
    layer_of = {name: int(match[1]) for name in names if (match := _LAYER_NAME.fullmatch(name))}
    num_layers = 1 + max(layer_of.values(), default=-1)
    aliases = {name: from_native(name, OFFICIAL)[0] for name in names if name.startswith((LANGUAGE, HEAD))}
    selected: set[str] = set()
    for entry in entries:
        if match := _LAYERS.fullmatch(entry):
            layers = _layers(match, num_layers)
            matching = {name for name, layer in layer_of.items() if layer in layers}
        else:
            matching = {
                name for name, alias in aliases.items() if fnmatchcase(name, entry) or fnmatchcase(alias, entry)
            }
        if not matching:
            raise ValueError(
                f"{_KEY}: no parameter of the language model matches {entry!r:.200}; there are "
                f"{', '.join(_summary(aliases.values(), num_layers))}."
            )
        selected |= matching
    return selected


def _layers(match: re.Match[str], num_layers: int) -> range:
    first = int(match[1])
    last = first if match[2] is None else num_layers - 1 if match[3] is None else int(match[3])
    if max(first, last) >= num_layers:
        raise ValueError(
            f"{_KEY}: there is no layer {max(first, last)}; the layers are 0 to {num_layers - 1}. A range is written "
            "4-7 (YAML reads 4:8 as the number 248)."
        )
    return range(first, last + 1)


def _summary(names: Collection[str], num_layers: int) -> Iterator[str]:
    """The names of the first layer stand for those of all."""
    for name in names:
        if ".layers.0." in name:
            yield name.replace(".layers.0.", f".layers.[0 to {num_layers - 1}].")
        elif ".layers." not in name:
            yield name
