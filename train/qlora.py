"""A frozen language model in four bits, for adapters to learn on (QLoRA, arXiv 2305.14314): bitsandbytes' NF4.

The matrices of its layers are quantised one by one as they are read, so that the whole model is never in memory
unquantised; a product makes its matrix again, forward and backward, and lets it go. The rest of the language model,
its tables and norms, is kept in the products' dtype: so is then all that flows between them. Tower and projector may
learn and stay in float32.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from yi_vl.checkpoint.load import build_model, open_model
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

from .optim import LOW_DTYPES

BYTES_PER_WEIGHT = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # 64 share a scale of 8 bits, 256 such scales one of 32
_MAY_LEARN = ["model.vision_tower", "model.multi_modal_projector"]


class _OnInt4(YiVLForConditionalGeneration):
    """What may learn is read in float32, whatever the rest is read in."""

    _keep_in_fp32_modules_strict = _MAY_LEARN


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
        llm_int8_skip_modules=[*_MAY_LEARN, "lm_head"],  # despite its name, for four bits, too
    )
    model, processor = build_model(
        open_model(path), device, _OnInt4, dtype=dtype, quantization_config=quantization_config
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # on some CPUs a layer in eval mode would repack its weights, round their scales, and pass no gradient again
            module.support_avx512bf16_for_cpu = False
    return model, processor


def num_weights(parameter: nn.Parameter) -> int:
    """How many weights a parameter stands for: of those in four bits, two lie in a byte."""
    quantised = getattr(parameter, "quant_state", None)
    return parameter.numel() if quantised is None else quantised.shape.numel()
