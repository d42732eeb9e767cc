"""The engine with gated cross-attention: every answer is what it would be alone and uncached, and the keys of an image
are computed once per conversation."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
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
from gated import NUM_LAYERS, RESAMPLED, blocks, gated_model, gated_processor
from PIL import Image
from serving import client_of, openai_messages, serving
from test_prefix_cache import Watched
from tiny import NUM_PATCHES, OFFICIAL, prefill, tiny_processor, uncached
from transformers.cache_utils import Cache

from eval.speed.engine import bytes_per_token
from yi_vl.cli import app
from yi_vl.engine import prompt_lookup
from yi_vl.engine.attention import GROUPED
from yi_vl.engine.cache_layers import GrowableLayer, ImageLayer
from yi_vl.engine.kv_cache import gather, lacks_image, layers_of, load_, new_cache, row_of, shift_row_, truncate_
from yi_vl.engine.prefix_cache import PrefixCache
from yi_vl.engine.running_batch import forward
from yi_vl.engine.sampling import Sampling
from yi_vl.info import config_table
from yi_vl.messages import Message, user_message
from yi_vl.predict import YiVL
from yi_vl.server import create_app

pytestmark = pytest.mark.core

WIDE, TALL = OFFICIAL / "wide.png", OFFICIAL / "tall.png"
NOISE, OTHER = (
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 60, 3), dtype=np.uint8)) for seed in range(2)
)
QUESTIONS = ("Hi", "What is this?", "Tell me about a dog " * 4, "How many?", "a cat " * 20)
NUM_BLOCKS = 2


def gated_yi_vl(**connector: Any) -> YiVL:
    model = gated_model(**connector)
    return YiVL(model, gated_processor(model))


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return gated_yi_vl()


def answered(question: str, *images: Any, reply: str = "A dog and a cat.") -> list[Message]:
    return [user_message(images, question), {"role": "assistant", "content": reply}]


def conversations() -> list[list[Message]]:
    """Without an image, with one, three in one turn, one in an earlier turn, and two with text between them."""
    return [
        [user_message([], QUESTIONS[4])],
        [user_message([WIDE], "Hi")],
        [user_message([WIDE, NOISE, TALL], "Which is it?")],
        [*answered("What is this?", TALL), user_message([], "Why?")],
        [*answered(QUESTIONS[2]), *answered("And this?", NOISE), user_message([WIDE], "And now?")],
    ]


# The cache


def test_rows_with_and_without_images_join_and_leave() -> None:
    """The key of an image is its number; whatever happens to the tokens, a row has its own last image, or none."""
    draw = random.Random(0)
    rows: list[int] = []  # 0 for none
    cache, mask = Cache(layers=[GrowableLayer(), ImageLayer()]), torch.zeros(0, 0, dtype=torch.bool)
    for number in range(1, 61):
        single, length = Cache(layers=[GrowableLayer(), ImageLayer()]), draw.choice([1, 4, 9])
        single.update(*torch.randn(2, 1, 1, length, 1), 0)
        image = draw.choice([0, number])
        if image:
            keys = torch.full((1, 2, 3, 4), float(image))
            single.layers[1].set(keys, -keys, torch.tensor([True]))  # type: ignore[union-attr]
        keep = list(range(len(rows))) if len(rows) < 4 else sorted(draw.sample(range(len(rows)), 2))
        parts = [(cache, mask, keep)] if keep else []
        cache, mask = gather([*parts, (single, torch.ones(1, length, dtype=torch.bool), [0])])
        rows = [*(rows[slot] for slot in keep), image]
        cache.update(*torch.randn(2, len(rows), 1, 3, 1), 0)
        is_kept = torch.tensor([draw.randint(1, 2) for _ in rows])[:, None] > torch.arange(2)
        truncate_(cache, mask.shape[1] + 2)
        mask = torch.cat([mask, is_kept], dim=1)
        for slot in range(len(rows)):
            if not mask[slot, -1]:
                shift_row_(cache, mask, slot, 1)
        assert cache.layers[1].is_initialized == any(rows)  # nothing is held for rows that have no image
        for slot, row in enumerate(rows):
            stored = row_of(cache, slot, mask)
            assert stored[0][0].shape[2] == mask[slot].sum()
            keys, values = stored.get(1, (torch.zeros(1, 2, 0, 4),) * 2)
            assert keys.shape == (1, 2, 3 if row else 0, 4) and keys.eq(row).all() and values.eq(-row).all()
            loaded = Cache(layers=[GrowableLayer(), ImageLayer()])
            load_(loaded, stored, int(mask[slot].sum()), 1)
            assert loaded.get_seq_length() == 1 and lacks_image(loaded) == (not row)


@torch.inference_mode()
def test_cached_equals_uncached_and_holds_the_tokens_and_one_image(yi_vl: YiVL) -> None:
    config, model = yi_vl.model.config.text_config, yi_vl.model
    prompt = yi_vl.engine.prepare(conversations()[4])
    inputs = yi_vl.engine.model_inputs(prompt)
    expected = model(**inputs, use_cache=False).logits
    cache, num_tokens = new_cache(config), len(prompt)
    positions, mask = torch.arange(num_tokens)[None], torch.ones(1, num_tokens, dtype=torch.bool)
    torch.testing.assert_close(forward(model, cache, mask, positions, num_tokens, **inputs), expected)
    head_bytes = 2 * config.num_key_value_heads * config.head_dim * 4
    stored = sum(part.nbytes for layer in row_of(cache, 0).values() for part in layer)
    assert stored == head_bytes * (NUM_LAYERS * num_tokens + NUM_BLOCKS * NUM_PATCHES)
    prefixes = PrefixCache(stored, config)
    prefixes.put(prompt.key, cache)
    assert prefixes.num_bytes == stored and len(prefixes) == 1
    smaller = PrefixCache(stored - 1, config)
    smaller.put(prompt.key, cache)
    assert smaller.num_bytes == 0
    token_bytes, image_bytes = NUM_LAYERS * head_bytes // 2, NUM_BLOCKS * NUM_PATCHES * head_bytes // 2  # in bf16
    (row,) = [row for row in table_rows(config_table("a model", model.config, None)) if row[0] == "KV cache"]
    assert f"{token_bytes:,} bytes per token" in row[1] and f"{image_bytes:,} for the last image" in row[1]


def table_rows(table: Any) -> list[list[str]]:
    return [list(cells) for cells in zip(*(column.cells for column in table.columns))]


# Answers


def test_the_image_decides_the_answer(yi_vl: YiVL) -> None:
    """Otherwise no test here would show anything."""
    assert yi_vl.model.model.language_model.config._attn_implementation == GROUPED  # as of other language models
    texts = [alone(yi_vl, prompt_of(yi_vl, "What is this?", *images), Sampling(8)) for images in ((), (WIDE,), (TALL,))]
    assert len(set(texts)) == 3
    first, second = ([*answered("What is this?", image), user_message([WIDE], "Why?")] for image in (TALL, NOISE))
    inputs = [yi_vl.engine.model_inputs(yi_vl.engine.prepare(messages)) for messages in (first, second)]
    logits = [yi_vl.model(**each).logits[0, -1] for each in inputs]
    assert (logits[0] - logits[1]).abs().max() > 0.01  # an earlier image as well, through the tokens after it


@pytest.mark.core
@pytest.mark.parametrize("max_tokens", [4096, 311, 5])
@pytest.mark.parametrize("connector", [{}, RESAMPLED])
def test_prompts_that_are_prefilled_together_are_computed_as_if_alone(
    max_tokens: int, connector: dict[str, Any]
) -> None:
    fresh = gated_yi_vl(**connector)
    prompts = [fresh.engine.prepare(messages) for messages in conversations()]
    batch = prefill(fresh, prompts, max_tokens)
    assert_decodes_as_uncached(fresh, batch, 2)
    batch.select([0, 1, 4])
    batch.extend(prefill(fresh, [prompts[2], prompt_of(fresh, "Go on.")]))
    assert_decodes_as_uncached(fresh, prefill(fresh, prompts, max_tokens), 2)  # from cached prefixes
    batch.select([0, 4])
    assert all(index < NUM_LAYERS for index in layers_of(batch.cache))  # no image is left


@pytest.mark.parametrize("seed", [0, 1])
def test_whatever_joins_leaves_is_cancelled_edited_or_continued_changes_no_answer(seed: int) -> None:
    assert_whatever_joins_or_leaves_changes_no_answer(gated_yi_vl(), seed, 24, _next_messages)


def _next_messages(draw: random.Random, requests: Requests, texts: Texts) -> list[Message]:
    """A conversation: a new one, or an earlier one that goes on, is asked again, goes back a turn, or is edited."""
    new = user_message(draw.sample([WIDE, TALL, NOISE], draw.choice([0, 0, 1, 2])), draw.choice(QUESTIONS))
    if not requests or draw.random() < 0.3:
        return [new]
    request_id = draw.choice([*requests])
    messages = requests[request_id][0]
    goes_on = [*messages, {"role": "assistant", "content": texts[request_id] or "Yes."}, new]
    return draw.choice([messages, goes_on, goes_on, messages[:1], [*messages[:-1], new]])


def test_rejected_drafts_change_no_answer(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = yi_vl.engine
    prompts = [engine.prepare(messages) for messages in conversations()]
    samplings = [Sampling(12 + 2 * i, temperature=float(i == 1), seed=i) for i in range(len(prompts))]
    assert_rejected_drafts_change_no_answer(yi_vl, prompts, samplings, engine.max_draft_tokens, monkeypatch)


def test_on_a_gpu_answers_are_those_of_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_lookup, "_NGRAM_TOKENS", 1)

    def answers(model: YiVL) -> list[Any]:
        chat = model.chat()
        turns = [chat.ask("What?", TALL, max_new_tokens=2), chat.ask("And?", WIDE, max_new_tokens=2)]
        chat.messages = chat.messages[:2]
        turns.append(chat.ask("And?", max_new_tokens=2))
        return [turns, model.answer_batch(conversations()[1:4], batch_size=2, max_new_tokens=4)]

    expected = answers(gated_yi_vl())
    with fake_cuda(monkeypatch):
        on_cuda = gated_yi_vl()
        assert answers(YiVL(on_cuda.model.to("cuda"), on_cuda.processor)) == expected  # type: ignore[arg-type]


# Prefixes


class Computed(Watched):
    """Counts tokens and encoded images, as `Watched` does, and images whose keys are computed in the first block."""

    def __init__(self, yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(yi_vl, monkeypatch)
        self.projected: list[int] = []
        block = blocks(yi_vl.model)[0]
        project = block.k_proj.forward

        def watch(features: torch.Tensor) -> torch.Tensor:
            self.projected.append(len(features))
            return project(features)

        monkeypatch.setattr(block.k_proj, "forward", watch)

    def take(self) -> tuple[int, int, int]:
        """Tokens, images encoded, images whose keys were computed, since the last call."""
        counts = sum(self.read), sum(self.encoded), sum(self.projected)
        for numbers in (self.read, self.encoded, self.projected):
            numbers.clear()
        return counts


@pytest.fixture
def computed(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> Computed:
    return Computed(yi_vl, monkeypatch)


def finish(yi_vl: YiVL, messages: list[Message], reply: str) -> int:
    """A request that is answered with given words; how many tokens it has in all."""
    batch, core = prefill(yi_vl, [yi_vl.engine.prepare(messages)]), yi_vl.engine.core
    (request,), tokenizer = batch.requests, yi_vl.processor.tokenizer
    for token in tokenizer(f" {reply}\n", add_special_tokens=False)["input_ids"]:
        request.add(token)
        batch.step(torch.tensor([token]))
    request.is_cancelled, core.batch = True, batch
    core.release()
    return len(request.key)


def test_a_second_turn_computes_no_image_and_no_keys_of_it(yi_vl: YiVL, computed: Computed) -> None:
    fresh = uncached(yi_vl)
    messages = [user_message([WIDE], "What is this?")]
    num_cached = finish(fresh, messages, "A dog.")
    assert computed.take()[1:] == (1, 1)
    fresh.engine.core._features._cache.max_bytes = 0  # nothing but the prefix cache knows the image
    fresh.engine.core._features._cache._values.clear()
    for number in range(2):
        messages += [{"role": "assistant", "content": "A dog."}, user_message([], f"And {number}?")]
        batch = prefill(fresh, [fresh.engine.prepare(messages)])
        assert computed.take() == (len(fresh.engine.prepare(messages)) - num_cached, 0, 0)
        assert_decodes_as_uncached(fresh, batch, 3)
        num_cached = finish(fresh, messages, "A dog.")
        computed.take()


# What is asked after [TALL, text, answer, NOISE, text, answer, WIDE, text, answer, text, answer]: how many messages
# stay, what follows them, and how many images are encoded when features are forgotten, and their keys computed.
EDITS: dict[str, tuple[int, list[Message], int]] = {
    "goes on": (8, [user_message([], "So?")], 0),
    "goes on with an image": (8, [user_message([OTHER], "So?")], 1),
    "the last answer is regenerated": (7, [], 0),
    "the last turn is edited": (6, [user_message([], "So?")], 0),
    "the turn with the last image is regenerated": (5, [], 0),
    "the turn with the last image gets another": (4, [user_message([OTHER], "So?")], 1),
    "the turn with the last image loses it": (4, [user_message([], "So?")], 1),
    "the answer before the last image is regenerated": (3, [], 1),
    "the answer before the last image is edited": (3, [*answered("x")[1:], user_message([], "So?")], 1),
    "that, and an image follows": (3, [*answered("x")[1:], user_message([OTHER], "So?")], 2),
    "the first answer is regenerated": (1, [], 1),
    "the first turn gets another image": (0, [user_message([OTHER], "What is this?")], 1),
    "the first turn loses its image": (0, [user_message([], "What is this?")], 0),
}


def begun(yi_vl: YiVL) -> tuple[list[Message], int]:
    """The conversation that is edited, and the number of its tokens that are cached."""
    messages: list[Message] = []
    for question, images in (("What is this?", [TALL]), ("And?", [NOISE]), ("And this?", [WIDE]), ("Why?", [])):
        messages.append(user_message(images, question))
        num_cached = finish(yi_vl, messages, "It is so.")
        messages.append({"role": "assistant", "content": "It is so."})
    yi_vl.engine.core._features._cache._values.clear()
    return messages, num_cached


@pytest.mark.core
@pytest.mark.parametrize("edit", EDITS)
def test_a_prefix_is_given_back_with_the_image_that_belongs_to_it(yi_vl: YiVL, computed: Computed, edit: str) -> None:
    fresh = uncached(yi_vl)
    messages, num_cached = begun(fresh)
    num_kept, new, num_images = EDITS[edit]
    prompt = fresh.engine.prepare([*messages[:num_kept], *new])
    num_common = prompt.key.num_common(fresh.engine.prepare([*messages, user_message([], "Why?")]).key)
    start = min(num_common, num_cached, len(prompt) - 1)  # an image costs no token of the prefix
    computed.take()
    batch = prefill(fresh, [prompt])
    assert computed.take() == (len(prompt) - start, num_images, num_images)
    assert_decodes_as_uncached(fresh, batch, 2)
    computed.take()
    batch = prefill(fresh, [prompt])
    assert computed.take()[:2] == (1, 0)
    assert_decodes_as_uncached(fresh, batch, 1)


@pytest.mark.core
@pytest.mark.parametrize("max_tokens", [4096, 60])
def test_prefixes_with_and_without_their_images_are_continued_together(yi_vl: YiVL, max_tokens: int) -> None:
    fresh = uncached(yi_vl)
    messages, _ = begun(fresh)
    prompts = [fresh.engine.prepare([*messages[:num_kept], *new]) for num_kept, new, _ in EDITS.values()]
    prompts.insert(5, fresh.engine.prepare(conversations()[2]))
    assert_decodes_as_uncached(fresh, prefill(fresh, prompts, max_tokens), 2)


def test_questions_about_an_image_share_its_keys(yi_vl: YiVL, computed: Computed) -> None:
    fresh = uncached(yi_vl)
    together = prefill(fresh, [prompt_of(fresh, question, WIDE) for question in QUESTIONS[:3]])
    assert computed.take()[1:] == (1, 1)
    assert_decodes_as_uncached(fresh, together, 2)
    computed.take()
    later = prefill(fresh, [prompt_of(fresh, QUESTIONS[3], WIDE)])
    assert computed.take()[1:] == (0, 0)
    assert_decodes_as_uncached(fresh, later, 2)


def test_markers_and_images_that_do_not_match_are_refused(yi_vl: YiVL) -> None:
    fresh, prompt = uncached(yi_vl), prompt_of(yi_vl, "What is this?", WIDE)
    broken = replace(prompt, key=replace(prompt.key, images=prompt.key.images * 2))
    with pytest.raises(ValueError, match="1 image tokens in input_ids but 2 images"):
        list(fresh.engine.generate([broken], Sampling()))
    texts = [output.text for outputs in fresh.engine.generate([prompt], Sampling(6)) for output in outputs]
    assert "".join(texts) == alone(yi_vl, prompt, Sampling(6))


# What a user calls


def test_a_server_answers_as_alone_and_counts_the_marker_as_one_token(yi_vl: YiVL) -> None:
    fresh = uncached(yi_vl)
    turns = [("user", [WIDE], "What is this?"), ("assistant", [], "A dog."), ("user", [TALL], "And this?")]
    messages = [*answered("What is this?", WIDE, reply="A dog."), user_message([TALL], "And this?")]
    texts = [*answered("What is this?", reply="A dog."), user_message([], "And this?")]
    expected = alone(yi_vl, fresh.engine.prepare(messages), Sampling(8))
    num_tokens = len(fresh.engine.prepare(messages))
    assert 2 <= num_tokens - len(fresh.engine.prepare(texts)) < NUM_PATCHES  # markers, and what the prompt puts around
    with serving(create_app(fresh, "yi-vl")) as address:
        for _ in range(2):
            reply = client_of(address).chat.completions.create(
                model="yi-vl", messages=openai_messages(turns), max_tokens=8, temperature=0
            )
            assert reply.choices[0].message.content == expected.strip()
            assert reply.usage.prompt_tokens == num_tokens


def test_a_chat_and_the_command_answer_as_the_model_alone(
    yi_vl: YiVL, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    yi_vl.save(folder)
    chat = uncached(yi_vl).chat()
    for question, images in (("What is this?", [WIDE]), ("Why?", []), ("And this?", [TALL, NOISE])):
        answer = chat.ask(question, images, max_new_tokens=6)
        prompt = yi_vl.engine.prepare(chat.messages[:-1])
        assert answer == alone(yi_vl, prompt, Sampling(6))
    app(["ask", str(WIDE), "What is this?", "--model", str(folder), "--max-new-tokens", "6"], standalone_mode=False)
    expected = alone(yi_vl, prompt_of(yi_vl, "What is this?", WIDE), Sampling(6))
    assert capsys.readouterr().out.strip() == expected.strip()


def test_a_processor_of_another_number_of_image_tokens_is_refused(yi_vl: YiVL) -> None:
    with pytest.raises(ValueError, match=f"tokens per image.* 1 .*{NUM_PATCHES}"):
        YiVL(yi_vl.model, tiny_processor())


def test_the_limit_of_text_answers_has_no_weights_of_blocks(yi_vl: YiVL) -> None:
    """Of `eval speed decode`: without an image they are not read."""
    model = yi_vl.model
    counted = [model.lm_head, model.model.language_model.norm, *model.model.language_model.layers]
    num_bytes = sum(parameter.nbytes for module in counted for parameter in module.parameters())
    assert bytes_per_token(yi_vl) == num_bytes - sum(p.nbytes for block in blocks(model) for p in block.parameters())
    broken = gated_yi_vl()
    with torch.no_grad():
        for parameter in (parameter for block in blocks(broken.model) for parameter in block.parameters()):
            parameter.fill_(torch.nan)
    assert broken.predict(None, "Hi", max_new_tokens=6) == uncached(yi_vl).predict(None, "Hi", max_new_tokens=6)
