"""What llama.cpp computes with the GGUF files that are written here, compared with our model; needs xllamacpp."""

from __future__ import annotations

import base64
import io
import json
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_texts import texts
from PIL import Image
from tiny import OFFICIAL, official_messages, tiny_config, tiny_processor
from torch import Tensor
from transformers import LlamaConfig

import yi_vl
from yi_vl.checkpoint import open_checkpoint
from yi_vl.checkpoint.gguf import write_gguf
from yi_vl.checkpoint.load import open_model
from yi_vl.config import IMAGE_MEAN, IMAGE_STD
from yi_vl.model import YiVLForConditionalGeneration

pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")
xllamacpp: Any = pytest.importorskip("xllamacpp", reason="llama.cpp is not installed: pip install xllamacpp")

CHECKPOINT = OFFICIAL / "checkpoint"
GOLDEN = json.loads((OFFICIAL / "golden.json").read_text(encoding="utf-8"))
ARRAYS = np.load(OFFICIAL / "golden.npz")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny official checkpoint in float32."""
    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    write_gguf(open_checkpoint(CHECKPOINT), folder, "f32")
    return folder


class Engine:
    """llama.cpp's server with one model, asked over its loopback address."""

    def __init__(self, model: Path, mmproj: Path | None = None) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(model)
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 1024
        parameters.n_parallel, parameters.warmup, parameters.verbosity = 1, False, 0
        parameters.cpuparams.n_threads = 1
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if mmproj is not None:
            parameters.mmproj.path = str(mmproj)
        self.server = xllamacpp.Server(parameters)

    def request(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.server.listening_address}{path}", data, headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            answer: dict[str, Any] = json.loads(response.read())
            return answer

    def log_probs(self, prompt: str | list[int], images: list[str], num_tokens: int) -> np.ndarray | None:
        """Of the first token after a prompt with `<image_placeholder>` where an image is, (V,).

        None if that token is part of a character, which the server waits for.
        """
        marked: Any = prompt
        if isinstance(prompt, str):
            marker = self.request("/props")["media_marker"] if images else ""
            text = prompt.replace("<image_placeholder>", marker)
            marked = {"prompt_string": text, "multimodal_data": images} if images else text
        body = {"prompt": marked, "n_predict": 1, "n_probs": num_tokens, "temperature": 0, "cache_prompt": False}
        answer = self.request("/completion", body)
        if "completion_probabilities" not in answer:
            return None
        log_probs = np.full(num_tokens, np.nan)
        for token in answer["completion_probabilities"][0]["top_logprobs"]:
            log_probs[token["id"]] = token["logprob"]
        return log_probs


@pytest.fixture(scope="module")
def engine(files: Path) -> Engine:
    return Engine(files / "model-f32.gguf", files / "mmproj-f32.gguf")


@pytest.fixture(scope="module")
def nano_engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("gguf") / "nano"
    write_gguf(open_model(None), folder, "f32")
    return Engine(folder / "model-f32.gguf")


@pytest.fixture(scope="module")
def model() -> yi_vl.YiVL:
    return yi_vl.load(CHECKPOINT, device="cpu", dtype=torch.float32)


def log_probs_of(yi: yi_vl.YiVL, input_ids: list[int], features: Tensor | None = None) -> np.ndarray:
    """Our model's of the next token, with the given image features."""
    model, num_tokens = yi.model, yi.model.config.image_token_id
    with torch.inference_mode():
        embeddings = model.get_input_embeddings()(torch.tensor([input_ids]))
        if features is not None:
            embeddings[0, torch.tensor(input_ids) == num_tokens] = features.flatten(0, 1)
        logits = model(inputs_embeds=embeddings).logits[0, -1, :num_tokens]
    return np.asarray(logits.log_softmax(-1).numpy())


def png(pixels: np.ndarray) -> str:
    """An image whose transform gives these pixels, (3, H, W), in base64."""
    values = (pixels.transpose(1, 2, 0) * np.array(IMAGE_STD) + np.array(IMAGE_MEAN)) * 255
    file = io.BytesIO()
    Image.fromarray(values.round().astype(np.uint8)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("name", ["engine", "nano_engine"])
def test_the_engine_gives_our_ids(name: str, request: pytest.FixtureRequest) -> None:
    engine = request.getfixturevalue(name)
    tokenizer = open_model(CHECKPOINT if name == "engine" else None).make_processor().tokenizer
    all_texts = texts()
    assert len(all_texts) > 300
    for text in all_texts:
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert engine.request("/tokenize", {"content": text})["tokens"] == expected, repr(text)


@pytest.mark.parametrize("name", ["engine", "nano_engine"])
def test_the_engine_computes_our_log_probabilities_on_text(
    name: str, request: pytest.FixtureRequest, model: yi_vl.YiVL
) -> None:
    engine = request.getfixturevalue(name)
    yi = model if name == "engine" else yi_vl.load(device="cpu", dtype=torch.float32)
    largest, count = 0.0, 0
    for question in ("What is this?", "你好！", "Name three animals.", "1 + 1 = ?", "图片里是什么？", "Who are you?"):
        ids = yi.processor.encode_messages([{"role": "user", "content": question}]).input_ids
        log_probs = engine.log_probs(ids, [], yi.model.config.image_token_id)
        if log_probs is not None:
            largest = max(largest, float(np.abs(log_probs - log_probs_of(yi, ids)).max()))
            count += 1
    print(f"{name}: log-probabilities of {count} prompts differ by {largest:.5f} at most")
    assert count >= 3 and largest < 0.02  # llama.cpp's kernels round activations


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"head_dim": 32},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_llamas(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny_config()
    config.text_config = LlamaConfig(**(config.text_config.to_dict() | {"head_dim": None} | changes))
    config.tie_word_embeddings = config.text_config.tie_word_embeddings
    torch.manual_seed(0)
    model = YiVLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
            elif "bias" in name:
                parameter.normal_(0, 0.3)
    yi_vl.YiVL(model.eval(), tiny_processor()).save(tmp_path / "model")
    write_gguf(open_checkpoint(tmp_path / "model"), tmp_path / "gguf", "f32")
    yi = yi_vl.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    engine = Engine(tmp_path / "gguf" / "model-f32.gguf")
    compared = 0
    for question in ("What is this?", "你好", "Name it.", "abc"):
        ids = yi.processor.encode_messages([{"role": "user", "content": question}]).input_ids
        log_probs = engine.log_probs(ids, [], 900)
        if log_probs is not None:
            np.testing.assert_allclose(log_probs, log_probs_of(yi, ids), rtol=0, atol=0.02)
            compared += 1
    assert compared


def test_the_engine_computes_the_official_image_features(engine: Engine, model: yi_vl.YiVL) -> None:
    """As far as they show in log-probabilities: at their places, or in builds with issue 25814 one early."""
    sequences: list[Tensor] = []
    block = model.model.model.vision_tower.visual.transformer.resblocks[-2]
    hook = block.register_forward_hook(lambda _module, _inputs, output: sequences.append(output))
    seen = set()
    for case, golden in GOLDEN.items():
        pixels = ARRAYS[f"{case}.pixels"]
        features = torch.from_numpy(ARRAYS[f"{case}.image_features"])  # (N, P, D)
        with torch.inference_mode():
            model.model.model.encode_images(torch.from_numpy(pixels))
            class_token = model.model.model.multi_modal_projector(sequences[-1][:, :1])  # (N, 1, D)
        ids = model.processor.encode_messages(official_messages(golden["turns"])).input_ids
        log_probs = engine.log_probs(golden["prompt"], [png(image) for image in pixels], 900)
        if log_probs is None:
            continue
        early = torch.cat([features[:, 1:], class_token], dim=1)
        differences = {
            name: float(np.abs(log_probs - log_probs_of(model, ids, expected)).max())
            for name, expected in (("at their places", features), ("one early", early))
        }
        print(f"{case}: {differences}")
        seen.add(min(differences, key=lambda name: differences[name]))
        assert min(differences.values()) < 0.1, differences
    hook.remove()
    assert len(seen) == 1, seen


def test_the_engine_stops_and_shows_no_separator(nano_engine: Engine) -> None:
    yi = yi_vl.load(device="cpu", dtype=torch.float32)
    messages = [{"role": "user", "content": "hello"}]
    body = {"messages": messages, "max_tokens": 60, "temperature": 0}
    answer = nano_engine.request("/v1/chat/completions", body)
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "stop" and "###" not in choice["message"]["content"]
    assert choice["message"]["content"].strip() == yi.predict(None, "hello")
    assert answer["usage"]["prompt_tokens"] == len(yi.processor.encode_messages(messages).input_ids)


def test_the_engine_puts_the_newline_after_images(engine: Engine, model: yi_vl.YiVL) -> None:
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png(ARRAYS['one_image.pixels'][0])}"}},
        {"type": "text", "text": "What is this?"},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0}
    answer = engine.request("/v1/chat/completions", body)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    assert answer["usage"]["prompt_tokens"] == len(model.processor.encode_messages(messages).input_ids)
