"""The machine: where to compute, and its measured limits, memory bandwidth and matrix rate, to compare speeds with."""

from __future__ import annotations

import itertools
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_CALLS_ON_GPU = 20


def machine() -> str:
    """The processor and what torch makes of it."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (named or [platform.processor()])[0]
    num_threads = torch.get_num_threads()
    return f"{device}, {num_threads} thread{'s' * (num_threads != 1)}, torch {torch.__version__}"


def gpu_or_cpu() -> torch.device:
    """The GPU if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronized_seconds(device: torch.device | str) -> float:
    """`time.perf_counter` once a GPU has done all that is queued on it; it works on after a call has returned."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_bandwidth(device: torch.device | str) -> float:
    """Bytes per second at which large tensors are read: the best of a sum and two kinds of product, each many times.

    On a CPU a product with one row may be limited by arithmetic: its bf16 kernels may read half of what a sum reads.
    """
    import torch

    weight = torch.ones(8192, 32768, dtype=torch.bfloat16, device=device)
    vector = torch.ones(1, 32768, dtype=torch.bfloat16, device=device)
    as_matrix = best_seconds(lambda: torch.nn.functional.linear(vector, weight), device)
    as_vector = best_seconds(lambda: torch.mv(weight, vector[0]), device)
    parts = itertools.cycle(weight.view(torch.int64).split(256))  # 16 MB each: a short call is less often interrupted
    as_sum = best_seconds(lambda: next(parts).sum(), device, times=64)
    return max(weight.nbytes / min(as_matrix, as_vector), weight.nbytes / 32 / as_sum)


def copy_bandwidth(device: torch.device | str, num_bytes: int = 1 << 30) -> float:
    """Bytes per second of a large copy within the device's memory; each byte is read once and written once."""
    import torch

    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / best_seconds(lambda: target.copy_(source), device)


def matrix_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device | str) -> float:
    """Floating-point operations per second of one product: the best of several."""
    import torch

    left, right = (torch.ones(*shape, dtype=dtype, device=device) for shape in ((rows, inner), (columns, inner)))
    return 2 * rows * inner * columns / best_seconds(lambda: torch.nn.functional.linear(left, right), device)


def best_seconds(work: Callable[[], Any], device: torch.device | str, times: int = 8) -> float:
    """Of a call, the least of several measurements; on a GPU each is of many calls, so that starting them is hidden."""
    import torch

    num_calls = _CALLS_ON_GPU if torch.device(device).type == "cuda" else 1

    def once() -> float:
        started = synchronized_seconds(device)
        for _ in range(num_calls):
            work()
        return (synchronized_seconds(device) - started) / num_calls

    with torch.inference_mode():
        return min(once() for _ in range(times))
