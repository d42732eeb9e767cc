"""int8 and int4 for the language model's linear layers; tower, projector and embeddings stay as they are.

On a CPU the layers here run kernels that come with torch. torchao, the library to reach for, was measured first (0.18,
one 11008 x 4096 product on one core of a Xeon with AMX; how many times as fast as bfloat16):

| rows | int8: torchao | FBGEMM | torch's kernel | dequantised | int4: torch's kernel | dequantised | bitsandbytes nf4 |
|-----:|--------------:|-------:|---------------:|------------:|---------------------:|------------:|-----------------:|
|    1 |          0.15 |   1.71 |           1.44 |        0.39 |                 2.81 |        0.13 |             2.70 |
|    8 |          0.19 |   1.37 |           0.75 |        0.45 |                 1.00 |        0.18 |             0.94 |
|   64 |          0.24 |   0.87 |           0.16 |        0.53 |                 0.18 |        0.21 |             0.17 |
| 1024 |          0.64 |   0.45 |           0.07 |        0.73 |                 0.08 |        0.68 |             0.08 |

torchao converts the whole int8 matrix for every token unless it is compiled, and has int4 for CPUs only as a prototype
around the same kernel; bitsandbytes needs AVX512-BF16, and another kernel from the hub to read prompts. auto-round's
packed form cannot be moved to another processor. oneDNN's product of int8 with int8 is as quick as FBGEMM's, but leaves
the rounding of x to some ten small operations, each a miss in every cache after megabytes of weights.

So int8 is FBGEMM's (on two cores, in a whole model, it says 1.6 words where torch's kernel says 1.1), which rounds x as
it goes. It is the engine of torch's own quantised tensors, which torch means to drop: without it, or on a processor
that it is not exact on, torch's kernel for few rows, and for many the matrix made again piece by piece, as in int4.

On an NVIDIA GPU torchao is the library, through transformers' `TorchAoConfig`. Weights are quantised one tensor at a
time as transformers loads them, so that the whole model is never in memory unquantised.

N output features, K input features, G group size, M rows. Called by loading.py and convert/; registers itself with
transformers, whose `from_pretrained` and `save_pretrained` call the rest.
"""

from __future__ import annotations

import warnings
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

from .runtime import trim_malloc

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


def packed_config(found: dict[str, Any] | None) -> PackedConfig | None:
    """A config.json's `quantization_config`; None when there is none, or another library wrote it."""
    if found is None or found.get("quant_method") != METHOD or not set(found) <= {"quant_method", "bits", "group_size"}:
        return None
    return PackedConfig(**found)


def make_config(scheme: str, text_config: Any, device: str | torch.device) -> QuantizationConfigMixin:
    """How a model is to be quantised on a device, for `from_pretrained(quantization_config=...)`.

    Raises:
        ValueError: there is no such scheme, or it cannot work there.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantize is {scheme!r}; there are {' and '.join(map(repr, SCHEMES))}.")
    kind = "cuda" if str(device) == "auto" and torch.cuda.is_available() else str(device).partition(":")[0]
    if kind == "cuda":
        return _torchao_config(scheme, text_config)
    if kind not in ("cpu", "auto"):
        raise ValueError(f"quantize={scheme!r} works on CPUs and NVIDIA GPUs, not on {device!r}. Leave it out there.")
    if scheme == "int4":
        _packed_rows()
    return make_packed_config(scheme, text_config)


def make_packed_config(scheme: str, text_config: Any) -> PackedConfig:
    """The same for CPUs, whatever this machine's is.

    Raises:
        ValueError: the model's layers are not as wide as the scheme wants them.
    """
    return PackedConfig(bits=8) if scheme == "int8" else PackedConfig(bits=4, group_size=_group_size(text_config))


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
        return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=_KEPT)
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        raise ValueError("int4 needs an NVIDIA GPU of compute capability 8.0 (Ampere) or later. Use quantize='int8'.")
    how = Int4WeightOnlyConfig(group_size=_group_size(text_config), int4_packing_format="tile_packed_to_4d")
    return TorchAoConfig(how, modules_to_not_convert=_KEPT)


class PackedLinear(nn.Module):
    """What both schemes share: `weight` and `weight_scale`, in memory as this processor's kernel wants them.

    A state dict holds them as `quantized` makes them, the same on every processor.
    """

    weight_dtype: torch.dtype

    def __init__(self, like: nn.Linear, weight_shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = like.in_features, like.out_features, like.bias
        self.dtype, device = like.weight.dtype, like.weight.device
        self.register_buffer("weight", torch.empty(weight_shape, dtype=self.weight_dtype, device=device))
        self.register_buffer("weight_scale", torch.empty(scale_shape, dtype=self.dtype, device=device))
        self.weight: Tensor
        self.weight_scale: Tensor
        self.is_packed = False

    @property
    def nbytes(self) -> int:
        """Of what is kept in memory."""
        return self.weight.nbytes + self.weight_scale.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """This layer's buffers, not packed yet, for a matrix (N, K)."""
        raise NotImplementedError

    def pack_(self) -> None:
        """Bring the weights into the form that this processor's kernel reads."""
        if not self.is_packed:
            self.weight, self.weight_scale = self._packed()
            self.is_packed = True

    def _packed(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _product(self, rows: Tensor) -> Tensor:
        """(M, K) -> (M, N)"""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        assert self.is_packed
        y = self._product(x.reshape(-1, self.in_features).contiguous())
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_packed:
            destination[f"{prefix}weight"], destination[f"{prefix}weight_scale"] = self._unpacked()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """What is loaded is packed anew."""
        was_packed, self.is_packed = self.is_packed, False
        if was_packed:
            self.weight, self.weight_scale = self._unpacked()
        super()._load_from_state_dict(state_dict, prefix, *args)
        if was_packed:
            self.pack_()

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Linear(PackedLinear):
    """y = x W^T with W = `weight` (N, K) int8 times `weight_scale` (N,), one for each row.

    With FBGEMM the rows of x are rounded to 8 bits, too, each by its own largest number. Without it they are not.
    """

    weight_dtype = torch.int8
    few_rows = 12  # without FBGEMM: up to so many, torch's kernel is the faster way

    def __init__(self, like: nn.Linear, config: PackedConfig) -> None:
        super().__init__(like, (like.out_features, like.in_features), (like.out_features,))
        self._fbgemm: Any = None  # FBGEMM's form of `weight`, which is no tensor; `weight` is then empty

    @property
    def nbytes(self) -> int:
        """Of what is kept in memory."""
        return super().nbytes + (0 if self._fbgemm is None else self.in_features * self.out_features)

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        """This layer's buffers, not packed yet, for a matrix (N, K)."""
        scale = (_largest(weight) / 127).clamp(min=torch.finfo(torch.float32).tiny).to(self.dtype)
        rows = zip(weight.split(_CHUNK_ROWS), scale.float().split(_CHUNK_ROWS))
        whole = [(w.float() / s[:, None]).round_().clamp_(-127, 127).to(torch.int8) for w, s in rows]
        return {"weight": torch.cat(whole), "weight_scale": scale}

    def _packed(self) -> tuple[Tensor, Tensor]:
        if not _has_fbgemm():
            return self.weight, self.weight_scale
        self._fbgemm = _fbgemm_pack(self.weight, self.weight_scale)
        return self.weight.new_empty(0), self.weight_scale

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        return self.weight if self._fbgemm is None else _fbgemm_unpack(self._fbgemm), self.weight_scale

    def _product(self, rows: Tensor) -> Tensor:
        if self._fbgemm is not None:
            return _fbgemm_product(rows.float(), self._fbgemm).to(rows.dtype)
        if len(rows) <= self.few_rows:
            return torch._weight_int8pack_mm(rows, self.weight, self.weight_scale)
        y = rows.new_empty(len(rows), self.out_features)
        for first in range(0, self.out_features, _CHUNK_ROWS):
            last = first + _CHUNK_ROWS
            y[:, first:last] = F.linear(rows, self.weight[first:last].to(rows.dtype))
        return y * self.weight_scale


class Int4Linear(PackedLinear):
    """y = x W^T with W = (q - 8) * scale + zero; q in 0..15, `weight_scale` (K/G, N, 2) holds scale and zero.

    In a state dict `weight` is (N, K/2) uint8: the low half of a byte is an even column, the high half the odd one
    after it. Packed for torch's kernel, rows are filled up.
    """

    weight_dtype = torch.uint8
    few_rows = 48  # up to so many, torch's kernel is the faster way

    def __init__(self, like: nn.Linear, config: PackedConfig) -> None:
        assert config.group_size is not None
        self.group_size = config.group_size
        num_groups = like.in_features // self.group_size
        super().__init__(like, (like.out_features, like.in_features // 2), (num_groups, like.out_features, 2))

    def quantized(self, weight: Tensor) -> dict[str, Tensor]:
        scales, bytes_ = [], []
        for rows in weight.split(_CHUNK_ROWS):
            grouped = rows.float().view(len(rows), -1, self.group_size)  # (n, K/G, G)
            low, high = grouped.aminmax(dim=-1, keepdim=True)
            scale = ((high - low) / 15).clamp_(min=1e-6).to(self.dtype)
            zero = (low + 8 * scale.float()).to(scale.dtype)
            q = ((grouped - zero.float()) / scale.float() + 8).round_().clamp_(0, 15).to(torch.uint8)
            scales.append(torch.cat((scale, zero), dim=-1))  # (n, K/G, 2)
            bytes_.append(_join(q.view(len(rows), -1)))  # (n, K/2)
        return {"weight": torch.cat(bytes_), "weight_scale": torch.cat(scales).transpose(0, 1).contiguous()}

    def _packed(self) -> tuple[Tensor, Tensor]:
        missing = -self.out_features % _ROW_MULTIPLE
        weight = torch.cat([_pack(_split(rows)) for rows in _chunks(self.weight)])
        return weight, F.pad(self.weight_scale, (0, 0, 0, missing)).contiguous()

    def _unpacked(self) -> tuple[Tensor, Tensor]:
        weight = torch.cat([_join(_unpack(rows)) for rows in self.weight.split(_CHUNK_ROWS)])
        return weight[: self.out_features], self.weight_scale[:, : self.out_features].contiguous()

    def _product(self, rows: Tensor) -> Tensor:
        if len(rows) > self.few_rows:
            return self._many(rows)[:, : self.out_features]
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.weight, self.group_size, self.weight_scale)
        return y[:, : self.out_features]

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

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, group_size={self.group_size}"


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


def packed_layers(model: nn.Module) -> Iterator[tuple[str, PackedLinear]]:
    """The quantised layers, by name."""
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear):
            yield name, module


def num_bytes(model: nn.Module) -> int:
    """Of all weights, packed ones too, which are not all tensors."""
    packed = {id(layer): layer for _, layer in packed_layers(model)}
    own = [m for m in model.modules() if id(m) not in packed]
    tensors = {id(t): t for m in own for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}  # tied: once
    return sum(tensor.nbytes for tensor in tensors.values()) + sum(layer.nbytes for layer in packed.values())


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):
    """transformers' hooks: quantise each tensor as it arrives, and pack what is loaded."""

    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        replace_linears_(model, self.quantization_config)
        if not self.pre_quantized:
            # transformers 5.16 casts a tensor to the type of what it replaces before it is quantised.
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
            trim_malloc()  # else what was not packed stays beside what is, freed but resident
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


def _fbgemm_pack(weight: Tensor, scale: Tensor) -> Any:
    """FBGEMM's form of int8 (N, K) and its rows' scales."""
    zeros = torch.zeros(len(weight), dtype=torch.int64, device="cpu")
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = "fbgemm"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch will drop these tensors some day; `_has_fbgemm` then says so
            quantised = torch._make_per_channel_quantized_tensor(weight, scale.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(quantised, None)
    finally:
        torch.backends.quantized.engine = before


def _fbgemm_unpack(packed: Any) -> Tensor:
    """(N, K) int8; slow."""
    weight: Tensor = torch.ops.quantized.linear_unpack(packed)[0].int_repr()
    return weight


def _fbgemm_product(x: Tensor, packed: Any) -> Tensor:
    """(M, K) -> (M, N), float32. FBGEMM rounds all of x by its largest number; so each row is divided by its own."""
    if len(x) == 1:
        y: Tensor = torch.ops.quantized.linear_dynamic(x, packed)
        return y
    largest = x.abs().amax(1, keepdim=True).clamp_(min=torch.finfo(torch.float32).tiny)
    y = torch.ops.quantized.linear_dynamic(x / largest, packed)
    return y.mul_(largest)


@cache
def _has_fbgemm() -> bool:
    """Whether FBGEMM is here and its sums are exact: on a processor without VNNI they overflow."""
    x = torch.full((1, 256), 255.0, device="cpu")
    weight = torch.full((64, 256), 127, dtype=torch.int8, device="cpu")
    try:
        y = _fbgemm_product(x, _fbgemm_pack(weight, torch.ones(64, device="cpu")))
    except (AttributeError, RuntimeError):
        return False
    return torch.allclose(y, torch.full_like(y, 255 * 127 * 256))


def _largest(weight: Tensor) -> Tensor:
    """Of every row, without a copy of the matrix: (N, K) -> (N,) float32"""
    low, high = weight.aminmax(dim=1)
    return torch.maximum(-low, high).float()


def _chunks(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows at a time, so that copies of them take little; on the meta device copies take nothing."""
    return (weight,) if weight.is_meta else weight.split(_CHUNK_ROWS)


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
    sample = torch.randint(
        16, (_ROW_MULTIPLE, 32), dtype=torch.uint8, device="cpu", generator=torch.Generator("cpu").manual_seed(0)
    )
    if not torch.equal(_unpack(_pack(sample), rows), sample):
        raise ValueError(f"torch {torch.__version__} packs int4 in a way that is not known here. Use quantize='int8'.")
    return rows
