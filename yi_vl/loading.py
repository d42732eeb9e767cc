"""A model for a program of this project: what is missing is refused at once, the rest is loaded quickly and quietly."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .startup import hidden, hidden_packages, quick_start

if TYPE_CHECKING:
    from .predict import YiVL


def check(
    model: str | None,
    images: Iterable[Any] = (),
    allow_remote_images: bool = False,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Refuse a model or an image that is not there, and wrong options of `Sampling`, before torch and the model are
    loaded, which takes seconds.

    Raises:
        ValueError: there is no such folder, and the name is no hub id; an image cannot be opened; an option is wrong.
    """
    from .checkpoint.find import find
    from .engine.sampling import Sampling

    Sampling(**options or {})
    find(model)
    for image in images:
        from .image import check_source  # numpy and Pillow, where there are images

        check_source(image, allow_remote_images)


def load_quickly(
    model: str | None,
    quantize: Literal["int8", "int4"] | None,
    device: str | None = None,
    dtype: str | None = None,
    allow_remote_images: bool = False,
    image_tiles: int | None = None,
) -> YiVL:
    """`predict.load`, within `quick_imports`."""
    with quick_start():
        with quick_imports(quantizers=_is_for_gpu(quantize, device) or _may_be_quantized(model)):
            from .predict import load

        return load(
            model,
            device=device,
            dtype=dtype,
            quantize=quantize,
            allow_remote_images=allow_remote_images,
            image_tiles=image_tiles,
        )


@contextmanager
def quick_imports(quantizers: bool = True) -> Iterator[None]:
    """Imports within find no optional package that is not used, and warn of nothing; a user is told of errors only.

    Args:
        quantizers: whether packages that quantize are found.
    """
    with quick_start(), hidden(hidden_packages(quantizers)):
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # what torchao makes torch say
        from huggingface_hub import constants
        from huggingface_hub.utils import enable_progress_bars
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if not constants.HF_HUB_DISABLE_PROGRESS_BARS:
            enable_progress_bars()  # those of downloads, which transformers disables with its own
        yield


def _is_for_gpu(quantize: str | None, device: str | None) -> bool:
    """Whether it is torchao that quantizes; on a CPU our own layers need no other package.

    A GPU that is asked for and not there is reported as that when the model is loaded.
    """
    if quantize is None or device is not None:
        return quantize is not None and device != "cpu"
    import torch

    return torch.cuda.is_available()


def _may_be_quantized(model: str | None) -> bool:
    """Whether a model is, or is not known not to be, saved in a quantization that another library reads."""
    if model is None:
        return False
    try:
        return b'"quantization_config"' in Path(model).expanduser().joinpath("config.json").read_bytes()
    except (OSError, ValueError, RuntimeError):  # a hub id, adapters, or a path that is refused later
        return True
