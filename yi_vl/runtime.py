"""Memory settings of the process: huge pages, and what glibc keeps of freed memory."""

from __future__ import annotations

import ctypes
import os


def use_huge_pages() -> None:
    """Have torch request transparent huge pages (2 MB) for large tensors; call it before the first tensor is made.

    Every layer of a prefill allocates and frees tensors of megabytes. With pages of 4 kB a fifth of the prefill's time
    on a CPU goes into page faults. A value that is set in the environment is kept.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def trim_malloc() -> None:
    """Have glibc return freed memory to the system."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return  # another C library
