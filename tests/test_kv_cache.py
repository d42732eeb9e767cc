"""The KV cache that grows in place, and rows that leave and join."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from yi_vl.engine.cache_layers import GrowableLayer
from yi_vl.engine.kv_cache import gather, layers_of, new_cache


def states(num_rows: int, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, (B, H, T, E)."""
    return torch.randn(num_rows, 2, num_tokens, 8), torch.randn(num_rows, 2, num_tokens, 8)


def test_it_holds_what_transformers_cache_holds_however_far_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GrowableLayer, "num_reserved", 3)
    layer, reference = GrowableLayer(), DynamicCache()
    for num_tokens in (5, 1, 1, 1, 1, 4, 1, 2):
        given = states(2, num_tokens)
        expected = reference.update(*given, 0)
        for part, expected_part in zip(layer.update(*given), expected, strict=True):
            assert torch.equal(part, expected_part)
    assert layer.get_seq_length() == 16


def test_a_step_copies_no_cached_keys() -> None:
    layer = GrowableLayer()
    first, _ = layer.update(*states(1, 10))
    for _ in range(100):
        keys, _ = layer.update(*states(1, 1))
        assert keys.data_ptr() == first.data_ptr()


@pytest.mark.parametrize("change", ["crop", "select", "reorder"])
def test_keys_given_out_stay_as_they_are(change: str) -> None:
    """What transformers does to a cache is followed by copying, not by writing over what others may still read."""
    layer, given = GrowableLayer(), states(2, 6)
    keys, values = layer.update(*given)
    rows = torch.tensor([1, 0])
    {
        "crop": lambda: layer.crop(-2),
        "select": lambda: layer.batch_select_indices(rows),
        "reorder": lambda: layer.reorder_cache(rows),  # type: ignore[arg-type]
    }[change]()
    new = states(2, 1)
    updated_keys, _ = layer.update(*new)
    before = given[0][:, :, :4] if change == "crop" else given[0][rows]
    assert torch.equal(updated_keys, torch.cat([before, new[0]], dim=2))
    assert torch.equal(keys, given[0]) and torch.equal(values, given[1])


def test_gathered_rows_are_padded_in_front_and_only_as_far_as_the_longest_is_long() -> None:
    first, second = new_cache(), new_cache()
    keys, values = states(2, 5)
    more_keys, more_values = states(1, 3)
    for index in range(2):
        first.update(keys, values, index)
        second.update(more_keys, more_values, index)
    has_gap = torch.tensor([[True, True, False, False, True], [True] * 5])
    gathered, is_token = gather([(first, has_gap, [0]), (second, torch.ones(1, 3, dtype=torch.bool), [0, 0])])
    assert is_token.tolist() == [[True] * 3] * 3
    for layer_keys, layer_values in layers_of(gathered).values():
        assert torch.equal(layer_keys[0], keys[0][:, has_gap[0]]) and torch.equal(layer_values[1], more_values[0])
    gathered, is_token = gather([(first, has_gap, [1]), (second, torch.ones(1, 3, dtype=torch.bool), [0])])
    assert is_token.tolist() == [[True] * 5, [False] * 2 + [True] * 3]
    padding = layers_of(gathered)[1][0][1, :, :2]
    assert torch.equal(padding, torch.zeros_like(padding))
