"""Connectors: shapes, fresh weights, sizes of the papers; answers alone, together and from a cached prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IMAGE_SIZE_PX, OFFICIAL, tiny_config, uncached

import yi_vl
from yi_vl.checkpoint import open_checkpoint
from yi_vl.checkpoint.gguf_vision import vision_unsupported
from yi_vl.connector import build_connector
from yi_vl.connector.config import ABSTRACTOR, MLP, QFORMER, RESAMPLER, ConnectorConfig
from yi_vl.conversion import write
from yi_vl.image import YiVLImageProcessor
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.predict import YiVL
from yi_vl.processor import YiVLProcessor, prepare_tokenizer

pytestmark = pytest.mark.core

SMALL: dict[str, dict[str, Any]] = {
    MLP: {},
    QFORMER: {"num_tokens": 4, "hidden_size": 32, "num_layers": 2, "num_heads": 2},
    RESAMPLER: {"num_tokens": 5, "num_layers": 2, "num_heads": 4},
    ABSTRACTOR: {"num_tokens": 9, "hidden_size": 32, "num_layers": 1},
}
NAMES = ("type", "num_tokens", "hidden_size", "num_layers", "num_heads")
each_type = pytest.mark.parametrize("type_", SMALL)  # test_cross_attention.py has the other


def small_yi_vl(type_: str) -> YiVL:
    torch.set_num_threads(1)
    config = tiny_config()
    config.connector_config = ConnectorConfig(type=type_, **SMALL[type_])
    model = YiVLForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # no two logits tie
    tokenizer = prepare_tokenizer(str(OFFICIAL / "checkpoint"))
    processor = YiVLProcessor(
        YiVLImageProcessor(size_px=IMAGE_SIZE_PX), tokenizer, num_image_tokens=config.connector_config.num_tokens
    )
    return YiVL(model, processor)


def images(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (60, 60, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.mark.parametrize(
    ("type_", "num_tokens", "millions"),
    [(MLP, 1024, 22.0), (QFORMER, 32, 107.1), (RESAMPLER, 64, 79.1), (ABSTRACTOR, 144, 38.5)],
)
def test_the_papers_sizes(type_: str, num_tokens: int, millions: float) -> None:
    with torch.device("meta"):
        connector = build_connector(ConnectorConfig(type=type_), 1280, 4096)
        features = connector(torch.empty(2, 1024, 1280))
    assert features.shape == (2, num_tokens, 4096)
    assert sum(parameter.numel() for parameter in connector.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


@each_type
def test_fresh_weights_are_finite_and_no_two_tokens_are_the_same(type_: str) -> None:
    model = YiVLForConditionalGeneration(small_yi_vl(type_).model.config)
    connector = model.model.multi_modal_projector
    assert all(parameter.isfinite().all() for parameter in connector.parameters())
    with torch.no_grad():
        features = model.model.encode_images(torch.randn(1, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX))[0]
    assert len(features) == model.config.num_image_tokens
    distances = torch.cdist(features, features) + torch.eye(len(features))
    assert distances.min() > 1e-6


def test_latents_are_drawn_and_not_all_ones() -> None:
    latents = YiVLForConditionalGeneration(small_yi_vl(RESAMPLER).model.config).model.multi_modal_projector
    assert latents.perceiver.latents.std().item() == pytest.approx(1, abs=0.25)


@each_type
def test_every_parameter_learns(type_: str) -> None:
    model = small_yi_vl(type_).model
    features = model.model.encode_images(torch.randn(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX))
    (features * torch.randn_like(features)).sum().backward()
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


@each_type
def test_saved_and_loaded_it_answers_the_same(type_: str, tmp_path: Path) -> None:
    yi = small_yi_vl(type_)
    yi.model.save_pretrained(tmp_path)
    yi.processor.save_pretrained(tmp_path)
    loaded = yi_vl.load(tmp_path, dtype="float32")
    connector, saved = loaded.model.config.connector_config, yi.model.config.connector_config
    assert [getattr(connector, name) for name in NAMES] == [getattr(saved, name) for name in NAMES]
    assert loaded.processor.tokens_per_image == yi.model.config.num_image_tokens
    (image,) = images(1)
    assert loaded.predict([image], "What is this?") == yi.predict([image], "What is this?")


@each_type
def test_answers_are_generates(type_: str) -> None:
    """The engine's answer is transformers' `generate` of the prompt that the processor makes."""
    yi = small_yi_vl(type_)
    (image,) = images(1)
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}
    inputs = yi.processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    num_image_tokens = int((inputs["input_ids"] == yi.model.config.image_token_id).sum())
    assert num_image_tokens == yi.model.config.num_image_tokens
    unused = list(range(len(yi.processor.tokenizer), yi.model.config.text_config.vocab_size))
    generated = yi.model.generate(**inputs, max_new_tokens=12, do_sample=False, suppress_tokens=unused)
    text = yi.processor.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert text.strip().startswith(yi.predict([image], "What?", max_new_tokens=12).strip())


@each_type
def test_together_and_continued_it_answers_as_alone(type_: str) -> None:
    yi = small_yi_vl(type_)
    first, second = images(2)
    requests = [([first], "What is this?"), ([first, second], "Which is which?"), ([], "Hi"), ([second], "And this?")]
    alone = [uncached(yi).predict(*request, max_new_tokens=12) for request in requests]
    assert yi.predict_batch(requests, max_new_tokens=12) == alone
    assert [yi.predict(*request, max_new_tokens=12) for request in requests] == alone  # from cached prefixes
    conversation = yi.chat()
    for given, question in (([first], "What is this?"), ([second], "And this?"), ([], "Sure?")):
        answer = conversation.ask(question, images=given, max_new_tokens=8)
        assert answer == uncached(yi).answer(conversation.messages[:-1], max_new_tokens=8)


@pytest.mark.parametrize("layout", ["official", "llava-hf"])
def test_other_layouts_are_refused_by_name(layout: str, tmp_path: Path) -> None:
    yi = small_yi_vl(QFORMER)
    yi.model.save_pretrained(tmp_path / "model")
    yi.processor.save_pretrained(tmp_path / "model")
    source = open_checkpoint(tmp_path / "model")
    with pytest.raises(ValueError, match="connector of type qformer"):
        write(source, tmp_path / "out", layout, type="f16")  # type: ignore[arg-type]


def test_gguf_has_the_language_model_alone() -> None:
    assert "connector of type resampler" in str(vision_unsupported(small_yi_vl(RESAMPLER).model.config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "perceiver"}, "type is 'perceiver'; expected one of mlp, qformer, resampler, abstractor"),
        ({"type": MLP, "num_tokens": 64}, "type mlp has no num_tokens"),
        ({"type": QFORMER, "num_tokens": 0}, "num_tokens is 0; expected a whole number of 1 or more"),
        ({"type": QFORMER, "hidden_size": 100, "num_heads": 3}, "hidden_size is 100; expected a multiple of its 3"),
        ({"type": RESAMPLER, "hidden_size": 64}, "type resampler has no hidden_size"),
        ({"type": ABSTRACTOR, "num_tokens": 50}, "num_tokens is 50; expected a square"),
        ({"type": ABSTRACTOR, "num_layers": 2.5}, "num_layers is 2.5"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConnectorConfig(**settings)


def test_a_processor_of_another_connector_is_refused(tmp_path: Path) -> None:
    yi = small_yi_vl(QFORMER)
    yi.model.save_pretrained(tmp_path)
    yi.processor.num_image_tokens = None
    yi.processor.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokens per image is 4 in one, 16 in the other"):
        yi_vl.load(tmp_path)
