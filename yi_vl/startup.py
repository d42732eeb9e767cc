"""The start of a program that answers questions: fewer imports, and no garbage collections until the model is there."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# transformers imports these wherever they are installed: scipy for the losses of detectors, torchvision for its own
# image processors, torchao for the quantization of that name, triton for GPU kernels.
NEVER_USED = ("scipy", "torchvision")
QUANTIZERS = ("torchao", "triton")


@contextmanager
def paused_garbage_collection() -> Iterator[None]:
    """No cyclic garbage collection within: imports make a million objects that stay, looked through in vain."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def quick_start() -> Iterator[None]:
    """`paused_garbage_collection`, and what is there at the end is never looked through, nor at the process's exit.

    For programs of our own: a model that is loaded within stays until the process ends.
    """
    with paused_garbage_collection():
        yield
        gc.freeze()


@contextmanager
def hidden(packages: Iterable[str]) -> Iterator[None]:
    """Optional packages that imports within do not find, unless they are imported already.

    transformers remembers what it did not find, so this is for programs of our own, not for the library.
    """
    names = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(names))  # type: ignore[arg-type]  # None: Python's own sign of no such module
    try:
        yield
    finally:
        for name in names:
            if sys.modules.get(name) is None:
                sys.modules.pop(name, None)
