"""The engine with the hybrid decoder: every answer is what it would be alone and uncached, and memory what it says."""

from __future__ import annotations

import asyncio
import random
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from engine_checks import (
    Requests,
    Texts,
    alone,
    assert_decodes_as_uncached,
    assert_rejected_drafts_change_no_answer,
    assert_whatever_joins_or_leaves_changes_no_answer,
    prompt_of,
)
from fake_cuda import fake_cuda
from serving import client_of, serving
from test_prefix_cache import Watched
from tiny import NUM_PATCHES, OFFICIAL, prefill, tiny_hybrid, uncached
from transformers.cache_utils import Cache

from eval.speed.cache import compare_cache
from yi_vl.decoder.config import YiHybridConfig
from yi_vl.engine import prompt_lookup
from yi_vl.engine.cache_layers import GrowableLayer, WindowLayer
from yi_vl.engine.kv_cache import gather, layers_of, new_cache, row_of, shift_row_
from yi_vl.engine.prefix_cache import ImageKey, PrefixCache, PrefixKey
from yi_vl.engine.running_batch import forward
from yi_vl.engine.sampling import Sampling
from yi_vl.messages import Message, user_message
from yi_vl.predict import YiVL
from yi_vl.server import create_app

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
WINDOW = 12  # less than an image's 16 tokens
QUESTIONS = ("Hi", "What is this?", "Tell me about a dog " * 4, "How many?", "a cat " * 20)


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_hybrid(WINDOW)


def text_config(yi_vl: YiVL) -> YiHybridConfig:
    config = yi_vl.model.config.text_config
    assert isinstance(config, YiHybridConfig)
    return config


def formula(config: YiHybridConfig, num_tokens: int) -> int:
    """Bytes of float32 keys and values."""
    assert config.head_dim is not None and config.num_key_value_heads is not None
    return 2 * config.num_key_value_heads * config.head_dim * 4 * config.kv_tokens(num_tokens)


# One cache


@pytest.mark.core
@pytest.mark.parametrize("chunk", [1, 2, 5, WINDOW - 1, WINDOW, WINDOW + 1, 31])
def test_cached_equals_uncached_at_every_length_and_bytes_are_those_of_the_formula(yi_vl: YiVL, chunk: int) -> None:
    config, model, num_tokens = text_config(yi_vl), yi_vl.model, 3 * WINDOW
    ids = torch.randint(3, 900, (1, num_tokens), generator=torch.Generator().manual_seed(chunk))
    cache, logits = new_cache(config), []
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        for start in range(0, num_tokens, chunk):
            new = ids[:, start : start + chunk]
            positions = torch.arange(start, start + new.shape[1])[None]
            mask = torch.ones(1, start + new.shape[1], dtype=torch.bool)
            logits.append(forward(model, cache, mask, positions, new.shape[1], input_ids=new))
            stored = row_of(cache, 0).values()
            assert sum(part.nbytes for layer in stored for part in layer) == formula(config, mask.shape[1])
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=1e-4, rtol=0)
    sources = config.kv_source_layers
    assert sources is not None and set(layers_of(cache)) == set(sources) and len(set(sources)) < len(sources)


def test_a_window_is_decoded_in_place_and_holds_no_more_than_its_reserve() -> None:
    layer, reserve = WindowLayer(40), WindowLayer.num_reserved
    layer.update(*torch.randn(2, 1, 2, 1000, 4))
    addresses = []
    for _ in range(500):
        keys, _ = layer.update(*torch.randn(2, 1, 2, 1, 4))
        addresses.append(keys.untyped_storage().data_ptr())
        assert keys.shape[2] == 40 and layer._buffer is not None and layer._buffer.shape[3] <= 40 + 2 * reserve
    num_moves = sum(address != before for before, address in pairwise(addresses))
    assert num_moves <= 500 / reserve and layer.get_seq_length() == 1500


def test_a_window_gives_back_only_what_it_holds() -> None:
    cache = Cache(layers=[WindowLayer(6)])
    cache.update(*torch.randn(2, 1, 1, 30, 1), 0)
    assert row_of(cache, 0, num_tokens=5)[0][0].shape[2] == 5  # all are of the last pass
    cache.update(*torch.randn(2, 1, 1, 2, 1), 0)
    assert row_of(cache, 0, num_tokens=30)[0][0].shape[2] == 5
    with pytest.raises(AssertionError, match="dropped 1 of the tokens"):
        row_of(cache, 0, num_tokens=29)
    layer = cache.layers[0]
    assert isinstance(layer, GrowableLayer)
    layer.truncate(30)
    with pytest.raises(AssertionError):
        layer.truncate(29)


def test_rows_longer_and_shorter_than_the_window_are_gathered() -> None:
    """The key of a token is its number; whatever leaves or joins, a row has its last tokens, one behind another."""
    draw, window = random.Random(0), 6
    rows: list[list[int]] = []
    cache, mask = Cache(layers=[WindowLayer(window), GrowableLayer()]), torch.zeros(0, 0, dtype=torch.bool)
    for number in range(60):
        length = draw.choice([1, 3, 5, 6, 9, 20])
        new = torch.arange(100 * number + 1, 100 * number + 1 + length).float()
        single = new_cache_of([new], window)
        has_gap, extra = draw.random() < 0.5, draw.randint(1, 4)  # tokens computed last, and some of them rejected
        keep = list(range(len(rows))) if len(rows) < 4 else sorted(draw.sample(range(len(rows)), 2))
        parts = [(cache, mask, keep)] if keep else []
        cache, mask = gather([*parts, (single, torch.ones(1, length, dtype=torch.bool), [0])])
        rows = [rows[slot] for slot in keep] + [new.int().tolist()]
        step = torch.stack([torch.arange(extra) + rows[slot][-1] + 1 for slot in range(len(rows))]).float()
        kept = [draw.randint(1, extra) if has_gap else extra for _ in rows]
        for index in range(2):
            cache.update(step[:, None, :, None], step[:, None, :, None], index)
        mask = torch.cat([mask, torch.arange(extra) < torch.tensor(kept)[:, None]], dim=1)
        rows = [row + new.int().tolist()[:count] for row, new, count in zip(rows, step, kept)]
        if has_gap and draw.random() < 0.5:
            cache, mask = gather([(cache, mask, range(len(rows)))])
        elif has_gap:
            for slot, count in enumerate(kept):
                if count < extra:
                    shift_row_(cache, mask, slot, extra - count)
        for slot, row in enumerate(rows):
            stored = row_of(cache, slot, mask)
            assert stored[1][0].flatten().int().tolist() == row
            assert stored[0][1].flatten().int().tolist() == row[-(window - 1) :]


def new_cache_of(rows: list[torch.Tensor], window: int) -> Cache:
    cache = Cache(layers=[WindowLayer(window), GrowableLayer()])
    for index in range(2):
        cache.update(*[torch.stack(rows)[:, None, :, None]] * 2, index)
    return cache


# Batches


@pytest.mark.core
@pytest.mark.parametrize("max_tokens", [4096, 61, 5])
def test_prompts_that_are_prefilled_together_are_computed_as_if_alone(yi_vl: YiVL, max_tokens: int) -> None:
    """What follows their common prefix is of different lengths: padding must not shorten a window."""
    fresh = uncached(yi_vl)
    prompts = [prompt_of(yi_vl, QUESTIONS[4]), prompt_of(yi_vl, "Hi"), prompt_of(yi_vl, "Why?", WIDE)]
    batch = prefill(fresh, prompts, max_tokens)
    assert_decodes_as_uncached(yi_vl, batch, 3)
    batch.select([0, 1])
    batch.extend(prefill(fresh, [prompt_of(yi_vl, "What?", WIDE, TALL)]))
    batch.select([1, 2])
    live = sum(part.nbytes for layer in layers_of(batch.cache).values() for part in layer)
    longest = int(batch.attention_mask.sum(1).max())
    assert live == len(batch) * formula(text_config(yi_vl), longest)
    assert batch.cache.get_seq_length() == longest


@pytest.mark.parametrize(("window", "seed"), [(WINDOW, 0), (2, 1), (60, 2)])
def test_whatever_joins_leaves_is_cancelled_edited_or_continued_changes_no_answer(window: int, seed: int) -> None:
    assert_whatever_joins_or_leaves_changes_no_answer(tiny_hybrid(window), seed, 16, _next_messages)


def _next_messages(draw: random.Random, requests: Requests, texts: Texts) -> list[Message]:
    """A conversation: a new one, or an earlier one that goes on, is asked again, or is edited."""
    question = draw.choice(QUESTIONS)
    if not requests or draw.random() < 0.4:
        return [user_message(draw.sample([WIDE, TALL], draw.randrange(3)), question)]
    request_id = draw.choice([*requests])
    messages = requests[request_id][0]
    answered = [*messages, {"role": "assistant", "content": texts[request_id] or "Yes."}, user_message([], question)]
    return draw.choice([messages, answered, [*messages[:-1], user_message([], question)]])


@pytest.mark.parametrize("max_draft_tokens", [3, 8])
def test_rejected_drafts_change_no_answer(yi_vl: YiVL, max_draft_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt_of(yi_vl, text, WIDE) for text in QUESTIONS[:3]]
    samplings = [Sampling(16 + 4 * i, temperature=float(i == 1), seed=i) for i in range(3)]
    assert_rejected_drafts_change_no_answer(yi_vl, prompts, samplings, max_draft_tokens, monkeypatch)


def test_a_server_answers_as_alone(yi_vl: YiVL) -> None:
    fresh, texts = uncached(yi_vl), QUESTIONS[:4]
    expected = [alone(yi_vl, prompt_of(yi_vl, text), Sampling(8)) for text in texts]

    async def ask_all(address: str) -> list[str]:
        import openai

        client = client_of(address, openai.AsyncOpenAI)

        async def ask(text: str) -> str:
            messages = [{"role": "user", "content": text}]
            reply = await client.chat.completions.create(model="yi-vl", messages=messages, max_tokens=8, temperature=0)
            return str(reply.choices[0].message.content)

        return list(await asyncio.gather(*map(ask, texts)))

    with serving(create_app(fresh, "yi-vl")) as address:
        assert asyncio.run(ask_all(address)) == expected


def test_on_a_gpu_answers_are_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lookup, "_NGRAM_TOKENS", 1)
    requests = [(WIDE, QUESTIONS[1]), (None, QUESTIONS[2]), (WIDE, "Why?")]

    def answers(model: YiVL) -> list[Any]:
        chat = model.chat()
        first = [chat.ask("What?", WIDE, max_new_tokens=4), chat.ask("And?", max_new_tokens=4)]
        return [first, model.predict_batch(requests, batch_size=2, max_new_tokens=6)]

    expected = answers(tiny_hybrid(WINDOW, num_experts=0))
    with fake_cuda(monkeypatch):
        on_cuda = tiny_hybrid(WINDOW, num_experts=0)  # their kernels need a real GPU
        assert answers(YiVL(on_cuda.model.to("cuda"), on_cuda.processor)) == expected  # type: ignore[arg-type]


# Prefixes


class Chat:
    """A conversation whose next prompts are prefilled, and decoded for some tokens, as the engine does."""

    def __init__(self, yi_vl: YiVL, watched: Watched) -> None:
        self.yi_vl, self.watched = yi_vl, watched

    def num_computed(self, messages: list[Any], num_steps: int = 3) -> int:
        """Tokens of the prompt that were computed; logits are compared with those of an uncached run."""
        self.watched.read.clear()
        prompt = self.yi_vl.engine.prepare(messages)
        batch = prefill(self.yi_vl, [prompt])
        num_tokens = sum(self.watched.read)
        assert_decodes_as_uncached(self.yi_vl, batch, num_steps)
        return num_tokens


@pytest.fixture
def chat(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> Chat:
    return Chat(uncached(yi_vl), Watched(yi_vl, monkeypatch))


def finish(yi_vl: YiVL, messages: list[Any], reply: str) -> int:
    """A request that is answered with given words; how many tokens of it were computed."""
    batch, core = prefill(yi_vl, [yi_vl.engine.prepare(messages)]), yi_vl.engine.core
    (request,), tokenizer = batch.requests, yi_vl.processor.tokenizer
    for token in tokenizer(f" {reply}\n", add_special_tokens=False)["input_ids"]:
        request.add(token)
        batch.step(torch.tensor([token]))
    request.is_cancelled, core.batch = True, batch
    core.release()
    return len(request.key)


@pytest.mark.parametrize("images", [(), (WIDE,), (WIDE, TALL)])
@pytest.mark.parametrize(
    "change", ["go on", "regenerate", "edit the last turn", "another image", "edit the first turn"]
)
def test_a_conversation_is_computed_from_its_longest_whole_prefix(chat: Chat, change: str, images: tuple[Any]) -> None:
    yi_vl, new = chat.yi_vl, user_message([], "Something else?")
    messages: list[Any] = []
    ends = []
    for question, reply in (("What is in this image, and what is not?", "A dog and a cat."), ("Why?", "It is so.")):
        messages.append(user_message([] if messages else images, question))
        ends.append(finish(yi_vl, messages, reply))
        messages.append({"role": "assistant", "content": reply})
    image_ends = [image.end for image in yi_vl.engine.prepare(messages[:1]).key.images]
    if change == "go on":
        messages, start = [*messages, new], ends[1]
    elif change == "regenerate":
        messages, start = messages[:-1], len(yi_vl.engine.prepare(messages[:-1])) - 1
    elif change == "edit the last turn":
        messages, start = [*messages[:-2], new], ends[0]
    elif change == "edit the first turn":
        messages = [user_message(images, "What is in that image, and what is not?"), *messages[1:-1]]
        start = max(image_ends, default=0)
    else:
        messages, start = [user_message([TALL], "What?")], 0
    num_tokens = len(yi_vl.engine.prepare(messages))
    assert chat.num_computed(messages) <= num_tokens - start
    assert chat.num_computed(messages) == 1  # and again


def test_an_image_asked_about_again_is_not_prefilled_again(chat: Chat) -> None:
    ask = [[user_message([WIDE], question)] for question in QUESTIONS]
    num_first = chat.num_computed(ask[0])
    assert num_first > NUM_PATCHES + WINDOW
    (image,) = chat.yi_vl.engine.prepare(ask[0]).key.images
    for messages in ask[1:3]:
        assert chat.num_computed(messages) <= len(chat.yi_vl.engine.prepare(messages)) - image.end
    chat.watched.read.clear()
    prompts = [chat.yi_vl.engine.prepare(messages) for messages in ask[3:]]
    batch = prefill(chat.yi_vl, prompts)
    assert chat.watched.read[0] < 60 and len(chat.watched.read) == 1  # tokens, and passes
    assert_decodes_as_uncached(chat.yi_vl, batch, 3)


def test_several_questions_about_an_image_at_once_share_its_prefill(chat: Chat) -> None:
    prompts = [prompt_of(chat.yi_vl, question, WIDE) for question in QUESTIONS[:3]]
    batch = prefill(chat.yi_vl, prompts)
    assert chat.watched.read[0] > NUM_PATCHES + WINDOW and chat.watched.read[1] < 50
    assert_decodes_as_uncached(chat.yi_vl, batch, 3)
    assert chat.num_computed([user_message([WIDE], QUESTIONS[3])]) < 20


def test_a_short_chat_about_an_image_is_one_entry() -> None:
    """Which gives back all its prefixes from the end of the image on."""
    yi_vl = tiny_hybrid(80)
    messages = [user_message([WIDE], "What?")]
    for number in range(3):
        num_tokens = finish(yi_vl, messages, f"Answer {number}.")
        messages += [{"role": "assistant", "content": f"Answer {number}."}, user_message([], f"And {number}?")]
    (entry,), prefixes = yi_vl.engine.prefixes._entries.values(), yi_vl.engine.prefixes
    (image,) = yi_vl.engine.prepare(messages).key.images
    assert entry.shortest == image.end and len(entry.key) == num_tokens > 3 * 80 - 40
    for length in range(image.end, num_tokens + 1):
        assert prefixes.num_cached(entry.key.head(length)) == length
    assert prefixes.num_cached(entry.key.head(image.end - 1)) == 0


def test_a_long_system_prompt_is_shared_from_the_third_conversation_on(chat: Chat) -> None:
    """Where the second leaves the first is known only then."""
    system = {"role": "system", "content": "Be brief and kind. " * 12}
    computed = [chat.num_computed([system, user_message([], question)]) for question in ("Hi", "What?", "Where?")]
    assert min(computed[:2]) > 50 and computed[2] < 15


def test_a_long_chat_keeps_a_few_prefixes_and_drops_none_of_another(yi_vl: YiVL) -> None:
    fresh, messages, other = uncached(yi_vl), [user_message([WIDE], "What?")], [user_message([TALL], "Where?")]
    finish(fresh, other, "There.")
    num_before = len(fresh.engine.prefixes)
    for number in range(5):
        finish(fresh, messages, f"Answer {number}.")
        messages += [{"role": "assistant", "content": f"Answer {number}."}, user_message([], f"And {number}?")]
    prefixes, config = fresh.engine.prefixes, text_config(yi_vl)
    assert num_before < len(prefixes) <= num_before + 5  # the system prompt, the image's end, and the last three
    num_bytes = 0
    for entry in prefixes._entries.values():
        parts = [part for layer in entry.layers.values() for part in layer]
        held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        num_tokens = len(entry.key)
        num_more = num_tokens - max(entry.shortest, min(num_tokens, WINDOW - 1))  # of each window, for shorter prefixes
        per_token = formula(config, 1) // len(entry.layers)
        assert sum(held.values()) == formula(config, num_tokens) + 3 * num_more * per_token and num_more < WINDOW
        num_bytes += sum(held.values())
    assert prefixes.num_bytes == num_bytes
    key = fresh.engine.prepare(other).key
    assert prefixes.num_cached(key.reusable_head) >= len(key) - 1


def test_the_table_of_memory_is_that_of_the_formula() -> None:
    rows = list(compare_cache(num_layers=16, window=16, every=4, group=2)["variants"].values())
    assert [round(row["times_smaller"], 2) for row in rows] == [1.21, 2.1, 3.32, 4.13, 4.7]
    assert all(row["hybrid_MiB"] == row["formula_MiB"] for row in rows)


@pytest.mark.parametrize("num_tokens", [39, 40, 41, 60])
def test_what_a_window_of_40_has_dropped_is_not_given_back(yi_vl: YiVL, num_tokens: int) -> None:
    config = YiHybridConfig(**{**text_config(yi_vl).to_dict(), "sliding_window": 40})
    prefixes, cache, key = PrefixCache(1 << 17, config), new_cache(config), PrefixKey(np.arange(num_tokens))
    for index in (0, 1, 2, 4, 5):
        cache.update(*torch.zeros(2, 1, 1, num_tokens, 1), index)
    prefixes.put(key, cache)
    assert prefixes.num_cached(key.extended([1])) == num_tokens
    for length in (num_tokens - 3, num_tokens - 1):
        expected = length if num_tokens == 39 else 0
        assert prefixes.num_cached(key.head(length).extended([1])) == expected


def test_prefixes_given_back_are_those_put_in_and_complete(yi_vl: YiVL) -> None:
    """A token's key is the sum of all ids up to it; windows of prefixes that are found have the right ones."""
    window, draw = 40, random.Random(0)
    config = YiHybridConfig(**{**text_config(yi_vl).to_dict(), "sliding_window": window})
    prefixes, keys, num_hits = PrefixCache(1 << 17, config), [], 0
    for _ in range(200):
        ids = [7] * draw.choice([25, 60]) + [draw.randrange(2)] * draw.randrange(1, 50) + [draw.randrange(3)] * 9
        if keys and draw.random() < 0.6:
            ids = [*draw.choice(keys), *ids[-draw.randrange(1, 40) :]]
        ids = ids[: draw.choice([window - 1, window, window + 1, window + 2, 400])]
        keys.append(ids)
        key = PrefixKey(np.array(ids, dtype=np.int64), (ImageKey(bytes([draw.randrange(2)]), 8, 20),))
        sums = (torch.tensor(ids).cumsum(0) + 1000 * key.images[0].digest[0]).double()
        cached = prefixes.find(key)
        length = cached.get_seq_length()
        assert length == prefixes.num_cached(key) and (not length or set(layers_of(cached)) == {0, 1, 2, 4, 5})
        for index, (layer_keys, _) in layers_of(cached).items():
            num_stored = min(length, window - 1) if index % 2 == 0 else length
            assert layer_keys.flatten().tolist() == sums[length - num_stored : length].tolist()
        num_hits += length > 25
        cache = new_cache(config)
        for index in (0, 1, 2, 4, 5):
            cache.update(sums[None, None, :, None], sums[None, None, :, None], index)
        for end in sorted(prefixes.ends(key)):
            prefixes.put(key.head(end), cache, is_shared=end < len(key) - 1)
        assert prefixes.num_cached(key) >= len(key) - 1
        stored = sum(entry.num_bytes for entry in prefixes._entries.values())
        assert prefixes.num_bytes == stored <= prefixes.max_bytes
    assert num_hits > 50
