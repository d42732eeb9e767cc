"""The processor as transformers' tools use it."""

from __future__ import annotations

import pytest
import torch
from PIL import Image
from tiny import IMAGE_TOKEN_ID, NUM_PATCHES, OFFICIAL, tiny_processor

from yi_vl.processor import YiVLProcessor, prepare_tokenizer

WIDE = OFFICIAL / "wide.png"


@pytest.fixture(scope="module")
def processor() -> YiVLProcessor:
    return tiny_processor()


def test_the_image_token_follows_the_tokenizers_last_id(processor: YiVLProcessor) -> None:
    assert processor.image_token_id == IMAGE_TOKEN_ID == len(processor.tokenizer) - 1
    assert processor.tokens_per_image == NUM_PATCHES
    assert processor.tokenizer.padding_side == "left"


def test_preparing_a_tokenizer_twice_adds_one_token(processor: YiVLProcessor, tmp_path: object) -> None:
    processor.tokenizer.save_pretrained(str(tmp_path))
    again = prepare_tokenizer(str(tmp_path))
    assert len(again) == len(processor.tokenizer)
    assert again.all_special_ids == processor.tokenizer.all_special_ids


def test_yis_special_tokens_keep_their_ids(processor: YiVLProcessor) -> None:
    names = ("<unk>", "<|startoftext|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>")
    assert processor.tokenizer.convert_tokens_to_ids(list(names)) == [0, 1, 2, 6, 7, 8]
    assert processor.tokenizer("a")["input_ids"] == processor.tokenizer("a", add_special_tokens=False)["input_ids"]


def test_transformers_call_expands_images_as_encode_messages_does(processor: YiVLProcessor) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(images=[Image.open(WIDE)], text=prompt, return_tensors="pt")
    encoded = processor.encode_messages(messages)
    assert inputs["input_ids"][0].tolist() == encoded.input_ids
    assert torch.equal(inputs["pixel_values"], processor.image_processor(WIDE)["pixel_values"])


def test_servers_get_the_number_of_tokens_of_an_image(processor: YiVLProcessor) -> None:
    counts = processor._get_num_multimodal_tokens(image_sizes=[[10, 20], [3000, 1]])
    assert counts["num_image_tokens"] == [NUM_PATCHES] * 2 and counts["num_image_patches"] == [1, 1]
