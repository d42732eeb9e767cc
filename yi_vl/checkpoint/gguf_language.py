"""The language model in llama.cpp's architecture `llama`: names, hyperparameters, the order of rotary dimensions."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from torch import Tensor

from .gguf_tensors import Fields, GgufTensor, ggml_type_for
from .key_map import EMBEDDING, HEAD, LANGUAGE
from .read import Checkpoint, LazyTensor

_NAMES = {EMBEDDING: "token_embd.weight", LANGUAGE + "norm.weight": "output_norm.weight", HEAD: "output.weight"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER = re.compile(re.escape(LANGUAGE) + r"layers\.(\d+)\.(.+)\.(weight|bias)")


def language_fields(text_config: Any) -> Fields:
    """The hyperparameters.

    Raises:
        ValueError: the language model is not one that llama.cpp's `llama` computes.
    """
    rope = text_config.rope_parameters
    rope_type = rope.get("rope_type", "default")
    if text_config.model_type != "llama" or text_config.hidden_act != "silu" or rope_type not in ("default", "linear"):
        raise ValueError(
            f"GGUF is written for Llamas with SiLU and plain or linear rotary positions; this is a "
            f"{text_config.model_type} with {text_config.hidden_act} and {rope_type}."
        )
    fields: Fields = {
        "llama.context_length": text_config.max_position_embeddings,
        "llama.embedding_length": text_config.hidden_size,
        "llama.block_count": text_config.num_hidden_layers,
        "llama.feed_forward_length": text_config.intermediate_size,
        "llama.attention.head_count": text_config.num_attention_heads,
        "llama.attention.head_count_kv": text_config.num_key_value_heads,
        "llama.attention.key_length": text_config.head_dim,
        "llama.attention.value_length": text_config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": float(text_config.rms_norm_eps),
        "llama.rope.dimension_count": text_config.head_dim,
        "llama.rope.freq_base": float(rope["rope_theta"]),
    }
    if rope_type == "linear":
        fields |= {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": float(rope["factor"])}
    return fields


def language_tensors(source: Checkpoint, matrix_type: str) -> list[GgufTensor]:
    """The tensors of the language model, without the embeddings of `<image_placeholder>` and what follows it.

    llama.cpp puts image features where the image is; rows that it does not have, it cannot sample.
    """
    text_config = source.config.text_config
    heads = {"attn_q": text_config.num_attention_heads, "attn_k": text_config.num_key_value_heads}
    tensors = []
    for name, tensor in source.tensors.items():
        if name in _NAMES:
            new_name, num_heads = _NAMES[name], None
        elif match := _LAYER.fullmatch(name):
            module = _LAYER_NAMES[match[2]]
            new_name, num_heads = f"blk.{match[1]}.{module}.{match[3]}", heads.get(module)
        else:
            continue
        shape = tuple(tensor.shape)
        if name in (EMBEDDING, HEAD):
            shape = (source.config.image_token_id, *shape[1:])
        read = partial(_read, tensor, shape[0], num_heads)
        tensors.append(GgufTensor(new_name, shape, ggml_type_for(shape, matrix_type), read))
    return tensors


def _read(tensor: LazyTensor, num_rows: int, num_heads: int | None) -> Tensor:
    values = tensor[...][:num_rows]
    return values if num_heads is None else interleave_rotary(values, num_heads)


def interleave_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """Rows of a projection to queries or keys, each head's two rotary halves interleaved: (heads * head_dim, ...).

    transformers rotates dimension i with i + head_dim / 2, llama.cpp 2 i with 2 i + 1.
    """
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.transpose(1, 2).reshape(weight.shape)
