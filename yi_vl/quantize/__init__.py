"""int8 and int4 for the language model's linear layers; tower, projector and embeddings keep their dtype.

On a CPU the layers run kernels that ship with torch. torchao was measured first (0.18, one 11008 x 4096 product on one
core of a Xeon with AMX; speed relative to bfloat16):

| rows | int8: torchao | FBGEMM | torch's kernel | dequantized | int4: torch's kernel | dequantized | bitsandbytes nf4 |
|-----:|--------------:|-------:|---------------:|------------:|---------------------:|------------:|-----------------:|
|    1 |          0.15 |   1.71 |           1.44 |        0.39 |                 2.81 |        0.13 |             2.70 |
|    8 |          0.19 |   1.37 |           0.75 |        0.45 |                 1.00 |        0.18 |             0.94 |
|   64 |          0.24 |   0.87 |           0.16 |        0.53 |                 0.18 |        0.21 |             0.17 |
| 1024 |          0.64 |   0.45 |           0.07 |        0.73 |                 0.08 |        0.68 |             0.08 |

torchao dequantizes the whole int8 matrix for every token unless it is compiled, and has int4 for CPUs only as a
prototype around the same kernel; bitsandbytes needs AVX512-BF16, and another kernel from the hub for prefill;
auto-round's packed weights cannot be moved to another processor.

On an NVIDIA GPU transformers' `TorchAoConfig` does the work. Weights are quantized one tensor at a time as transformers
loads them, so that the whole model is never in memory unquantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..linear import language_linears
from ..runtime import trim_malloc
from . import int4, int8
from .int4 import Int4Linear, packed_rows
from .int8 import Int8Linear
from .packed import PackedLinear

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[Scheme, ...] = ("int8", "int4")
METHOD = "yi_vl"  # `quant_method` in the config.json of a model that this package quantized

_GROUP_SIZES = (64, 32)  # of those that torch's kernels take; 128 does not divide every layer
_NOT_CONVERTED = ["model.vision_tower", "model.multi_modal_projector"]  # by torchao


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """`quantization_config` in the config.json of a model quantized for CPUs.

    Args:
        bits: 8, one scale for a row; or 4, a scale and a zero for every `group_size` weights of a row.
    """

    def __init__(self, bits: int, group_size: int | None = None, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own are an enum
        self.bits = bits
        self.group_size = group_size


def packed_config(values: dict[str, Any] | None) -> PackedConfig | None:
    """A config.json's `quantization_config`; None when there is none, or another library wrote it."""
    keys = {"quant_method", "bits", "group_size"}
    if values is None or values.get("quant_method") != METHOD or not set(values) <= keys:
        return None
    return PackedConfig(**values)


def make_config(scheme: str, text_config: Any, device: str | torch.device) -> QuantizationConfigMixin:
    """The configuration of a scheme on a device, for `from_pretrained(quantization_config=...)`.

    Raises:
        ValueError: the scheme is unknown, or does not work there.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize is {scheme!r}; there are {' and '.join(map(repr, SCHEMES))}.")
    _check_dense(scheme, text_config)
    device_type = "cuda" if str(device) == "auto" and torch.cuda.is_available() else str(device).partition(":")[0]
    if device_type == "cuda":
        return _torchao_config(scheme, text_config)
    if device_type not in ("cpu", "auto"):
        raise ValueError(f"quantize={scheme!r} works on CPUs and NVIDIA GPUs, not on {device!r}. Leave it out there.")
    if scheme == "int4":
        packed_rows()
    return make_packed_config(scheme, text_config)


def make_packed_config(scheme: str, text_config: Any) -> PackedConfig:
    """The same for CPUs, whether or not this one has the kernels.

    Raises:
        ValueError: the widths of the model's layers do not divide into groups, or the model has experts.
    """
    _check_dense(scheme, text_config)
    return PackedConfig(bits=8) if scheme == "int8" else PackedConfig(bits=4, group_size=_group_size(text_config))


def _check_dense(scheme: str, text_config: Any) -> None:
    """Experts are not linear layers but stacks of matrices, without a quantized kernel, and most of the weights.

    Raises:
        ValueError: the model has experts.
    """
    if num_experts := getattr(text_config, "num_experts", 0):
        raise ValueError(
            f"quantize={scheme!r} is for linear layers, and this model has {num_experts} experts in each layer, which "
            "would keep their dtype. Leave it out, or quantize the dense model."
        )


def _group_size(text_config: Any) -> int:
    """The largest that divides every layer of a language model: torchao would leave the others as they are."""
    widths = {text_config.hidden_size, text_config.intermediate_size}
    widths.add(text_config.num_attention_heads * text_config.head_dim)
    for group_size in _GROUP_SIZES:
        if not any(width % group_size for width in widths):
            return group_size
    raise ValueError(
        f"int4 takes weights in groups of {' or '.join(map(str, _GROUP_SIZES))}, and this model's layers are "
        f"{', '.join(map(str, sorted(widths)))} wide. Use quantize='int8'."
    )


def _torchao_config(scheme: str, text_config: Any) -> TorchAoConfig:
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is missing; on a GPU, quantize needs: pip install "yi_vl[quantize]"') from error
    if scheme == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=_NOT_CONVERTED)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError("int4 needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later. Use quantize='int8'.")
    int4 = Int4WeightOnlyConfig(group_size=_group_size(text_config), int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(int4, modules_to_not_convert=_NOT_CONVERTED)


def replace_linears_(model: nn.Module, config: PackedConfig) -> None:
    """Replace the language model's linear layers and its head by empty quantized layers.

    A head that shares the embedding table's weights stays as it is.
    """
    if config.bits not in (8, 4):
        raise ValueError(f"quantization_config says {config.bits} bits; there are 8 and 4.")
    for name, linear in list(language_linears(model)):
        if config.bits == 8:
            layer: PackedLinear = Int8Linear(linear)
        else:
            assert config.group_size is not None
            layer = Int4Linear(linear, config.group_size)
        model.set_submodule(name, layer)


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The quantized layers, by name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module


def describe_quantized_kernels(dtype: torch.dtype) -> list[str]:
    """The kernels that were measured to be the fastest on this processor, one line for each scheme."""
    if int8.uses_fbgemm(dtype):
        lines = ["int8: FBGEMM"]
    else:
        lines = [f"int8: torch's kernel for up to {int8.max_kernel_rows(dtype)} rows, dequantized for more"]
    return [*lines, f"int4: torch's kernel for up to {int4.max_kernel_rows(dtype)} rows, dequantized for more"]


def num_bytes(model: nn.Module) -> int:
    """Bytes of all weights in memory, including packed ones, which are not all tensors."""
    packed = {id(layer): layer for _, layer in packed_layers(model)}
    others = [m for m in model.modules() if id(m) not in packed]
    tensors = {
        id(t): t for m in others for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))
    }  # tied: once
    return sum(tensor.nbytes for tensor in tensors.values()) + sum(layer.nbytes for layer in packed.values())


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """transformers' hooks: quantize each tensor as it is loaded, and pack the layers when all are."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        replace_linears_(model, self.quantization_config)
        if not self.pre_quantized:
            # transformers 5.16 casts a tensor to the dtype of the parameter that it replaces before quantizing it.
            for _, layer in packed_layers(model):
                layer.weight = layer.weight.to(layer.dtype)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module_name, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module_name), PackedLinear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layer in packed_layers(model):
            if layer.weight.device.type != "cpu":
                raise ValueError(
                    f"{name} is on {layer.weight.device}, but was quantised for CPUs. Load it with device='cpu', or "
                    "give a GPU the original with quantize=..."
                )
            layer.pack_()
            trim_malloc()  # else the freed unpacked weights stay resident
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


class _Quantize(ConversionOps):
    def convert(  # type: ignore[override]  # transformers' own operations take these by name as well
        self, input_dict: dict[str, Any], *, model: nn.Module, full_layer_name: str, **_: Any
    ) -> dict[str, Tensor]:
        (weight,) = input_dict.values()
        layer_name = full_layer_name.rpartition(".")[0]
        layer: Any = model.get_submodule(layer_name)
        quantized = layer.quantize(weight[0] if isinstance(weight, list) else weight)
        return {f"{layer_name}.{name}": tensor for name, tensor in quantized.items()}
