"""Tokens that become text: stop strings, whole characters, white space at the end."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tiny import tiny_yi_vl

from yi_vl.chat import STOP_STRING
from yi_vl.engine.detokenizer import IncrementalDetokenizer, partial_stop_length
from yi_vl.predict import YiVL


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
    detokenizer = IncrementalDetokenizer(yi_vl.processor.tokenizer, max_tokens, stop_ids={2, 7})
    return [detokenizer.add(token) for token in tokens], detokenizer


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
    shown_pieces, detokenizer = detokenize(yi_vl, tokens_of(yi_vl, *pieces))
    assert "".join(shown_pieces) == shown
    assert detokenizer.finish_reason == "stop"


@pytest.mark.parametrize("stop_id", [2, 7])
def test_stop_ids_end_an_answer_and_nothing_follows(yi_vl: YiVL, stop_id: int) -> None:
    pieces, detokenizer = detokenize(yi_vl, [*tokens_of(yi_vl, " dog", "#"), stop_id, *tokens_of(yi_vl, " is")])
    assert "".join(pieces) == "dog#"
    assert (detokenizer.finish_reason, detokenizer.num_tokens) == ("stop", 3)


def test_length_ends_an_answer_and_shows_what_was_held_back(yi_vl: YiVL) -> None:
    pieces, detokenizer = detokenize(yi_vl, tokens_of(yi_vl, " dog", "#", "#", " is"), max_tokens=3)
    assert pieces == ["dog", "", "##", ""]
    assert (detokenizer.finish_reason, detokenizer.num_tokens) == ("length", 3)


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
    detokenizer = IncrementalDetokenizer(yi_vl.processor.tokenizer, 100, (), (STOP_STRING, " is"))
    assert "".join(detokenizer.add(token) for token in tokens_of(yi_vl, " dog", " i", "s", " is")) == "dog"
