"""The vision tower and projector as llama.cpp's mmproj file: clip.cpp's graph for LLaVA with Yi-VL's projector.

The class token: released builds of llama.cpp put it behind the patches, but add positions and select the output as if
it stood before them. So the file has the patches' positions in the bias of the patch embedding (a row for each patch),
the class token's in the class token, and zeros where clip.cpp adds positions: wherever the class token stands, the
tower computes the same. What the file cannot mend is the selection: these builds drop the first patch and append the
class token, so each feature is exact but comes one place early.
Measured on tests/official_tiny against the official features, mean cosine in such a build: 0.64 with the positions in
their usual place, 0.993 without a class token, 1.0000 (one place early) as it is written. In a mended build: 1.0000.
"""

from __future__ import annotations

import re
from functools import partial

import torch
from torch import Tensor

from ..config import IMAGE_MEAN, IMAGE_STD, OpenClipVisionConfig, YiVLConfig
from .gguf_tensors import Fields, GgufTensor, ggml_type_for
from .key_map import PROJECTOR, TOWER
from .read import Checkpoint, LazyTensor

CLASS_TOKEN_FAULT = (
    "warning: llama.cpp without its pull request 25844, which no release until October 2026 has, gives the language "
    "model image features one patch early, the first missing and the class token's as the last "
    "(github.com/ggml-org/llama.cpp/issues/25814)"
)

_BLOCK = re.compile(re.escape(TOWER) + r"transformer\.resblocks\.(\d+)\.(.+?)\.?(in_proj_)?(weight|bias)")
_BLOCK_NAMES = {
    "ln_1": "ln1",
    "ln_2": "ln2",
    "attn.out_proj": "attn_out",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
_PROJECTOR_NAMES = {"linear_1": "mm.0", "norm_1": "mm.1", "linear_2": "mm.3", "norm_2": "mm.4"}


def vision_unsupported(config: YiVLConfig) -> str | None:
    """Why clip.cpp cannot hold a tower and its connector; None if it can."""
    vision, connector = config.vision_config, config.connector_config
    if not connector.is_projector:
        return f"llama.cpp's clip has no place for a connector of type {connector.type}, which this model has"
    if vision.stem_widths:
        return "llama.cpp's clip has no place for a convolutional stem, which this model's tower has"
    if vision.timm_model:
        return f"llama.cpp's clip has no place for timm's {vision.timm_model}, which is this model's tower"
    if _num_blocks(vision) >= vision.num_hidden_layers:
        return "llama.cpp's clip never runs a tower's last block, whose output is this model's image feature"
    return None


def vision_fields(config: YiVLConfig) -> Fields:
    """The hyperparameters. clip.cpp runs all blocks but the last one."""
    vision = config.vision_config
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",  # with mm.3 in the file, the one with norms
        "clip.use_gelu": not vision.quick_gelu,
        "clip.vision.image_size": vision.image_size,
        "clip.vision.patch_size": vision.patch_size,
        "clip.vision.embedding_length": vision.hidden_size,
        "clip.vision.feed_forward_length": vision.intermediate_size,
        "clip.vision.block_count": _num_blocks(vision) + 1,
        "clip.vision.attention.head_count": vision.num_attention_heads,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
        "clip.vision.projection_dim": config.text_config.hidden_size,
        "clip.vision.image_mean": list(IMAGE_MEAN),
        "clip.vision.image_std": list(IMAGE_STD),
    }


def vision_tensors(source: Checkpoint, matrix_type: str) -> list[GgufTensor]:
    """The tensors of tower and projector; no final norm, which clip.cpp would apply."""
    tensors = _embeddings(source.tensors, matrix_type)
    for name, tensor in source.tensors.items():
        if name.startswith(PROJECTOR):
            module, _, parameter = name.removeprefix(PROJECTOR).partition(".")
            tensors.append(_whole(f"{_PROJECTOR_NAMES[module]}.{parameter}", tensor, matrix_type))
        elif (match := _BLOCK.fullmatch(name)) and int(match[1]) <= _num_blocks(source.config.vision_config):
            number, module, is_fused, parameter = match.groups()
            if not is_fused:
                tensors.append(_whole(f"v.blk.{number}.{_BLOCK_NAMES[module]}.{parameter}", tensor, matrix_type))
                continue
            shape = (tensor.shape[0] // 3, *tensor.shape[1:])
            for part, projection in enumerate(("attn_q", "attn_k", "attn_v")):
                new_name = f"v.blk.{number}.{projection}.{parameter}"
                read = partial(_third, tensor, part)
                tensors.append(GgufTensor(new_name, shape, ggml_type_for(shape, matrix_type), read))
    return tensors


def _num_blocks(vision: OpenClipVisionConfig) -> int:
    """How many blocks are run until the image feature."""
    return vision.feature_layer % vision.num_hidden_layers + 1


def _embeddings(tensors: dict[str, LazyTensor], matrix_type: str) -> list[GgufTensor]:
    """What is before the blocks. See above for where the positions are."""
    convolution, class_token, positions = (
        tensors[TOWER + name] for name in ("conv1.weight", "class_embedding", "positional_embedding")
    )
    num_rows, width = positions.shape
    # clip.cpp's convolution takes no bfloat16.
    ggml_type = "F16" if matrix_type == "F16" else "F32"
    return [
        GgufTensor("v.patch_embd.weight", tuple(convolution.shape), ggml_type, lambda: convolution[...]),
        GgufTensor("v.patch_embd.bias", (num_rows - 1, width), "F32", lambda: positions[...][1:]),
        GgufTensor("v.class_embd", (width,), "F32", lambda: class_token[...].float() + positions[...][0].float()),
        GgufTensor("v.position_embd.weight", (num_rows, width), "F32", lambda: torch.zeros(num_rows, width)),
        *(
            _whole(f"v.pre_ln.{parameter}", tensors[f"{TOWER}ln_pre.{parameter}"], matrix_type)
            for parameter in ("weight", "bias")
        ),
    ]


def _whole(name: str, tensor: LazyTensor, matrix_type: str) -> GgufTensor:
    shape = tuple(tensor.shape)
    return GgufTensor(name, shape, ggml_type_for(shape, matrix_type), lambda: tensor[...])


def _third(tensor: LazyTensor, part: int) -> Tensor:
    return tensor[...].chunk(3)[part]
