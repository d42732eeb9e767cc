"""The caches of prefixes and images: they save prefill and encoding, change no answer, and are bounded."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import NUM_PATCHES, OFFICIAL, prefill, tiny_yi_vl, uncached
from transformers.cache_utils import Cache

from yi_vl.chat import render_caption
from yi_vl.engine.kv_cache import new_cache
from yi_vl.engine.prefix_cache import ImageKey, LRUCache, PrefixCache, PrefixKey
from yi_vl.engine.sampling import Sampling
from yi_vl.messages import user_message
from yi_vl.predict import YiVL

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


class Watched:
    """Counts the tokens of each forward pass and the images that are encoded."""

    def __init__(self, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
        self.read: list[int] = []
        self.encoded: list[int] = []
        forward, encode = yi_vl.model.forward, yi_vl.model.model.encode_images

        def watch_forward(**inputs: Any) -> Any:
            self.read.append((inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]).shape[1])
            return forward(**inputs)

        def watch_encode(pixel_values: torch.Tensor) -> torch.Tensor:
            self.encoded.append(len(pixel_values))
            return encode(pixel_values)

        monkeypatch.setattr(yi_vl.model, "forward", watch_forward)
        monkeypatch.setattr(yi_vl.model.model, "encode_images", watch_encode)


def test_an_image_seen_lately_is_not_encoded_again(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, watched = uncached(yi_vl), Watched(yi_vl, monkeypatch)
    first = fresh.predict_batch([([WIDE, TALL, WIDE], "What?"), (WIDE, "Where?")], max_new_tokens=8)
    assert sum(watched.encoded) == 2
    assert fresh.predict([WIDE, TALL, WIDE], "What?", max_new_tokens=8) == first[0] and sum(watched.encoded) == 2


def test_a_chat_reads_only_what_is_new(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh, watched = uncached(yi_vl), Watched(yi_vl, monkeypatch)
    chat = fresh.chat()
    chat.ask("What is in this image?", [WIDE], max_new_tokens=6)
    first_turn, watched.read[:] = watched.read[0], []
    chat.ask("And now?", max_new_tokens=6)
    assert watched.encoded == [1] and watched.read[0] < first_turn / 4
    fresh.chat().ask(
        "Another question", [WIDE], max_new_tokens=6
    )  # the same prefix: system prompt and image are cached
    assert watched.encoded == [1] and max(watched.read) < first_turn / 4


def test_a_prompt_that_is_an_image_alone_is_answered_again(yi_vl: YiVL) -> None:
    """A captioning prompt: the longest cached prefix would end within the image."""
    engine = uncached(yi_vl).engine
    encoded = yi_vl.processor.encode(render_caption("")[:1])
    prompts = [engine.inputs.to_prompt(encoded, [yi_vl.processor.image_processor.to_inputs(WIDE)])]
    first, again = (
        [output.text for (output,) in engine.generate(prompts, Sampling(max_new_tokens=6))] for _ in range(2)
    )
    assert again == first


def test_images_and_image_tokens_that_do_not_match_are_refused(yi_vl: YiVL) -> None:
    prompt = yi_vl.engine.prepare([user_message([WIDE], "What?")])
    broken = replace(prompt, key=replace(prompt.key, images=prompt.key.images * 2))
    with pytest.raises(ValueError, match=f"{NUM_PATCHES} image tokens .* {2 * NUM_PATCHES} image features"):
        list(uncached(yi_vl).engine.generate([broken], Sampling()))


@pytest.mark.parametrize("change", ["go on", "regenerate", "edit", "stop early", "failed turn", "another image"])
def test_prefix_caching_changes_no_answer(yi_vl: YiVL, change: str) -> None:
    """Logits of the next turn equal those of a cold run, whatever happened to the conversation before."""
    warm = uncached(yi_vl)
    chat = warm.chat()
    chat.ask("What is in this image?", [WIDE], max_new_tokens=6)
    chat.ask("What else?", max_new_tokens=6)
    if change == "regenerate":
        chat.messages = chat.messages[:-2]
    elif change == "edit":
        chat.messages = [*chat.messages[:2], {"role": "user", "content": "Something else?"}, chat.messages[3]]
    elif change == "stop early":
        pieces = chat.stream("Go on", max_new_tokens=20)
        next(pieces)
        pieces.close()
    elif change == "failed turn":
        with pytest.raises(ValueError, match="no-such-file"):
            chat.ask("And this?", ["no-such-file.png"])
    elif change == "another image":
        chat.messages = [
            {
                "role": "user",
                "content": [{"type": "image", "image": TALL}, {"type": "text", "text": "What is in this image?"}],
            },
            *chat.messages[1:],
        ]
    conversation = [*chat.messages, {"role": "user", "content": "What else?"}]

    def logits(model: YiVL) -> torch.Tensor:
        prompt = model.engine.prepare(conversation)
        assert (model.engine.prefixes.find(prompt.key).get_seq_length() > 0) == (model is warm)
        rows, seen = prefill(model, [prompt]), []
        for _ in range(5):
            seen.append(rows.logits)
            rows.step(rows.logits.argmax(-1))
        return torch.cat(seen)

    torch.testing.assert_close(logits(warm), logits(uncached(yi_vl)), atol=1e-4, rtol=0)


def test_the_prefix_cache_is_bounded(yi_vl: YiVL) -> None:
    fresh = uncached(yi_vl)
    fresh.predict(WIDE, "What?", max_new_tokens=4)
    num_bytes_of_one = fresh.engine.prefixes.num_bytes
    fresh.engine.prefixes.max_bytes = int(2.5 * num_bytes_of_one)
    for question in ("What?", "Where?", "Why?", "How?", "Who?"):
        fresh.chat(system=question * 9).ask(question, [TALL], max_new_tokens=4)
        assert 0 < fresh.engine.prefixes.num_bytes <= 2.5 * num_bytes_of_one
        parts = [
            part
            for entry in fresh.engine.prefixes._entries.values()
            for layer in entry.layers.values()
            for part in layer
        ]
        held = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts}
        assert sum(held.values()) == fresh.engine.prefixes.num_bytes  # no reserve, nothing larger kept alive
    fresh.clear_cache()
    assert fresh.engine.prefixes.num_bytes == 0


def test_the_least_recently_used_goes_first_and_bytes_are_bounded() -> None:
    store: LRUCache[str] = LRUCache(max_bytes=10)
    store.put("a", "A", 4)
    store.put("b", "B", 4)
    assert store.get("a") == "A"
    store.put("c", "C", 4)
    assert (store.get("a"), store.get("b"), store.get("c"), store.num_bytes) == ("A", None, "C", 8)
    store.put("large", "L", 11)
    assert store.get("large") is None and store.num_bytes == 8
    store.put("a", "A2", 6)
    assert store.get("a") == "A2" and store.num_bytes == 10 and len(store) == 2


def test_prefixes_are_found_by_blocks_and_dropped_with_them() -> None:
    """Against a plain search over all entries, with branches that share beginnings, and images that differ."""

    def key_of(numbers: list[int], *digests: bytes) -> PrefixKey:
        images = tuple(ImageKey(digest, 20 + 30 * i, 40 + 30 * i) for i, digest in enumerate(digests))
        return PrefixKey(np.array(numbers, dtype=np.int64), images)

    def cache_of(length: int) -> Cache:
        cache = new_cache()
        cache.update(torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1), 0)
        return cache

    draw = random.Random(0)
    prefixes = PrefixCache(max_bytes=8 * 3000)  # 4 bytes each of keys and values
    for _ in range(200):
        numbers = [7] * draw.choice([25, 60, 100]) + [draw.randrange(2)] * draw.randrange(1, 80)
        key = key_of(numbers, draw.choice([b"a", b"b"]))
        entries = prefixes._entries.values()
        expected = max((entry.key.num_common(key) for entry in entries), default=0)
        assert prefixes.num_cached(key) == (expected if expected >= 16 else 0)
        assert prefixes.find(key).get_seq_length() == prefixes.num_cached(key)
        prefixes.put(key, cache_of(len(key)))
        assert prefixes.num_cached(key) == len(key)
        assert prefixes.num_bytes == sum(8 * len(entry.key) for entry in entries) <= prefixes.max_bytes
    assert {id(entry) for entries in prefixes._reusable._entries.values() for entry in entries} == set(
        prefixes._entries
    )
    assert 10 < len(prefixes) < 60


def test_a_lookup_does_not_take_longer_the_more_prefixes_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    prefixes, count = PrefixCache(max_bytes=1 << 20), 0
    num_common = PrefixKey.num_common

    def watch(key: PrefixKey, other: PrefixKey) -> int:
        nonlocal count
        count += 1
        return num_common(key, other)

    monkeypatch.setattr(PrefixKey, "num_common", watch)
    for number in range(300):  # all begin with the same block, as with one system prompt
        key = PrefixKey(np.array([7] * 20 + [number] * 20, dtype=np.int64))
        count = 0
        assert prefixes.num_cached(key) == (20 if number else 0)
        assert count <= 64
        cache = new_cache()
        cache.update(torch.zeros(1, 1, 40, 1), torch.zeros(1, 1, 40, 1), 0)
        prefixes.put(key, cache)
    assert len(prefixes) == 300 and prefixes.num_cached(key) == 40
