"""The tokenizer as llama.cpp's vocabulary `llama`, and the chat template that its server renders."""

from __future__ import annotations

import json
import re

from ..chat import CHATML, IM_END, IM_START, STOP_STRING, SYSTEM_PROMPT, YI_VL, ChatFormat
from ..generation import END_TOKENS
from .gguf_tensors import Fields
from .read import Checkpoint

# The separator that ends an answer is marked unused: it is tokenized all the same, and not shown as text.
_NORMAL, _UNKNOWN, _CONTROL, _UNUSED, _BYTE = 1, 2, 3, 5, 6
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def _template(default_system: str, system: str, question: str, answer: str, answer_header: str) -> str:
    """The template in Jinja: expressions for what is written of `given`, `walk.text` and `message`.

    llama.cpp joins the parts of a message with images to one string in which a marker, `<__media_..__>`, is an image's
    place; so the newline between images and question is added here.
    """
    return (
        "{%- set has_system = messages[0]['role'] == 'system' -%}"
        "{%- set given = messages[0]['content'] if has_system else " + default_system + " -%}"
        "{{- " + system + " -}}"
        "{%- for message in messages[(1 if has_system else 0):] -%}"
        "{%- if message['role'] == 'assistant' -%}"
        "{{- " + answer + " -}}"
        "{%- elif message['role'] == 'user' -%}"
        "{%- set pieces = message['content'].split('<__media_') -%}"
        "{%- set walk = namespace(text=pieces[0], has_text=pieces[0] | length > 0) -%}"
        "{%- for piece in pieces[1:] -%}"
        "{%- set marker = piece.split('_>')[0] + '_>' -%}"
        "{%- set rest = piece[(marker | length):] -%}"
        "{%- set line_break = '\\n' if rest and not walk.has_text else '' -%}"
        "{%- set walk.text = walk.text + '<__media_' + marker + line_break + rest -%}"
        "{%- if rest -%}{%- set walk.has_text = true -%}{%- endif -%}"
        "{%- endfor -%}"
        "{{- " + question + " -}}"
        "{%- else -%}"
        "{{- raise_exception('A message is by user or assistant, the first one also by system.') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- " + answer_header + " -}}{%- endif -%}"
    )


GGUF_CHAT_TEMPLATE = _template(
    default_system=repr(SYSTEM_PROMPT),
    system="given + '\\n\\n###'",
    question="' Human: ' + walk.text + '\\n###'",
    answer="' Assistant: ' + message['content'] + '\\n###'",
    answer_header="' Assistant:'",
)
_CHATML_TEMPLATE = _template(
    default_system="''",
    system=f"'{IM_START}system\\n' + given + '{IM_END}\\n' if given else ''",
    question=f"'{IM_START}user\\n' + walk.text + '{IM_END}\\n'",
    answer=f"'{IM_START}assistant\\n' + message['content'] + '{IM_END}\\n'",
    answer_header=f"'{IM_START}assistant\\n'",
)
GGUF_CHAT_TEMPLATES: dict[ChatFormat, str] = {YI_VL: GGUF_CHAT_TEMPLATE, CHATML: _CHATML_TEMPLATE}


def tokenizer_fields(source: Checkpoint) -> Fields:
    """Pieces, scores and types of all ids before the image token's, the tokens that end an answer, and the template.

    Raises:
        ValueError: the tokenizer is not a SentencePiece BPE without a prefix space, as Yi's is.
    """
    processor = source.make_processor()
    tokenizer, is_chatml = processor.tokenizer, processor.chat_format == CHATML
    num_tokens = source.config.image_token_id
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    probe = tokenizer.convert_ids_to_tokens(tokenizer("a  b", add_special_tokens=False)["input_ids"])
    if model["type"] != "BPE" or not model.get("byte_fallback") or "".join(probe) != "a▁▁b":
        raise ValueError(
            f"{source.folder}: its tokenizer is not a SentencePiece BPE with bytes and without a prefix space, as Yi's "
            "is, the only ggml_type that is written as GGUF."
        )
    pieces = {id: piece for piece, id in model["vocab"].items()}
    scores, lowest = _scores(model["merges"]), -float(len(model["merges"]))
    special = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    stop_id = model["vocab"].get(IM_END if is_chatml else STOP_STRING)
    types = {id: _CONTROL for id in special} | {tokenizer.unk_token_id: _UNKNOWN}
    types |= {} if is_chatml else {stop_id: _UNUSED}
    tokens = [special.get(id, pieces.get(id, f"[PAD{id}]")) for id in range(num_tokens)]
    fields: Fields = {
        "llama.vocab_size": num_tokens,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [scores.get(token, lowest) for token in tokens],
        "tokenizer.ggml.token_type": [types.get(id, _token_type(pieces.get(id))) for id in range(num_tokens)],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.remove_extra_whitespaces": False,
        "tokenizer.chat_template": GGUF_CHAT_TEMPLATES[processor.chat_format],
    }
    ids = {"unknown": tokenizer.unk_token_id, "padding": tokenizer.pad_token_id, "bos": tokenizer.bos_token_id}
    ids |= {"eos": model["vocab"].get(END_TOKENS[0], tokenizer.eos_token_id), "eot": stop_id}
    return fields | {f"tokenizer.ggml.{name}_token_id": id for name, id in ids.items() if id is not None}


def _scores(merges: list) -> dict[str, float]:
    """The score of each merged piece: llama.cpp merges the pair whose piece has the highest one first."""
    scores: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        scores.setdefault(left + right, -float(rank))
    return scores


def _token_type(piece: str | None) -> int:
    """The type of a token that is not special; an id that the tokenizer does not have is unused."""
    if piece is None:
        return _UNUSED
    return _BYTE if _BYTE_PIECE.fullmatch(piece) else _NORMAL
