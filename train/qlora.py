"""Adapters on a frozen language model in four bits (QLoRA, arXiv 2305.14314): bitsandbytes' NF4.

Each matrix is quantized as it is loaded, so that the whole model is never in memory unquantized, and dequantized for
each product, forward and backward. The language model's tables and norms, and hence its activations, have the dtype of
the products. Tower, projector and blocks of cross-attention may be trained
and stay in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from yi_vl.checkpoint.load import build_model, open_model
from yi_vl.decoder.cross_attention import CROSS_BLOCK
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

from .optim import LOW_DTYPES

BYTES_PER_WEIGHT = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # 64 share a scale of 8 bits, 256 such scales one of 32
_MAY_BE_TRAINED = ["model.vision_tower", "model.multi_modal_projector", rf"model.language_model.layers.*.{CROSS_BLOCK}"]


class _OnInt4(YiVLForConditionalGeneration):
    """Modules that may be trained are read in float32, whatever dtype the others are read in."""

    _keep_in_fp32_modules_strict = _MAY_BE_TRAINED


def read_int4(
    path: str | Path, precision: str, device: torch.device
) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """A model that is not quantized, its language model's layers in four bits; and its processor.

    Args:
        path: whatever `yi_vl.load` takes.
        precision: of the products, one of `config.PRECISIONS`.
        device: where the model is to be trained; each matrix is quantized there.

    Raises:
        ValueError: there is no such model, or bitsandbytes is missing, too old, or cannot work here.
    """
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is missing; lora.base: int4 needs: pip install -e ".[train]"') from error
    dtype = LOW_DTYPES.get(precision, torch.float32)
    quantization_config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*_MAY_BE_TRAINED, "lm_head"],  # despite its name, for four bits, too
    )
    model, processor = build_model(
        open_model(path), device, _OnInt4, dtype=dtype, quantization_config=quantization_config
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # on some CPUs a layer in eval mode would repack its weights with rounded scales, and then pass no gradient
            module.support_avx512bf16_for_cpu = False
    return model, processor


def num_weights(parameter: nn.Parameter) -> int:
    """The number of weights in a parameter; four-bit ones are packed two to a byte."""
    quant_state = getattr(parameter, "quant_state", None)
    return parameter.numel() if quant_state is None else quant_state.shape.numel()
