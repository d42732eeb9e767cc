"""Nano's tokenizer, and a whole model with random weights.

The tokenizer is SentencePiece with the special ids of Yi's.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterable
from pathlib import Path

import sentencepiece
import torch
from transformers import PreTrainedConfig

from yi_vl.chat import IMAGE_PLACEHOLDER
from yi_vl.config import preset
from yi_vl.generation import set_end_tokens_
from yi_vl.image import YiVLImageProcessor
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import YiVLProcessor, prepare_tokenizer

CONTROL_SYMBOLS = ["<|Human|>", "<|Assistant|>", "<|System|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>"]  # ids 3 to 8
_BOUNDARY = re.compile(r"([\n的，。、：？！“”])|(?<=[A-Z])(?=[A-Z])")
# No token crosses these: names stay whole, and words in capitals are spelt letter by letter.


def train_tokenizer(texts: Iterable[str], out_dir: Path, vocab_size: int) -> None:
    """A byte-fallback BPE tokenizer over English and Chinese `texts`, in the file layout of Yi's release."""
    out_dir.mkdir(parents=True, exist_ok=True)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(part for text in texts for part in _BOUNDARY.split(text) if part),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentence_length=1 << 16,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        unk_piece="<unk>",
        bos_piece="<|startoftext|>",
        eos_piece="<|endoftext|>",
        control_symbols=CONTROL_SYMBOLS,
        minloglevel=2,
    )
    (out_dir / "tokenizer.model").write_bytes(model.getvalue())
    special = {
        "<unk>": 0,
        "<|startoftext|>": 1,
        "<|endoftext|>": 2,
        "<|im_start|>": 6,
        "<|im_end|>": 7,
        "<|im_sep|>": 8,
    }
    entry = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "LlamaTokenizer",  # as in Yi's release; prepare_tokenizer replaces it
        "added_tokens_decoder": {str(index): {"content": text} | entry for text, index in special.items()},
        "additional_special_tokens": list(special),
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
    }
    (out_dir / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def fresh_model(
    tokenizer_dir: Path, text_config: PreTrainedConfig, image_size: int = 224, seed: int = 0
) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """Nano with random weights, but for its language model's shape as in the preset; and its processor."""
    torch.manual_seed(seed)
    tokenizer = prepare_tokenizer(str(tokenizer_dir))
    config = preset("nano")
    config.vision_config.image_size = image_size
    config.text_config, config.image_token_id = text_config, len(tokenizer) - 1
    assert tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER) == config.image_token_id, "the tokenizer ends otherwise"
    model = YiVLForConditionalGeneration(config)
    assert model.generation_config is not None
    set_end_tokens_(model.generation_config, tokenizer)
    return model, YiVLProcessor(YiVLImageProcessor(image_size), tokenizer, config.vision_config.patch_size)
