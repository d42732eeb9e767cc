"""Linear layers of a language model on a CPU: few rows are multiplied by the kernel that is fastest there.

A decode step multiplies one row per request, so that the weights are read once for very little arithmetic. Which
product reads them fastest is measured when a model is loaded. On an EPYC with AVX512-BF16, two cores, one row of a
5632 x 2048 matrix: `torch.mv` reads 10 GB/s, `F.linear` 20, of two rows 23, and with weights in oneDNN's blocked layout
(*packed*), of four rows, 29. On a Xeon with AMX `torch.mv` reads 25-27 GB/s, where `F.linear` reads 18-20.

N output features, K input features, M rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autotune import fastest, least_seconds

_DTYPES = (torch.bfloat16, torch.float16)  # in float32 every request's answer is to be independent of its batch
_MIN_ELEMENTS = 1 << 20  # smaller matrices stay in the processor's cache
_CHUNK_BYTES, _NUM_CHUNKS = 8 << 20, 6  # rows of weights that a call multiplies, of each layout: more than most caches
_CHUNK_ROWS = 64  # a multiple of it, as layouts have blocks of rows
_MANY_ROWS = 32  # stand for prefill


@dataclass(frozen=True)
class Kernel:
    """A product of M rows with a weight.

    Args:
        num_rows: fewer rows are repeated to so many.
    """

    operation: Literal["linear", "mv", "packed"]
    num_rows: int = 1

    def __str__(self) -> str:
        rows = "" if self.operation == "mv" else f", {self.num_rows} rows" if self.num_rows > 1 else ", 1 row"
        return self.operation + rows

    def __call__(self, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """(M, K) -> (M, N); `weight` is in oneDNN's layout for "packed", else (N, K)."""
        if self.operation == "mv":
            y = torch.mv(weight, rows[0]).unsqueeze(0)
            return y if bias is None else y + bias
        num_rows = len(rows)
        if num_rows < self.num_rows:
            rows = torch.cat((rows,) * (self.num_rows // num_rows))  # in a seventh of the time of `repeat`
        product = packed_linear if self.operation == "packed" else F.linear
        return product(rows, weight, bias)[:num_rows]


# For M rows, by M; the first is the default. More rows are multiplied as they are.
_PLAIN = {
    1: (Kernel("linear"), Kernel("mv"), Kernel("linear", 2), Kernel("linear", 4)),
    2: (Kernel("linear", 2), Kernel("linear", 4)),
}
_PACKED = {1: (Kernel("packed"), Kernel("packed", 4)), 2: (Kernel("packed", 2), Kernel("packed", 4))}
MAX_TUNED_ROWS = max(_PLAIN)


@dataclass(frozen=True)
class Kernels:
    """The kernels of one shape, by the number of rows, and what was measured of all candidates.

    Args:
        seconds: of each candidate, by the number of rows and its name.
        num_bytes: of the weights that each of these calls read.
    """

    is_packed: bool
    by_rows: dict[int, Kernel]
    seconds: dict[int, dict[str, float]] = field(default_factory=dict)
    num_bytes: int = 0

    @property
    def is_default(self) -> bool:
        """Whether they are those of `nn.Linear`."""
        return self.by_rows == {num_rows: kernels[0] for num_rows, kernels in _PLAIN.items()}


Shape = tuple[torch.dtype, int, int]  # dtype, N, K
_measured: dict[Shape, Kernels] = {}


class TunedLinear(nn.Linear):
    """`nn.Linear` with measured kernels for few rows.

    Where packed weights are faster, `weight` is held in that layout, and in no other, from `pack_` until something but
    inference needs it: training, a state dict, a cast, or a caller that takes the attribute `weight`. It is then the
    ordinary parameter again, the same object. Copies and pickles are packed as the original.
    """

    def __init__(self, like: nn.Linear, kernels: Kernels) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kernels = like.in_features, like.out_features, kernels
        self.weight, self.bias = like.weight, like.bias
        self.train(like.training)

    @property
    def is_packed(self) -> bool:
        return self._stored_weight.is_mkldnn

    @property
    def _stored_weight(self) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        return weight

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self._parameters.get(name) is not None:
            self.unpack_()
        return super().__getattr__(name)

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)"""
        weight = self._parameters["weight"]
        assert weight is not None
        if torch.compiler.is_compiling():  # which cannot exchange the weight, nor call the packed product
            return F.linear(input, weight.to_dense() if weight.is_mkldnn else weight, self.bias)
        is_inference = not torch.is_grad_enabled() or not (weight.requires_grad or input.requires_grad)
        if not is_inference or input.dtype != weight.dtype or input.device != weight.device:
            return super().forward(input)  # which unpacks
        num_rows = input.numel() // self.in_features
        if 0 < num_rows <= MAX_TUNED_ROWS and weight.is_mkldnn == self.kernels.is_packed:
            y = self.kernels.by_rows[num_rows](input.reshape(num_rows, -1), weight, self.bias)
            return y.view(*input.shape[:-1], self.out_features)
        return packed_linear(input, weight, self.bias) if weight.is_mkldnn else super().forward(input)

    @torch.no_grad()
    def pack_(self) -> None:
        """Bring the weight into the layout of the kernels that were chosen."""
        weight = self._stored_weight
        if self.kernels.is_packed and not self.is_packed and _can_be_tuned(weight) and weight.grad is None:
            torch.utils.swap_tensors(weight, nn.Parameter(pack(weight.detach()), weight.requires_grad))

    @torch.no_grad()
    def unpack_(self) -> None:
        """Make the weight an ordinary tensor."""
        weight = self._stored_weight
        if self.is_packed:
            torch.utils.swap_tensors(weight, nn.Parameter(weight.detach().to_dense(), weight.requires_grad))

    def train(self, mode: bool = True) -> TunedLinear:
        """Training mode unpacks the weight."""
        if mode:
            self.unpack_()
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        weight = self._stored_weight
        dense = nn.Parameter(weight.detach().to_dense(), weight.requires_grad) if self.is_packed else weight
        return vars(self) | {"_parameters": self._parameters | {"weight": dense}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if not self.training:
            self.pack_()

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> TunedLinear:
        was_packed = self.is_packed
        self.unpack_()
        super()._apply(fn, recurse)
        if was_packed:
            self.pack_()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.unpack_()  # in place: a copy would double the memory, and not follow edits
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        was_packed = self.is_packed
        self.unpack_()
        super()._load_from_state_dict(*args, **kwargs)
        if was_packed:
            self.pack_()


def language_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of a model's language model and its head, by name; not a head that is the embedding table."""
    is_tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("language_model." in name or (name == "lm_head" and not is_tied)):
            yield name, module


def tune_linears_(model: nn.Module) -> None:
    """Give the language model's linear layers the fastest kernels for few rows, measured once per shape.

    Layers are replaced, or packed again. Only 16-bit weights on a CPU are tuned; subclasses of `nn.Linear` and layers
    with hooks stay as they are. For a model that its caller owns.
    """
    groups: dict[Shape, list[str]] = defaultdict(list)
    for name, layer in list(language_linears(model)):
        if type(layer) is TunedLinear:
            layer.pack_()
        elif type(layer) is nn.Linear and not _has_hooks(layer) and _can_be_tuned(layer.weight):
            groups[layer.weight.dtype, layer.out_features, layer.in_features].append(name)
    for key, names in groups.items():
        if key not in _measured:
            weights = [layer.weight.detach() for layer in map(model.get_submodule, names)]  # type: ignore[operator]
            _measured[key] = measure_kernels(weights)
        if not _measured[key].is_default:
            for name in names:
                layer = TunedLinear(model.get_submodule(name), _measured[key])  # type: ignore[arg-type]
                layer.pack_()
                model.set_submodule(name, layer)


def repack_linears_(model: nn.Module) -> None:
    """Bring the weights of tuned layers into their layout again, which a state dict has undone."""
    for layer in model.modules():
        if type(layer) is TunedLinear:
            layer.pack_()


def untune_linears_(model: nn.Module) -> None:
    """Put ordinary `nn.Linear` layers in the place of tuned ones, with the same parameters."""
    for name, layer in list(model.named_modules()):
        if type(layer) is TunedLinear:
            with torch.device("meta"):
                linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            linear.weight, linear.bias = layer.weight, layer.bias
            model.set_submodule(name, linear.train(layer.training))


def kernels_of(model: nn.Module) -> dict[str, Kernels]:
    """The kernels chosen for a model's layers, by "N x K"; layers that were not tuned are left out."""
    tuned = {f"{m.out_features} x {m.in_features}": m.kernels for m in model.modules() if isinstance(m, TunedLinear)}
    for (_, rows, columns), kernels in _measured.items():
        if any((m.out_features, m.in_features) == (rows, columns) for _, m in language_linears(model)):
            tuned.setdefault(f"{rows} x {columns}", kernels)
    return tuned


@torch.inference_mode()
def measure_kernels(
    weights: list[Tensor], measure: Callable[[dict[str, Callable[[int], object]]], dict[str, float]] = least_seconds
) -> Kernels:
    """Choose the kernels for matrices of one shape, of which some rows are multiplied by every candidate.

    Args:
        weights: (N, K) each.
        measure: gives the seconds of each candidate; see `least_seconds`.
    """
    num_rows = min(len(weights[0]), max(1, _CHUNK_BYTES // weights[0][0].nbytes // _CHUNK_ROWS) * _CHUNK_ROWS)
    chunks = (weight[i : i + num_rows] for weight in weights for i in range(0, len(weight) - num_rows + 1, num_rows))
    plain = list(islice(chunks, _NUM_CHUNKS))
    packed = _try_pack(plain)
    layouts = {"linear": plain, "mv": plain, "packed": packed}
    seconds: dict[int, dict[str, float]] = {}
    generator = torch.Generator("cpu").manual_seed(0)
    for num_rows in (*_PLAIN, _MANY_ROWS):
        rows = torch.randn(num_rows, plain[0].shape[1], generator=generator, device="cpu").to(plain[0].dtype)
        kernels = [*_PLAIN.get(num_rows, [Kernel("linear", num_rows)])]
        kernels += _PACKED.get(num_rows, [Kernel("packed", num_rows)]) if packed else []
        seconds[num_rows] = measure({str(kernel): _call(kernel, rows, layouts[kernel.operation]) for kernel in kernels})
    return _choose(seconds, plain[0].nbytes)


def _call(kernel: Kernel, rows: Tensor, weights: list[Tensor]) -> Callable[[int], object]:
    return lambda index: kernel(rows, weights[index % len(weights)])


def _choose(seconds: dict[int, dict[str, float]], num_bytes: int) -> Kernels:
    """Packed weights have to be clearly faster for one row, and not clearly slower for many."""
    chosen: dict[bool, dict[int, Kernel]] = {}
    for is_packed, candidates in ((False, _PLAIN), (True, _PACKED)):
        if all(str(kernel) in seconds[1] for kernel in candidates[1]):
            chosen[is_packed] = {
                num_rows: {str(kernel): kernel for kernel in kernels}[
                    fastest({str(kernel): seconds[num_rows][str(kernel)] for kernel in kernels})
                ]
                for num_rows, kernels in candidates.items()
            }
    is_packed = False
    if True in chosen:
        single = {str(chosen[layout][1]): seconds[1][str(chosen[layout][1])] for layout in (False, True)}
        packed, linear = (seconds[_MANY_ROWS][str(Kernel(op, _MANY_ROWS))] for op in ("packed", "linear"))  # type: ignore[arg-type]
        many = {"packed": packed, "linear": linear}
        is_packed = fastest(single) == str(chosen[True][1]) and fastest(many) == "packed"
    return Kernels(is_packed, chosen[is_packed], seconds, num_bytes)


def pack(weight: Tensor) -> Tensor:
    """(N, K) in oneDNN's blocked layout.

    Raises:
        RuntimeError: oneDNN does not have the dtype on this processor.
    """
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` with a packed weight; without gradients."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


def _try_pack(weights: list[Tensor]) -> list[Tensor]:
    """No tensors where oneDNN is missing, or does not have the dtype on this processor."""
    try:
        packed = [pack(weight) for weight in weights]
        packed_linear(weights[0].new_zeros(1, weights[0].shape[1]), packed[0])
        return packed
    except (AttributeError, RuntimeError):
        return []


def _can_be_tuned(weight: Tensor) -> bool:
    is_on_cpu = weight.device.type == "cpu" and type(weight) is nn.Parameter
    return is_on_cpu and weight.dtype in _DTYPES and weight.numel() >= _MIN_ELEMENTS


def _has_hooks(layer: nn.Module) -> bool:
    """Such as accelerate's, of offloaded weights."""
    return hasattr(layer, "_hf_hook") or bool(layer._forward_hooks or layer._forward_pre_hooks)
