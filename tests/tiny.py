"""A tiny Yi-VL: random weights, made in memory, and the tokenizer of the test checkpoint in the official layout."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.cache_utils import Cache

from yi_vl.chat import from_llava
from yi_vl.config import OpenClipVisionConfig, YiVLConfig
from yi_vl.decoder.config import YiHybridConfig, layer_pattern
from yi_vl.engine.prompt import Prompt
from yi_vl.engine.running_batch import RunningBatch
from yi_vl.engine.sampling import Sampling
from yi_vl.image import YiVLImageProcessor
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.predict import YiVL
from yi_vl.processor import YiVLProcessor, prepare_tokenizer
from yi_vl.versions import CACHE_ARGUMENT

OFFICIAL = Path(__file__).parent / "official_tiny"
IMAGE_SIZE_PX, PATCH_SIZE_PX, NUM_PATCHES = 56, 14, 16
IMAGE_TOKEN_ID = 900  # the row after the tokenizer's 900 pieces


def tiny_config(stem_widths: list[int] | None = None, max_position_embeddings: int = 512) -> YiVLConfig:
    return YiVLConfig(
        vision_config=OpenClipVisionConfig(
            image_size=IMAGE_SIZE_PX,
            patch_size=PATCH_SIZE_PX if stem_widths is None else 28,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=2,
            stem_widths=stem_widths,
        ),
        text_config=LlamaConfig(
            vocab_size=960,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max_position_embeddings,
            pad_token_id=0,
        ),
        image_token_id=IMAGE_TOKEN_ID,
    )


def tiny_model(seed: int = 0, **config: object) -> YiVLForConditionalGeneration:
    """Random weights, spread wide enough that no two logits tie."""
    return spread_model(tiny_config(**config), seed)


def spread_model(config: YiVLConfig, seed: int) -> YiVLForConditionalGeneration:
    torch.set_num_threads(1)  # at this size more threads only wait for each other
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = YiVLForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(4)
    return model.eval()


def tiny_hybrid(window: int, seed: int = 0, max_position_embeddings: int = 512) -> YiVL:
    """With the hybrid decoder: layers of windows and full ones by turns, two of which share keys and values, and
    experts by top-p."""
    config = tiny_config()
    config.text_config = YiHybridConfig(
        vocab_size=960,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=0,
        layer_types=layer_pattern(6, 2),
        sliding_window=window,
        num_experts=4,
        router_top_p=0.5,
        max_experts_per_tok=3,
    )
    return YiVL(spread_model(config, seed), tiny_processor())


def tiny_processor(patch_size: int = PATCH_SIZE_PX) -> YiVLProcessor:
    tokenizer = prepare_tokenizer(str(OFFICIAL / "checkpoint"))
    return YiVLProcessor(YiVLImageProcessor(size_px=IMAGE_SIZE_PX), tokenizer, patch_size=patch_size)


def tiny_yi_vl(seed: int = 0, **config: object) -> YiVL:
    return YiVL(tiny_model(seed, **config), tiny_processor())


def uncached(yi_vl: YiVL) -> YiVL:
    """The same model with empty caches."""
    return YiVL(yi_vl.model, yi_vl.processor)


def grow_cache(**inputs: Any) -> int:
    """The number of rows of a forward pass, whose cache grows as if the layers had been computed."""
    new = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
    nothing = torch.zeros(new.shape[0], 1, new.shape[1], 1)
    cache: Cache = inputs[CACHE_ARGUMENT]
    for layer in range(2):
        cache.update(nothing, nothing, layer)
    return len(new)


def prefill(yi_vl: YiVL, prompts: Sequence[Prompt], max_tokens: int = 4096) -> RunningBatch:
    """Prompts in their slots, apart from whatever else the engine does; in chunks of so many tokens."""
    engine, batch = yi_vl.engine, None
    with torch.inference_mode():
        group = engine.core.new_prefill(
            [engine._new_request(prompt, Sampling(), lambda _: None, None, False) for prompt in prompts]
        )
        while batch is None:
            if group.missing_images:
                group.encode_images(group.missing_images)
            batch = group.step(max_tokens)
    return batch


def official_messages(turns: list[list[str | None]]) -> list[dict[str, Any]]:
    """The turns of a golden case as messages."""
    messages = []
    for question, answer in turns:
        messages += from_llava([{"from": "human", "value": question.replace("<image_placeholder>", "<image>")}])
        messages += [{"role": "assistant", "content": answer}] if answer else []
    return messages
