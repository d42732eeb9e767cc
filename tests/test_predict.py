"""The Python API: answers, streams, batches and conversations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import IMAGE_TOKEN_ID, NUM_PATCHES, OFFICIAL, grow_cache, tiny_model, tiny_processor, tiny_yi_vl, uncached

from yi_vl.engine.sampling import Sampling
from yi_vl.predict import YiVL

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
REQUESTS = [
    (WIDE, "What is this?"),
    (None, "Tell me a long story about a dog and a cat, 一个故事。"),
    ([WIDE, TALL], "Compare."),
    ([], "Hi"),
    (TALL, "描述这张图片。"),
]
Script = Callable[[Sequence[Sequence[int]]], list[int]]


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


@pytest.fixture
def script(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Makes the model generate given tokens, row by row; returns the list that collects each step's number of rows.

    A row of several tokens, or of the end token, is removed after the last of them; another repeats its one token.
    """

    def install(rows: Sequence[Sequence[int]]) -> list[int]:
        calls: list[int] = []
        going = [list(row) for row in rows]
        is_endless = [len(row) == 1 and row[0] != 2 for row in rows]
        yi_vl.clear_cache()

        def forward(**inputs: Any) -> SimpleNamespace:
            num_rows = grow_cache(**inputs)
            logits = torch.zeros(num_rows, 1, 960)
            if num_rows < len(rows) and not calls:  # what all rows begin with
                return SimpleNamespace(logits=logits)
            left = [row for row in going if row]
            assert num_rows == len(left), "a row that has ended goes on, or one is missing"
            for index, row in enumerate(left):
                logits[index, 0, row[0]] = 1.0
            for row, goes_on in zip(going, is_endless, strict=True):
                if not goes_on:
                    del row[:1]
            calls.append(num_rows)
            assert len(calls) < 600, "generation is not stopped"
            return SimpleNamespace(logits=logits)

        monkeypatch.setattr(yi_vl.model, "forward", forward)
        return calls

    monkeypatch.setattr(yi_vl.engine, "max_draft_tokens", 0)  # one row, one token
    yi_vl.clear_cache()
    yield install
    yi_vl.clear_cache()


def ids_of(yi_vl: YiVL, text: str) -> list[int]:
    return yi_vl.processor.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "stop", [(), ("cat", "li", "three", "B", "wp", "test\N{REPLACEMENT CHARACTER}")]
)  # some end early
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}])
def test_a_batch_equals_its_single_requests(yi_vl: YiVL, options: dict[str, Any], stop: tuple[str, ...]) -> None:
    options = {"max_new_tokens": 12, "stop": stop, **options}
    alone = [uncached(yi_vl).predict(*request, **options) for request in REQUESTS]
    assert len({len(answer) for answer in alone}) > 1
    assert yi_vl.predict_batch(REQUESTS, **options) == alone
    for batch_size in (2, 3):
        assert uncached(yi_vl).predict_batch(REQUESTS, batch_size=batch_size, **options) == alone


def test_the_next_request_takes_the_slot_of_a_finished_request(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, sizes = uncached(yi_vl), []
    forward = yi_vl.model.forward

    def watch(**inputs: Any) -> Any:
        sizes.append(fresh.engine.num_running + fresh.engine.num_waiting)
        return forward(**inputs)

    monkeypatch.setattr(yi_vl.model, "forward", watch)
    answers = fresh.predict_batch(REQUESTS, batch_size=2, max_new_tokens=12, stop=("cat", "li", "three", "B"))
    assert len({len(answer) for answer in answers}) > 2
    assert sizes == sorted(sizes, reverse=True) and sizes.count(2) > sizes.count(1)  # a slot is free at the end only


def test_an_answer_depends_on_its_image(yi_vl: YiVL) -> None:
    assert len({yi_vl.predict(image, "What?", max_new_tokens=12) for image in (WIDE, TALL, None, [WIDE, TALL])}) == 4


@pytest.mark.parametrize("request_index", range(len(REQUESTS)))
def test_streamed_pieces_are_the_answer(yi_vl: YiVL, request_index: int) -> None:
    request = REQUESTS[request_index]
    pieces = list(yi_vl.stream(*request, max_new_tokens=20))
    answer = yi_vl.predict(*request, max_new_tokens=20)
    assert "".join(pieces) == answer == answer.strip()
    assert len(pieces) > 3 and all(pieces)


def test_images_may_be_paths_bytes_pil_images_or_arrays(yi_vl: YiVL) -> None:
    image = Image.open(WIDE).convert("RGB")
    sources = [WIDE, str(WIDE), WIDE.read_bytes(), image, np.asarray(image), [image]]
    assert len({yi_vl.predict(source, "What?", max_new_tokens=8) for source in sources}) == 1


def test_seeds_repeat_an_answer(yi_vl: YiVL) -> None:
    def answer(seed: int | None) -> str:
        return yi_vl.predict(WIDE, "What?", temperature=1.0, seed=seed, max_new_tokens=12)

    assert answer(1) == answer(1) != answer(2)
    assert answer(None) != answer(None)


def test_rows_end_by_themselves(yi_vl: YiVL, script: Script) -> None:
    texts = [" A dog.\n###", " two cats and a dog\n###"]
    calls = script([ids_of(yi_vl, text) for text in texts] + [[2]])
    answers = yi_vl.predict_batch([(None, "a"), (None, "b"), (None, "c")])
    assert answers == ["A dog.", "two cats and a dog", ""]
    lengths = [*(len(ids_of(yi_vl, text)) for text in texts), 1]
    assert lengths[1] > lengths[0] > 2
    assert calls == [
        sum(length > step for length in lengths) for step in range(lengths[1])
    ]  # who has ended costs nothing


def test_the_longest_answer_is_cut_to_what_the_context_holds(yi_vl: YiVL, script: Script) -> None:
    calls = script([ids_of(yi_vl, " dog")])
    num_prompt_tokens = len(yi_vl.engine.prepare([{"role": "user", "content": "Hi"}]))
    yi_vl.predict(None, "Hi", max_new_tokens=10**6)
    assert num_prompt_tokens + len(calls) == 512


@pytest.mark.parametrize("stop", ["and", ["never", "and"]])
def test_stop_texts_end_an_answer_besides_the_separator(yi_vl: YiVL, script: Script, stop: Any) -> None:
    script([ids_of(yi_vl, " two cats and a dog\n###")])
    assert yi_vl.predict(None, "Hi", stop=stop) == "two cats"
    script([ids_of(yi_vl, " two cats\n### Human and")])
    assert yi_vl.predict(None, "Hi", stop=stop) == "two cats"


def test_closing_a_stream_stops_the_work(yi_vl: YiVL, script: Script) -> None:
    calls = script([ids_of(yi_vl, " dog")])
    pieces = yi_vl.stream(None, "Hi")
    assert (next(pieces), next(pieces)) == ("dog", " dog") and len(calls) == 2
    pieces.close()
    assert len(calls) == 2
    with pytest.raises(StopIteration):
        next(pieces)


def test_a_stream_that_is_never_read_does_no_work(yi_vl: YiVL, script: Script) -> None:
    calls = script([[2]])
    yi_vl.stream(None, "Hi").close()
    assert calls == []


def test_the_image_token_and_rows_without_a_token_are_never_sampled(
    yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = 0

    def forward(**inputs: Any) -> SimpleNamespace:
        nonlocal steps
        steps += grow_cache(**inputs)
        logits = torch.zeros(1, 1, 960)
        logits[..., IMAGE_TOKEN_ID:] = 9.0
        logits[..., 2] = 1.0
        return SimpleNamespace(logits=logits)

    monkeypatch.setattr(yi_vl.model, "forward", forward)
    assert uncached(yi_vl).predict(None, "Hi") == ""
    assert steps == 1  # the most likely token that is not suppressed ends the answer


def test_too_long_prompts_are_refused_before_any_work(yi_vl: YiVL, script: Script) -> None:
    calls = script([[2]])
    missing = Path("no/such/file.png")
    with pytest.raises(ValueError, match=rf"{40 * NUM_PATCHES} of them for 40 images .* holds 512"):
        yi_vl.predict([missing] * 40, "What?")
    with pytest.raises(ValueError, match="0 of them for 0 images"):
        yi_vl.stream(None, "a dog " * 600)
    assert calls == []


@pytest.mark.parametrize(
    ("arguments", "options", "problem"),
    [
        ((None, ""), {}, "question is empty"),
        ((None, " "), {}, "question is empty"),
        ((None, 3), {}, "question is 3; expected a text"),
        ((b"no image", "What?"), {}, "not an image"),
        ((["missing.png"], "What?"), {}, "missing.png"),
        ((None, "Hi"), {"temperature": -1}, "temperature is -1"),
        ((None, "Hi"), {"top_p": 0}, "top_p is 0"),
        ((None, "Hi"), {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ((None, "Hi"), {"stop": ["a", ""]}, "stop is"),
    ],
)
def test_bad_requests_are_refused_at_once(yi_vl: YiVL, arguments: Any, options: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        yi_vl.stream(*arguments, **options)
    with pytest.raises(ValueError, match=problem):
        yi_vl.predict_batch([arguments], **options)


def test_unknown_options_and_sizes_are_refused(yi_vl: YiVL) -> None:
    with pytest.raises(TypeError, match="temprature"):
        yi_vl.predict(None, "Hi", temprature=1.0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        yi_vl.predict_batch([], batch_size=0)
    assert yi_vl.predict_batch([]) == []


def test_image_parts_must_carry_their_image(yi_vl: YiVL) -> None:
    with pytest.raises(ValueError, match="must carry its image"):
        yi_vl.answer([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}])


def test_system_and_history_are_read(yi_vl: YiVL) -> None:
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    messages = [{"role": "system", "content": "Be brief."}, *history, {"role": "user", "content": "So?"}]
    response = yi_vl.predict(None, "So?", system="Be brief.", history=history, max_new_tokens=12)
    assert response == yi_vl.answer(messages, max_new_tokens=12)
    assert response != yi_vl.predict(None, "So?", max_new_tokens=12)


def test_outputs_have_finish_reasons_and_lengths(yi_vl: YiVL, script: Script) -> None:
    script([[*ids_of(yi_vl, " dog"), 2], ids_of(yi_vl, " dog")])
    prompts = [yi_vl.engine.prepare([{"role": "user", "content": "Hi"}])] * 2
    outputs = [output for step in yi_vl.engine.generate(prompts, Sampling(max_new_tokens=3)) for output in step]
    assert [
        (output.request_id, output.finish_reason, output.num_tokens) for output in outputs if output.finish_reason
    ] == [
        (0, "stop", 2),
        (1, "length", 3),
    ]


def test_a_conversation_keeps_its_history(yi_vl: YiVL) -> None:
    chat = yi_vl.chat()
    first = chat.ask("What is this?", WIDE, max_new_tokens=5)
    second = chat.ask("And what else?", max_new_tokens=5)
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert [chat.messages[index]["content"] for index in (1, 3)] == [first, second]
    image_part = {"type": "image", "image": WIDE}
    messages = [
        {"role": "user", "content": [image_part, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And what else?"},
    ]
    assert second == yi_vl.answer(messages, max_new_tokens=5)


def test_a_conversation_keeps_its_images_when_their_files_are_gone(yi_vl: YiVL, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(WIDE.read_bytes())
    chat = yi_vl.chat(system="Be brief.")
    chat.ask("What?", path, max_new_tokens=3)
    path.unlink()
    chat.ask("And?", max_new_tokens=3)
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}


def test_a_stopped_answer_stays_in_the_history_as_far_as_it_went(yi_vl: YiVL, script: Script) -> None:
    script([ids_of(yi_vl, " dog")])
    chat = yi_vl.chat()
    pieces = chat.stream("Hi")
    assert next(pieces) + next(pieces) == "dog dog"
    pieces.close()
    assert chat.messages[-1] == {"role": "assistant", "content": "dog dog"}
    chat.ask("And?", max_new_tokens=2)
    assert len(chat.messages) == 4


def test_a_failed_turn_is_dropped(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = yi_vl.chat()
    for wrong in (("", None), ("What?", "missing.png")):
        with pytest.raises(ValueError):
            chat.ask(*wrong)
    (dog,), steps = ids_of(yi_vl, " dog"), 0

    def fail_later(**inputs: Any) -> SimpleNamespace:
        nonlocal steps
        steps += 1
        grow_cache(**inputs)
        if steps == 3:
            raise RuntimeError("out of memory")
        return SimpleNamespace(logits=torch.eye(960)[None, None, dog])

    monkeypatch.setattr(yi_vl.model, "forward", fail_later)
    pieces = chat.stream("Hi")
    assert next(pieces) and chat.messages
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pieces)
    assert chat.messages == []
    yi_vl.clear_cache()  # of what was not computed


@pytest.mark.parametrize("configured", [None, 2, 7, [2, 7], 11])
def test_both_end_tokens_of_yi_end_an_answer_whatever_is_configured(configured: Any, yi_vl: YiVL) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = configured
    extra = {configured} if configured == 11 else set()
    assert YiVL(model, yi_vl.processor).engine.stop_ids == {2, 7} | extra


def test_model_and_processor_must_fit() -> None:
    with pytest.raises(ValueError, match="patch size in pixels is 14 in one, 28 in the other"):
        YiVL(tiny_model(), tiny_processor(patch_size=28))
    model = tiny_model()
    model.config.image_token_id = 901
    with pytest.raises(ValueError, match="image token's id is 901 in one, 900 in the other"):
        YiVL(model, tiny_processor())


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_weights_that_are_elsewhere_until_they_are_needed_change_no_answer(
    yi_vl: YiVL, where: str, tmp_path: Path
) -> None:
    model, here = tiny_model(), torch.device("cpu")
    if where == "cpu":
        accelerate.cpu_offload(model, here, preload_module_classes=["MultiheadAttention"])
    else:
        accelerate.disk_offload(model, str(tmp_path), here, preload_module_classes=["MultiheadAttention"])
    assert {parameter.device.type for parameter in model.model.language_model.layers.parameters()} == {"meta"}
    offloaded = YiVL(model, yi_vl.processor)
    assert offloaded.predict_batch(REQUESTS, batch_size=2, max_new_tokens=8) == [
        yi_vl.predict(*request, max_new_tokens=8) for request in REQUESTS
    ]
    chat, other = offloaded.chat(), yi_vl.chat()
    for question, image in (("What?", WIDE), ("And now?", None)):
        assert chat.ask(question, image, max_new_tokens=6) == other.ask(question, image, max_new_tokens=6)
