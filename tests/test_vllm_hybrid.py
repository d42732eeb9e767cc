"""vLLM generates what the hybrid decoder does, alone and in a Yi-VL: windows, sharing, and experts by top-k and top-p.

It runs in the environment that `make vllm` makes; vLLM starts once, in a process of its own, and takes minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vllm import CONVERSATIONS, ENVIRONMENT, OFFICIAL, ROOT, START_SECONDS, native

from yi_vl.config import OpenClipVisionConfig, YiVLConfig
from yi_vl.decoder.config import FULL, SLIDING, YiHybridConfig
from yi_vl.decoder.model import YiHybridForCausalLM
from yi_vl.image import YiVLImageProcessor
from yi_vl.messages import images_of
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.predict import YiVL
from yi_vl.processor import YiVLProcessor, prepare_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("vllm") is None, reason="vLLM is not installed; `make vllm` makes an environment for it"
    ),
]

NEW_TOKENS = 24
WINDOW = 40
PROMPT_LENGTHS = (5, WINDOW - 1, WINDOW, WINDOW + 1, 100)
CHATS = ("English", "two images", "second turn", "text only")
SHARING = {"kv_source_layers": [0, 1, 2, 1]}
WINDOWS = {"layer_types": [SLIDING, FULL, SLIDING, FULL]}
TOP_K = {"num_experts": 8, "num_experts_per_tok": 3}
TOP_P = TOP_K | {"router_top_p": 0.6, "max_experts_per_tok": 4}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": WINDOWS,
    "sharing": SHARING,
    "experts by top-k": TOP_K,
    "experts by top-p": TOP_P,
    "everything": WINDOWS | SHARING | TOP_P,
}
YI_VL = "a Yi-VL with everything"


def config_with(features: dict[str, Any], vocab_size: int = 512) -> YiHybridConfig:
    """Heads of 64, as vLLM's CPU kernels want; weights so large that no two logits tie."""
    plain = {"layer_types": [FULL] * 4, "kv_source_layers": [0, 1, 2, 3]}
    return YiHybridConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        sliding_window=WINDOW,
        initializer_range=0.3,
        pad_token_id=0,
        **plain | features,
    )


def save_language_model(folder: Path, features: dict[str, Any]) -> list[list[int]]:
    """A model with requests of several lengths; returns the tokens that it generates."""
    torch.manual_seed(0)
    model = YiHybridForCausalLM(config_with(features)).eval()
    model.save_pretrained(folder)
    prompts = [torch.randint(3, 512, (length,)).tolist() for length in PROMPT_LENGTHS]
    (folder / "requests.json").write_text(json.dumps(prompts))
    return [greedy(model, prompt) for prompt in prompts]


def save_yi_vl(folder: Path, features: dict[str, Any]) -> list[list[int]]:
    """The same for a Yi-VL and conversations."""
    tokenizer = prepare_tokenizer(str(OFFICIAL / "checkpoint"))
    vision = OpenClipVisionConfig(
        image_size=56,
        patch_size=14,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=1,
    )
    text = config_with(features, vocab_size=960)
    config = YiVLConfig(vision_config=vision, text_config=text, image_token_id=len(tokenizer) - 1)
    torch.manual_seed(0)
    model = YiVLForConditionalGeneration(config).eval()
    processor = YiVLProcessor(YiVLImageProcessor(56), tokenizer, patch_size=14)
    YiVL(model, processor).save(folder)
    (folder / "requests.json").write_text(json.dumps([CONVERSATIONS[name] for name in CHATS]))
    answers = []
    for messages in (native(CONVERSATIONS[name]) for name in CHATS):
        transform, inputs = processor.image_processor, {}
        if images := list(images_of(messages)):
            inputs["pixel_values"] = transform.to_pixel_values(
                torch.stack([transform.to_uint8(image) for image in images])
            )
        unused = [config.image_token_id, *range(len(tokenizer), text.vocab_size)]
        prompt = processor.encode_messages(messages).input_ids
        answers.append(greedy(model, prompt, suppress_tokens=unused, **inputs))
    return answers


def greedy(model: Any, prompt: list[int], **inputs: Any) -> list[int]:
    ids = torch.tensor([prompt])
    tokens = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        **inputs,
    )
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By model: what vLLM generates beside what is expected; and its refusals."""
    root = tmp_path_factory.mktemp("hybrid")
    models = {name: partial(save_language_model, features=features) for name, features in FEATURES.items()}
    models[YI_VL] = partial(save_yi_vl, features=FEATURES["everything"])
    folders = {name: root / str(index) for index, name in enumerate(models)}
    expected = {name: save(folders[name]) for name, save in models.items()}
    results = root / "results.json"
    command = [sys.executable, "tests/vllm_generate.py", str(results), *map(str, folders.values())]
    environment = ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    written = json.loads(results.read_text())
    measured = {name: written[str(folder)] | {"expected": expected[name]} for name, folder in folders.items()}
    return measured | {"refused": written["refused"]}


@pytest.mark.parametrize("name", [*FEATURES, YI_VL])
def test_vllm_generates_the_same_tokens(generated: dict[str, Any], name: str) -> None:
    model = generated[name]
    assert model["answers"] == [model["expected"]] * 2
    assert min(len(set(tokens)) for tokens in model["expected"]) > NEW_TOKENS / 2, "too uniform to show anything"


@pytest.mark.parametrize(("name", "num_sharing"), [("windows", 0), ("sharing", 1), ("everything", 1), (YI_VL, 1)])
def test_layers_that_share_have_no_cache_of_their_own(generated: dict[str, Any], name: str, num_sharing: int) -> None:
    assert generated[name]["num_sharing"] == num_sharing


def test_what_cannot_be_divided_is_refused_in_one_line(generated: dict[str, Any]) -> None:
    pipeline, experts = generated["refused"]
    assert "--pipeline-parallel-size 2: layers of a yi_hybrid share keys and values" in pipeline
    assert "Number of experts in the model must be greater than 0" in experts
