"""The parts of `python -m eval gpu` that load a model and answer with it.

Sizes are those of an 80 GB card; "nano" runs the same code in seconds on a CPU. Each part
imports torch and yi_vl itself, so that a missing package fails that part only.
"""

from __future__ import annotations

import gc
import importlib.metadata
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .guard import Measured, Part, Settings, Skipped

if TYPE_CHECKING:
    from yi_vl import YiVL
    from yi_vl.quantize import Scheme

IMAGE = Path("docs/images/scene.png")
TINY = Path("tests/official_tiny")
QUESTION = "What is in this image?"
MATRIX_RATE, COPY_BANDWIDTH, READ_BANDWIDTH = "bf16 matrix products", "copy in memory", "weights read by one token"
_PACKAGES = (
    "torch", "torchvision", "transformers", "accelerate", "peft", "open_clip_torch", "timm", "torchao", "bitsandbytes",
    "flash-attn", "triton",
)  # fmt: skip
_LARGEST_DIFFERENCE = 1e-3  # of fp32 logits about 1; the sums of a GPU are in another order
_GB = 1e9
_ROOM_FOR_6B = 40 * _GB  # 13.4 of them are the model, and as many again while it is written


def environment(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    """The machine, its bandwidth and its rate for matrix products."""
    import torch

    from yi_vl.hardware import copy_bandwidth, machine, matrix_rate, read_bandwidth

    yield Measured("machine", machine())
    yield Measured("python", platform.python_version())
    for package in _PACKAGES:
        try:
            yield Measured(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Measured(package, "not installed")
    if settings.is_cuda:
        properties = torch.cuda.get_device_properties(settings.device)
        yield Measured("memory", properties.total_memory / _GB, "GB")
        yield Measured("compute capability", f"{properties.major}.{properties.minor}")
        yield Measured("CUDA", str(torch.version.cuda))
        yield Measured("driver", _driver())
    side, num_bytes = (8192, 4 << 30) if settings.is_cuda else (512, 1 << 26)
    shape = (side, side, side)
    yield Measured(COPY_BANDWIDTH, copy_bandwidth(settings.device, num_bytes) / _GB, "GB/s")
    yield Measured(READ_BANDWIDTH, read_bandwidth(settings.device) / _GB, "GB/s")
    yield Measured(MATRIX_RATE, matrix_rate(*shape, torch.bfloat16, settings.device) / 1e12, "TFLOP/s")
    yield Measured("fp32 matrix products", matrix_rate(*shape, torch.float32, settings.device) / 1e12, "TFLOP/s")


def logits(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    """The tiny checkpoint in the official layout, in fp32, on the CPU and on the device."""
    import torch

    import yi_vl

    _need(TINY)
    values, answers = [], []
    for device in ("cpu", settings.device):
        model = yi_vl.load(TINY / "checkpoint", device=device, dtype=torch.float32)
        inputs = model.engine.model_inputs(model.engine.prepare(_messages(TINY / "wide.png")))
        with torch.inference_mode():
            values.append(model.model(**inputs).logits.cpu())
        answers.append([model.predict(TINY / name, QUESTION, max_new_tokens=24) for name in ("wide.png", "tall.png")])
    difference = float((values[0] - values[1]).abs().max())
    yield Measured("largest difference of fp32 logits", difference, "", float(values[0].abs().max()), "largest logit")
    yield Measured("greedy answers of 24 tokens", "equal" if answers[0] == answers[1] else "different")
    if difference > _LARGEST_DIFFERENCE or answers[0] != answers[1]:
        raise ValueError(f"the device computes something else than the CPU: {difference:g}, {answers}")


def load(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    """A folder of safetensors to the device."""
    import yi_vl
    from yi_vl.hardware import synchronized_seconds
    from yi_vl.quantize import num_bytes

    started = time.perf_counter()
    folder = checkpoint(settings)
    yield Measured("making and writing the checkpoint", time.perf_counter() - started, "s")
    started = time.perf_counter()
    model = yi_vl.load(folder, device=settings.device)
    seconds = synchronized_seconds(settings.device) - started
    size = num_bytes(model.model) / _GB
    yield Measured("weights", size, "GB")
    yield Measured("loading", seconds, "s")
    yield Measured("loading", size / seconds, "GB/s")


def answer(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    """One answer about an image, of weights made on the device; and how fast a prompt is prefilled."""
    from yi_vl.hardware import synchronized_seconds
    from yi_vl.quantize import num_bytes

    from ..speed.engine import compare_prefill

    started = time.perf_counter()
    model = _model(settings, shared)
    yield Measured("making the model", synchronized_seconds(settings.device) - started, "s")
    yield Measured("weights", num_bytes(model.model) / _GB, "GB")
    new_tokens = 64 if settings.is_cuda else 8
    seconds = []
    for _ in range(2):  # the first compiles and allocates
        model.clear_cache()
        started = synchronized_seconds(settings.device)
        model.predict(IMAGE, QUESTION, max_new_tokens=new_tokens)
        seconds.append(synchronized_seconds(settings.device) - started)
    yield Measured(f"the first answer, {new_tokens} tokens about an image", seconds[0], "s")
    yield Measured(f"the second, {new_tokens} tokens about an image", seconds[1], "s")
    prefill = compare_prefill(model, 1100 if settings.size == "6b" else 200)
    rate, limit = (prefill["variants"][name]["tflops"] for name in ("yi_vl", "matrix products alone"))
    yield Measured(f"prefill, {prefill['what']}", rate, "TFLOP/s", limit, "matrix products of its shapes")
    yield from _peak(settings)


def stream(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    """Time to the first token about an image, and the rate of those after it."""
    from yi_vl.engine.sampling import Sampling
    from yi_vl.hardware import synchronized_seconds

    from ..speed.engine import bytes_per_token, engine_rate, text_of

    model = _model(settings, shared)
    seconds = []
    for _ in range(3):
        model.clear_cache()
        started = synchronized_seconds(settings.device)
        prompt = model.engine.prepare(_messages(IMAGE))
        next(model.engine.generate([prompt], Sampling(max_new_tokens=2)))
        seconds.append(synchronized_seconds(settings.device) - started)
    yield Measured(f"time to the first token, {len(prompt)} tokens with an image", 1000 * min(seconds), "ms")
    new_tokens = 64 if settings.is_cuda else 8
    rate = max(engine_rate(model, [text_of(model, 64)], new_tokens) for _ in range(3))
    yield Measured("one answer", rate, "tokens/s", *_decode_limit(settings, bytes_per_token(model)))


def batch(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    """Answers side by side: the weights are read once for all of them."""
    from ..speed.engine import bytes_per_token, engine_rate, text_of

    model = _model(settings, shared)
    new_tokens = 32 if settings.is_cuda else 4
    for num_rows in (8, 32):
        conversations = [text_of(model, 64, str(row)) for row in range(num_rows)]
        engine_rate(model, conversations, 3)
        rate = engine_rate(model, conversations, new_tokens)
        limit, name = _decode_limit(settings, bytes_per_token(model))
        yield Measured(f"{num_rows} answers at once", rate, "tokens/s", limit and num_rows * limit, name)
    yield from _peak(settings)


def chat(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    """The third turn of a chat about an image, prefilled whole and from the prefix cache."""
    from ..speed.engine import compare_chat

    model = _model(settings, shared)
    compare_chat(model, IMAGE, 2, 2)
    whole, reused = (times["turn_3_ms"] for times in compare_chat(model, IMAGE, 3, 16)["variants"].values())
    yield Measured("time to the first token of turn 3", reused, "ms", whole, "prefilled whole")


def flash_attention(settings: Settings, shared: dict[str, Any]) -> Iterator[Measured]:
    """flash-attn beside torch's attention; how training packs rows with it is seen in the parts of training."""
    import torch
    from transformers.utils import is_flash_attn_2_available

    from ..speed.engine import first_token_seconds, text_of

    if not settings.is_cuda:
        raise Skipped("needs a GPU")
    if not is_flash_attn_2_available():
        raise Skipped("needs flash-attn")
    model = _model(settings, shared)
    language, conversation = model.model.model.language_model, text_of(model, 2000)
    prompt = model.engine.prepare(conversation)
    results = {}
    for attention in ("sdpa", "flash_attention_2"):
        language.set_attn_implementation(attention)
        with torch.inference_mode():
            values = model.model(**model.engine.model_inputs(prompt)).logits[0, -1].float()
        results[attention] = values, min(first_token_seconds(model, conversation) for _ in range(3))
    language.set_attn_implementation("sdpa")
    (values, seconds), (flash_values, flash_seconds) = results.values()
    yield Measured(f"prefill of {len(prompt)} tokens", 1000 * flash_seconds, "ms", 1000 * seconds, "sdpa")
    difference = float((values - flash_values).abs().max())
    yield Measured("largest difference of bf16 logits", difference, "", float(values.abs().max()), "largest logit")


def quantize(settings: Settings, shared: dict[str, Any], scheme: Scheme) -> Iterator[Measured]:
    """A checkpoint quantized as it is loaded, beside bf16."""
    import torch

    import yi_vl
    from yi_vl.hardware import synchronized_seconds
    from yi_vl.quantize import num_bytes

    from ..speed.engine import bytes_per_token, engine_rate, text_of

    if settings.is_cuda:
        import torchao  # noqa: F401  # missing, it is what this part needs
    folder, new_tokens = checkpoint(settings), 64 if settings.is_cuda else 8
    results = []
    for quantized_as in (None, scheme):
        started = time.perf_counter()
        model = yi_vl.load(folder, device=settings.device, dtype=torch.bfloat16, quantize=quantized_as)
        seconds = synchronized_seconds(settings.device) - started
        # torchao's tensors tell the size of what they stand for
        size = torch.cuda.memory_allocated(settings.device) if settings.is_cuda else num_bytes(model.model)
        conversation = text_of(model, 64)
        engine_rate(model, [conversation], 3)
        rate = max(engine_rate(model, [conversation], new_tokens) for _ in range(3))
        results.append((seconds, size / _GB, rate))
        if quantized_as is None:
            yield Measured("one answer in bf16", rate, "tokens/s", *_decode_limit(settings, bytes_per_token(model)))
        del model
        gc.collect()
    (seconds, size_gb, rate), (quantized_seconds, quantized_gb, quantized_rate) = results
    yield Measured("loading", quantized_seconds, "s", seconds, "bf16")
    yield Measured("weights", quantized_gb, "GB", size_gb, "bf16")
    yield Measured("one answer", quantized_rate, "tokens/s", rate, "bf16")


def checkpoint(settings: Settings, preset: str | None = None) -> Path:
    """A folder with a model of random weights, made when it is first asked for; the bundled one for "nano".

    Args:
        preset: of random_models.py; by default the largest that the run is about, or the disk has room for.
    """
    import yi_vl

    if settings.size == "nano":
        return Path(yi_vl.__file__).parent / "nano"
    if preset is None:
        has_room = shutil.disk_usage(settings.work).free > _ROOM_FOR_6B
        preset = "6b" if has_room or (settings.work / "6b").is_dir() else "1b"
    folder = settings.work / preset
    if not folder.is_dir():
        from ..speed.random_models import make

        _need(TINY)
        make(preset, device=settings.device).save(folder)  # type: ignore[arg-type]  # one of its presets
    return folder


def _model(settings: Settings, shared: dict[str, Any]) -> YiVL:
    """The model that a group's parts share."""
    from ..speed.random_models import make

    _need(IMAGE)
    if "model" not in shared:
        if settings.size == "6b":
            _need(TINY)
        shared["model"] = make(settings.size, device=settings.device)
    model: YiVL = shared["model"]
    return model


def _messages(image: Path) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]}]


def _need(path: Path) -> None:
    if not path.exists():
        raise Skipped(f"needs {path}: run it from a checkout")


def _decode_limit(settings: Settings, num_bytes: int) -> tuple[float | None, str]:
    """Tokens per second of one answer at which the weights alone take all of the memory's bandwidth."""
    bandwidths = [settings.rates[name] for name in (COPY_BANDWIDTH, READ_BANDWIDTH) if name in settings.rates]
    if not bandwidths:
        return None, ""
    return max(
        bandwidths
    ) * _GB / num_bytes, f"{num_bytes / _GB:.2f} GB of weights a token at {max(bandwidths):,.0f} GB/s"


def _peak(settings: Settings) -> Iterator[Measured]:
    import torch

    if settings.is_cuda:
        yield Measured("peak memory", torch.cuda.max_memory_allocated(settings.device) / _GB, "GB")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown: nvidia-smi does not tell"


# Expected on an 80 GB card, in seconds: 20, 10, 30, 5, 15, 5, 5, 45, 40, 40.
PARTS = (
    Part("environment", "device", 60, environment),
    Part("logits", "device", 45, logits),
    Part("answer", "model", 90, answer),
    Part("stream", "model", 45, stream),
    Part("batch", "model", 60, batch),
    Part("chat", "model", 45, chat),
    Part("flash-attn", "model", 45, flash_attention),
    Part("load", "folder", 120, load),
    Part("int8", "folder", 90, partial(quantize, scheme="int8")),
    Part("int4", "folder", 90, partial(quantize, scheme="int4")),
)
