"""Texts on which llama.cpp's tokenizer is compared with ours."""

from __future__ import annotations

import json

import numpy as np
from tiny import OFFICIAL

GOLDEN = json.loads((OFFICIAL / "golden.json").read_text(encoding="utf-8"))


def texts() -> list[str]:
    """Prompts, both languages, code, white space, what the vocabulary does not have, and random characters."""
    fixed = [
        "a", " ", "  a  b ", "\n\n\n", "\t x", "Hello, world!", "你好，世界", "图片里是什么？ What is it?", "é ñ ü ß",
        "🐧🐧 🎨", "### Human: hi\n### Assistant:", "#### heading", "##", "x = {'a': [1, 2.5]}", "０１２", "\u200b",
        "ﬁ ½ ²", "▁", "a▁b", "<0x0A>", "<unk", "|im_end|>", "1234567890", "aaaaaaaaaaaaaaaaaa", "nnnnn", "的的的的的的",
        "\r\n", "\u3000全角",
    ]  # fmt: skip
    prompts = [golden["prompt"].replace("<image_placeholder>", "") for golden in GOLDEN.values()]
    random = np.random.default_rng(0)
    words = "\n".join(prompts).split(" ")
    alphabet = list("abcdefghijklmnopqrstuvwxyz ,.\n#") + list("的一是不图片人模型") + ["é", "🐧", "\u0301"]
    mixed = [" ".join(random.choice(words, size=random.integers(1, 12))) for _ in range(150)]
    noise = ["".join(random.choice(alphabet, size=random.integers(1, 40))) for _ in range(150)]
    return fixed + prompts + mixed + noise
