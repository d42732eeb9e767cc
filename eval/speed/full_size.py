"""The released shapes on this machine: a checkpoint of random weights in the official layout, loaded and asked.

What it shows of a machine is true of the real weights as well: time and memory do not depend on their values.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.progress import Progress, TaskID
from torch import Tensor
from transformers import GenerationConfig

import yi_vl
from yi_vl.checkpoint import Checkpoint, convert
from yi_vl.config import preset
from yi_vl.engine.sampling import Sampling
from yi_vl.hardware import machine, synchronized_seconds
from yi_vl.image import YiVLImageProcessor
from yi_vl.processor import YiVLProcessor, prepare_tokenizer
from yi_vl.quantize import Scheme, num_bytes

_STD = 0.02
_CPU = torch.device("cpu")
_QUESTION = "What is in this image?"


@dataclass(frozen=True)
class RandomTensor:
    """A tensor that is generated when it is read: norms one, biases zero, all else normal."""

    name: str
    shape: torch.Size
    dtype: torch.dtype

    def __getitem__(self, index: Any) -> Tensor:
        if len(self.shape) == 1:
            is_bias = self.name.endswith("bias")
            return (torch.zeros if is_bias else torch.ones)(self.shape, dtype=self.dtype)[index]
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return torch.empty(self.shape, dtype=self.dtype).normal_(std=_STD, generator=generator)[index]


def make(folder: Path, size: Literal["6b", "34b"], tokenizer_folder: Path) -> None:
    """Write a checkpoint in the official layout, shard by shard: bf16, the tower once more in fp32 in vit/.

    Raises:
        ValueError: there is no room, or no tokenizer.
    """
    config = preset(size)
    config.text_config.vocab_size = config.image_token_id  # 64000, as released
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in yi_vl.YiVLForConditionalGeneration(config).state_dict().items()}
    tensors: dict[str, Any] = {
        name: RandomTensor(name, shape, torch.float32 if ".vision_tower." in name else torch.bfloat16)
        for name, shape in shapes.items()
    }
    processor = YiVLProcessor(YiVLImageProcessor(), prepare_tokenizer(str(tokenizer_folder)))
    random = Checkpoint("yi-vl", tokenizer_folder, config, GenerationConfig(), tensors, lambda: processor)
    with Progress() as progress:
        report = partial(_report, progress, progress.add_task("writing"))
        convert(random, folder, "official", progress=report)


def _report(progress: Progress, task: TaskID, done: int, total: int) -> None:
    progress.update(task, completed=done, total=total)


def measure(folder: Path, image: Path, new_tokens: int, quantize: Scheme | None = None) -> dict[str, str]:
    """Load and answer in a process of its own, whose peak memory is then that of the model.

    Raises:
        ValueError: the model cannot be loaded, or not so.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(folder, image, new_tokens, quantize, sending))
    process.start()
    sending.close()
    try:
        result: dict[str, str] | str = receiving.recv()
    except EOFError:
        result = "the process that loaded the model was killed; was there enough memory?"
    process.join()
    if isinstance(result, str):
        raise ValueError(f"{folder}: {result}")
    return result


def _measure(folder: Path, image: Path, new_tokens: int, quantize: Scheme | None, results: Any) -> None:
    try:
        before = peak_bytes()
        started = time.perf_counter()
        model = yi_vl.load(folder, dtype=torch.bfloat16, quantize=quantize)
        device = model.model.device
        loaded = synchronized_seconds(device)
        weight_bytes = num_bytes(model.model)
        peak_of_loading = peak_bytes(device)
        messages = [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": _QUESTION}]}
        ]
        model.engine.max_draft_tokens = 0  # one token per step
        prompt, sampling = model.engine.prepare(messages), Sampling(max_new_tokens=1 + new_tokens)
        pieces, times = [], [synchronized_seconds(device)]
        for (output,) in model.engine.generate([prompt], sampling):
            pieces.append(output.text)
            times.append(synchronized_seconds(device))
        seconds_per_token = (times[-1] - times[1]) / max(1, len(times) - 2)
        results.send(
            {
                "weights": f"{weight_bytes / 1e9:.2f} GB in {quantize or 'bf16'}",
                "loading": f"{loaded - started:.1f} s",
                "peak memory, loading": _of(peak_of_loading, weight_bytes),
                "peak memory, answering": _of(peak_bytes(device), weight_bytes),
                "of it before loading": f"{before / 1e9:.2f} GB (Python and its libraries)"
                if device.type != "cuda"
                else "nothing: it is the GPU's memory",
                f"prefill, {len(prompt)} tokens": f"{times[1] - times[0]:.1f} s",
                f"decoding, {len(times) - 2} tokens": f"{1 / max(1e-9, seconds_per_token):.2f} tokens/s",
                "answer": repr("".join(pieces)),
                "machine": machine(),
            }
        )
    except ValueError as error:
        results.send(str(error))


def peak_bytes(device: torch.device = _CPU) -> int:
    """The most memory this process has held at once, on a GPU in tensors."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # `getrusage` also counts what the parent held when it started this process
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _of(held_bytes: int, weight_bytes: int) -> str:
    return f"{held_bytes / 1e9:.2f} GB, {held_bytes / weight_bytes:.3f} x the weights"
