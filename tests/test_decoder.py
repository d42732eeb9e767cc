"""The hybrid decoder: its configuration, attention, sharing of keys and values, router, experts and losses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, LlamaForCausalLM

from yi_vl.auto import YiHybridConfig, YiHybridForCausalLM, YiVLConfig, YiVLForConditionalGeneration
from yi_vl.config import OpenClipVisionConfig
from yi_vl.decoder.config import FULL, SLIDING, layer_pattern, sharing_pattern
from yi_vl.decoder.experts import Router, RouterSums, router_sums
from yi_vl.decoder.losses import balance_loss, router_loss
from yi_vl.versions import CACHE_ARGUMENT

pytestmark = pytest.mark.core

WINDOW = 5
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,  # answers are as long as is asked
    "initializer_range": 0.2,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "max_experts_per_tok": 4}


def decoder(**settings: Any) -> YiHybridForCausalLM:
    """Random weights: sliding layers but for every fourth, of which two share keys and values."""
    config = YiHybridConfig(**{**SIZES, "sliding_window": WINDOW, **settings})
    model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, YiHybridForCausalLM)
    return model.eval()


def random_ids(num_tokens: int, num_rows: int = 1) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (num_rows, num_tokens))


# The configuration


def test_the_patterns_of_the_defaults() -> None:
    config = YiHybridConfig(**SIZES)
    assert config.layer_types == [SLIDING, SLIDING, SLIDING, FULL] * 2
    assert config.kv_source_layers == [0, 1, 2, 3, 4, 5, 6, 3]
    assert sharing_pattern(layer_pattern(12, 2), 3) == [0, 1, 2, 1, 4, 1, 6, 7, 8, 7, 10, 7]
    assert sharing_pattern(layer_pattern(4, 1), 1) == [0, 1, 2, 3]


@pytest.mark.parametrize(("every", "group"), [(1, 1), (2, 1), (4, 2), (2, 3)])
@pytest.mark.parametrize("num_tokens", [1, WINDOW - 1, WINDOW, 40])
def test_kept_tokens_are_those_of_the_formula(every: int, group: int, num_tokens: int) -> None:
    types = layer_pattern(8, every)
    config = YiHybridConfig(
        **SIZES, layer_types=types, kv_source_layers=sharing_pattern(types, group), sliding_window=WINDOW
    )
    num_full = types.count(FULL)
    expected = math.ceil(num_full / group) * num_tokens + (8 - num_full) * min(num_tokens, WINDOW - 1)
    assert config.kv_tokens(num_tokens) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_types": [FULL] * 7}, "layer_types has 7 entries; expected 8"),
        ({"layer_types": [FULL] * 7 + ["linear_attention"]}, "layer_types has 'linear_attention'"),
        ({"kv_source_layers": [0, 1, 2]}, "kv_source_layers has 3 entries; expected 8"),
        ({"kv_source_layers": [0, 1, 2, 7, 4, 5, 6, 7]}, r"kv_source_layers\[3\] is 7; expected 3, or an earlier"),
        ({"kv_source_layers": [0, 1, 2, 3, 4, 5, 6, -1]}, r"kv_source_layers\[7\] is -1"),
        ({"kv_source_layers": [0, 1, 2, 3, 4, 5, 6, 5]}, "Layer 7 .* takes keys and values from layer 5"),
        ({"kv_source_layers": [0, 0, 2, 3, 4, 5, 6, 3]}, "Layer 1 .* only full_attention layers share"),
        ({"sliding_window": 1}, "sliding_window is 1; expected"),
        ({"num_experts": 1}, "num_experts is 1; expected 2 or more, or 0"),
        ({"num_experts": -2}, "num_experts is -2"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok is 5; expected 1 to 4"),
        ({"num_experts": 4, "max_experts_per_tok": 9}, "max_experts_per_tok is 9; expected 1 to 4"),
        ({"num_experts": 4, "router_top_p": 0.0}, "router_top_p is 0.0; expected more than 0"),
        ({"num_experts": 4, "router_top_p": 1.5}, "router_top_p is 1.5"),
        ({"num_experts": 4, "router_top_p": math.nan}, "router_top_p is nan"),
        ({"num_experts": 4, "router_balance_weights": [1.0, 1.0]}, "router_balance_weights is"),
        ({"num_experts": 4, "router_entropy_weight": -1.0}, "router_entropy_weight -1.0"),
        ({"num_experts": 4, "router_balance_parts": 0}, "router_balance_parts is 0"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        YiHybridConfig(**{**SIZES, **settings})


# Attention


def test_without_windows_sharing_and_experts_it_is_a_llama() -> None:
    llama = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = decoder(layer_types=[FULL] * 8, kv_source_layers=list(range(8)))
    model.load_state_dict(llama.state_dict())
    ids = random_ids(12, 2)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, llama(input_ids=ids).logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_sliding_layer_sees_its_window_and_nothing_before(attention: str) -> None:
    model = decoder(num_hidden_layers=1, layer_types=[SLIDING], kv_source_layers=[0])
    model.set_attn_implementation(attention)
    ids = random_ids(12)
    with torch.no_grad():
        last = model(input_ids=ids).logits[0, -1]
        for index in range(12):
            changed = ids.clone()
            changed[0, index] = ids[0, index] % 95 + 1
            is_seen = not torch.equal(model(input_ids=changed).logits[0, -1], last)
            assert is_seen == (index >= 12 - WINDOW), index


def test_a_layer_that_shares_has_no_projections_of_its_own() -> None:
    model = decoder()
    names = set(model.state_dict())
    assert "model.layers.3.self_attn.k_proj.weight" in names
    assert not names & {f"model.layers.7.self_attn.{matrix}_proj.weight" for matrix in "kv"}


def test_a_shared_layer_attends_to_the_keys_and_values_of_its_source() -> None:
    """The same function as a layer of its own, whose projections give exactly those keys and values."""
    settings: dict[str, Any] = {"num_hidden_layers": 2, "layer_types": [FULL, FULL]}
    shared = decoder(**settings, kv_source_layers=[0, 0])
    separate = decoder(**settings, kv_source_layers=[0, 1])
    separate.load_state_dict(shared.state_dict(), strict=False)
    first, second = separate.model.layers[0].self_attn, separate.model.layers[1].self_attn
    calls: dict[str, Tensor] = {}
    first.k_proj.register_forward_hook(lambda _, __, output: calls.__setitem__("k", output))
    first.v_proj.register_forward_hook(lambda _, __, output: calls.__setitem__("v", output))
    second.k_proj.register_forward_hook(lambda *_: calls["k"])
    second.v_proj.register_forward_hook(lambda *_: calls["v"])
    ids = random_ids(9, 2)
    with torch.no_grad():
        torch.testing.assert_close(shared(input_ids=ids).logits, separate(input_ids=ids).logits)


# The cache of transformers


@pytest.mark.parametrize("chunk", [1, 3, WINDOW - 1, WINDOW, WINDOW + 1])
@pytest.mark.parametrize("top_p", [None, 0.5])
def test_cached_is_uncached(chunk: int, top_p: float | None) -> None:
    model = decoder(**EXPERTS, router_top_p=top_p)
    ids = random_ids(2 * WINDOW + 3, 2)
    cache, outputs = DynamicCache(config=model.config), []
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for part in ids.split(chunk, dim=1):
            outputs.append(model(input_ids=part, use_cache=True, **{CACHE_ARGUMENT: cache}).logits)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-4, atol=1e-4)
    kept = [layer.keys.shape[2] for layer in cache.layers if layer.keys is not None]
    assert sum(kept) == model.config.kv_tokens(ids.shape[1])


@pytest.mark.parametrize("num_tokens", [2, WINDOW - 1, WINDOW, WINDOW + 1, 20])
def test_generated_is_uncached_greedy(num_tokens: int) -> None:
    model = decoder(**EXPERTS, router_top_p=0.5)
    ids = random_ids(num_tokens, 2)
    generated = model.generate(ids, max_new_tokens=8, do_sample=False)
    with torch.no_grad():
        for _ in range(8):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(generated, ids)


def test_a_padded_row_is_what_it_is_alone() -> None:
    model = decoder(**EXPERTS, router_top_p=0.5)
    short, long = random_ids(4), random_ids(11)
    ids = torch.cat([F.pad(short, (7, 0)), long])
    mask = (ids != 0).long()
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False)
    for row, alone in zip(generated, (short, long)):
        assert torch.equal(row[11:], model.generate(alone, max_new_tokens=9, do_sample=False)[0, alone.shape[1] :])


# Router and experts


def probabilities_router(probabilities: list[float], **settings: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights, (K,), for one token of these probabilities."""
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1}
    router = Router(YiHybridConfig(**{**SIZES, **sizes, "num_experts": len(probabilities), **settings}))
    with torch.no_grad():
        router.weight.copy_(torch.tensor(probabilities).log().unsqueeze(1).expand(-1, 4))
    _, ids, weights = router(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    return ids[0], weights[0].detach()


@pytest.mark.parametrize(
    ("top_p", "cap", "expected"),
    [
        (0.4, 4, [1]),
        (0.55, 4, [1, 3]),
        (0.75, 4, [1, 3]),
        (0.76, 4, [1, 3, 0]),
        (1.0, 4, [1, 3, 0, 2]),
        (1.0, 2, [1, 3]),
    ],
)
def test_top_p_takes_the_fewest_that_suffice(top_p: float, cap: int, expected: list[int]) -> None:
    probabilities = [0.2, 0.5, 0.05, 0.25]
    settings = {"router_top_p": top_p, "max_experts_per_tok": cap, "norm_topk_prob": False}
    ids, weights = probabilities_router(probabilities, **settings)
    num_free = cap - len(expected)
    assert ids.tolist() == expected + [4] * num_free
    torch.testing.assert_close(weights, torch.tensor([probabilities[i] for i in expected] + [0.0] * num_free))
    ids, weights = probabilities_router(probabilities, **{**settings, "norm_topk_prob": True})
    assert weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("cap", "expected"), [(64, 26), (8, 8)])
def test_an_undecided_router_takes_many_but_for_the_cap(cap: int, expected: int) -> None:
    ids, _ = probabilities_router([1 / 64] * 64, router_top_p=0.4, max_experts_per_tok=cap)
    assert (ids < 64).sum() == expected


def test_top_k_takes_as_many_for_every_token() -> None:
    ids, weights = probabilities_router([0.2, 0.5, 0.05, 0.25], num_experts_per_tok=2)
    assert ids.tolist() == [1, 3]
    torch.testing.assert_close(weights, torch.tensor([2 / 3, 1 / 3]))


@pytest.mark.parametrize("top_p", [None, 0.5])
def test_the_experts_kernels_agree(top_p: float | None) -> None:
    model, ids = decoder(**EXPERTS, router_top_p=top_p), random_ids(12, 2)
    results: list[tuple[Tensor, list[Tensor]]] = []
    for kernel in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(kernel)
        model.zero_grad()
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        results.append((outputs.logits.detach(), [parameter.grad.clone() for parameter in model.parameters()]))
    for logits, gradients in results[1:]:
        torch.testing.assert_close(logits, results[0][0], rtol=1e-4, atol=1e-4)
        for gradient, expected in zip(gradients, results[0][1]):
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4)


def test_the_experts_are_those_of_the_definition() -> None:
    """A token's output is the weighted sum of its experts' feed-forward layers."""
    layer = decoder(**EXPERTS).model.layers[0].mlp
    tokens = torch.randn(6, 32)
    with torch.no_grad():
        output, _ = layer(tokens.unsqueeze(0))
        _, ids, weights = layer.gate(tokens)
        expected = torch.zeros(6, 32)
        for token in range(6):
            for expert, weight in zip(ids[token].tolist(), weights[token]):
                gate, up = (layer.experts.gate_up_proj[expert] @ tokens[token]).chunk(2)
                expected[token] += weight * (layer.experts.down_proj[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(output[0], expected, rtol=1e-4, atol=1e-5)


# Losses and gradients


def test_sums_of_the_router_leave_padding_out() -> None:
    probabilities = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8]])
    ids = torch.tensor([[0, 2], [1, 0], [0, 2], [1, 0]])
    sums = router_sums(probabilities, ids, torch.tensor([[1, 1, 1, 0]]), num_parts=2)
    assert sums.tokens.tolist() == [2, 1]
    torch.testing.assert_close(sums.probabilities, torch.tensor([[1.1, 0.9], [0.9, 0.1]]))
    assert sums.first_choices.tolist() == [[1, 1], [1, 0]]
    assert sums.routed.tolist() == [[2, 1], [1, 0]]
    entropy = [-sum(p * math.log(p) for p in row) for row in probabilities[:3].tolist()]
    torch.testing.assert_close(sums.entropy, torch.tensor([entropy[0] + entropy[1], entropy[2]]))


def test_balance_is_what_its_formula_gives_by_hand() -> None:
    probabilities = torch.tensor([[0.7, 0.3], [0.4, 0.6], [0.9, 0.1], [0.2, 0.8]])
    sums = router_sums(probabilities, probabilities.topk(1).indices, None, num_parts=2)
    first = 2 * (0.5 * 0.55 + 0.5 * 0.45)  # one token each; mean probabilities 0.55 and 0.45
    assert balance_loss(sums).item() == pytest.approx(first)
    always = router_sums(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), torch.tensor([[0], [0]]), None, num_parts=1)
    assert balance_loss(always).item() == pytest.approx(2 * 0.85)


def test_the_loss_weighs_three_levels_and_entropy() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.1, 0.9]])
    sums = router_sums(probabilities, probabilities.topk(1).indices, None, num_parts=2)
    entropy = -(probabilities * probabilities.log()).sum(-1).mean().item()
    whole = 2 * (0.5 * 0.525 + 0.5 * 0.475)
    parts = (2 * 0.85 + 2 * 0.8) / 2  # each part prefers one expert, which the whole does not show
    settings = {**SIZES, "num_experts": 2, "num_experts_per_tok": 1, "max_experts_per_tok": 1}
    config = YiHybridConfig(**settings, router_balance_weights=[1.0, 10.0, 100.0], router_entropy_weight=1000.0)
    assert router_loss([sums, sums], config).item() == pytest.approx(11 * whole + 100 * parts + 1000 * entropy)


def test_a_part_without_tokens_does_not_count() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    sums = router_sums(probabilities, torch.tensor([[0], [0]]), torch.tensor([[1, 0]]), num_parts=2)
    assert balance_loss(sums).item() == pytest.approx(2 * 0.9)
    nothing = RouterSums(*(torch.zeros_like(part) for part in sums))
    assert balance_loss(nothing).item() == 0


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("top_p", [None, 0.5])
def test_activation_checkpointing_changes_no_gradient(use_reentrant: bool, top_p: float | None) -> None:
    weights = {"router_balance_weights": [1.0, 1.0, 1.0], "router_entropy_weight": 1.0}
    model, ids = decoder(**EXPERTS, **weights, router_top_p=top_p).train(), random_ids(12, 2)
    gradients = []
    for is_checkpointed in (False, True):
        for layer in model.model.layers:
            layer.gradient_checkpointing = is_checkpointed
            layer._gradient_checkpointing_func = lambda *args: torch.utils.checkpoint.checkpoint(
                *args, use_reentrant=use_reentrant
            )
        model.zero_grad()
        model(inputs_embeds=model.get_input_embeddings()(ids), labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


# In transformers, and in a Yi-VL


def test_fresh_weights_are_finite_and_of_the_configs_spread() -> None:
    model = decoder(**EXPERTS, initializer_range=0.05)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
    experts = model.model.layers[0].mlp
    for weight in (experts.experts.gate_up_proj, experts.experts.down_proj, experts.gate.weight):
        assert weight.std().item() == pytest.approx(0.05, rel=0.15)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    model = decoder(**EXPERTS, router_top_p=0.4)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert isinstance(loaded, YiHybridForCausalLM)
    assert loaded.config.router_top_p == 0.4
    ids = random_ids(9)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_yi_vl_with_it_answers_about_an_image(tmp_path: Path) -> None:
    vision = OpenClipVisionConfig(
        image_size=28, patch_size=14, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    text = YiHybridConfig(**SIZES, **EXPERTS, sliding_window=WINDOW, router_top_p=0.5)
    model = YiVLForConditionalGeneration(YiVLConfig(vision_config=vision, text_config=text, image_token_id=90)).eval()
    ids = torch.cat([random_ids(3) % 90, torch.full((1, 4), 90), random_ids(4) % 90], 1)
    pixels = torch.randn(1, 3, 28, 28)
    answer = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path)
    loaded = YiVLForConditionalGeneration.from_pretrained(tmp_path)
    assert isinstance(loaded.config.text_config, YiHybridConfig)
    assert torch.equal(answer, loaded.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False))
    with torch.no_grad():
        for _ in range(6):
            next_id = model(input_ids=ids, pixel_values=pixels).logits[:, -1, :90].argmax(-1, keepdim=True)
            ids = torch.cat([ids, next_id], 1)
    assert torch.equal(answer[:, -6:], ids[:, -6:])
