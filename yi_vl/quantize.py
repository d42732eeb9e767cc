"""int8 and int4 for the language model's linear layers; tower, projector and embeddings stay as they are.

On a CPU the layers here run torch's own packed kernels. torchao, the library to reach for, was measured first (0.18,
one 11008 x 4096 product on one core of a Xeon with AMX; how many times as fast as bfloat16):

| rows | int8: torchao | torch's kernel | dequantised | int4: torch's kernel | dequantised | bitsandbytes nf4 |
|-----:|--------------:|---------------:|------------:|---------------------:|------------:|-----------------:|
|    1 |          0.15 |           1.89 |        0.39 |                 2.81 |        0.13 |             2.70 |
|    8 |          0.19 |           0.87 |        0.45 |                 1.00 |        0.18 |             0.94 |
|   64 |          0.24 |           0.16 |        0.53 |                 0.18 |        0.21 |             0.17 |
| 1024 |          0.64 |           0.07 |        0.73 |                 0.08 |        0.68 |             0.08 |

torchao converts the whole int8 matrix for every token unless it is compiled, and has int4 for CPUs only as a prototype
around the same kernel; bitsandbytes needs AVX512-BF16, and another kernel from the hub to read prompts. auto-round-lib
is as fast for a token and faster for many rows, but rounds activations as well, and its packed form cannot be moved to
another processor. oneDNN's product of int8 with int8 is up to 1.9 times as fast alone, but x has to become int8 first,
and those ten small operations, each a miss in every cache after megabytes of weights, take back what it gains. So:
torch's kernels for few rows; for many, the matrix is made again piece by piece.

On an NVIDIA GPU torchao is the library, through transformers' `TorchAoConfig`. Weights are quantised one tensor at a
time as transformers loads them, so that the whole model is never in memory unquantised.

N output features, K input features, G group size, M rows. Called by loading.py and convert/; registers itself with
transformers, whose `from_pretrained` and `save_pretrained` call the rest.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, TorchAoConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

Scheme = Literal["int8", "int4"]
SCHEMES: tuple[Scheme, ...] = ("int8", "int4")
METHOD = "yi_vl"  # `quant_method` in the config.json of what this file quantised

_GROUP_SIZES = (64, 32)  # torch's kernels know both, and 128, which does not divide every layer
_ROW_MULTIPLE = 64  # rows are filled up to it, for then torch packs them all alike
_PACKED_ROWS = {"AVX512": 64, "AVX2": 32}  # rows that torch packs together on such a processor
_CHUNK_ROWS = 512  # dequantised at once: they stay in the processor's cache
_KEPT = ["model.vision_tower", "model.multi_modal_projector"]  # on a GPU, where the library chooses the rest


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):
    """What config.json says of a model quantised for CPUs.

    Args:
        bits: 8, one scale for a row; or 4, a scale and a zero for every `group_size` weights of a row.
    """

    def __init__(self, bits: int, group_size: int | None = None, quant_method: str = METHOD) -> None:
        self.quant_method = quant_method  # type: ignore[assignment]  # transformers' own are an enum
        self.bits = bits
        self.group_size = group_size


def make_config(scheme: str, text_config: Any, device: str | torch.device) -> QuantizationConfigMixin:
    """How a model is to be quantised on a device, for `from_pretrained(quantization_config=...)`.

    Raises:
        ValueError: there is no such scheme, or it cannot work there.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize is {scheme!r}; there are {' and '.join(map(repr, SCHEMES))}.")
    kind = "cuda" if str(device) == "auto" and torch.cuda.is_available() else str(device).partition(":")[0]
    if kind == "cuda":
        return _torchao_config(scheme)
    if kind not in ("cpu", "auto"):
        raise ValueError(f"quantize={scheme!r} works on CPUs and NVIDIA GPUs, not on {device!r}. Leave it out there.")
    if scheme == "int8":
        return PackedConfig(bits=8)
    _packed_rows()
    widths = {text_config.hidden_size, text_config.intermediate_size}
    widths.add(text_config.num_attention_heads * text_config.head_dim)
    for group_size in _GROUP_SIZES:
        if not any(width % group_size for width in widths):
            return PackedConfig(bits=4, group_size=group_size)
    raise ValueError(
        f"int4 takes weights in groups of {' or '.join(map(str, _GROUP_SIZES))}, and this model's layers are "
        f"{', '.join(map(str, sorted(widths)))} wide. Use quantize='int8'."
    )


def _torchao_config(scheme: str) -> TorchAoConfig:
    try:
        from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    except ModuleNotFoundError as error:
        raise ValueError(f'{error.name} is missing; on a GPU, quantize needs: pip install "yi_vl[quantize]"') from error
    if scheme == "int8":
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=_KEPT)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError("int4 needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later. Use quantize='int8'.")
    how = Int4WeightOnlyConfig(group_size=_GROUP_SIZES[0], int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(how, modules_to_not_convert=_KEPT)


class Int8Linear(nn.Module):
    """y = x W^T with W = `weight` (N, K) int8 times `weight_scale` (N,), one for each row."""

    few_rows = 12  # up to so many, torch's kernel is the faster way

    def __init__(self, like: nn.Linear, config: PackedConfig) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias
        device = like.weight.device
        self.register_buffer("weight", torch.empty(like.weight.shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(self.out_features, dtype=like.weight.dtype, device=device))
        self.weight: Tensor
        self.weight_scale: Tensor

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """This layer's buffers for a matrix (N, K)."""
        scale = (_largest(weight) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(self.weight_scale.dtype)
        rows = zip(weight.split(_CHUNK_ROWS), scale.float().split(_CHUNK_ROWS))
        whole = [(w.float() / s[:, None]).round_().clamp_(-127, 127).to(torch.int8) for w, s in rows]
        return {"weight": torch.cat(whole), "weight_scale": scale}

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)  # (M, K)
        few = len(rows) <= self.few_rows
        y = torch._weight_int8pack_mm(rows, self.weight, self.weight_scale) if few else self._many(rows)  # (M, N)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def _many(self, x: Tensor) -> Tensor:
        y = x.new_empty(len(x), self.out_features)
        for first in range(0, self.out_features, _CHUNK_ROWS):
            last = first + _CHUNK_ROWS
            y[:, first:last] = F.linear(x, self.weight[first:last].to(x.dtype))
        return y * self.weight_scale

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int4Linear(nn.Module):
    """y = x W^T with W = (q - 8) * scale + zero; q in 0..15, `weight_scale` (K/G, N, 2) holds scale and zero.

    In a state dict `weight` is (N, K/2) uint8: the low half of a byte is an even column, the high half the odd one
    after it. In memory it is packed as torch's kernel for this processor wants it, and rows are filled up.
    """

    few_rows = 48  # up to so many, torch's kernel is the faster way

    def __init__(self, like: nn.Linear, config: PackedConfig) -> None:
        super().__init__()
        assert config.group_size is not None
        self.in_features, self.out_features = like.in_features, like.out_features
        self.group_size = config.group_size
        self.bias = like.bias
        self.is_packed = False
        num_groups, device = self.in_features // self.group_size, like.weight.device
        shape = (self.out_features, self.in_features // 2)
        self.register_buffer("weight", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_buffer(
            "weight_scale", torch.empty(num_groups, self.out_features, 2, dtype=like.weight.dtype, device=device)
        )
        self.weight: Tensor
        self.weight_scale: Tensor

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """This layer's buffers, not packed yet, for a matrix (N, K)."""
        scales, bytes_ = [], []
        for rows in weight.split(_CHUNK_ROWS):
            grouped = rows.float().view(len(rows), -1, self.group_size)  # (n, K/G, G)
            low, high = grouped.aminmax(dim=-1, keepdim=True)
            scale = ((high - low) / 15).clamp_(min=1e-6).to(self.weight_scale.dtype)
            zero = (low + 8 * scale.float()).to(scale.dtype)
            q = ((grouped - zero.float()) / scale.float() + 8).round_().clamp_(0, 15).to(torch.uint8)
            scales.append(torch.cat((scale, zero), dim=-1))  # (n, K/G, 2)
            bytes_.append(_join(q.view(len(rows), -1)))  # (n, K/2)
        return {"weight": torch.cat(bytes_), "weight_scale": torch.cat(scales).transpose(0, 1).contiguous()}

    def pack_(self) -> None:
        """Bring the weights into the form that this processor's kernel reads."""
        if self.is_packed:
            return
        missing = -self.out_features % _ROW_MULTIPLE
        self.weight = torch.cat([_pack(_split(rows)) for rows in self.weight.split(_CHUNK_ROWS)])
        self.weight_scale = F.pad(self.weight_scale, (0, 0, 0, missing)).contiguous()
        self.is_packed = True

    def forward(self, x: Tensor) -> Tensor:
        assert self.is_packed
        rows = x.reshape(-1, self.in_features)  # (M, K)
        if len(rows) <= self.few_rows:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, self.weight_scale)
        else:
            y = self._many(rows)
        y = y[:, : self.out_features]  # (M, N)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _many(self, x: Tensor) -> Tensor:
        """Columns are made as they are packed: the low halves of some rows' bytes, then the high ones."""
        half, num_groups = _packed_rows() // 2, len(self.weight_scale)
        packed = self.weight.view(-1, self.in_features, half)  # (blocks, K, half)
        scales = self.weight_scale.view(num_groups, len(packed), 2, half, 2)
        y = x.new_empty(len(x), len(packed), 2, half)
        step = _CHUNK_ROWS // half
        for first in range(0, len(packed), step):
            some = slice(first, first + step)
            bytes_ = packed[some].transpose(0, 1).contiguous()  # (K, n, half)
            for part, nibbles in enumerate((bytes_ & 15, bytes_ >> 4)):
                w = nibbles.view(torch.int8).sub_(8).to(x.dtype).view(num_groups, self.group_size, -1)
                scale, zero = (scales[:, some, part, :, i].reshape(num_groups, 1, -1) for i in range(2))
                torch.addcmul(zero, w, scale, out=w)
                y[:, some, part] = (x @ w.view(self.in_features, -1)).view(len(x), -1, half)
        return y.view(len(x), -1)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            chunks = [_join(_unpack(rows)) for rows in self.weight.split(_CHUNK_ROWS)]
            destination[f"{prefix}weight"] = torch.cat(chunks)[: self.out_features]
            destination[f"{prefix}weight_scale"] = self.weight_scale[:, : self.out_features].contiguous()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What is loaded is packed anew."""
        was_packed, self.is_packed = self.is_packed, False
        if was_packed:
            self.weight = self.weight[: self.out_features]
            self.weight_scale = self.weight_scale[:, : self.out_features].contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was_packed:
            self.pack_()

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.group_size}, "
            f"bias={self.bias is not None}"
        )


def replace_linears_(model: nn.Module, config: PackedConfig) -> None:
    """Put empty quantised layers in the place of the language model's linear layers and of its head.

    A head that shares the embedding table's weights stays as it is.
    """
    kind = {8: Int8Linear, 4: Int4Linear}.get(config.bits)
    if kind is None:
        raise ValueError(f"quantization_config says {config.bits} bits; there are 8 and 4.")
    is_tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    for name, module in list(model.named_modules()):
        is_language = "language_model." in name or (name == "lm_head" and not is_tied)
        if is_language and isinstance(module, nn.Linear):
            model.set_submodule(name, kind(module, config))


def packed_layers(model: nn.Module) -> Iterator[tuple[str, Int8Linear | Int4Linear]]:
    """The quantised layers, by name."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear | Int4Linear):
            yield name, module


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """transformers' hooks: quantise each tensor as it arrives, and pack what is loaded."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        replace_linears_(model, self.quantization_config)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        module_name, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(module_name), Int8Linear | Int4Linear)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize()

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layer in packed_layers(model):
            if layer.weight.device.type != "cpu":
                raise ValueError(
                    f"{name} is on {layer.weight.device}, but was quantised for CPUs. Load it with device='cpu', or "
                    "give a GPU the original with quantize=..."
                )
            if isinstance(layer, Int4Linear):
                layer.pack_()
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
        quantized = layer.quantized(weight[0] if isinstance(weight, list) else weight)
        return {f"{layer_name}.{name}": tensor for name, tensor in quantized.items()}


def _largest(weight: Tensor) -> Tensor:
    """Of every row, without a copy of the matrix: (N, K) -> (N,) float32"""
    low, high = weight.aminmax(dim=1)
    return torch.maximum(-low, high).float()


def _join(q: Tensor) -> Tensor:
    """(N, K) of 0..15 -> (N, K/2) bytes"""
    return q[:, 0::2] | (q[:, 1::2] << 4)


def _split(bytes_: Tensor) -> Tensor:
    """(N, K/2) bytes -> (N, K) of 0..15"""
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=-1).flatten(1)


def _pack(q: Tensor) -> Tensor:
    """(N, K) of 0..15 -> (N filled up, K/2) bytes as torch's kernel reads them"""
    filled = F.pad(q, (0, 0, 0, -len(q) % _ROW_MULTIPLE)).int()
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(filled, 1)
    return packed


def _unpack(packed: Tensor, rows: int | None = None) -> Tensor:
    """The reverse. A block's bytes are (K, half): their low halves are its first rows, their high halves the others."""
    rows = rows or _packed_rows()
    blocks = packed.reshape(-1, packed.shape[1] * 2, rows // 2)  # (blocks, K, half)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).flatten(0, 1)  # (N, K)


@cache
def _packed_rows() -> int:
    """How many rows torch packs together here.

    Raises:
        ValueError: torch has no quick kernel for this processor, or packs in a way that is not known.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    rows = _PACKED_ROWS.get(capability)
    if rows is None:
        raise ValueError(
            f"int4 needs a processor with AVX2 or AVX512; torch finds {capability} here. Use quantize='int8'."
        )
    sample = torch.randint(16, (_ROW_MULTIPLE, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if not torch.equal(_unpack(_pack(sample), rows), sample):
        raise ValueError(f"torch {torch.__version__} packs int4 in a way that is not known here. Use quantize='int8'.")
    return rows
