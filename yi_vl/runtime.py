"""Settings of the process: huge pages, waiting threads, and what glibc keeps of freed memory."""

from __future__ import annotations

import ctypes
import os


def use_huge_pages() -> None:
    """Have torch request transparent huge pages (2 MB) for large tensors; call it before the first tensor is made.

    Every layer of a prefill allocates and frees tensors of megabytes. With pages of 4 kB a fifth of the prefill's time
    on a CPU goes into page faults. A value that is set in the environment is kept.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def limit_spinning() -> None:
    """Have OpenMP's threads wait actively for a quarter of a millisecond at most; call it before torch is imported.

    Every product ends with threads that wait for each other. GNU's OpenMP spins for some 8 ms, longer than a process's
    turn on the processor: beside other processes most of the time goes into waiting for a thread that is not running.
    Two cores with a load of 8 multiplied five to ten times as fast with the limit. Values in the environment are kept.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def trim_malloc() -> None:
    """Have glibc return freed memory to the system."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library
