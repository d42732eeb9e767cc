"""Changes to a language model's tokenizer, so that it gives the official ids and typed special tokens stay text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerFast

from .arguments import one_line
from .chat import CHATML, IMAGE_PLACEHOLDER, YI_VL


def drop_prefix_space_(tokenizer: Any, sentencepiece_file: Path) -> None:
    """Put no blank before a text where the SentencePiece model puts none.

    The tokenizer.json of Yi's language models does, also after a special token (01-ai/Yi-1.5, issue 37): converters of
    their time took every SentencePiece model for Llama's.
    """
    if not _has_prefix_space(tokenizer.tokenize("a")):
        return
    from sentencepiece import SentencePieceProcessor

    try:
        pieces = SentencePieceProcessor(model_file=str(sentencepiece_file)).encode("a", out_type=str)
    except RuntimeError as error:
        raise ValueError(f"{sentencepiece_file} cannot be read: {one_line(error)}") from error
    if _has_prefix_space(pieces):
        return
    backend = tokenizer.backend_tokenizer
    content = json.loads(backend.to_str())
    content |= {name: _without_prefix_space(content[name]) for name in ("normalizer", "pre_tokenizer", "decoder")}
    without = Tokenizer.from_str(json.dumps(content))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = (
        without.normalizer,
        without.pre_tokenizer,
        without.decoder,
    )


def make_special_(tokenizer: Any, names: Sequence[str]) -> None:
    """Tokens that no text becomes, and that are left out where text is decoded without special ones.

    Raises:
        ValueError: the tokenizer has no such tokens.
    """
    if missing := [name for name in names if name not in tokenizer.get_vocab()]:
        raise ValueError(
            f"chat_format is {CHATML}, but the tokenizer has no token {' and no '.join(missing)}, as those of Yi's "
            f"language models have. Set chat_format to {YI_VL}."
        )
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not special.issuperset(names):
        tokenizer.add_special_tokens({"extra_special_tokens": list(names)}, replace_extra_special_tokens=False)


def encode_typed_specials_as_text_(tokenizer: Any) -> None:
    """Undo what transformers adds when it converts a SentencePiece model, so that a typed `<|im_end|>` stays text.

    Up to 5.23 it makes the model's user-defined symbols added tokens, but not special ones; from 5.24 it cuts them out
    of the text, and looks pieces up whole (`<unk>`, `<0x0A>`). Both are undone: every version gives the same ids.
    """
    backend = tokenizer.backend_tokenizer
    if not getattr(backend.model, "byte_fallback", False):  # not from SentencePiece
        return
    if backend.model.ignore_merges:
        backend.model.ignore_merges = False
        backend.pre_tokenizer = None
    pieces = backend.get_vocab(with_added_tokens=False)
    defined = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in defined if name in pieces])


def renamed(tokenizer: Any, image_token_id: int) -> Any:
    """The same tokenizer with one added token called `<image_placeholder>`, and none after it (llava-hf's `<pad>`)."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {token["id"]: token for token in content["added_tokens"]}
    if image_token_id not in names:
        raise ValueError(f"there is no added token {image_token_id}, config.json's image token")
    names[image_token_id] |= {"content": IMAGE_PLACEHOLDER, "special": True}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] <= image_token_id]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        unk_token=tokenizer.unk_token,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.unk_token,
        padding_side="left",
        extra_special_tokens=[token["content"] for token in content["added_tokens"] if token["special"]],
    )


def _has_prefix_space(pieces: list[str]) -> bool:
    return pieces[0].startswith("▁")


def _without_prefix_space(part: Any) -> Any:
    """A normalizer, pre-tokenizer or decoder of a tokenizer.json that neither adds nor removes a first blank."""
    if part is None or part["type"] == "Prepend" or (part["type"] == "Strip" and part.get("content") == " "):
        return None
    for key in ("normalizers", "pretokenizers", "decoders"):  # of a sequence
        if key in part:
            return part | {key: [kept for each in part[key] if (kept := _without_prefix_space(each)) is not None]}
    return part | {"prepend_scheme": "never"} if part["type"] == "Metaspace" else part
