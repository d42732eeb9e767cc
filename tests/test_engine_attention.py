"""Attention of single tokens with grouped heads: the numbers of transformers' own, on any number of rows."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_processor, tiny_yi_vl
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from yi_vl.engine.attention import GROUPED, grouped_attention
from yi_vl.predict import YiVL


@pytest.mark.parametrize("num_new", [1, 3])
@pytest.mark.parametrize("is_masked", [False, True])
def test_grouped_attention_is_sdpa(num_new: int, is_masked: bool) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 8, num_new, 16)
    key, value = torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 16)
    mask = torch.ones(2, 1, num_new, 9, dtype=torch.bool).tril(9 - num_new) if is_masked or num_new > 1 else None
    if is_masked:
        mask[1, :, :, :4] = False
    module = nn.Module()
    module.num_key_value_groups = 4
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    output, weights = grouped_attention(module, query, key, value, mask, scaling=0.3)
    assert weights is None and output.shape == (2, num_new, 8, 16)
    torch.testing.assert_close(output, expected)


def test_the_engine_uses_it_in_place_of_torchs_attention_alone() -> None:
    model = tiny_yi_vl().model
    assert model.model.language_model.config._attn_implementation == GROUPED
    model.model.language_model.set_attn_implementation("eager")
    YiVL(model, tiny_processor())
    assert model.model.language_model.config._attn_implementation == "eager"
