"""The tables of `yi-vl info`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import ranges
from .chat import CHATML, YI_VL, ChatFormat

if TYPE_CHECKING:
    from rich.table import Table

    from .checkpoint.summary import QuantizedSizes
    from .config import YiVLConfig


_CHAT_MARKS: dict[ChatFormat, str] = {YI_VL: "### Human: ...", CHATML: "<|im_start|>user ... <|im_end|>"}


def config_table(name: str, config: YiVLConfig, folder: Path | None) -> Table:
    """The architecture: vision tower, language model, context, chat format, quantization, adapters."""
    from .checkpoint import base_of, holds_adapters
    from .checkpoint.load import read_chat_format, read_max_tiles
    from .checkpoint.summary import scheme_of

    vision, text = config.vision_config, config.text_config
    table = _table(name, "", "")
    stem = f", convolutional stem {vision.stem_widths}" if vision.stem_widths else ""
    stem += f", timm's {vision.timm_model}" if vision.timm_model else ""
    table.add_row(
        "vision tower",
        f"{vision.num_hidden_layers} blocks, width {vision.hidden_size}, {vision.num_attention_heads} heads{stem}; "
        f"{vision.image_size} px in patches of {vision.patch_size} px",
    )
    connector = config.connector_config
    if connector.is_cross_attention:
        table.add_row("connector", cross_attention_text(config))
        features = f"{config.num_image_features} per image, of {vision.num_patches} patches"
        table.add_row("image features", f"{features}; one token in the prompt")
        table.add_row("KV cache", _kv_cache_text(config))
    elif connector.is_projector:
        table.add_row("image tokens", f"{vision.num_patches} per image ({vision.grid_size} x {vision.grid_size})")
    else:
        table.add_row("connector", f"{connector.type}, {connector.num_layers} layers")
        table.add_row("image tokens", f"{config.num_image_tokens} per image, of {vision.num_patches} patches")
    if folder is not None and (max_tiles := read_max_tiles(str(folder))):
        most = (1 + max_tiles) * config.num_image_tokens
        table.add_row("image tiles", f"up to {max_tiles} of a large image, beside it whole: {most:,} tokens at most")
    table.add_row(
        "language model",
        f"{text.num_hidden_layers} layers, width {text.hidden_size}, feed-forward {text.intermediate_size}, "
        f"{text.num_attention_heads} heads, {text.num_key_value_heads} for keys and values",
    )
    table.add_row("context", f"{text.max_position_embeddings:,} tokens, images and answer included")
    table.add_row("vocabulary", f"{text.vocab_size:,} rows; {config.image_token_id} is the image token")
    if folder is not None:  # a preset has none of its own
        chat_format = read_chat_format(str(folder))
        table.add_row("chat format", f"{chat_format} ({_CHAT_MARKS[chat_format]})")
    if scheme := scheme_of(config):
        dtype = str(config.dtype).removeprefix("torch.")
        table.add_row("quantised", f"{scheme}, in the language model's linear layers; all else is {dtype}")
    if folder is not None and holds_adapters(folder):
        table.add_row("adapters", f"of {base_of(folder)}; merged into it when loaded, which changes none of the sizes")
    return table


def cross_attention_text(config: YiVLConfig) -> str:
    """The blocks before the language model's layers, and what they attend to."""
    import torch

    from .decoder.cross_attention import GatedCrossAttention

    connector, layers = config.connector_config, config.text_config.cross_layers
    features = f"a resampler of {connector.num_layers} layers" if connector.has_resampler else "a projector"
    with torch.device("meta"):
        block = sum(parameter.numel() for parameter in GatedCrossAttention(config.text_config).parameters())
    return (
        f"cross_attention: gated blocks before layers {', '.join(ranges(layers))} (from 0), of "
        f"{len(layers) * block:,} parameters; they attend to the features of {features}"
    )


def _kv_cache_text(config: YiVLConfig) -> str:
    """What a conversation takes: its tokens, and the image that comes last."""
    text = config.text_config
    num_heads = text.num_key_value_heads or text.num_attention_heads
    token_bytes = text.num_hidden_layers * 2 * num_heads * text.head_dim * 2  # keys and values, in bf16
    image_bytes = text.image_key_bytes(config.num_image_features)
    return f"{token_bytes:,} bytes per token (bf16), and {image_bytes:,} for the last image of a conversation"


def size_tables(config: YiVLConfig, folder: Path | None) -> Iterator[Table]:
    """Parameters and tensors, in our layout and the official one; then memory."""
    from .checkpoint.summary import measure, measure_quantized, scheme_of

    if scheme_of(config):
        yield _quantized_table(measure_quantized(config, folder))
        return
    sizes = measure(config)
    table = _table("parameters", "", "here", "official layout")
    for name, count in sizes.num_parameters.items():
        official = sizes.num_official_parameters and sizes.num_official_parameters[name]
        table.add_row(name, f"{count:,}", f"{official:,}" if official else "-")
    table.add_row("tensors", f"{sizes.num_tensors:,}", f"{sizes.num_official_tensors or '-'}")
    yield table
    table = _table("memory of the weights", "", "MB")
    for name, num_bytes in sizes.memory_bytes.items():
        table.add_row(name, f"{num_bytes / 1e6:,.0f}")
    yield table


def _quantized_table(sizes: QuantizedSizes) -> Table:
    table = _table("weights", "", "parameters", "MB in memory")
    for name, count in sizes.num_parameters.items():
        table.add_row(name, f"{count:,}", f"{sizes.memory_bytes[name] / 1e6:,.1f}")
    total, total_bytes = sum(sizes.num_parameters.values()), sum(sizes.memory_bytes.values())
    table.add_row("together", f"{total:,}", f"{total_bytes / 1e6:,.1f}")
    table.add_row("tensors", f"{sizes.num_tensors:,}", "")
    return table


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index and len(columns) > 1 and any(columns) else "left")
    return table
