"""The start of a program that answers questions: fewer imports, and no garbage collections until the model is there."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata

TRIED_TRANSFORMERS = "5.24."  # nothing is hidden from other versions: 5.16 needs torchvision, new ones are not known

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
        atexit.register(_unfreeze_for_triton)


def _unfreeze_for_triton() -> None:
    """Triton 3.9, which torchao imports, otherwise reports all that is left of it at the exit as leaked."""
    if sys.modules.get("triton") is not None:
        gc.unfreeze()


def hidden_packages(quantizers: bool) -> tuple[str, ...]:
    """What the installed transformers does not have to find.

    Args:
        quantizers: whether packages that quantize have to be found.
    """
    if not metadata.version("transformers").startswith(TRIED_TRANSFORMERS):
        return ()
    return NEVER_USED if quantizers else (*NEVER_USED, *QUANTIZERS)


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
