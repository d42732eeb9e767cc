"""What "I am not sure." costs: whether a model that says so would have been right, had it to name something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from yi_vl import YiVL
from yi_vl.chat import STOP_STRING


def other_answer(model: YiVL, images: Sequence[Path], question: str, answer: str, max_new_tokens: int = 48) -> str:
    """The greedy answer among those that do not begin with the same token as `answer`."""
    content: list[dict[str, Any]] = [{"type": "image", "image": Image.open(path)} for path in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    answered = [*messages, {"role": "assistant", "content": answer}]
    processor, core = model.processor, model.model
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(core.device, core.dtype)
    num_prompt = inputs["input_ids"].shape[1]
    ids = processor.apply_chat_template(answered, tokenize=True, return_dict=True, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        tokens = core.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            begin_suppress_tokens=[ids[0, num_prompt].item()],
        )
    text: str = processor.decode(tokens[0, num_prompt:], skip_special_tokens=True)
    return text.split(STOP_STRING)[0].strip()
