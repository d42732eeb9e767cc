"""A toy Yi-VL with gated cross-attention, its language model without, and inputs for both."""

from __future__ import annotations

from typing import Any

import torch
from tiny import IMAGE_TOKEN_ID, spread_model, tiny_config, tiny_processor
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

from yi_vl.config import YiVLConfig
from yi_vl.connector.config import CROSS_ATTENTION, ConnectorConfig
from yi_vl.decoder.cross_attention import GatedCrossAttention
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

RESAMPLED: dict[str, Any] = {"num_tokens": 5, "num_layers": 1, "num_heads": 4}
NUM_LAYERS = 4


def gated_config(every: int = 2, **connector: Any) -> YiVLConfig:
    config = tiny_config()
    config.text_config.num_hidden_layers = NUM_LAYERS
    config.set_connector_(ConnectorConfig(type=CROSS_ATTENTION, every=every, **connector))
    return config


def blocks(model: torch.nn.Module) -> list[GatedCrossAttention]:
    return [module for module in model.modules() if isinstance(module, GatedCrossAttention)]


def gated_model(is_open: bool = True, **connector: Any) -> YiVLForConditionalGeneration:
    """Random weights; `is_open`: the gates as if it had been trained."""
    model = spread_model(gated_config(**connector), seed=0)
    for index, block in enumerate(blocks(model) if is_open else ()):
        torch.nn.init.constant_(block.attention_gate, 0.6 + 0.1 * index)
        torch.nn.init.constant_(block.mlp_gate, -0.4)
    return model


def gated_processor(model: YiVLForConditionalGeneration) -> YiVLProcessor:
    processor = tiny_processor()
    processor.num_image_tokens = model.config.connector_config.num_prompt_tokens
    return processor


def llama_of(model: YiVLForConditionalGeneration) -> LlamaForCausalLM:
    """The same language model as transformers' own class, without the blocks."""
    text = model.config.text_config
    values = {name: getattr(text, name) for name in LlamaConfig().to_dict() if hasattr(text, name)}
    del values["model_type"]
    llama = LlamaForCausalLM(LlamaConfig(**values)).eval()
    weights = {name.removeprefix("language_model."): w for name, w in model.model.language_model.state_dict().items()}
    llama.model.load_state_dict({name: weight for name, weight in weights.items() if "cross_block" not in name})
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    return llama


def tokens(num_rows: int, length: int, images: dict[int, list[int]]) -> Tensor:
    """Random ids, and markers at these columns of these rows."""
    ids = torch.randint(5, 800, (num_rows, length), generator=torch.Generator().manual_seed(1))
    for row, columns in images.items():
        ids[row, columns] = IMAGE_TOKEN_ID
    return ids


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(2))


ROWS = {0: [3], 1: [0, 7], 3: [5]}  # row 2 has no image
