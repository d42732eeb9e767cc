"""yi_vl beside other engines on the same work: the same questions about the same images, greedily, in one run."""

from __future__ import annotations

import atexit
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, ContinuousBatchingConfig

import yi_vl
from yi_vl.chat import stop_strings
from yi_vl.image.data_url import data_url, png_bytes

_BATCH_SIZES = (1, 8, 32)
_LLAMA_CPP_SLOTS = 8
_IMAGES = (Path("docs/images/dog.png"), Path("docs/images/scene.png"))
_QUESTIONS = ("What is in this image?", "图片里是什么？", "Please describe this image.", "How many items are there?")
_TEXTS = ("Who are you?", "你是谁？", "What can you do?", "Say hello.")


@dataclass(frozen=True)
class Question:
    """What is asked, and the bytes of a PNG file that it is about, if any."""

    text: str
    image: bytes | None = None


class NotMeasuredError(Exception):
    """An engine is not installed, or cannot do this work: why, in a few words."""


Answer = Callable[[Sequence[Question], int], list[str]]  # questions and new tokens -> answers


@dataclass(frozen=True)
class Variant:
    """One way to answer. `num_at_once` questions are the least that show its speed, and what it is warmed up with."""

    answer: Answer
    num_at_once: int = 1


def compare_engines(
    folder: Path, num_questions: int, new_tokens: int, num_rounds: int, with_images: bool
) -> dict[str, Any]:
    """Each engine over all questions, in turns, and over one for the time to its first token.

    No image comes twice, so that caches hold nothing but the prompt's beginning. Tokens are counted in the answers'
    texts. What was first in each is not counted: kernels are chosen and compiled then.
    """
    variants, left_out = _make_variants(folder, with_images)
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    numbers = iter(range(10**9))

    def questions(count: int) -> list[Question]:
        return [_question(next(numbers), with_images) for _ in range(count)]

    for name, variant in list(variants.items()):
        try:
            variant.answer(questions(min(variant.num_at_once, num_questions)), new_tokens)
            variant.answer(questions(1), 1)
        except NotMeasuredError as error:
            left_out[name] = str(error)
            del variants[name]
    rates: dict[str, list[float]] = {name: [] for name in variants}
    first_ms: dict[str, list[float]] = {name: [] for name in variants}
    texts: dict[str, list[str]] = {}
    for _ in range(num_rounds):
        work, single = questions(num_questions), questions(1)
        for name, variant in variants.items():
            started = time.perf_counter()
            texts[name] = variant.answer(work, new_tokens)
            seconds = time.perf_counter() - started
            rates[name].append(sum(len(ids) for ids in tokenizer(texts[name])["input_ids"]) / seconds)
            started = time.perf_counter()
            variant.answer(single, 1)
            first_ms[name].append(1000 * (time.perf_counter() - started))
    what = "questions about an image each" if with_images else "questions without images"
    baseline = next(iter(texts.values()))
    return {
        "what": f"{num_questions} {what}, at most {new_tokens} new tokens, {num_rounds} rounds",
        "variants": {name: _row(rates[name], first_ms[name], texts[name], baseline) for name in variants},
        "not_measured": "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "none",
    }


def _row(rates: list[float], first_ms: list[float], texts: list[str], baseline: list[str]) -> dict[str, float]:
    median = statistics.median(rates)
    return {
        "tokens_per_second": median,
        "spread_percent": 100 * (max(rates) - min(rates)) / median,
        "first_token_ms": statistics.median(first_ms),
        "answers_like_the_first": sum(a == b for a, b in zip(texts, baseline, strict=True)),
    }


def _question(number: int, with_image: bool) -> Question:
    if not with_image:
        return Question(f"{_TEXTS[number % len(_TEXTS)]} {number}")
    image = Image.open(_IMAGES[number % len(_IMAGES)]).convert("RGB")
    for bit in range(20):  # the number, in the image's corner
        image.putpixel((bit, 0), (255, 255, 255) if number >> bit & 1 else (0, 0, 0))
    return Question(_QUESTIONS[number % len(_QUESTIONS)], png_bytes(image))


def _make_variants(folder: Path, with_images: bool) -> tuple[dict[str, Variant], dict[str, str]]:
    makers: dict[str, Callable[[], dict[str, Variant]]] = {
        "transformers": lambda: _transformers(folder, with_images),
        "vLLM": lambda: {"vLLM, 32 slots": Variant(_vllm(folder), 32)},
        "llama.cpp": lambda: {"llama.cpp, 8 slots": Variant(_llama_cpp(folder, with_images), _LLAMA_CPP_SLOTS)},
        "yi_vl": lambda: _yi_vl(folder),
    }
    variants: dict[str, Variant] = {}
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        try:
            variants |= make()
        except NotMeasuredError as error:
            left_out[name] = str(error)
    return variants, left_out


def _yi_vl(folder: Path) -> dict[str, Variant]:
    model = yi_vl.load(folder, dtype=torch.bfloat16)

    def answer(questions: Sequence[Question], new_tokens: int, batch_size: int) -> list[str]:
        requests = [(question.image, question.text) for question in questions]
        return model.predict_batch(requests, batch_size=batch_size, max_new_tokens=new_tokens)

    return {
        f"yi_vl, batch size {size}": Variant(lambda questions, n, size=size: answer(questions, n, size), size)  # type: ignore[misc]
        for size in _BATCH_SIZES
    }


def _transformers(folder: Path, with_images: bool) -> dict[str, Variant]:
    """`generate` as a script calls it, one question at a time; and transformers' own continuous batching."""
    processor = AutoProcessor.from_pretrained(folder)
    model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def encode(question: Question) -> dict[str, Any]:
        image = [] if question.image is None else [{"type": "image", "image": Image.open(io.BytesIO(question.image))}]
        message = {"role": "user", "content": [*image, {"type": "text", "text": question.text}]}
        encoded = processor.apply_chat_template(
            [message], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        return dict(encoded.to(model.dtype))

    def generate(questions: Sequence[Question], new_tokens: int) -> list[str]:
        texts = []
        for question in questions:
            inputs = encode(question)
            tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            texts += processor.post_process_image_text_to_text(tokens)
        return texts

    def generate_batch(questions: Sequence[Question], new_tokens: int) -> list[str]:
        if with_images:
            raise NotMeasuredError("it takes no images")
        prompts = [encode(question)["input_ids"][0].tolist() for question in questions]
        config = type(model.generation_config)(
            **model.generation_config.to_diff_dict() | {"do_sample": False, "max_new_tokens": new_tokens}
        )
        # Without these numbers it takes nearly all memory that is free.
        limits = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=2048, max_requests_per_batch=32)
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=limits)
        if len(outputs) < len(prompts):
            raise NotMeasuredError("it fails here; see its message above")
        tokens = [output.generated_tokens for output in outputs.values()]
        return list(processor.post_process_image_text_to_text(tokens))

    return {
        "transformers, generate": Variant(generate),
        "transformers, continuous batching": Variant(generate_batch, 32),
    }


def _vllm(folder: Path) -> Answer:
    """`LLM.chat`. On a CPU its worker has all cores but one, which is its front end's: more are slower."""
    if find_spec("vllm") is None:
        raise NotMeasuredError("not installed (`make vllm`)")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm import LLM  # type: ignore[import-not-found]

    llm = LLM(str(folder), dtype="bfloat16", enforce_eager=True, max_num_seqs=32)

    def answer(questions: Sequence[Question], new_tokens: int) -> list[str]:
        params = llm.get_default_sampling_params()
        params.max_tokens = new_tokens
        outputs = llm.chat([_openai_messages(question) for question in questions], params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    return answer


def _openai_messages(question: Question) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    if question.image is not None:
        parts.append({"type": "image_url", "image_url": {"url": data_url(question.image, "image/png")}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question.text}]}]


def _llama_cpp(folder: Path, with_images: bool) -> Answer:
    """Its server inside this process, with eight slots; requests are sent at once."""
    if find_spec("xllamacpp") is None:
        raise NotMeasuredError("not installed (PyPI's xllamacpp)")
    if with_images:
        raise NotMeasuredError("released builds compute other image features (llama.cpp issue 25814)")
    import xllamacpp  # type: ignore[import-not-found]

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(_as_gguf(folder))
    parameters.n_parallel, parameters.n_ctx, parameters.verbosity = _LLAMA_CPP_SLOTS, _LLAMA_CPP_SLOTS * 1024, 0
    parameters.cpuparams.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(parameters)
    processor = AutoProcessor.from_pretrained(folder)
    stops = list(stop_strings(processor.chat_format))

    def ask(question: Question, new_tokens: int) -> str:
        prompt = processor.encode_messages([{"role": "user", "content": question.text}]).input_ids
        body = {"prompt": prompt, "n_predict": new_tokens, "temperature": 0, "stop": stops}
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return str(json.loads(response.read())["content"]).strip()

    def answer(questions: Sequence[Question], new_tokens: int) -> list[str]:
        with ThreadPoolExecutor(len(questions)) as threads:
            return list(threads.map(lambda question: ask(question, new_tokens), questions))

    return answer


def _as_gguf(folder: Path) -> Path:
    """The language model as a file that is kept until the process ends.

    Raises:
        NotMeasuredError: it cannot be written.
    """
    target = Path(tempfile.mkdtemp(prefix="yi-vl-gguf-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    command = [sys.executable, "-m", "yi_vl", "convert", str(folder), str(target / "model")]
    done = subprocess.run([*command, "--to", "gguf", "--type", "bf16"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotMeasuredError(f"no GGUF file: {(done.stderr.strip().splitlines() or ['yi-vl convert failed'])[-1]}")
    return next(path for path in (target / "model").glob("*.gguf") if not path.name.startswith("mmproj"))
