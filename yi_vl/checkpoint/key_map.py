"""The names of tensors in the native layout, the official release's and llava-hf's: a table for both directions.

The native layout keeps the queries, keys and values of a tower block in one tensor, as open_clip does; the others keep
three. In llava-hf's Yi-VL, `linear_2` and `linear_4` of the projector are LayerNorms. The first Yi releases called the
norms of the language model `ln1` and `ln2`. Source: the published indices of 01-ai/Yi-VL-6B, of 01-ai/Yi-6B's first
revision and of BUAADreamer/Yi-VL-6B-hf.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

TOWER, PROJECTOR, LANGUAGE, HEAD = (
    "model.vision_tower.visual.",
    "model.multi_modal_projector.",
    "model.language_model.",
    "lm_head.weight",
)
EMBEDDING = LANGUAGE + "embed_tokens.weight"
_BLOCK, _HF_BLOCK = "transformer.resblocks.", "encoder.layers."

_TOWER_KEYS = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.": "pre_layrnorm.",  # sic
    "ln_post.": "post_layernorm.",
}
_BLOCK_KEYS = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_FUSED, _PARTS = "attn.in_proj_", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
_OLD_NORMS = {".ln1.": ".input_layernorm.", ".ln2.": ".post_attention_layernorm."}
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # stored by older transformers; not learned


@dataclass(frozen=True)
class KeyMap:
    """Another layout's prefixes for the native TOWER, PROJECTOR, LANGUAGE and HEAD; None where it has no such part."""

    tower: str | None
    projector: dict[str, str] | None = None
    language: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class Slot:
    """A native tensor, or a third of it: 0 queries, 1 keys, 2 values."""

    name: str
    part: int | None = None


OFFICIAL = KeyMap(
    tower="model.vision_tower.vision_tower.vision_model.",
    projector={
        "linear_1.": "model.mm_projector.0.",
        "norm_1.": "model.mm_projector.1.",
        "linear_2.": "model.mm_projector.3.",  # 2 is the GELU
        "norm_2.": "model.mm_projector.4.",
    },
    language="model.",
    head="lm_head.weight",
)
OFFICIAL_VIT = KeyMap(tower="vision_model.")  # the folder vit/ of a release
LLAVA_HF = KeyMap(
    tower="vision_tower.vision_model.",
    projector={
        "linear_1.": "multi_modal_projector.linear_1.",
        "norm_1.": "multi_modal_projector.linear_2.",
        "linear_2.": "multi_modal_projector.linear_3.",
        "norm_2.": "multi_modal_projector.linear_4.",
    },
    language="language_model.model.",
    head="language_model.lm_head.weight",
)


def to_native(name: str, key_map: KeyMap) -> Slot | None:
    """The native tensor that `name` of another layout is, or is a third of; None for a buffer that is not needed.

    Raises:
        KeyError: the layout has no such name.
    """
    if name.endswith(_BUFFERS):
        return None
    if key_map.tower is not None and name.startswith(key_map.tower):
        return _tower_to_native(name, name.removeprefix(key_map.tower))
    for native, foreign in (key_map.projector or {}).items():
        if name.startswith(foreign):
            return Slot(PROJECTOR + native + name.removeprefix(foreign))
    if name == key_map.head:
        return Slot(HEAD)
    if key_map.language is not None and name.startswith(key_map.language):
        rest = name.removeprefix(key_map.language)
        for old, new in _OLD_NORMS.items():
            rest = rest.replace(old, new)
        if re.match(r"embed_tokens\.|layers\.\d+\.|norm\.", rest):
            return Slot(LANGUAGE + rest)
    raise KeyError(name)


def from_native(name: str, key_map: KeyMap) -> tuple[str, ...]:
    """The names of a native tensor in another layout: one; three for queries, keys and values; none if it has none.

    Raises:
        KeyError: there is no such native name, or the layout cannot hold it (a convolutional stem).
    """
    if name.startswith(TOWER):
        return () if key_map.tower is None else _tower_from_native(name, key_map.tower)
    if name.startswith(PROJECTOR):
        if key_map.projector is None:
            return ()
        module, _, parameter = name.removeprefix(PROJECTOR).partition(".")
        return (key_map.projector[f"{module}."] + parameter,)
    if name == HEAD:
        return () if key_map.head is None else (key_map.head,)
    if name.startswith(LANGUAGE):
        return () if key_map.language is None else (key_map.language + name.removeprefix(LANGUAGE),)
    raise KeyError(name)


def _tower_to_native(name: str, rest: str) -> Slot:
    if rest.startswith(_HF_BLOCK):
        number, _, within = rest.removeprefix(_HF_BLOCK).partition(".")
        block = f"{TOWER}{_BLOCK}{number}."
        for part, prefix in enumerate(_PARTS):
            if within.startswith(prefix):
                return Slot(block + _FUSED + within.removeprefix(prefix), part)
        return Slot(block + _renamed(name, within, _inverse(_BLOCK_KEYS)))
    return Slot(TOWER + _renamed(name, rest, _inverse(_TOWER_KEYS)))


def _tower_from_native(name: str, prefix: str) -> tuple[str, ...]:
    rest = name.removeprefix(TOWER)
    if rest.startswith(_BLOCK):
        number, _, within = rest.removeprefix(_BLOCK).partition(".")
        block = f"{prefix}{_HF_BLOCK}{number}."
        if within.startswith(_FUSED):
            return tuple(block + part + within.removeprefix(_FUSED) for part in _PARTS)
        return (block + _renamed(name, within, _BLOCK_KEYS),)
    return (prefix + _renamed(name, rest, _TOWER_KEYS),)


def _renamed(name: str, rest: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if rest == old or (old.endswith(".") and rest.startswith(old)):
            return new + rest.removeprefix(old)
    raise KeyError(name)


def _inverse(table: dict[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}
