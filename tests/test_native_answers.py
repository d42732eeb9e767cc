"""transformers' own tools answer as ours do: every attention, batches, where an answer ends, masks, drafting."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
from test_chat import CONVERSATIONS, MALFORMED, assistant, user
from tiny import IMAGE_TOKEN_ID, OFFICIAL, tiny_model, tiny_processor, tiny_yi_vl
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    TextIteratorStreamer,
    pipeline,
)
from transformers.utils.chat_template_utils import _compile_jinja_template

import yi_vl
from yi_vl.chat import CHAT_TEMPLATE, STOP_STRING, strip_answer, strip_separator
from yi_vl.checkpoint import Layout, convert, open_checkpoint
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.predict import YiVL
from yi_vl.processor import YiVLProcessor
from yi_vl.vision import OpenClipTower

pytestmark = pytest.mark.core

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
QUESTIONS = [
    ("penguin.png", "What is in this picture?", "It is a penguin."),
    ("scene.png", "How many items are there? Give me their number, please.", None),
    ("brazil.png", "这是哪国的国旗？", "这是巴西的国旗。"),
]
CHATS = [
    [{"role": "user", "content": [{"type": "image", "url": str(IMAGES / name)}, {"type": "text", "text": question}]}]
    for name, question, _ in QUESTIONS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answers") / "tiny"
    tiny_yi_vl().save(path)
    return path


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    message = {"role": "user", "content": [{"type": "image", "url": str(WIDE)}, {"type": "text", "text": "What?"}]}
    return dict(
        tiny_processor().apply_chat_template(
            [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
    )


@pytest.fixture(scope="module")
def nano() -> YiVL:
    return yi_vl.load(device="cpu")


# Attention: the language model takes what transformers knows, the tower's own is equal to each.

IMPLEMENTATIONS: list[Any] = [
    "eager",
    "sdpa",
    "flex_attention",
    None,
    {"text_config": "eager", "vision_config": "sdpa"},
    {"": "sdpa", "text_config": "flex_attention", "vision_config": "flex_attention"},
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS, ids=str)
def test_every_attention_answers_the_same(folder: Path, implementation: Any, inputs: dict[str, torch.Tensor]) -> None:
    expected = tiny_model()(**inputs).logits
    changed = tiny_model()
    changed.set_attn_implementation(implementation)
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = implementation
    for model in (
        changed,
        AutoModelForImageTextToText.from_pretrained(folder, attn_implementation=implementation),
        AutoModelForImageTextToText.from_pretrained(folder, config=config),
    ):
        text = implementation["text_config"] if isinstance(implementation, dict) else implementation or "sdpa"
        assert model.config.text_config._attn_implementation == text
        if text != "flex_attention":  # which torch compiles, for seconds, on a CPU
            torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_the_tower_alone_and_the_base_model_take_every_attention(folder: Path, implementation: str) -> None:
    pixels = torch.randn(2, 3, 56, 56)
    config = tiny_model().config.vision_config
    tower = OpenClipTower._from_config(config, attn_implementation=implementation)
    features = tower(pixels).last_hidden_state
    tower.set_attn_implementation("sdpa")
    torch.testing.assert_close(tower(pixels).last_hidden_state, features)
    base = AutoModel.from_pretrained(folder, attn_implementation=implementation)
    assert base.config.vision_config._attn_implementation == implementation


@pytest.mark.parametrize(("implementation", "error"), [("flash_attention_2", ImportError), ("nonsense", ValueError)])
def test_an_attention_that_is_not_there_is_transformers_own_error(
    folder: Path, implementation: str, error: type[Exception]
) -> None:
    if implementation == "flash_attention_2" and torch.cuda.is_available():
        pytest.skip("may be installed")
    for model_class in (AutoModelForImageTextToText, AutoModel):
        with pytest.raises(error, match=r"(?i)flash|nonsense"):
            model_class.from_pretrained(folder, attn_implementation=implementation)
    with pytest.raises(error, match=r"(?i)flash|nonsense"):
        tiny_model().model.vision_tower.set_attn_implementation(implementation)


# Batches and ends


def test_the_pipeline_answers_as_predict_does_alone_and_in_a_batch(nano: YiVL) -> None:
    pipe = pipeline("image-text-to-text", model=str(Path(yi_vl.__file__).parent / "nano"), dtype=torch.float32)
    expected = [nano.predict(IMAGES / name, question) for name, question, _ in QUESTIONS]
    assert all(answer in (None, response) for (*_, answer), response in zip(QUESTIONS, expected))
    together = pipe(CHATS, batch_size=3, return_full_text=False)
    assert [answer[0]["generated_text"] for answer in together] == expected
    assert [pipe(chat, return_full_text=False)[0]["generated_text"] for chat in CHATS] == expected
    assert pipe(CHATS[0])[0]["generated_text"][-1] == {"role": "assistant", "content": expected[0]}


def test_no_images_are_as_none_at_all(nano: YiVL) -> None:
    bare = nano.processor(text="Hello", return_tensors="pt")
    empty = nano.processor(text="Hello", images=[], return_tensors="pt")
    size_px = nano.processor.image_processor.size_px
    assert empty["pixel_values"].shape == (0, 3, size_px, size_px) and "pixel_values" not in bare
    answers = [nano.model.generate(**inputs, max_new_tokens=4, do_sample=False) for inputs in (bare, empty)]
    assert torch.equal(*answers)
    assert torch.equal(nano.model(**bare).logits, nano.model(**empty).logits)


def test_generate_stops_by_itself_and_the_processor_decodes_answers(nano: YiVL) -> None:
    processor = nano.processor
    inputs = processor.apply_chat_template(
        CHATS,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        add_generation_prompt=True,
        processor_kwargs={"padding": True},
    )
    generated = nano.model.generate(**inputs, max_new_tokens=60)
    new = generated[:, inputs["input_ids"].shape[1] :]
    expected = [nano.predict(IMAGES / name, question) for name, question, _ in QUESTIONS]
    assert new.shape[1] < 25
    assert processor.post_process_image_text_to_text(new) == expected
    for decoded in (
        processor.batch_decode(new, skip_special_tokens=True),
        processor.decode(new, skip_special_tokens=True),
    ):
        assert [text.removeprefix(" ") for text in decoded] == expected
    assert processor.decode(new[0], skip_special_tokens=True) == " " + expected[0]
    assert STOP_STRING in processor.decode(new[0]), "as it is, when special tokens are asked for"
    assert STOP_STRING in processor.post_process_image_text_to_text(new, skip_special_tokens=False)[0]
    streamer = TextIteratorStreamer(processor, skip_prompt=True, skip_special_tokens=True)
    nano.model.generate(**{k: v[:1] for k, v in inputs.items()}, max_new_tokens=60, streamer=streamer)
    assert "".join(streamer).strip() == expected[0]


@pytest.mark.parametrize(
    ("text", "stripped"),
    [
        (" a dog\n###", " a dog"),
        ("a\n## Title\n### Section\ntext", "a\n## Title\n### Section\ntext"),
        ("#### four\n####", "#### four\n####"),
        ("###", ""),
        (" open ", " open "),
    ],
)
def test_only_the_separator_at_the_end_is_cut(text: str, stripped: str) -> None:
    assert strip_separator(text) == stripped
    assert strip_answer(text) == stripped.strip()


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
    assert generation["eos_token_id"] == [2, 7, 458] and tokenizer["padding_side"] == "left"
    assert (nano / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


def test_padding_is_in_front_whatever_a_file_says_unless_it_is_asked_for(folder: Path, tmp_path: Path) -> None:
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


def test_vllm_can_follow_the_template() -> None:
    """Its detector wants `for X in messages`, sliced or not, and in it `for Y in X['content']`."""
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


# What else is done with a model


def _image_inputs(processor: YiVLProcessor, *names: str) -> dict[str, torch.Tensor]:
    content = [
        *({"type": "image", "url": str(IMAGES / name)} for name in names),
        {"type": "text", "text": "What is it?"},
    ]
    return dict(
        processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
        )
    )


@pytest.mark.parametrize("names", [("penguin.png",), ("penguin.png", "brazil.png")])
def test_drafts_never_hold_an_image_token(nano: YiVL, names: tuple[str, ...]) -> None:
    inputs = _image_inputs(nano.processor, *names)
    plain = nano.model.generate(**inputs, max_new_tokens=24)
    drafted = nano.model.generate(**inputs, max_new_tokens=24, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, drafted)


def test_generate_never_samples_the_image_token(
    monkeypatch: pytest.MonkeyPatch, inputs: dict[str, torch.Tensor]
) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[IMAGE_TOKEN_ID] = 1e3 * model.lm_head.weight.abs().max()
        model.lm_head.weight[IMAGE_TOKEN_ID + 1] = -model.lm_head.weight[IMAGE_TOKEN_ID]
    for options in ({}, {"num_beams": 2}, {"suppress_tokens": [IMAGE_TOKEN_ID + 1]}):
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)[:, inputs["input_ids"].shape[1] :]
        assert IMAGE_TOKEN_ID not in new


def test_an_image_goes_with_its_beams_and_sequences(nano: YiVL) -> None:
    inputs = _image_inputs(nano.processor, "penguin.png")
    plain = nano.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    rows = nano.model.generate(**inputs, max_new_tokens=12, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(rows, plain.expand(2, -1))


def test_a_model_and_a_chat_are_copied_and_pickled() -> None:
    yi = tiny_yi_vl()
    chat = yi.chat()
    chat.ask("What is this?", WIDE, max_new_tokens=5)
    expected = yi.predict(WIDE, "What?", max_new_tokens=6)
    pickled = pickle.dumps(yi)
    assert len(pickled) < 2 * sum(parameter.nbytes for parameter in yi.model.parameters()), "caches are left behind"
    for copied in (copy.copy(yi), copy.deepcopy(yi), pickle.loads(pickled)):
        assert copied.predict(WIDE, "What?", max_new_tokens=6) == expected
    branch, stored = copy.deepcopy(chat), pickle.loads(pickle.dumps(chat))
    following = chat.ask("And now?", max_new_tokens=5)
    assert len(branch.messages) == len(stored.messages) == 2 and branch._yi_vl is yi
    assert branch.ask("And now?", max_new_tokens=5) == stored.ask("And now?", max_new_tokens=5) == following
    with torch.no_grad():
        copied = copy.deepcopy(yi)
        copied.model.lm_head.weight.mul_(-1)
    assert yi.predict(WIDE, "What?", max_new_tokens=6) == expected != copied.predict(WIDE, "What?", max_new_tokens=6)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.bfloat16", torch.bfloat16),
        ("bf16", torch.bfloat16),
        ("fp32", torch.float32),
        ("auto", torch.float32),
        (torch.float64, torch.float64),
        (None, torch.float32),
    ],
)
def test_dtypes_may_be_named(folder: Path, dtype: Any, expected: torch.dtype) -> None:
    assert yi_vl.load(folder, device="cpu", dtype=dtype).model.dtype == expected


@pytest.mark.parametrize("dtype", ["nonsense", "int8", torch.int32, 3, "", "nn"])
def test_what_is_no_dtype_of_weights_is_refused(folder: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"dtype is .*; expected a torch dtype or its name"):
        yi_vl.load(folder, device="cpu", dtype=dtype)


def test_devices_may_be_numbers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (-1, "-1", torch.device("cpu"), "cpu", {"": "cpu"}, "auto"):
        assert yi_vl.load(folder, device=device).model.device.type == "cpu"  # type: ignore[arg-type]
    placed: list[Any] = []
    load = YiVLForConditionalGeneration.from_pretrained

    def watch(*args: Any, device_map: Any, **options: Any) -> Any:
        placed.append(device_map)
        return load(*args, device_map="cpu", **options)

    monkeypatch.setattr(YiVLForConditionalGeneration, "from_pretrained", watch)
    for device in (0, 1, "1", "cuda:1", torch.device("cuda", 1)):
        yi_vl.load(folder, device=device)  # type: ignore[arg-type]
    assert [str(device) for device in placed] == ["cuda:0", *["cuda:1"] * 4]
    for wrong in ("nonsense", "", 1.5, True):
        with pytest.raises(ValueError, match=r"device is .*; expected"):
            yi_vl.load(folder, device=wrong)  # type: ignore[arg-type]


def test_the_default_device_and_dtype_of_torch_change_no_answer(folder: Path) -> None:
    """`meta` stands for a GPU: what is made on it by oversight has no values."""
    yi = yi_vl.load(folder, device="cpu")
    requests = [(WIDE, "What?"), (None, "Hi"), ([TALL, WIDE], "Compare.")]
    options: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 3}]
    expected = [yi.predict_batch(requests, max_new_tokens=6, **each) for each in options]
    for set_default, value, before in (
        (torch.set_default_device, "meta", None),
        (torch.set_default_dtype, torch.float64, torch.float32),
    ):
        set_default(value)  # type: ignore[operator]
        try:
            again = yi_vl.load(folder, device="cpu", dtype=torch.float32)
            assert [again.predict_batch(requests, max_new_tokens=6, **each) for each in options] == expected
            chat = again.chat()
            assert chat.ask("What?", WIDE, max_new_tokens=6) == expected[0][0] and chat.ask("And?", max_new_tokens=6)
        finally:
            set_default(before)  # type: ignore[operator]
