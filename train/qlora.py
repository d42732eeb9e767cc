"""A frozen 4-bit language model to train adapters on (QLoRA, arXiv 2305.14314), in bitsandbytes' NF4.

The matrices of its layers are quantized one by one while loading, so that the whole model is never in memory
unquantized. The rest of the language model has the dtype of the products. Tower and projector may be trained and stay
in float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from yi_vl.model import YiVLForConditionalGeneration

from .optim import LOW_DTYPES

BYTES_PER_WEIGHT = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # 64 share a scale of 8 bits, 256 such scales one of 32
_MAY_BE_TRAINED = ["model.vision_tower", "model.multi_modal_projector"]


class _OnInt4(YiVLForConditionalGeneration):
    """Loads what may be trained in float32, whatever the dtype of the rest."""

    _keep_in_fp32_modules_strict = _MAY_BE_TRAINED


def read_int4(path: Path, precision: str, device: torch.device) -> tuple[YiVLForConditionalGeneration, dict[str, Any]]:
    """The model of an unquantized checkpoint, its language model's layers in 4 bits; and transformers' loading info.

    Args:
        precision: of the products, one of `config.PRECISIONS`.
        device: of training; each matrix is quantized there.

    Raises:
        ValueError: bitsandbytes is missing.
        ImportError, RuntimeError: it is too old, or cannot work here.
    """
    try:
        import bitsandbytes
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is missing; lora.base: int4 needs: pip install -e ".[train]"') from error
    dtype = LOW_DTYPES.get(precision, torch.float32)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[*_MAY_BE_TRAINED, "lm_head"],  # despite its name, for 4 bits, too
    )
    loaded: Any = _OnInt4.from_pretrained(
        path, dtype=dtype, device_map={"": device}, quantization_config=quantization, output_loading_info=True
    )
    model, report = loaded
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # on some CPUs a layer in eval mode would repack its weights with rounded scales, and then pass no gradient
            module.support_avx512bf16_for_cpu = False
    return model, report


def num_weights(parameter: nn.Parameter) -> int:
    """The number of weights of a parameter; 4-bit ones are stored two in a byte."""
    quant_state = getattr(parameter, "quant_state", None)
    return parameter.numel() if quant_state is None else quant_state.shape.numel()
