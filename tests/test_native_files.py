"""What transformers reads from saved files: end tokens, padding, the tokenizer, the chat template and its masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from test_chat import CONVERSATIONS, MALFORMED, assistant, user
from tiny import IMAGE_TOKEN_ID, OFFICIAL, tiny_model, tiny_processor
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import _compile_jinja_template

import yi_vl
from yi_vl.chat import STOP_STRING
from yi_vl.chat_template import CHAT_TEMPLATE
from yi_vl.checkpoint import Layout, convert, open_checkpoint
from yi_vl.processor import YiVLProcessor

pytestmark = pytest.mark.core

WIDE = OFFICIAL / "wide.png"


def _files(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    generation, tokenizer = (
        json.loads((folder / name).read_text()) for name in ("generation_config.json", "tokenizer_config.json")
    )
    return generation, tokenizer


@pytest.mark.parametrize("to", ["save", "yi-vl", "official", "llava-hf"])
def test_what_is_saved_stops_and_pads_by_itself(to: Layout | str, tmp_path: Path) -> None:
    model = yi_vl.load(OFFICIAL / "checkpoint", device="cpu", dtype=torch.float32)
    separator = model.processor.tokenizer.convert_tokens_to_ids(STOP_STRING)
    assert model.model.generation_config.eos_token_id == [2, 7, separator]
    if to == "save":
        model.save(tmp_path / "out")
    else:
        convert(open_checkpoint(OFFICIAL / "checkpoint"), tmp_path / "out", to)  # type: ignore[arg-type]
    generation, tokenizer = _files(tmp_path / "out")
    assert generation["eos_token_id"] == [2, 7, separator] and tokenizer["padding_side"] == "left"
    if to != "official":  # whose config.json is LLaVA's, not transformers'
        assert AutoTokenizer.from_pretrained(tmp_path / "out").padding_side == "left"
    if to in ("save", "yi-vl"):
        assert generation["suppress_tokens"] == list(range(IMAGE_TOKEN_ID, 960))
    again = yi_vl.load(tmp_path / "out", device="cpu")
    assert again.model.generation_config.eos_token_id == [2, 7, separator]
    assert again.engine.stop_ids == {2, 7}, "our engine finds the separator in the text, whatever its tokens"
    assert again.processor.tokenizer.padding_side == "left"


ROUND_TRIPS: list[list[Layout]] = [["official", "yi-vl"], ["llava-hf", "yi-vl"], ["llava-hf", "official", "llava-hf"]]


@pytest.mark.parametrize("layouts", ROUND_TRIPS, ids="-".join)
def test_a_round_trip_changes_nothing_of_the_tokenizer(layouts: list[Layout], tmp_path: Path) -> None:
    folder = OFFICIAL / "checkpoint"
    expected = _tokenizer_behaviour(open_checkpoint(folder).make_processor())
    for number, layout in enumerate(layouts):
        convert(open_checkpoint(folder), tmp_path / f"{number}", layout)
        folder = tmp_path / f"{number}"
        assert _tokenizer_behaviour(open_checkpoint(folder).make_processor()) == expected
    yi_vl.load(folder, device="cpu").save(tmp_path / "saved")
    assert _tokenizer_behaviour(YiVLProcessor.from_pretrained(tmp_path / "saved")) == expected


def _tokenizer_behaviour(processor: YiVLProcessor) -> list[Any]:
    texts = ["<|im_end|>", "a<|im_start|>b", "<unk>", "<0x0A>", "<|reserved_3|>", "<image_placeholder>", "<image>"]
    texts += ["<pad>", "###", "#### a", "\n### Human: x", "  two  spaces", "全角　a\tb", "😀", "<|endoftext|>"]
    tokenizer = processor.tokenizer
    return [
        [processor.encode_messages([user(f"q {text} z")]).input_ids for text in texts],
        [tokenizer(text, split_special_tokens=split)["input_ids"] for text in texts for split in (False, True)],
        tokenizer.added_tokens_decoder,
        sorted(tokenizer.all_special_ids),
        (len(tokenizer), tokenizer.special_tokens_map, tokenizer.padding_side),
    ]


def test_the_trainers_checkpoints_stop_and_pad_by_themselves(tmp_path: Path) -> None:
    from train.checkpoint import save_checkpoint

    model = tiny_model()
    save_checkpoint(tmp_path / "final", model, model.state_dict(), tiny_processor(), "", None)
    generation, tokenizer = _files(tmp_path / "final")
    assert generation["eos_token_id"] == [2, 7, 642] and tokenizer["padding_side"] == "left"


def test_the_bundled_model_is_what_is_saved_today() -> None:
    nano = Path(yi_vl.__file__).parent / "nano"
    generation, tokenizer = _files(nano)
    hashes = YiVLProcessor.from_pretrained(nano).tokenizer.convert_tokens_to_ids("###")
    assert generation["eos_token_id"] == [2, 7, hashes] and tokenizer["padding_side"] == "left"
    assert (nano / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


def test_padding_is_left_whatever_a_file_says_unless_it_is_an_argument(tmp_path: Path) -> None:
    old = tmp_path / "old"
    tiny_processor().save_pretrained(old)
    path = old / "tokenizer_config.json"
    for side in ("right", None):
        settings = json.loads(path.read_text()) | {"padding_side": side}
        path.write_text(json.dumps({key: value for key, value in settings.items() if value}))
        processor = YiVLProcessor.from_pretrained(old)
        assert processor.tokenizer.padding_side == "left"
        processor.save_pretrained(tmp_path / "again")
        assert json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())["padding_side"] == "left"
    assert YiVLProcessor.from_pretrained(old, padding_side="right").tokenizer.padding_side == "right"


# The template


@pytest.mark.parametrize(("messages", "problem"), MALFORMED)
def test_the_template_refuses_what_render_refuses(messages: Any, problem: str) -> None:
    with pytest.raises(jinja2.TemplateError):
        _compile_jinja_template(CHAT_TEMPLATE).render(messages=messages, add_generation_prompt=True)


@pytest.mark.parametrize("messages", [[user("a"), user("b")], [user("a"), assistant("b")], [user("")]])
def test_a_refused_conversation_is_a_value_error_of_the_processor(messages: Any) -> None:
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=r"expected assistant|nothing to answer|is empty"):
            tiny_processor().apply_chat_template(messages, tokenize=tokenize, add_generation_prompt=True)


def test_the_assistant_mask_is_the_loss_mask() -> None:
    processor = tiny_processor()
    conversations = [_shown([*messages, assistant("An answer, 一个回答。")]) for messages in CONVERSATIONS.values()]
    made = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "return_mm_token_type_ids": True},
    )
    for row, messages in enumerate(conversations):
        encoded = processor.encode_messages(messages, add_generation_prompt=False)
        is_token = made["attention_mask"][row].bool()
        assert made["input_ids"][row][is_token].tolist() == encoded.input_ids
        assert made["assistant_masks"][row][is_token].tolist() == [int(value) for value in encoded.loss_mask]
        assert not made["assistant_masks"][row][~is_token].any()
        is_image = made["input_ids"][row] == IMAGE_TOKEN_ID
        assert torch.equal(made["mm_token_type_ids"][row], is_image.long())


def _shown(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation with an image in each image part."""
    return [
        message
        if isinstance(message["content"], str)
        else message
        | {"content": [part | {"url": str(WIDE)} if part["type"] == "image" else part for part in message["content"]]}
        for message in messages
    ]
