"""The decode loop, sampling, and tokens that become text safe to show."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from tiny import IMAGE_TOKEN_ID, OFFICIAL, tiny_yi_vl

from yi_vl.chat import STOP_STRING
from yi_vl.engine.detokenizer import IncrementalDetokenizer, partial_stop_length
from yi_vl.engine.prefix_cache import shared_prefix_length
from yi_vl.engine.running_batch import Prompts, RunningBatch
from yi_vl.engine.sampling import Sampler, Sampling
from yi_vl.predict import YiVL

VOCABULARY = 960
NO_SUPPRESSED_TOKENS = torch.zeros(VOCABULARY, dtype=torch.bool)


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


def tokens_of(yi_vl: YiVL, *pieces: str) -> list[int]:
    """Ids of whole vocabulary entries, or of a text's UTF-8 bytes where there is no such entry."""
    tokenizer, ids = yi_vl.processor.tokenizer, []
    for piece in pieces:
        token = tokenizer.get_vocab().get(piece.replace(" ", "▁"))
        ids += (
            [token] if token is not None else [tokenizer.convert_tokens_to_ids(f"<0x{b:02X}>") for b in piece.encode()]
        )
    return ids


def detokenize(yi_vl: YiVL, tokens: Sequence[int], max_tokens: int = 100) -> tuple[list[str], IncrementalDetokenizer]:
    answer = IncrementalDetokenizer(yi_vl.processor.tokenizer, max_tokens, stop_ids={2, 7})
    return [answer.add(token) for token in tokens], answer


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        ((" dog", " is", "###"), "dog is"),
        ((" dog", " is", "\n", "###", " Human"), "dog is"),
        ((" dog", "\n", "#", "#", "#", " Human"), "dog"),
        ((" dog", "##", "#", "a"), "dog"),
        ((" dog", "#", "##"), "dog"),
        (("###",), ""),
        (("\n", " ", "\n", "###"), ""),
    ],
)
def test_stop_string_ends_an_answer_wherever_token_boundaries_fall(
    yi_vl: YiVL, pieces: tuple[str, ...], shown: str
) -> None:
    shown_pieces, answer = detokenize(yi_vl, tokens_of(yi_vl, *pieces))
    assert "".join(shown_pieces) == shown
    assert answer.finish_reason == "stop"


@pytest.mark.parametrize("stop_id", [2, 7])
def test_stop_ids_end_an_answer_and_nothing_follows(yi_vl: YiVL, stop_id: int) -> None:
    pieces, answer = detokenize(yi_vl, [*tokens_of(yi_vl, " dog", "#"), stop_id, *tokens_of(yi_vl, " is")])
    assert "".join(pieces) == "dog#"
    assert (answer.finish_reason, answer.num_tokens) == ("stop", 3)


def test_length_ends_an_answer_and_shows_what_was_held_back(yi_vl: YiVL) -> None:
    pieces, answer = detokenize(yi_vl, tokens_of(yi_vl, " dog", "#", "#", " is"), max_tokens=3)
    assert pieces == ["dog", "", "##", ""]
    assert (answer.finish_reason, answer.num_tokens) == ("length", 3)


def test_what_may_be_a_stop_string_or_the_last_white_space_is_held_back(yi_vl: YiVL) -> None:
    pieces, _ = detokenize(yi_vl, tokens_of(yi_vl, " dog", "\n", "#", "#", " is", " ", "###"))
    assert pieces == ["dog", "", "", "", "\n## is", "", ""]


@pytest.mark.parametrize("text", ["你好，世界", "🙂🙃 ok", "é狗ñ🐕", "a🙂b狗c"])
def test_pieces_are_whole_characters_whatever_the_token_boundaries(yi_vl: YiVL, text: str) -> None:
    tokenizer = yi_vl.processor.tokenizer
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
    pieces, _ = detokenize(yi_vl, ids)
    assert "".join(pieces) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in pieces)


def test_a_character_cut_off_at_the_end_is_dropped(yi_vl: YiVL) -> None:
    pieces, _ = detokenize(yi_vl, tokens_of(yi_vl, " dog", "🙂", "🐕")[:-1], max_tokens=8)
    assert "".join(pieces) == "dog🙂"


def test_broken_bytes_do_not_buffer_what_follows(yi_vl: YiVL) -> None:
    broken = yi_vl.processor.tokenizer.convert_tokens_to_ids("<0xFF>")
    pieces, _ = detokenize(yi_vl, [broken, *tokens_of(yi_vl, " dog", "狗", " is")])
    assert "".join(pieces).endswith(" dog狗 is")


@pytest.mark.parametrize("text", ["A  dog,\n\n  a cat", "def f():\n    return 1", "What is this? 这是什么？ ok"])
def test_pieces_together_are_the_text(yi_vl: YiVL, text: str) -> None:
    ids = yi_vl.processor.tokenizer(f" {text}\n###", add_special_tokens=False)["input_ids"]
    pieces, _ = detokenize(yi_vl, ids)
    assert "".join(pieces) == text


def test_a_long_answer_costs_no_more_per_token_than_a_short_one(yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, lengths = yi_vl.processor.tokenizer, []
    plain = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: lengths.append(len(ids)) or plain(ids, **options))
    pieces, _ = detokenize(yi_vl, tokens_of(yi_vl, " dog", "狗", "🐕") * 10)
    assert "".join(pieces) == ("dog狗🐕 " * 10).rstrip()
    assert max(lengths) <= 8


@pytest.mark.parametrize(
    ("text", "length"), [("", 0), ("a", 0), ("a#", 1), ("a##", 2), ("a\n#", 1), ("# a", 0), ("##a#", 1)]
)
def test_partial_stop_length(text: str, length: int) -> None:
    assert partial_stop_length(text) == length


def test_the_longest_partial_stop_string_counts() -> None:
    assert partial_stop_length("a #", ("###", " ## ")) == 2
    assert partial_stop_length("a", ()) == 0


def test_more_stop_strings(yi_vl: YiVL) -> None:
    answer = IncrementalDetokenizer(yi_vl.processor.tokenizer, 100, (), (STOP_STRING, " is"))
    assert "".join(answer.add(token) for token in tokens_of(yi_vl, " dog", " i", "s", " is")) == "dog"


@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_p": math.nan},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_a_value_out_of_range_is_named(options: dict[str, float]) -> None:
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        Sampling(**options)  # type: ignore[arg-type]


def test_suppressed_tokens_are_never_sampled() -> None:
    suppress_tokens = NO_SUPPRESSED_TOKENS.clone()
    suppress_tokens[[3, 5]] = True
    logits = torch.zeros(2, VOCABULARY)
    logits[:, [3, 5]] = 50.0
    logits[:, 8] = 9.0
    assert Sampler(Sampling(), suppress_tokens)(logits, [None, None]).tolist() == [8, 8]
    sampler = Sampler(Sampling(temperature=2.0), suppress_tokens)
    generators = [Sampling(temperature=2.0).new_generator() for _ in range(2)]
    assert not {3, 5} & {token for _ in range(50) for token in sampler(logits, generators).tolist()}


def test_temperature_and_top_p_shape_the_samples() -> None:
    logits = torch.full((1, VOCABULARY), -20.0)
    logits[0, :3] = torch.tensor([2.0, 1.0, 0.0])

    def share_of_first(**options: float) -> float:
        sampling = Sampling(seed=0, **options)  # type: ignore[arg-type]
        sampler, generators = Sampler(sampling, NO_SUPPRESSED_TOKENS), [sampling.new_generator()]
        return sum(sampler(logits, generators).item() == 0 for _ in range(300)) / 300

    assert share_of_first(temperature=1.0) == pytest.approx(0.665, abs=0.08)
    assert share_of_first(temperature=0.5) == pytest.approx(0.867, abs=0.08)
    assert share_of_first(temperature=1.0, top_p=0.5) == 1.0
    assert share_of_first(temperature=1e-42) == 1.0


def test_a_seed_repeats_its_samples_in_every_row_and_leaves_the_global_generator_alone() -> None:
    logits = torch.randn(20, 1, VOCABULARY, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()

    def sample(seed: int | None, num_rows: int) -> torch.Tensor:
        sampling = Sampling(temperature=1.0, seed=seed)
        sampler = Sampler(sampling, NO_SUPPRESSED_TOKENS)
        generators = [sampling.new_generator() for _ in range(num_rows)]
        return torch.stack([sampler(step.expand(num_rows, -1), generators) for step in logits])  # (steps, rows)

    alone = sample(1, 1)
    assert torch.equal(sample(1, 3), alone.expand(-1, 3))
    assert not torch.equal(sample(2, 1), alone)
    assert not torch.equal(sample(None, 1), sample(None, 1))
    assert torch.equal(torch.get_rng_state(), before)


def two_prompts(yi_vl: YiVL) -> Prompts:
    image = OFFICIAL / "wide.png"
    long = [{"type": "image", "image": image}, {"type": "text", "text": "What is in this picture?"}]
    return yi_vl.engine.prepare([[{"role": "user", "content": long}], [{"role": "user", "content": "Hi"}]])


def test_prompts_are_padded_on_the_left(yi_vl: YiVL) -> None:
    prompts = two_prompts(yi_vl)
    num_tokens = prompts.num_tokens
    assert prompts.input_ids.shape[1] == num_tokens[0] > num_tokens[1]
    assert prompts.attention_mask[1].tolist() == [0] * (num_tokens[0] - num_tokens[1]) + [1] * num_tokens[1]
    assert (prompts.input_ids == IMAGE_TOKEN_ID).sum(1).tolist() == [16, 0]
    assert prompts.images_uint8 is not None and prompts.images_uint8.shape == (1, 56, 56, 3)


def pixel_values(yi_vl: YiVL, prompts: Prompts) -> torch.Tensor:
    assert prompts.images_uint8 is not None
    return yi_vl.processor.image_processor.to_pixel_values(prompts.images_uint8)


def prefill(yi_vl: YiVL, prompts: Prompts) -> RunningBatch:
    yi_vl.clear_cache()
    return yi_vl.engine.prefill(prompts, yi_vl.engine.new_requests(prompts, Sampling()))


def decode_greedily(batch: RunningBatch, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily: the tokens (B, steps), and the logits that each was chosen by (steps, B, V)."""
    tokens, logits = [], []
    for _ in range(num_steps):
        logits.append(batch.logits)
        tokens.append(batch.logits.argmax(-1))
        batch.step(tokens[-1])
    return torch.stack(tokens, dim=1), torch.stack(logits)


def test_cached_steps_equal_uncached_ones(yi_vl: YiVL) -> None:
    prompts = two_prompts(yi_vl)
    chosen, seen = decode_greedily(prefill(yi_vl, prompts), 8)
    with torch.inference_mode():
        for row, num_tokens in enumerate(prompts.num_tokens):
            ids = torch.cat([prompts.input_ids[row, -num_tokens:], chosen[row]])
            pixels = pixel_values(yi_vl, prompts) if row == 0 else None
            logits = yi_vl.model(input_ids=ids[None], pixel_values=pixels).logits[0]
            torch.testing.assert_close(seen[:, row], logits[num_tokens - 1 : -1], atol=1e-4, rtol=0)


def test_decoding_equals_transformers_generate(yi_vl: YiVL) -> None:
    prompts = two_prompts(yi_vl)
    tokens, _ = decode_greedily(prefill(yi_vl, prompts), 8)
    expected = yi_vl.model.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        pixel_values=pixel_values(yi_vl, prompts),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,  # none
    )
    assert torch.equal(tokens, expected[:, -8:])


def test_rows_that_leave_and_join_change_nothing_for_those_that_stay(yi_vl: YiVL) -> None:
    prompts = two_prompts(yi_vl)
    alone = [yi_vl.engine.prepare([[{"role": "user", "content": text}]]) for text in ("Hi", "Tell me about a dog.")]
    expected, logits = decode_greedily(prefill(yi_vl, alone[0]), 12)
    expected_new, logits_new = decode_greedily(prefill(yi_vl, alone[1]), 6)

    batch = prefill(yi_vl, prompts)  # a request with an image, and "Hi"
    tokens, seen = decode_greedily(batch, 4)
    batch.select([1])  # the longer row leaves, and its padding with it
    assert batch.cache.get_seq_length() == prompts.num_tokens[1] + 4
    more, seen_alone = decode_greedily(batch, 2)
    batch.extend(prefill(yi_vl, alone[1]))
    both, seen_both = decode_greedily(batch, 6)
    assert torch.equal(torch.cat([tokens[1], more[0], both[0]]), expected[0])
    assert torch.equal(both[1], expected_new[0])
    seen_of_row = torch.cat([seen[:, 1], seen_alone[:, 0], seen_both[:, 0]])
    torch.testing.assert_close(seen_of_row, logits[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(seen_both[:, 1], logits_new[:, 0], atol=1e-4, rtol=0)


def test_a_shared_prefix_is_prefilled_once_and_a_step_computes_one_position(
    yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []
    positions: list[list[int]] = []
    forward = yi_vl.model.forward

    def watch(**inputs: torch.Tensor) -> object:
        outputs = forward(**inputs)
        read = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        calls.append((*read.shape[:2], outputs.logits.shape[1]))
        positions.append(inputs["position_ids"][-1].tolist())
        return outputs

    monkeypatch.setattr(yi_vl.model, "forward", watch)
    prompts = two_prompts(yi_vl)
    decode_greedily(prefill(yi_vl, prompts), 2)
    shared, length, num_tokens = (
        shared_prefix_length(prompts.prefix_keys),
        prompts.input_ids.shape[1],
        prompts.num_tokens[1],
    )
    assert 100 < shared < num_tokens
    assert calls == [(1, shared, 1), (2, length - shared, 1), (2, 1, 1), (2, 1, 1)]
    assert positions[0] == list(range(shared))
    assert positions[1] == [0] * (length - num_tokens) + list(range(shared, num_tokens))  # padding shifts no row
    assert positions[2:] == [[num_tokens], [num_tokens + 1]]
