"""Gated cross-attention: nothing at the start, nothing before an image, the last image after it; cached and generated.

A reference goes token by token, with a loop for which image each attends to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from gated import NUM_LAYERS, RESAMPLED, ROWS, blocks, gated_model, llama_of, pixels, tokens
from tiny import IMAGE_TOKEN_ID
from torch import Tensor
from transformers import (
    DynamicCache,
)
from transformers.cache_utils import Cache
from transformers.generation import utils as generation_utils

from train.optim import checkpoint_activations_
from yi_vl.decoder.image_keys import ImageKeysLayer
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.versions import CACHE_ARGUMENT

pytestmark = pytest.mark.core


@pytest.mark.parametrize("connector", [{}, RESAMPLED])
@torch.inference_mode()
def test_fresh_blocks_change_nothing_to_the_bit(connector: dict[str, Any]) -> None:
    model, ids = gated_model(is_open=False, **connector), tokens(4, 12, ROWS)
    logits = model(input_ids=ids, pixel_values=pixels(4)).logits
    assert torch.equal(logits, llama_of(model)(input_ids=ids).logits)


@torch.inference_mode()
def test_what_has_no_image_before_it_stays_as_the_language_models_also_after_training() -> None:
    model, ids = gated_model(), tokens(4, 12, ROWS)
    logits, expected = model(input_ids=ids, pixel_values=pixels(4)).logits, llama_of(model)(input_ids=ids).logits
    assert torch.equal(logits[2], expected[2])
    for row, columns in ROWS.items():
        assert torch.equal(logits[row, : columns[0]], expected[row, : columns[0]])
        assert (logits[row, columns[0] :] - expected[row, columns[0] :]).abs().amax(-1).min() > 1e-3
    text = ids[2:3]
    assert torch.equal(model(input_ids=text).logits, llama_of(model)(input_ids=text).logits)
    sequences = [each.generate(text, max_new_tokens=8, do_sample=False) for each in (model, llama_of(model))]
    assert torch.equal(*sequences)


def reference(model: YiVLForConditionalGeneration, ids: Tensor, features: Tensor) -> Tensor:
    """Logits (1, S, V) of one row: each token's cross-attention by itself, to the features of one image, (P, D)."""
    inner, config = model.model.language_model, model.config.text_config
    hidden = inner.embed_tokens(ids)
    rotary = inner.rotary_emb(hidden, torch.arange(ids.shape[1]).unsqueeze(0))
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)[None, None]
    for layer in inner.layers:
        if (block := layer.cross_block) is not None:
            seen = 0
            for position, id in enumerate(ids[0].tolist()):
                seen += id == IMAGE_TOKEN_ID
                if not seen:
                    continue
                token, image = hidden[:, position].clone(), features[seen - 1]
                heads = block.q_proj(block.input_layernorm(token)).view(config.num_attention_heads, -1)
                keys, values = (p(image).view(len(image), -1, heads.shape[1]) for p in (block.k_proj, block.v_proj))
                group = config.num_attention_heads // keys.shape[1]
                outputs = [
                    ((keys[:, h // group] @ query) * len(query) ** -0.5).softmax(0) @ values[:, h // group]
                    for h, query in enumerate(heads)
                ]
                token = token + block.attention_gate.tanh() * block.o_proj(torch.cat(outputs))
                token = token + block.mlp_gate.tanh() * block.mlp(block.post_attention_layernorm(token))
                hidden[:, position] = token
        hidden = super(type(layer), layer).forward(hidden, attention_mask=mask, position_embeddings=rotary)
    return model.lm_head(inner.norm(hidden))


@pytest.mark.parametrize("connector", [{}, {"every": 1}, RESAMPLED])
@torch.inference_mode()
def test_each_token_attends_to_the_last_image_before_it(connector: dict[str, Any]) -> None:
    model, ids = gated_model(**connector), tokens(4, 12, ROWS)
    logits = model(input_ids=ids, pixel_values=pixels(4)).logits
    features = model.model.encode_images(pixels(4))
    for row, numbers in ((0, [0]), (1, [1, 2]), (3, [3])):
        expected = reference(model, ids[row : row + 1], features[numbers])
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [4, 3, 5], [1, 6, 4, 1]])
@torch.inference_mode()
def test_in_chunks_it_computes_the_same(sizes: list[int]) -> None:
    model, ids, images = gated_model(), tokens(4, 12, ROWS), pixels(4)
    expected = model(input_ids=ids, pixel_values=images).logits
    cache, logits, start = DynamicCache(config=model.config.text_config), [], 0
    numbers = (ids == IMAGE_TOKEN_ID).flatten().cumsum(0).view_as(ids) - 1
    for size in sizes:
        chunk = slice(start, start + size)
        given = numbers[:, chunk][ids[:, chunk] == IMAGE_TOKEN_ID]
        inputs = {"input_ids": ids[:, chunk], "pixel_values": images[given], CACHE_ARGUMENT: cache}
        logits.append(model(**inputs).logits)
        start += size
        assert cache.get_seq_length() == start
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-4)
    layers = cache.layers[NUM_LAYERS:]
    assert len(layers) == 2 and all(isinstance(layer, ImageKeysLayer) for layer in layers)
    assert layers[0].has_image.tolist() == [True, True, False, True]


@torch.inference_mode()
def test_an_image_that_is_not_in_the_cache_is_handed_in() -> None:
    """As after a prefix whose last image is not the one whose keys are stored."""
    model, ids, images = gated_model(), tokens(4, 12, ROWS), pixels(4)
    expected = model(input_ids=ids, pixel_values=images).logits[:, 7:]
    features, cache = model.model.encode_images(images), DynamicCache(config=model.config.text_config)
    model(input_ids=ids[:, :7], pixel_values=images[[0, 1, 3]], **{CACHE_ARGUMENT: cache})
    for layer in cache.layers[NUM_LAYERS:]:
        layer.reset()
    inputs: dict[str, Any] = {"input_ids": ids[:, 7:], "pixel_values": images[2:3], CACHE_ARGUMENT: cache}
    given = [features[0], None, None, features[3]]  # row 1 marks an image itself
    torch.testing.assert_close(model(**inputs, previous_images=given).logits, expected, rtol=1e-4, atol=1e-4)
    assert cache.layers[-1].has_image.tolist() == [True, True, False, True]
    stored = sum(part.nbytes for layer in cache.layers[NUM_LAYERS:] for part in (layer.keys, layer.values))
    assert stored == 4 * model.config.text_config.image_key_bytes(16, value_bytes=4)
    with pytest.raises(ValueError, match="3 previous images of 4 rows"):
        model(**inputs, previous_images=given[:3])
    more: dict[str, Any] = {"input_ids": tokens(4, 2, {}), CACHE_ARGUMENT: cache}
    expected = model(**more).logits
    cache.crop(-2)
    for layer in cache.layers[NUM_LAYERS:]:  # of other images
        layer.keys, layer.values = torch.randn_like(layer.keys), torch.randn_like(layer.values)
    replaced = [features[0], features[2], None, features[3]]
    torch.testing.assert_close(model(**more, previous_images=replaced).logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_samples_in_one_row_do_not_see_each_others_images() -> None:
    model, ids, images = gated_model(), tokens(4, 12, ROWS), pixels(4)
    lengths = [12, 9, 5, 11]
    expected = [
        model(input_ids=ids[row : row + 1, :length], pixel_values=images[numbers] if numbers else None).logits
        for row, (length, numbers) in enumerate(zip(lengths, [[0], [1, 2], [], [3]]))
    ]
    packed = torch.cat([ids[row, :length] for row, length in enumerate(lengths)]).unsqueeze(0)
    position_ids = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    sample = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))
    mask = (sample[:, None] == sample).tril()[None, None]
    for use_cache in (True, False):
        inputs = {"attention_mask": mask, "position_ids": position_ids, "use_cache": use_cache}
        logits = model(input_ids=packed, pixel_values=images, **inputs).logits
        torch.testing.assert_close(logits, torch.cat(expected, dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_images_than_of_markers_is_refused(count: int) -> None:
    model = gated_model()
    with pytest.raises(ValueError, match=f"2 image tokens in input_ids but {count} images; each image needs"):
        model(input_ids=tokens(1, 8, {0: [1, 4]}), pixel_values=pixels(count) if count else None)


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows of ids, padded on the left."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def prompts() -> list[tuple[list[int], list[int]]]:
    """Ids, and the images that they mark."""
    ids = tokens(4, 12, ROWS).tolist()
    return [(ids[0][:9], [0]), (ids[1], [1, 2]), (ids[2][:5], []), (ids[3][:11], [3])]


GREEDY = {"max_new_tokens": 8, "do_sample": False}


@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        GREEDY | {"use_cache": False},
        GREEDY | {"num_beams": 3},
        GREEDY | {"num_beams": 4, "num_return_sequences": 2},
    ],
)
@torch.inference_mode()
def test_generated_together_as_alone(settings: dict[str, Any]) -> None:
    model, images = gated_model(), pixels(4)
    together = model.generate(**padded([ids for ids, _ in prompts()]), pixel_values=images, **settings)[:, 12:]
    for row, (ids, numbers) in enumerate(prompts()):
        given = {"pixel_values": images[numbers]} if numbers else {}
        alone = model.generate(torch.tensor([ids]), **given, **settings)[:, len(ids) :]
        count = len(alone)
        assert together[row * count : (row + 1) * count, : alone.shape[1]].tolist() == alone.tolist()
        if settings == GREEDY:  # against no cache, token by token
            current = list(ids)
            for token in alone[0].tolist():
                logits = model(input_ids=torch.tensor([current]), use_cache=False, **given).logits
                logits[..., IMAGE_TOKEN_ID] = -torch.inf
                assert int(logits[0, -1].argmax()) == token
                current.append(token)


@pytest.mark.skipif(
    not hasattr(generation_utils, "_slice_mm_encoder_output"), reason="this transformers has no chunks with images"
)
@torch.inference_mode()
def test_a_prompt_in_transformers_chunks() -> None:
    model, images, inputs = gated_model(), pixels(4), padded([ids for ids, _ in prompts()])
    expected = model.generate(**inputs, pixel_values=images, **GREEDY)
    for size in (3, 5):
        chunked = model.generate(**inputs, pixel_values=images, **GREEDY, prefill_chunk_size=size)
        assert torch.equal(chunked, expected)


def test_a_static_cache_is_refused() -> None:
    with pytest.raises(ValueError, match=r"static cache .* leave cache_implementation out"):
        gated_model().generate(tokens(1, 5, {}), max_new_tokens=2, cache_implementation="static")


@torch.inference_mode()
def test_drafts_from_the_prompt_change_nothing() -> None:
    model, images = gated_model(), pixels(4)
    for ids, numbers in prompts()[:2]:
        inputs = {"inputs": torch.tensor([ids * 3]), "pixel_values": images[numbers * 3]}
        plain = model.generate(**inputs, max_new_tokens=30, do_sample=False)
        drafted = model.generate(**inputs, max_new_tokens=30, do_sample=False, prompt_lookup_num_tokens=4)
        assert torch.equal(plain, drafted)


@torch.inference_mode()
def test_sampled_sequences_of_one_prompt_are_those_of_its_repetitions() -> None:
    model, images = gated_model(), pixels(4)
    ids, numbers = next(prompt for prompt in prompts() if len(prompt[1]) == 1)  # transformers 5.16 mixes several up
    results = []
    for repeats, settings in ((1, {"num_return_sequences": 3}), (3, {})):
        torch.manual_seed(0)
        given = images[numbers].repeat(repeats, 1, 1, 1)
        inputs = torch.tensor([ids] * repeats)
        results.append(model.generate(inputs, pixel_values=given, do_sample=True, max_new_tokens=8, **settings))
    assert torch.equal(*results)


@pytest.mark.parametrize("has_image", [True, False])
@torch.inference_mode()
def test_a_second_turn_on_the_same_cache(has_image: bool) -> None:
    """A conversation in which each row goes on, with a new image or without, in both the last image is attended to."""
    model, images = gated_model(), pixels(4)
    first, second = tokens(2, 6, {0: [2], 1: [1]}), tokens(2, 5, {0: [1]} if has_image else {}) + 0
    cache = DynamicCache(config=model.config.text_config)
    begun = model.generate(first, pixel_values=images[:2], **{CACHE_ARGUMENT: cache}, **GREEDY)
    whole = torch.cat([begun, second], dim=1)
    new = {"pixel_values": images[2:3]} if has_image else {}
    mask = torch.ones_like(whole)
    continued = model.generate(whole, attention_mask=mask, **new, **{CACHE_ARGUMENT: cache}, **GREEDY)
    order = [0, 2, 1] if has_image else [0, 1]
    assert torch.equal(continued, model.generate(whole, attention_mask=mask, pixel_values=images[order], **GREEDY))


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([3, 1, 0, 2])), [3, 1, 0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 3])), [2, 3]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2, 3, 3]),
        (lambda cache: cache.crop(-1), [0, 1, 2, 3]),
    ],
)
@torch.inference_mode()
def test_rows_of_the_cache_take_their_images_with_them(change: Callable[[Cache], None], rows: list[int]) -> None:
    model, ids, more = gated_model(), tokens(4, 12, ROWS), tokens(8, 2, {})
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=ids, pixel_values=pixels(4), **{CACHE_ARGUMENT: cache})
    change(cache)
    num_kept = cache.get_seq_length()
    continued = model(input_ids=more[: len(rows)], **{CACHE_ARGUMENT: cache}).logits
    for row, source in enumerate(rows):
        whole = torch.cat([ids[source, :num_kept], more[row]]).unsqueeze(0)
        given = {0: [0], 1: [1, 2], 2: [], 3: [3]}[source]
        images = {"pixel_values": pixels(4)[given]} if given else {}
        expected = model(input_ids=whole, **images).logits[:, num_kept:]
        torch.testing.assert_close(continued[row : row + 1], expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_cache_that_is_reset_has_no_image() -> None:
    model = gated_model()
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=tokens(4, 12, ROWS), pixel_values=pixels(4), **{CACHE_ARGUMENT: cache})
    layers = [layer for layer in cache.layers if isinstance(layer, ImageKeysLayer)]
    assert layers and all(layer.has_image is not None for layer in layers)
    cache.reset()
    assert all(layer.keys is None and layer.has_image is None for layer in layers)


@torch.inference_mode()
def test_encoded_images_are_taken_as_they_are() -> None:
    model, ids, images = gated_model(), tokens(4, 12, ROWS), pixels(4)
    encoded = model.get_image_features(images)
    logits = model(input_ids=ids, mm_encoder_outputs={"image": encoded}).logits
    assert torch.equal(logits, model(input_ids=ids, pixel_values=images).logits)


def test_parameters_that_no_image_uses_take_part_and_change_nothing() -> None:
    """Under DDP and FSDP all ranks must use them, whatever is in their micro-batches."""
    model, ids = gated_model().train(), tokens(2, 8, {})
    features = torch.randn(1, 16, 32, requires_grad=True)
    used = model(input_ids=ids, unused_features=features).logits
    assert torch.equal(used, model(input_ids=ids).logits)
    used.pow(2).mean().backward()
    for block in blocks(model):
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in block.parameters())
    assert features.grad is not None and not features.grad.any()


def test_every_block_learns() -> None:
    model = gated_model().train()
    model(input_ids=tokens(4, 12, ROWS), pixel_values=pixels(4)).logits.pow(2).mean().backward()
    for block in blocks(model):
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in block.parameters())
    assert all(p.grad is not None and p.grad.any() for p in model.model.multi_modal_projector.parameters())


def test_checkpointed_activations_give_the_same_gradients() -> None:
    grads = []
    for checkpointing in (False, True):
        model = gated_model().train()
        if checkpointing:
            checkpoint_activations_(model)
        outputs = model(input_ids=tokens(4, 12, ROWS), pixel_values=pixels(4), use_cache=False)
        outputs.logits.pow(2).mean().backward()
        grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for expected, gradient in zip(*grads):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-7)
