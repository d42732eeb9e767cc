"""The rows of a micro-batch as one sequence, so that no padding is computed.

On a GPU flash-attn tells the rows apart by their positions, which begin anew with each: no token looks into another
row, and no mask is made. Where it is missing rows stay padded: a mask would cost more than the padding that sorting by
length leaves. On a CPU cpu.py packs in a way of its own.

B rows, S tokens of the longest, T of all. Called by loop.py, objective.py and cpu.py.
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
    """Where each token of a padded micro-batch lies in the one sequence."""

    tokens: Tensor  # (T - num_pads,) indices into (B*S,)
    positions: Tensor  # (1, T), each token's in its row
    num_pads: int  # tokens at the end that nothing looks at

    @classmethod
    def of(cls, attention_mask: Tensor, prefix: int) -> Packing:
        """That of rows padded on the right, (B, S). A `prefix` that they share is every row's own here."""
        rows, columns = attention_mask.nonzero().unbind(1)  # (T,) each
        return cls(rows * attention_mask.shape[1] + columns, columns.unsqueeze(0), 0)

    def inputs(self, input_ids: Tensor) -> dict[str, Any]:
        """What the model is to be given for padded ids, (B, S)."""
        return {"input_ids": self.take(input_ids, 0), "position_ids": self.positions}

    def take(self, padded: Tensor, pad: int) -> Tensor:
        """(B, S) -> (1, T), with `pad` for the tokens that nothing looks at"""
        return F.pad(padded.reshape(-1)[self.tokens], (0, self.num_pads), value=pad).unsqueeze(0)


def use_varlen_attention_(language_model: PreTrainedModel, precision: str) -> None:
    """Make the language model attend with flash-attn, where it is installed and has kernels for the precision."""
    if is_flash_attn_2_available() and precision != "fp32":
        language_model.set_attn_implementation(VARLEN)
