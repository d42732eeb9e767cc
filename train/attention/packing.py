"""Packs the rows of a micro-batch into one sequence without padding, for flash-attn on a GPU (cpu.py: for a CPU).

flash-attn finds the row boundaries by `position_ids`, which restart at 0 in each row. Without flash-attn rows stay
padded: a mask would cost more than the little padding that sorting by length leaves.

B rows, S tokens of the longest, T of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

VARLEN = "flash_attention_2"


@dataclass(frozen=True)
class Packing:
    """Maps the tokens of a padded micro-batch to the packed sequence."""

    tokens: Tensor  # (T - num_pads,) indices into (B*S,)
    position_ids: Tensor  # (1, T), within each row
    num_pads: int  # unused tokens at the end

    @classmethod
    def of(cls, attention_mask: Tensor, shared_prefix_length: int) -> Packing:
        """From the mask of rows padded on the right, (B, S). The shared prefix is kept in every row here."""
        rows, columns = attention_mask.nonzero().unbind(1)  # (T,) each
        return cls(rows * attention_mask.shape[1] + columns, columns.unsqueeze(0), 0)

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """The model's inputs for padded ids, (B, S)."""
        return {"input_ids": self.take(input_ids, 0), "position_ids": self.position_ids}

    def num_rows(self, attention_mask: Tensor) -> Tensor:
        """(1, T) in how many rows each token stands; 0 for the unused ones at the end."""
        return self.take(attention_mask, 0)

    def take(self, padded: Tensor, pad: int) -> Tensor:
        """(B, S) -> (1, T), with `pad` for the unused tokens at the end"""
        return F.pad(padded.reshape(-1)[self.tokens], (0, self.num_pads), value=pad).unsqueeze(0)


def use_varlen_attention_(language_model: PreTrainedModel, precision: str) -> None:
    """Use flash-attn in the language model, if it is installed and supports the precision."""
    if is_flash_attn_2_available() and precision != "fp32":
        language_model.set_attn_implementation(VARLEN)
