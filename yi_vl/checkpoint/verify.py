"""Whether a converted checkpoint holds and computes what its source does: `yi-vl convert --verify`."""

from __future__ import annotations

from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .configuration import read_configuration
from .gguf import GgufType, plan_gguf
from .gguf_tensors import GgufTensor
from .key_map import EMBEDDING, HEAD
from .load import load_model
from .read import Checkpoint, TowerFrom, open_checkpoint
from .weight_files import shortened

if TYPE_CHECKING:
    from gguf import ReaderTensor

_QUESTION = "What is in this image? 这张图片里有什么？"
# How far logits may be from the source's, relative to their spread. Measured with int8: 2.3% on nano, 4.6% on random
# weights; with int4: 14% and 37%. Unrelated weights give about 140%.
_LIMITS = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 0.03, "int8": 0.2, "int4": 0.6}
# The largest error of rounding, relative to the value, or for Q8_0 to the largest of its block of 32.
_TYPE_LIMITS = {"F32": 2.0**-23, "F16": 2.0**-11, "BF16": 2.0**-8, "Q8_0": 0.57 / 127}


# Below these values float16 has fewer digits; a block's scale is a float16.
_SMALLEST = {"F16": 2.0**-14, "Q8_0": 127 * 2.0**-14}
_BLOCK_ELEMENTS = 1 << 22


class _Computed(NamedTuple):
    """What a model computes on the fixed prompt."""

    input_ids: list[int]
    logits: Tensor  # (S, V) float32
    dtype: torch.dtype
    num_tokens: int  # without the added ones


def verify_layout(source: Checkpoint, path: str, target: Path, tower_from: TowerFrom) -> str:
    """Compare every tensor of a conversion with its source's, and what both compute on a fixed prompt and image.

    Args:
        path: of the source, as `load_model` takes it.

    Returns:
        The figures.

    Raises:
        ValueError: they differ.
    """
    converted = open_checkpoint(target)
    if unpaired := sorted(source.tensors.keys() ^ converted.tensors.keys()):
        raise ValueError(f"{target} differs from its source: only one of them has {shortened(unpaired, 5)}.")
    num_rows, rounded_to = source.config.image_token_id, []
    for name, tensor in source.tensors.items():
        original, written = tensor[...], converted.tensors[name][...]
        if written.dtype != original.dtype:
            rounded_to.append(_name(written.dtype))
        if name in (EMBEDDING, HEAD):
            original, written = original[:num_rows], written[:num_rows]  # those behind are of added tokens
        if not torch.equal(_bytes(original.to(written.dtype)), _bytes(written)):
            raise ValueError(f"{target} differs from its source: {name} has other values.")
    num_same = len(source.tensors) - len(rounded_to)
    rounded = f", {len(rounded_to)} rounded to {rounded_to[0]}" if rounded_to else ""
    figures = verify_logits(path, target, tower_from, set(rounded_to))
    return f"{num_same} tensors are the same to the bit{rounded}; {figures}"


def verify_logits(path: str, target: Path, tower_from: TowerFrom, rounded_to: Set[str]) -> str:
    """Compare the logits of two models on a fixed prompt and image; one of them at a time is in memory.

    Args:
        path: of the source, as `load_model` takes it.
        rounded_to: schemes of quantization, or dtypes, that weights of the target were rounded to.

    Returns:
        The figures.

    Raises:
        ValueError: they differ by more than rounding explains, or the prompt's token ids differ.
    """
    is_packed = getattr(read_configuration(target), "quantization_config", None) is not None
    device = "cpu" if is_packed else None  # layers quantized for CPUs run there only
    original, written = _compute(path, tower_from, device), _compute(str(target), "vit", device)
    if original.input_ids != written.input_ids:
        raise ValueError(f"{target} differs from its source: its tokenizer gives other token ids.")
    num_rows = min(original.num_tokens, written.num_tokens)
    expected, logits = original.logits[:, :num_rows], written.logits[:, :num_rows]
    largest = float((logits - expected).abs().max())
    share = float((logits - expected).norm() / (expected - expected.mean()).norm())
    cause = max({_name(original.dtype), *rounded_to}, key=lambda name: _LIMITS[name])
    figures = f"logits on a fixed prompt and image differ by {largest:.3g} at most, {share:.2%} of their spread"
    if not share <= _LIMITS[cause]:  # also NaN
        raise ValueError(f"{target} differs from its source: {figures}; {cause} explains {_LIMITS[cause]:.2%}.")
    return figures


def verify_gguf(source: Checkpoint, target: Path, type: GgufType) -> str:
    """Compare every tensor in GGUF files, dequantized, with its source's.

    Returns:
        The figures.

    Raises:
        ValueError: one differs by more than its type explains, or the files have other tensors than they should.
    """
    from gguf import GGUFReader

    largest, where, count = 0.0, "", 0
    for file in plan_gguf(source, target.name, type)[0]:
        stored = {tensor.name: tensor for tensor in GGUFReader(target / file.name).tensors}
        if unpaired := sorted(stored.keys() ^ {tensor.name for tensor in file.tensors}):
            raise ValueError(f"{target / file.name} has other tensors than it should: {shortened(unpaired, 5)}.")
        for tensor in file.tensors:
            error = _rounding_error(tensor, stored[tensor.name])
            if not error <= _TYPE_LIMITS[tensor.ggml_type]:  # also NaN
                raise ValueError(
                    f"{target / file.name} differs from its source: {tensor.name} by {error:.3g} of its values; "
                    f"{tensor.ggml_type} explains {_TYPE_LIMITS[tensor.ggml_type]:.3g}."
                )
            count += 1
            if error >= largest:
                largest, where = error, tensor.name
    return (
        f"{count} tensors read back differ by {largest:.2g} of their values at most (in {where}), which {type} explains"
    )


def _rounding_error(tensor: GgufTensor, stored: ReaderTensor) -> float:
    """The largest difference, relative to the value itself, or to the largest of its block where a block is scaled.

    NaN, if there is one in either.
    """
    from gguf.quants import dequantize

    expected_rows = tensor.read().reshape(-1, tensor.shape[-1])
    stored_rows = stored.data.reshape(len(expected_rows), -1)
    num_rows = max(1, _BLOCK_ELEMENTS // tensor.shape[-1])
    errors = []
    for first in range(0, len(expected_rows), num_rows):
        expected = expected_rows[first : first + num_rows].float()
        dequantized = dequantize(stored_rows[first : first + num_rows], stored.tensor_type)
        scale = expected.abs()
        if tensor.ggml_type == "Q8_0":
            blocks = scale.unflatten(-1, (-1, 32))
            scale = blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(-2)
        difference = (torch.tensor(dequantized) - expected).abs()
        errors.append((difference / scale.clamp(min=_SMALLEST.get(tensor.ggml_type, 2.0**-126))).max())
    return float(torch.stack(errors).max())


def _compute(path: str, tower_from: TowerFrom, device: str | None) -> _Computed:
    """What a model computes on the fixed prompt."""
    model, processor = load_model(path, device, tower_from=tower_from)
    encoded = processor.encode_messages(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}]
    )
    pixel_values = processor.image_processor([_image()], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        input_ids = torch.tensor([encoded.input_ids], device=model.device)
        logits = model(input_ids=input_ids, pixel_values=pixel_values.to(model.device, model.dtype)).logits[0]
    return _Computed(encoded.input_ids, logits.float().cpu(), model.dtype, model.config.image_token_id)


def _image() -> Image.Image:
    """An image with a gradient in every channel."""
    x, y = np.meshgrid(np.arange(96), np.arange(64))
    return Image.fromarray(np.stack([x * 2, y * 4 - 1 & 255, (x + y) & 255], axis=-1).astype(np.uint8))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bytes(tensor: Tensor) -> Tensor:
    """Its bytes: NaN equals itself there."""
    return tensor.contiguous().flatten().view(torch.uint8)
