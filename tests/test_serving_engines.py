"""What vLLM and SGLang ask of model, processor and template, held without either; test_vllm.py runs vLLM itself.

`make matrix` runs this with the transformers that SGLang pins, too.
"""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from pathlib import Path

import jinja2
import pytest
import torch
from tiny import IMAGE_SIZE_PX, IMAGE_TOKEN_ID, NUM_PATCHES, OFFICIAL, tiny_model, tiny_processor, tiny_yi_vl
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.utils.chat_template_utils import _compile_jinja_template

from yi_vl.auto import YiVLConfig, YiVLModel, YiVLProcessor
from yi_vl.chat import ANSWER_HEADER, STOP_STRING
from yi_vl.chat_template import CHAT_TEMPLATE

pytestmark = pytest.mark.core

WIDE = OFFICIAL / "wide.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "model"
    tiny_yi_vl().save(path)
    return path


def test_the_forward_pass_returns_tuples() -> None:
    """Both call the base model with `return_dict=False`, on embeddings, and take the first of what comes back."""
    model = tiny_model()
    ids = torch.tensor([[3, 4, 5]])
    embeddings = model.get_input_embeddings()(ids)
    with torch.inference_mode():
        for module, name in ((model.model, "last_hidden_state"), (model, "logits")):
            as_tuple = module(inputs_embeds=embeddings, use_cache=False, return_dict=False)
            assert isinstance(as_tuple, tuple)
            assert torch.equal(as_tuple[0], module(input_ids=ids, use_cache=False)[name])


def test_image_features_come_by_image() -> None:
    """`get_image_features(...).pooler_output` has a (P, D) tensor per image, whichever model is asked."""
    model = tiny_model()
    pixels = torch.randn(2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)
    with torch.inference_mode():
        expected = model.model.encode_images(pixels)
        for module in (model, model.model):
            features = module.get_image_features(pixels, return_dict=True).pooler_output
            assert [tuple(image.shape) for image in features] == [(NUM_PATCHES, 32)] * 2
            assert torch.equal(torch.stack(list(features)), expected)


def test_the_processor_answers_what_engines_ask() -> None:
    processor = tiny_processor()
    assert processor.tokenizer.convert_tokens_to_ids(processor.image_token) == processor.image_token_id
    assert processor.image_token_id == IMAGE_TOKEN_ID == tiny_model().config.image_token_id
    sizes = processor._get_num_multimodal_tokens(image_sizes=[[30, 700], [1, 1]])
    assert sizes["num_image_tokens"] == [NUM_PATCHES] * 2 and sizes["num_image_patches"] == [1, 1]
    made = processor(
        text=f"a{processor.image_token}b{processor.image_token}", images=[str(WIDE)] * 2, return_tensors="pt"
    )
    assert int((made["input_ids"] == IMAGE_TOKEN_ID).sum()) == 2 * NUM_PATCHES
    assert made["pixel_values"].shape == (2, 3, IMAGE_SIZE_PX, IMAGE_SIZE_PX)


def test_saved_files_are_found_by_auto_classes_and_stop(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is YiVLConfig
    assert type(AutoProcessor.from_pretrained(folder)) is YiVLProcessor
    assert type(AutoModel.from_pretrained(folder)) is YiVLModel
    separator = tiny_processor().tokenizer.convert_tokens_to_ids(STOP_STRING)
    assert separator in json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


def test_the_template_takes_parts() -> None:
    """vLLM wants `for X in messages`, sliced or not, and in it `for Y in X['content']`; SGLang the word `image`."""
    tree = _compile_jinja_template(CHAT_TEMPLATE).environment.parse(CHAT_TEMPLATE)
    names = set()
    for loop in tree.find_all(jinja2.nodes.For):
        source = loop.iter
        if isinstance(source, jinja2.nodes.Getitem) and isinstance(source.arg, jinja2.nodes.Slice):
            source = source.node
        if isinstance(source, jinja2.nodes.Name) and source.name == "messages":
            assert isinstance(loop.target, jinja2.nodes.Name)
            names.add(loop.target.name)
    assert names == {"message"}
    inner = [loop.iter for loop in tree.find_all(jinja2.nodes.For) if isinstance(loop.iter, jinja2.nodes.Getitem)]
    assert any(
        isinstance(source.node, jinja2.nodes.Name)
        and source.node.name in names
        and isinstance(source.arg, jinja2.nodes.Const)
        and source.arg.value == "content"
        for source in inner
    )
    assert "image" in CHAT_TEMPLATE


def test_every_prompt_ends_with_the_header_of_an_answer() -> None:
    """By which vllm_plugin tells an answer from other text."""
    processor = tiny_processor()
    for content in ("Hi", [{"type": "image"}, {"type": "text", "text": "你好###"}]):
        prompt = processor.encode_messages([{"role": "user", "content": content}]).input_ids
        assert processor.tokenizer.decode(prompt[-16:]).endswith(ANSWER_HEADER)


def test_vllm_is_told_where_its_plugin_is() -> None:
    values = {point.value for point in entry_points(group="vllm.general_plugins") if point.name == "yi_vl"}
    assert values == {"yi_vl.vllm_plugin:register"}
