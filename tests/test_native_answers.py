"""transformers' tools answer as yi_vl does: every attention, batches, where an answer ends, drafting, devices."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import IMAGE_TOKEN_ID, OFFICIAL, tiny_model, tiny_processor, tiny_yi_vl
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    TextIteratorStreamer,
    pipeline,
)

import yi_vl
from yi_vl.chat import STOP_STRING, strip_answer, strip_separator
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.predict import YiVL
from yi_vl.processor import YiVLProcessor
from yi_vl.vision import OpenClipTower

pytestmark = pytest.mark.core

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
IMAGES = Path(__file__).parents[1] / "docs" / "images"
QUESTIONS = [
    ("dog.png", "What is in this image?", "It is a dog."),
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


@pytest.mark.parametrize("names", [("dog.png",), ("dog.png", "brazil.png")])
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
    inputs = _image_inputs(nano.processor, "dog.png")
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
