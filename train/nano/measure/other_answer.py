"""What "I am not sure." costs: whether a model that says so would have been right, had it to name something."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from yi_vl import YiVL
from yi_vl.image import load_image


def other_answer(model: YiVL, images: Sequence[Path], question: str, answer: str, max_new_tokens: int = 48) -> str:
    """The greedy answer among those that do not begin with the same token as `answer`."""
    processor, core = model.processor, model.model
    content: list[dict[str, Any]] = [{"type": "image", "image": load_image(path)} for path in images]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ).to(core.device, core.dtype)
    answered = processor.encode_messages([*messages, {"role": "assistant", "content": answer}], False)
    first = next(token for token, is_answer in zip(answered.input_ids, answered.loss_mask) if is_answer)
    with torch.inference_mode():
        tokens = core.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, begin_suppress_tokens=[first])
    text: str = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
