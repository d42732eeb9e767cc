"""A toy model of random weights, what `upcycle` makes of it, and the logits of both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import OFFICIAL, tiny_config, tiny_processor

import yi_vl
from yi_vl.checkpoint import convert, open_checkpoint
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.upcycle import Changes, upcycle

RELEASE = OFFICIAL / "checkpoint"
WIDE = str(OFFICIAL / "wide.png")
EXPERTS = ("--experts", "3", "--slices", "4")


def logits(folder: Path, with_image: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a prompt, (S, V)."""
    loaded = yi_vl.load(folder, device="cpu", dtype=dtype)
    content: list[dict[str, Any]] = [{"type": "text", "text": "What is this? 这是什么？"}]
    encoded = loaded.processor.encode_messages(
        [{"role": "user", "content": [{"type": "image"}, *content] if with_image else content}]
    )
    pixels = loaded.processor.image_processor([Image.open(WIDE)], return_tensors="pt")["pixel_values"].to(dtype)
    with torch.inference_mode():
        output = loaded.model(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels if with_image else None)
    return output.logits[0].float()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of random weights, spread so that a change of the function is seen in the logits."""
    folder = tmp_path_factory.mktemp("dense")
    config = tiny_config()
    config.text_config.num_hidden_layers = 6
    config.text_config.attention_bias = True
    torch.manual_seed(0)
    model = YiVLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hybrid(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it at once: layers 1, 3 and 5 see all tokens, and 3 has the keys and values of 1."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    changes = Changes(experts=3, slices=4, every=2, window=8, top_p=0.3, max_experts=5)
    convert(upcycle(open_checkpoint(dense), changes), folder, "yi-vl")
    return folder


@pytest.fixture(scope="module")
def windows(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same attention, and dense feed-forward layers."""
    folder = tmp_path_factory.mktemp("windows") / "model"
    convert(upcycle(open_checkpoint(dense), Changes(every=2, window=8)), folder, "yi-vl")
    return folder
