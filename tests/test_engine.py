"""The engine: requests that join and leave at any step, threads that share it, fairness, and one request's errors."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from typing import Any

import pytest
import torch
from tiny import OFFICIAL, tiny_yi_vl, uncached

from yi_vl.engine import prompt_lookup
from yi_vl.engine.engine import Engine
from yi_vl.engine.pace import Pace
from yi_vl.engine.prompt import Prompt
from yi_vl.engine.prompt_lookup import PromptLookup
from yi_vl.engine.request import StepOutput
from yi_vl.engine.sampling import Sampling
from yi_vl.predict import YiVL

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
TEXTS = ("Hi", "What is this?", "Tell me about a dog " * 6, "How many?", "a cat " * 30)


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


@pytest.fixture
def engine(yi_vl: YiVL) -> Engine:
    return uncached(yi_vl).engine


def prompt_of(engine: Engine, text: str, *images: Any, system: str | None = None) -> Prompt:
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return engine.prepare(messages if system is None else [{"role": "system", "content": system}, *messages])


def run(engine: Engine, max_steps: int = 2000) -> dict[int, str]:
    """Step until nothing is left to do; the text of each request."""
    texts: dict[int, str] = defaultdict(str)
    for _ in range(max_steps):
        if not engine.wait_for_work(0):
            return texts
        for output in engine.step():
            assert output.error is None
            texts[output.request_id] += output.text
    raise AssertionError("the engine does not come to an end")


def alone(yi_vl: YiVL, prompt: Prompt, sampling: Sampling) -> str:
    outputs = [output for step in uncached(yi_vl).engine.generate([prompt], sampling) for output in step]
    return "".join(output.text for output in outputs)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_batch_size", [None, 3])
def test_every_answer_is_what_it_would_be_alone_whatever_joins_and_leaves(
    yi_vl: YiVL, engine: Engine, seed: int, max_batch_size: int | None
) -> None:
    draw, engine.max_batch_size = random.Random(seed), max_batch_size
    requests: dict[int, tuple[Prompt, Sampling]] = {}
    texts: dict[int, str] = defaultdict(str)
    cancelled = set()
    for step in range(60):
        if step < 40 and draw.random() < 0.5:
            images = draw.sample([WIDE, TALL], draw.randrange(3))
            prompt = prompt_of(engine, draw.choice(TEXTS), *images)
            temperature = draw.choice([0.0, 1.0])
            sampling = Sampling(max_new_tokens=draw.randint(1, 14), temperature=temperature, seed=draw.randrange(9))
            requests[engine.admit(prompt, sampling)] = prompt, sampling
        if requests and draw.random() < 0.1:
            cancelled.add(draw.choice([*requests]))
            engine.cancel(max(cancelled))
        for output in engine.step():
            texts[output.request_id] += output.text
    for request_id, text in run(engine).items():
        texts[request_id] += text
    for request_id, (prompt, sampling) in requests.items():
        expected = alone(yi_vl, prompt, sampling)
        if request_id in cancelled:
            assert expected.startswith(texts[request_id])
        else:
            assert texts[request_id] == expected
    assert engine.num_running == engine.num_waiting == 0


def test_threads_share_the_engine_and_batch_each_other(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = uncached(yi_vl)
    expected = [alone(yi_vl, prompt_of(fresh.engine, text, WIDE), Sampling(max_new_tokens=20)) for text in TEXTS]
    rows, forward = [], yi_vl.model.forward
    begin = threading.Barrier(len(TEXTS))

    def watch(**inputs: Any) -> Any:
        rows.append(len(inputs.get("input_ids", [])))
        return forward(**inputs)

    def answer(index: int) -> None:
        begin.wait()
        answers[index] = fresh.predict(WIDE, TEXTS[index], max_new_tokens=20)

    monkeypatch.setattr(yi_vl.model, "forward", watch)
    answers = [""] * len(TEXTS)
    threads = [threading.Thread(target=answer, args=(index,)) for index in range(len(TEXTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == expected and max(rows) > 1


def test_a_stream_that_is_read_slowly_holds_up_no_other(yi_vl: YiVL) -> None:
    fresh = uncached(yi_vl)
    slow = fresh.stream(WIDE, "What?", max_new_tokens=20)
    first = next(slow)
    assert fresh.predict(TALL, "Where?", max_new_tokens=20)
    expected = uncached(yi_vl).predict(WIDE, "What?", max_new_tokens=20)
    assert first + "".join(slow) == expected


def test_a_cancelled_request_frees_its_slot_and_its_memory_at_once(engine: Engine) -> None:
    engine.max_batch_size = 1
    first = engine.admit(prompt_of(engine, "Hi"), Sampling(max_new_tokens=50))
    second = engine.admit(prompt_of(engine, "What?"), Sampling(max_new_tokens=2))
    engine.step()
    assert (engine.num_running, engine.num_waiting) == (1, 1)
    engine.cancel(first)
    assert (engine.num_running, engine.num_waiting) == (0, 1)
    engine.cancel(first)  # no matter
    assert set(run(engine)) == {second}


def test_requests_cancelled_at_the_same_time_are_all_released(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is cancelled by another thread while the first one's slot is being freed, and no step follows."""
    first, second = (engine.admit(prompt_of(engine, text), Sampling(max_new_tokens=50)) for text in ("Hi", "What?"))
    while engine.batch_size < 2:
        engine.step()
    release = engine.core.release

    def cancel_meanwhile() -> None:
        release()
        thread = threading.Thread(target=engine.cancel, args=(second,))
        thread.start()
        thread.join(60)

    monkeypatch.setattr(engine.core, "release", cancel_meanwhile)
    engine.cancel(first)
    assert engine.num_running == 0 and not engine.wait_for_work(0)


def test_a_short_prompt_does_not_wait_for_long_ones(engine: Engine) -> None:
    """Long prompts are prefilled in chunks, and a short one comes first."""
    engine.core.prefill_pace = Pace(1.0, least=16, most=16, first=16)
    long_ids = [
        engine.admit(prompt_of(engine, "a cat " * 40, system=f"{n} ."), Sampling(max_new_tokens=3)) for n in "ab"
    ]
    for _ in range(3):
        assert engine.step() == []
    short = engine.admit(prompt_of(engine, "?", system="c"), Sampling(max_new_tokens=3))
    num_steps = 0
    while not (outputs := engine.step()):
        num_steps += 1
    assert {output.request_id for output in outputs} == {short} and num_steps <= 4
    assert set(run(engine)) >= set(long_ids)


def test_a_running_answer_gets_a_token_at_every_second_step_while_a_long_prompt_is_prefilled(engine: Engine) -> None:
    engine.core.prefill_pace = Pace(1.0, least=16, most=16, first=16)
    running = engine.admit(prompt_of(engine, "Hi", system="."), Sampling(max_new_tokens=40))
    while not engine.step():
        pass
    engine.admit(prompt_of(engine, "a cat " * 40), Sampling(max_new_tokens=1))
    given = [[output.request_id for output in engine.step()] for _ in range(8)]
    assert [running in ids for ids in given].count(True) == 4


def test_long_prompts_are_not_starved_by_short_ones(engine: Engine) -> None:
    engine.max_batch_size = 4
    engine.core.prefill_pace = Pace(1.0, least=16, most=16, first=16)
    long_id = engine.admit(prompt_of(engine, "a cat " * 40), Sampling(max_new_tokens=1))
    for number in range(200):
        engine.admit(prompt_of(engine, "?", system=str(number)), Sampling(max_new_tokens=1))
        if any(output.request_id == long_id for output in engine.step()):
            return
    raise AssertionError("the long prompt is never prefilled")


def test_clients_share_the_slots_fairly(engine: Engine) -> None:
    engine.max_batch_size = 2
    sampling = Sampling(max_new_tokens=2)
    greedy = [engine.admit(prompt_of(engine, f"Question {n}?"), sampling, client="greedy") for n in range(8)]
    modest = engine.admit(prompt_of(engine, "Hi"), sampling, client="modest")
    ended: list[int] = []
    while engine.wait_for_work(0):
        ended += [output.request_id for output in engine.step() if output.is_last]
    assert sorted(ended) == [*greedy, modest] and ended.index(modest) <= 3


def test_an_error_is_that_of_its_request_alone(yi_vl: YiVL) -> None:
    """A prompt that fails is found among those that are prefilled with it; the others are answered."""
    engine = uncached(yi_vl).engine
    prompts = [prompt_of(engine, text, WIDE) for text in ("Hi", "What?", "Where?")]
    expected = [alone(yi_vl, prompt, Sampling(max_new_tokens=6)) for prompt in prompts]
    broken = Prompt(prompt_of(engine, "What?", TALL).key, ())  # its image is missing
    received: list[StepOutput] = []
    ids = [
        engine.admit(prompt, Sampling(max_new_tokens=6), received.append) for prompt in (prompts[0], broken, prompts[2])
    ]
    while engine.wait_for_work(0):
        engine.step()
    failed = [output for output in received if output.error is not None]
    assert [output.request_id for output in failed] == [ids[1]]
    for index in (0, 2):
        assert "".join(o.text for o in received if o.request_id == ids[index]) == expected[index]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_after_a_failed_step_the_engine_serves_on(
    yi_vl: YiVL, engine: Engine, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    received: list[StepOutput] = []
    engine.admit(prompt_of(engine, "Hi"), Sampling(max_new_tokens=9), received.append)
    while not engine.step():
        pass

    def fail(**inputs: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(yi_vl.model, "forward", fail)
        if isinstance(error, Exception):
            engine.step()
        else:
            with pytest.raises(KeyboardInterrupt):
                engine.step()
    assert received[-1].error is not None and not engine.wait_for_work(0) and engine.num_running == 0
    prompt = prompt_of(engine, "Hi")
    engine.admit(prompt, Sampling(max_new_tokens=9))
    assert [*run(engine).values()] == [alone(yi_vl, prompt, Sampling(max_new_tokens=9))]


def test_rows_of_a_batch_use_their_own_cached_prefixes(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two chats with nothing in common but the beginning: each next turn computes its own new tokens only."""
    engine, sampling = uncached(yi_vl).engine, Sampling(max_new_tokens=4)
    chats = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]
        for image, text in ((WIDE, "What is in this image, please?"), (TALL, "Where?"))
    ]
    for index, text in enumerate(("", "")):
        outputs = [o for step in engine.generate([engine.prepare(chats[index])], sampling) for o in step]
        text = "".join(output.text for output in outputs)
        chats[index] += [{"role": "assistant", "content": text}, {"role": "user", "content": "Go on"}]
    prompts = [engine.prepare(chat) for chat in chats]
    expected = [alone(yi_vl, prompt, sampling) for prompt in prompts]
    computed, forward = [], yi_vl.model.forward

    def watch(**inputs: Any) -> Any:
        if "inputs_embeds" in inputs:
            computed.append(inputs["inputs_embeds"].shape[:2].numel())
        return forward(**inputs)

    monkeypatch.setattr(yi_vl.model, "forward", watch)
    for prompt in prompts:
        engine.admit(prompt, sampling)
    assert [*run(engine).values()] == expected
    assert sum(computed) < 0.4 * sum(map(len, prompts))


def test_the_pace_follows_what_was_measured() -> None:
    pace = Pace(0.5, least=64, most=4096, first=256)
    assert pace.num_units == 256
    pace.record(10, 5.0)  # too few to tell
    assert pace.num_units == 256
    for _ in range(20):
        pace.record(256, 0.1)
    assert pace.num_units == 1024  # 1280 fit
    for _ in range(20):
        pace.record(256, 100.0)
    assert pace.num_units == 64
    for _ in range(20):
        pace.record(4096, 0.001)
    assert pace.num_units == 4096


def test_an_engine_is_copied_without_what_is_under_way(engine: Engine) -> None:
    import copy

    engine.admit(prompt_of(engine, "Hi"), Sampling(max_new_tokens=9))
    engine.step()
    copied = copy.copy(engine)
    assert copied.num_running == 0 and not copied.wait_for_work(0) and copied.prefixes.num_bytes == 0
    assert torch.equal(copied.model.lm_head.weight, engine.model.lm_head.weight)


@pytest.mark.parametrize("max_draft_tokens", [1, 3, 8])
def test_drafts_change_no_answer(yi_vl: YiVL, max_draft_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is accepted or rejected, beside requests that are sampled and ones that leave."""
    plain, drafting = uncached(yi_vl).engine, uncached(yi_vl).engine
    plain.max_draft_tokens, drafting.max_draft_tokens = 0, max_draft_tokens
    drafted, accepted, record = [], [], PromptLookup.record

    def watch(lookup: PromptLookup, num_drafted: int, num_accepted: int) -> None:
        drafted.append(num_drafted)
        accepted.append(num_accepted)
        record(lookup, num_drafted, num_accepted)

    monkeypatch.setattr(PromptLookup, "record", watch)
    monkeypatch.setattr(prompt_lookup, "_NGRAM_TOKENS", 1)  # many drafts, most of them wrong
    monkeypatch.setattr(prompt_lookup, "_PAUSE_TOKENS", 0)
    prompts = [prompt_of(plain, text, image) for text in TEXTS for image in (WIDE, TALL)]
    samplings = [
        Sampling(max_new_tokens=5 + 7 * (index % 5), temperature=float(index % 3 == 2), seed=index, stop=("li",))
        for index in range(len(prompts))
    ]
    answers = []
    for engine in (plain, drafting):
        texts: dict[int, str] = defaultdict(str)
        for prompt, sampling in zip(prompts, samplings, strict=True):
            engine.admit(prompt, sampling)
            for output in (output for _ in range(3) for output in engine.step()):
                texts[output.request_id] += output.text
        for request_id, text in run(engine).items():
            texts[request_id] += text
        answers.append(texts)
    assert answers[1] == answers[0]
    assert sum(drafted) > sum(accepted) > 0
    for prompt in prompts:  # what was cached on the way is right, too
        assert alone_on(drafting, prompt) == alone_on(plain, prompt)


def alone_on(engine: Engine, prompt: Prompt) -> str:
    outputs = [output for step in engine.generate([prompt], Sampling(max_new_tokens=20)) for output in step]
    return "".join(output.text for output in outputs)


def test_an_answer_that_repeats_takes_fewer_steps(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, steps = yi_vl.model.forward, []

    def watch(**inputs: Any) -> Any:
        steps.append(inputs)
        return forward(**inputs)

    monkeypatch.setattr(yi_vl.model, "forward", watch)
    counts = []
    for max_draft_tokens in (0, 8):
        engine = uncached(yi_vl).engine
        engine.max_draft_tokens = max_draft_tokens
        steps.clear()
        engine.admit(prompt_of(engine, "Hi"), Sampling(max_new_tokens=200), ignore_eos=True)
        texts = run(engine)
        counts.append((len(steps), texts))
    assert counts[0][1] == counts[1][1]
    assert counts[1][0] < 0.7 * counts[0][0]  # a tiny random model soon repeats itself
