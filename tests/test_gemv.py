"""Decoding on a CPU: matrix-vector products in bf16, and large pages."""

from __future__ import annotations

import os

import pytest
import torch
from tiny import tiny_model
from torch import nn

from yi_vl.engine.gemv import GemvLinear, use_gemm_, use_gemv_
from yi_vl.runtime import use_huge_pages


def test_gemv_equals_gemm() -> None:
    torch.manual_seed(0)
    layers = nn.ModuleList([nn.Linear(64, 48, bias=False), nn.Linear(64, 48)]).to(torch.bfloat16)
    vector, matrix = torch.randn(1, 1, 64, dtype=torch.bfloat16), torch.randn(2, 3, 64, dtype=torch.bfloat16)
    expected = [layer(given) for layer in layers for given in (vector, matrix)]
    use_gemv_(layers)
    assert all(type(layer) is GemvLinear and isinstance(layer, nn.Linear) for layer in layers)
    for actual, expected_product in zip(
        [layer(given) for layer in layers for given in (vector, matrix)], expected, strict=True
    ):
        torch.testing.assert_close(actual, expected_product, atol=0.01, rtol=0.01)
    use_gemm_(layers)
    assert all(type(layer) is nn.Linear for layer in layers)


def test_gemv_is_used_for_a_decoding_step_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().to(torch.bfloat16)
    use_gemv_(model)
    num_products, plain = 0, torch.mv

    def count(weight: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        nonlocal num_products
        num_products += 1
        return plain(weight, vector)

    monkeypatch.setattr(torch, "mv", count)
    with torch.inference_mode():
        model(input_ids=torch.tensor([[5, 6]]))
        assert num_products == 0
        model(input_ids=torch.tensor([[5]]))
    assert num_products == 2 * 7 + 1


@pytest.mark.parametrize("chosen", [None, "0"])
def test_huge_pages_are_enabled_unless_the_user_has_chosen(chosen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    if chosen is not None:
        monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", chosen)
    use_huge_pages()
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == (chosen or "1")
