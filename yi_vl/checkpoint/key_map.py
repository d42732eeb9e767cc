"""What every tensor is called in our layout, the official release's and llava-hf's: tables, read in both directions.

Ours keeps queries, keys and values of a tower's block in one tensor, as open_clip does; the others keep three. In the
llava-hf form of Yi-VL `linear_2` and `linear_4` of the projector are LayerNorms. The first Yi releases called the layer
norms of the language model `ln1` and `ln2`. Source: the published indices of 01-ai/Yi-VL-6B, of 01-ai/Yi-6B's first
revision and of BUAADreamer/Yi-VL-6B-hf.

Pure: called by source.py and target.py; calls nothing.
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
_BLOCK, _THEIR_BLOCK = "transformer.resblocks.", "encoder.layers."

_OF_TOWER = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.": "pre_layrnorm.",  # sic
    "ln_post.": "post_layernorm.",
}
_OF_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_FUSED, _PARTS = "attn.in_proj_", ("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")
_OLD_NORMS = {".ln1.": ".input_layernorm.", ".ln2.": ".post_attention_layernorm."}
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")  # older transformers stored them; they hold nothing that was learned


@dataclass(frozen=True)
class Layout:
    """Where another layout keeps what ours calls TOWER, PROJECTOR, LANGUAGE and HEAD. None: not at all."""

    tower: str | None
    projector: dict[str, str] | None = None
    language: str | None = None
    head: str | None = None


@dataclass(frozen=True)
class Slot:
    """A tensor of ours, or a third of it: 0 queries, 1 keys, 2 values."""

    name: str
    part: int | None = None


OFFICIAL = Layout(
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
OFFICIAL_VIT = Layout(tower="vision_model.")  # the folder vit/ of a release
LLAVA_HF = Layout(
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


def to_ours(name: str, layout: Layout) -> Slot | None:
    """The tensor of ours that `name` of another layout is, or is a third of; None for a buffer that nobody needs.

    Raises:
        KeyError: the layout has no such name.
    """
    if name.endswith(_BUFFERS):
        return None
    if layout.tower is not None and name.startswith(layout.tower):
        return _tower_to_ours(name, name.removeprefix(layout.tower))
    for ours, theirs in (layout.projector or {}).items():
        if name.startswith(theirs):
            return Slot(PROJECTOR + ours + name.removeprefix(theirs))
    if name == layout.head:
        return Slot(HEAD)
    if layout.language is not None and name.startswith(layout.language):
        rest = name.removeprefix(layout.language)
        for old, new in _OLD_NORMS.items():
            rest = rest.replace(old, new)
        if re.match(r"embed_tokens\.|layers\.\d+\.|norm\.", rest):
            return Slot(LANGUAGE + rest)
    raise KeyError(name)


def from_ours(name: str, layout: Layout) -> tuple[str, ...]:
    """What another layout calls a tensor of ours: one name, three for queries, keys and values, none if it has none.

    Raises:
        KeyError: ours has no such name, or the layout cannot hold it (a convolutional stem).
    """
    if name.startswith(TOWER):
        return () if layout.tower is None else _tower_from_ours(name, layout.tower)
    if name.startswith(PROJECTOR):
        if layout.projector is None:
            return ()
        module, _, kind = name.removeprefix(PROJECTOR).partition(".")
        return (layout.projector[f"{module}."] + kind,)
    if name == HEAD:
        return () if layout.head is None else (layout.head,)
    if name.startswith(LANGUAGE):
        return () if layout.language is None else (layout.language + name.removeprefix(LANGUAGE),)
    raise KeyError(name)


def _tower_to_ours(name: str, rest: str) -> Slot:
    if rest.startswith(_THEIR_BLOCK):
        number, _, within = rest.removeprefix(_THEIR_BLOCK).partition(".")
        block = f"{TOWER}{_BLOCK}{number}."
        for part, theirs in enumerate(_PARTS):
            if within.startswith(theirs):
                return Slot(block + _FUSED + within.removeprefix(theirs), part)
        return Slot(block + _renamed(name, within, {theirs: ours for ours, theirs in _OF_BLOCK.items()}))
    return Slot(TOWER + _renamed(name, rest, {theirs: ours for ours, theirs in _OF_TOWER.items()}))


def _tower_from_ours(name: str, prefix: str) -> tuple[str, ...]:
    rest = name.removeprefix(TOWER)
    if rest.startswith(_BLOCK):
        number, _, within = rest.removeprefix(_BLOCK).partition(".")
        block = f"{prefix}{_THEIR_BLOCK}{number}."
        if within.startswith(_FUSED):
            return tuple(block + part + within.removeprefix(_FUSED) for part in _PARTS)
        return (block + _renamed(name, within, _OF_BLOCK),)
    return (prefix + _renamed(name, rest, _OF_TOWER),)


def _renamed(name: str, rest: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if rest == old or (old.endswith(".") and rest.startswith(old)):
            return new + rest.removeprefix(old)
    raise KeyError(name)
