"""A tensor of a GGUF file: its name and type there, and its values, read when they are written."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Fields = dict[str, Any]  # the metadata of a GGUF file: bool, int, float, str, or a list of one of them
_BLOCK_ELEMENTS = 1 << 22
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to be written; `ggml_type` is its type by its name in GGML: F32, F16, BF16 or Q8_0."""

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        """In the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block_elements, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[self.ggml_type]]
        return math.prod(self.shape) // block_elements * block_bytes

    def encode(self) -> np.ndarray:
        """The bytes for the file, (rows, bytes per row).

        Raises:
            ValueError: a value is beyond what float16 holds.
        """
        tensor = self.read()
        rows = tensor.reshape(-1, self.shape[-1])
        encoded = np.empty((len(rows), self.num_bytes // len(rows)), dtype=np.uint8)
        num_rows = max(1, _BLOCK_ELEMENTS // self.shape[-1])
        for first in range(0, len(rows), num_rows):  # block by block: intermediate values take little memory
            encoded[first : first + num_rows] = self._encode_block(rows[first : first + num_rows])
        return encoded

    def _encode_block(self, rows: Tensor) -> np.ndarray:
        if self.ggml_type in _DTYPES:
            converted = rows.to(_DTYPES[self.ggml_type]).contiguous()
            if self.ggml_type == "F16" and not converted.isfinite().all():
                raise ValueError(f"{self.name} has values beyond float16's 65504, or NaN; write bf16 (--type bf16).")
            return converted.view(torch.uint8).numpy()
        from gguf import GGMLQuantizationType
        from gguf.quants import quantize

        return np.asarray(quantize(rows.float().contiguous().numpy(), GGMLQuantizationType[self.ggml_type]))


def ggml_type_for(shape: tuple[int, ...], matrix_type: str) -> str:
    """The type of a tensor: vectors are F32, as llama.cpp wants them; rows that are not whole blocks of 32 are F16."""
    if len(shape) < 2:
        return "F32"
    return "F16" if matrix_type == "Q8_0" and shape[-1] % 32 else matrix_type
