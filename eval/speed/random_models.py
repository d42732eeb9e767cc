"""Yi-VLs of random weights, for what does not depend on their values: time and memory."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import GenerationConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import yi_vl
from yi_vl import YiVLConfig, YiVLForConditionalGeneration, YiVLProcessor
from yi_vl.config import OpenClipVisionConfig, preset, yi_config
from yi_vl.image import YiVLImageProcessor
from yi_vl.linear import tune_linears_
from yi_vl.predict import YiVL
from yi_vl.processor import prepare_tokenizer

Preset = Literal["nano", "1b", "6b"]
_TOKENIZER = Path("tests/official_tiny/checkpoint")
_WORD = re.compile("▁[a-z]{2,}")
_NUM_VALUES = (1 << 20) - 3  # no multiple of a row's length, so that rows differ


def make(name: Preset, dtype: torch.dtype = torch.bfloat16, device: str | None = None) -> YiVL:
    """A Yi-VL of a preset's size; "nano" is the bundled one, the others answer nonsense.

    "1b" has the real recipe's image side (448 px, 1024 tokens) with a tower and a language model scaled down.

    Raises:
        ValueError: there is no tokenizer to borrow, because this is not run from a checkout.
    """
    if name == "nano":
        return yi_vl.load(device=device, dtype=dtype)
    if not _TOKENIZER.exists():
        raise ValueError(f"{_TOKENIZER} is not here; run this from a checkout of the project.")
    config = preset("6b") if name == "6b" else _one_billion()
    tokenizer = prepare_tokenizer(str(_TOKENIZER))
    config.image_token_id = tokenizer.convert_tokens_to_ids("<image_placeholder>")
    with torch.device("meta"):
        model = YiVLForConditionalGeneration(config)
    model.to(dtype)  # type: ignore[arg-type]  # wrapped by transformers as if it were no method
    model.to_empty(device=device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    fill_(model)
    with torch.no_grad():
        word_ids = [token_id for piece, token_id in tokenizer.get_vocab().items() if _WORD.fullmatch(piece)]
        is_word = torch.zeros(len(model.lm_head.weight), 1, dtype=dtype).index_fill_(0, torch.tensor(word_ids), 1)
        model.lm_head.weight.mul_(is_word.to(model.device))  # an answer's text encodes to its own tokens
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    processor = YiVLProcessor(
        YiVLImageProcessor(config.vision_config.image_size), tokenizer, config.vision_config.patch_size
    )
    tune_linears_(model)
    return YiVL(model, processor)


@torch.no_grad()
def fill_(module: nn.Module) -> None:
    """Random weights, norms of one, and rotary embeddings as they are computed, for a module of no values yet."""
    generator = torch.Generator(next(module.parameters()).device).manual_seed(0)
    for parameter in module.parameters():
        _repeat(parameter, generator) if parameter.ndim > 1 else parameter.fill_(1.0)
    for rotary in module.modules():
        if isinstance(rotary, LlamaRotaryEmbedding):
            rotary.inv_freq.copy_(LlamaRotaryEmbedding(rotary.config).inv_freq)


def language_config(name: Preset) -> LlamaConfig:
    """The configuration of a preset's language model."""
    return _one_billion().text_config if name == "1b" else preset(name).text_config


def _repeat(parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Fill with the same few random numbers over and over: drawing billions takes minutes."""
    values = torch.empty(_NUM_VALUES, dtype=parameter.dtype, device=parameter.device)
    values.normal_(std=0.02, generator=generator)
    for part in parameter.view(-1).split(_NUM_VALUES):
        part.copy_(values[: len(part)])


def _one_billion() -> YiVLConfig:
    vision = OpenClipVisionConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8)
    return YiVLConfig(vision_config=vision, text_config=yi_config(2048, 5632, 22, 16, 4))
