"""The model: images land at their tokens, gradients reach every part, and a saved model is the same model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import IMAGE_TOKEN_ID, NUM_PATCHES, OFFICIAL, tiny_model, tiny_processor
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from yi_vl.config import YiVLConfig
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor

pytestmark = pytest.mark.core


def batch(num_images: list[int], length: int = 48, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows with so many images each, one text token between them; labels on the text after the last image."""
    draw = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(10, 900, (len(num_images), length), generator=draw)
    labels = input_ids.clone()
    for row, count in enumerate(num_images):
        for index in range(count):
            start = 1 + index * (NUM_PATCHES + 1)
            input_ids[row, start : start + NUM_PATCHES] = IMAGE_TOKEN_ID
        labels[row, : 1 + count * (NUM_PATCHES + 1)] = -100
    pixels = torch.randn(sum(num_images), 3, 56, 56, generator=draw)
    return {"input_ids": input_ids, "labels": labels, "pixel_values": pixels}


@pytest.fixture
def model() -> YiVLForConditionalGeneration:
    return tiny_model()


def test_features_stand_at_the_image_tokens_in_reading_order(model: YiVLForConditionalGeneration) -> None:
    inputs = batch([1, 0, 2])
    features = model.model.encode_images(inputs["pixel_values"])
    before = model.get_input_embeddings()(inputs["input_ids"])
    embeds = model.model.insert_images(before, inputs["input_ids"], features)
    slots = inputs["input_ids"] == IMAGE_TOKEN_ID
    assert torch.equal(embeds[0][slots[0]], features[0])
    assert torch.equal(embeds[2][slots[2]], features[1:].flatten(0, 1))
    assert torch.equal(embeds[~slots], before[~slots])


def test_rows_with_several_images_equal_rows_alone(model: YiVLForConditionalGeneration) -> None:
    inputs = batch([2, 0, 1])
    together = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits
    pixels = inputs["pixel_values"].split([2, 0, 1])
    for row in range(3):
        alone = model(input_ids=inputs["input_ids"][row : row + 1], pixel_values=pixels[row]).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=0)
    swapped = model(input_ids=inputs["input_ids"][:1], pixel_values=pixels[0].flip(0)).logits[0]
    assert not torch.allclose(together[0], swapped, atol=1e-3)


@pytest.mark.parametrize(
    ("num_tokens", "num_images"), [(NUM_PATCHES, 2), (NUM_PATCHES - 1, 1), (0, 1), (3 * NUM_PATCHES, 2)]
)
def test_a_mismatch_names_both_counts(model: YiVLForConditionalGeneration, num_tokens: int, num_images: int) -> None:
    input_ids = torch.full((1, 60), 5)
    input_ids[0, :num_tokens] = IMAGE_TOKEN_ID
    problem = f"{num_tokens} image tokens in input_ids but {num_images * NUM_PATCHES} image features"
    with pytest.raises(ValueError, match=problem):
        model(input_ids=input_ids, pixel_values=torch.zeros(num_images, 3, 56, 56))


def test_pixels_need_input_ids(model: YiVLForConditionalGeneration) -> None:
    with pytest.raises(ValueError, match="image tokens"):
        model(inputs_embeds=torch.zeros(1, 4, 32), pixel_values=torch.zeros(1, 3, 56, 56))
    with pytest.raises(ValueError, match="exactly one of"):
        model()


def test_every_parameter_that_is_used_gets_a_gradient(model: YiVLForConditionalGeneration) -> None:
    model.train()(**batch([1, 0])).loss.backward()
    silent = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    last_block = "model.vision_tower.visual.transformer.resblocks.2."
    assert silent == {
        name
        for name, _ in model.named_parameters()
        if name.startswith(
            (last_block, "model.vision_tower.visual.ln_post")
        )  # stored, never run: the penultimate block counts
    }


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # the name that every version knows
def test_gradient_checkpointing_changes_no_gradient(model: YiVLForConditionalGeneration) -> None:
    inputs = batch([1, 2])
    model.train()(**inputs).loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.model.vision_tower.visual.transformer.grad_checkpointing
    assert all(layer.gradient_checkpointing for layer in model.model.language_model.layers)
    model(**inputs).loss.backward()
    for name, parameter in model.named_parameters():
        if name in plain:
            torch.testing.assert_close(parameter.grad, plain[name], msg=name)
    model.gradient_checkpointing_disable()
    assert not model.model.vision_tower.visual.transformer.grad_checkpointing


def test_the_loss_is_the_mean_over_supervised_tokens(model: YiVLForConditionalGeneration) -> None:
    inputs = batch([1, 0])
    outputs = model(**inputs)
    flat_logits = outputs.logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(flat_logits, inputs["labels"][:, 1:].flatten())
    torch.testing.assert_close(outputs.loss, expected)
    num_items = torch.tensor(1000)
    num_supervised = (inputs["labels"][:, 1:] != -100).sum()
    normalized = model(**inputs, num_items_in_batch=num_items).loss
    torch.testing.assert_close(normalized, expected * num_supervised / num_items)


def test_only_the_logits_asked_for_are_computed(model: YiVLForConditionalGeneration) -> None:
    inputs = batch([1])
    del inputs["labels"]
    everything = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, everything[:, -1:])
    positions = torch.tensor([0, 40])
    torch.testing.assert_close(model(**inputs, logits_to_keep=positions).logits, everything[:, positions])


def test_images_may_come_encoded(model: YiVLForConditionalGeneration) -> None:
    inputs = batch([1, 1])
    features = model.get_image_features(inputs["pixel_values"])
    assert [tuple(feature.shape) for feature in features.pooler_output] == [(NUM_PATCHES, 32)] * 2
    expected = model(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits
    given = model(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": features}).logits
    assert torch.equal(given, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stem_widths", [None, [8, 16]])
def test_save_and_load_is_exact(tmp_path: Path, dtype: torch.dtype, stem_widths: list[int] | None) -> None:
    model = tiny_model(stem_widths=stem_widths).to(dtype)
    processor = tiny_processor(patch_size=model.config.vision_config.patch_size)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    config, loaded = (
        AutoConfig.from_pretrained(tmp_path),
        AutoModelForImageTextToText.from_pretrained(tmp_path, dtype="auto"),
    )
    assert isinstance(config, YiVLConfig) and isinstance(loaded, YiVLForConditionalGeneration)
    assert config.vision_config.to_dict() == model.config.vision_config.to_dict()
    saved_state, loaded_state = model.state_dict(), loaded.state_dict()
    assert saved_state.keys() == loaded_state.keys()
    assert all(
        torch.equal(saved_state[name], loaded_state[name]) and saved_state[name].dtype == loaded_state[name].dtype
        for name in saved_state
    )

    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, YiVLProcessor)
    assert again.to_dict() == processor.to_dict() and again.chat_template == processor.chat_template
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What? <|im_end|>"}]}]
    assert again.encode_messages(messages) == processor.encode_messages(messages)
    images = [OFFICIAL / "wide.png"]
    assert torch.equal(again.image_processor(images)["pixel_values"], processor.image_processor(images)["pixel_values"])


def test_a_loaded_model_has_every_tensor_on_disk(tmp_path: Path) -> None:
    from safetensors import safe_open

    model = tiny_model()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(model.state_dict())
