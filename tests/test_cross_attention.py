"""Gated cross-attention: nothing at the start, nothing before an image, the last image after it; cached and generated.

A reference goes token by token, with a loop for which image each attends to.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunApp
from PIL import Image
from safetensors.torch import load_file
from tiny import IMAGE_TOKEN_ID, spread_model, tiny_config, tiny_processor
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.cache_utils import Cache
from transformers.generation import utils as generation_utils

import yi_vl
from train.optim import checkpoint_activations_
from yi_vl.auto import YiGatedConfig, YiGatedForCausalLM
from yi_vl.checkpoint.assemble import from_parts
from yi_vl.checkpoint.gguf_vision import vision_unsupported
from yi_vl.cli import app
from yi_vl.config import YiVLConfig
from yi_vl.connector.config import CROSS_ATTENTION, ConnectorConfig
from yi_vl.decoder.config import YiHybridConfig
from yi_vl.decoder.cross_attention import CROSS_BLOCK, GatedCrossAttention
from yi_vl.decoder.gated_config import cross_pattern
from yi_vl.decoder.image_keys import ImageKeysLayer
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor
from yi_vl.quantize import packed_layers
from yi_vl.versions import CACHE_ARGUMENT
from yi_vl.vllm_plugin.unsupported import check_language_model

pytestmark = pytest.mark.core

RESAMPLED: dict[str, Any] = {"num_tokens": 5, "num_layers": 1, "num_heads": 4}
NUM_LAYERS = 4


def gated_config(every: int = 2, **connector: Any) -> YiVLConfig:
    config = tiny_config()
    config.text_config.num_hidden_layers = NUM_LAYERS
    config.set_connector_(ConnectorConfig(type=CROSS_ATTENTION, every=every, **connector))
    return config


def blocks(model: torch.nn.Module) -> list[GatedCrossAttention]:
    return [module for module in model.modules() if isinstance(module, GatedCrossAttention)]


def gated_model(is_open: bool = True, **connector: Any) -> YiVLForConditionalGeneration:
    """Random weights; `is_open`: the gates as if it had been trained."""
    model = spread_model(gated_config(**connector), seed=0)
    for index, block in enumerate(blocks(model) if is_open else ()):
        torch.nn.init.constant_(block.attention_gate, 0.6 + 0.1 * index)
        torch.nn.init.constant_(block.mlp_gate, -0.4)
    return model


def gated_processor(model: YiVLForConditionalGeneration) -> YiVLProcessor:
    processor = tiny_processor()
    processor.num_image_tokens = model.config.connector_config.num_prompt_tokens
    return processor


def llama_of(model: YiVLForConditionalGeneration) -> LlamaForCausalLM:
    """The same language model as transformers' own class, without the blocks."""
    text = model.config.text_config
    values = {name: getattr(text, name) for name in LlamaConfig().to_dict() if hasattr(text, name)}
    del values["model_type"]
    llama = LlamaForCausalLM(LlamaConfig(**values)).eval()
    weights = {name.removeprefix("language_model."): w for name, w in model.model.language_model.state_dict().items()}
    llama.model.load_state_dict({name: weight for name, weight in weights.items() if "cross_block" not in name})
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    return llama


def tokens(num_rows: int, length: int, images: dict[int, list[int]]) -> Tensor:
    """Random ids, and markers at these columns of these rows."""
    ids = torch.randint(5, 800, (num_rows, length), generator=torch.Generator().manual_seed(1))
    for row, columns in images.items():
        ids[row, columns] = IMAGE_TOKEN_ID
    return ids


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 56, 56, generator=torch.Generator().manual_seed(2))


ROWS = {0: [3], 1: [0, 7], 3: [5]}  # row 2 has no image


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
        gated_model().generate(tokens(1, 5, {}), cache_implementation="static")


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


def test_the_decoder_alone_is_one_of_transformers(tmp_path: Path) -> None:
    config = gated_config().text_config
    model = AutoModelForCausalLM.from_config(config).eval()
    assert isinstance(model, YiGatedForCausalLM) and all(not b.attention_gate.any() for b in blocks(model))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded.config, YiGatedConfig) and loaded.config.cross_layers == [1, 3]
    ids = tokens(1, 8, {})
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    hidden = loaded(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == NUM_LAYERS + 1


def test_blocks_come_before_the_last_of_every_so_many_layers() -> None:
    assert cross_pattern(32, 4) == [3, 7, 11, 15, 19, 23, 27, 31] and cross_pattern(5, 2) == [1, 3]


@pytest.mark.parametrize("layers", [[], [4], [-1], [1, 1], [3, 1], [True], "1"])
def test_wrong_layers_are_named(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"cross_layers is .*expected some of the layers 0 to 3, in ascending order"):
        YiGatedConfig(num_hidden_layers=4, cross_layers=layers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gates are open, saved."""
    path = tmp_path_factory.mktemp("gated")
    model = gated_model(**RESAMPLED)
    model.save_pretrained(path)
    gated_processor(model).save_pretrained(path)
    return path


@torch.inference_mode()
def test_saved_and_loaded_it_computes_the_same(folder: Path) -> None:
    model, ids, images = gated_model(**RESAMPLED), tokens(4, 12, ROWS), pixels(4)
    loaded = yi_vl.load(folder, dtype="float32")
    assert loaded.processor.tokens_per_image == loaded.model.config.num_image_tokens == 1
    assert loaded.model.config.num_image_features == 5 and loaded.model.config.text_config.cross_layers == [1, 3]
    auto = AutoModelForImageTextToText.from_pretrained(folder)
    expected = model(input_ids=ids, pixel_values=images).logits
    for each in (loaded.model, auto):
        logits = each(input_ids=ids, pixel_values=images).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert "from yi_vl.auto import" in (folder / "yi_vl_classes.py").read_text()
    assert json.loads((folder / "config.json").read_text())["text_config"]["model_type"] == "yi_gated"


@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.06), ("int4", 0.7)])
@torch.inference_mode()
def test_quantized_the_blocks_are_too(folder: Path, scheme: str, tolerance: float) -> None:
    quantized, exact = (yi_vl.load(folder, dtype="float32", quantize=q).model for q in (scheme, None))
    names = [name for name, _ in packed_layers(quantized)]
    assert sum(CROSS_BLOCK in name for name in names) == 2 * 7, "of two blocks all matrices"
    ids, images = tokens(1, 8, {0: [2]}), pixels(1)
    logits, expected = (model(input_ids=ids, pixel_values=images).logits for model in (quantized, exact))
    assert (logits - expected).std() < tolerance * expected.std()


def test_the_prompt_has_one_token_for_an_image(folder: Path) -> None:
    processor = yi_vl.load(folder).processor
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}, {"type": "image"}]}]
    encoded = processor.encode_messages(messages)
    assert encoded.input_ids.count(IMAGE_TOKEN_ID) == 2 and len(encoded.image_starts) == 2
    image = Image.new("RGB", (60, 40), "red")
    inputs = processor(text="<image_placeholder>a<image_placeholder>", images=[image, image], return_tensors="pt")
    assert int((inputs["input_ids"] == IMAGE_TOKEN_ID).sum()) == 2


def refused(run_app: RunApp, *arguments: object) -> str:
    code, out, err = run_app("yi-vl", app, *arguments)
    assert code == 2 and "Traceback" not in err, out + err
    return " ".join(err.split())


@pytest.mark.parametrize("layout", ["official", "llava-hf", "gguf"])
def test_other_layouts_are_refused_by_name(layout: str, folder: Path, tmp_path: Path, run_app: RunApp) -> None:
    message = refused(run_app, "convert", folder, tmp_path / "out", "--to", layout)
    assert f"type yi_gated, and the layout '{layout}' has no place for its blocks of gated cross-attention" in message
    assert "connector of type cross_attention" in str(vision_unsupported(gated_config()))
    assert not (tmp_path / "out").exists()


def test_other_architectures_are_not_made_of_it(folder: Path, tmp_path: Path, run_app: RunApp) -> None:
    message = refused(run_app, "expand", folder, tmp_path / "out", "--after-every", "2")
    assert "type yi_gated, whose layers differ. Expand the dense model" in message and "its connector" in message
    message = refused(run_app, "upcycle", folder, tmp_path / "out", "--experts", "2")
    assert "type yi_gated, whose blocks of gated cross-attention a hybrid decoder cannot have" in message
    with pytest.raises(ValueError, match="yi_gated model; the language model must be a llama"):
        from_parts("ViT-B-32", None, str(folder), 224)
    with pytest.raises(ValueError, match="goes into a llama, and the language model is a yi_hybrid"):
        YiVLConfig(text_config=YiHybridConfig(), connector_config=ConnectorConfig(type=CROSS_ATTENTION))
    with pytest.raises(ValueError, match="has blocks of gated cross-attention, and the connector is of type mlp"):
        YiVLConfig(text_config=YiGatedConfig())


def test_vllm_refuses_it_by_name() -> None:
    with pytest.raises(ValueError, match=r"gated cross-attention \(yi_gated\).* use yi-vl serve"):
        check_language_model(YiGatedConfig())
    check_language_model(LlamaConfig())


def test_it_is_converted_to_its_own_layout(folder: Path, tmp_path: Path, run_app: RunApp) -> None:
    assert run_app("yi-vl", app, "convert", folder, tmp_path / "copy", "--to", "yi-vl", "--verify")[0] == 0
    weights = load_file(tmp_path / "copy/model.safetensors")
    assert any(CROSS_BLOCK in name for name in weights)


def test_info_says_what_it_is(folder: Path, run_app: RunApp) -> None:
    code, out, _ = run_app("yi-vl", app, "info", folder)
    text = " ".join(out.replace("│", " ").split())
    count = sum(parameter.numel() for block in blocks(gated_model()) for parameter in block.parameters())
    assert code == 0 and f"gated blocks before layers 1, 3 (from 0), of {count:,} parameters" in text
    assert "a resampler of 1 layers" in text and "5 per image, of 16 patches; one token in the prompt" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_config": {"cross_layers": [9]}}, "cross_layers is .9.; expected some of the layers 0 to 3"),
        ({"connector_config": {"num_tokens": 10**9}}, "connector_config.num_tokens is 1000000000"),
        ({"connector_config": {"type": "mlp", "num_tokens": None, "num_layers": None}}, "has no|of type mlp"),
    ],
)
def test_a_broken_config_is_named(changes: dict[str, Any], message: str, folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    for section, changed in changes.items():
        values[section] |= changed
    shutil.copytree(folder, tmp_path / "broken")
    (tmp_path / "broken/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        yi_vl.load(tmp_path / "broken")


def test_tiles_are_refused(tmp_path: Path) -> None:
    model = gated_model()
    processor = gated_processor(model)
    yi_vl.YiVL(model, processor).save(tmp_path / "model")
    with pytest.raises(ValueError, match=r"up to 4 tiles.*cross_attention"):
        yi_vl.load(tmp_path / "model", image_tiles=4)
    processor.image_processor.max_tiles = 2
    with pytest.raises(ValueError, match=r"up to 2 tiles.*cross_attention"):
        yi_vl.YiVL(model, processor)
