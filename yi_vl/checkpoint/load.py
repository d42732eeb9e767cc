"""Loading a model and its processor from a folder or a hub id; every error is one line."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, get_args

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from ..arguments import as_choice, one_line, shown
from ..auto import YiVLConfig, YiVLForConditionalGeneration, YiVLProcessor  # which registers them with transformers
from ..chat import CHAT_FORMATS, YI_VL, ChatFormat
from ..generation import set_end_tokens_
from ..image.tiles import as_max_tiles
from ..linear import tune_linears_
from ..quantize import METHOD, Scheme, make_config
from . import Checkpoint, TowerFrom, base_of, holds_adapters, merge, open_checkpoint, read_configuration, read_processor
from .find import find as find
from .json_files import read_json
from .modelscope import fetch_modelscope, is_modelscope

_HUB_FILES = ("*.json", "*.model", "*.jinja", "vit/*/*.json")
_HUB_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "vit/*/pytorch_model*.bin")
_DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's strategies to place a model
_SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_SMALL_PARAMETERS = 200_000_000  # below this fp32 on a CPU: 4.7 ms per nano token, in bf16 6.2 and on many CPUs more
_logger = logging.getLogger(__name__)


def load_model(
    path: str | os.PathLike | None = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    tower_from: TowerFrom | None = "vit",
    quantize: Scheme | None = None,
) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """A model in evaluation mode, and its processor.

    Args:
        path: a folder or hub id, in any of the three layouts, or of LoRA adapters, which are merged into their
            base; the bundled nano by default.
        device: "cpu", "cuda:1", ..., or the GPU's number; "auto" spreads the model over all there is. By default the
            GPU, else the CPU.
        dtype: of the weights, also by its name ("bfloat16", "bf16"); "auto" is what they are stored in. By default
            bfloat16, but float32 for a small model on a CPU.
        tower_from: which of its two copies of the vision tower an official release gets, that in `vit/` or that among
            the shards.
        quantize: "int8" or "int4" for the language model's linear layers; what was saved quantised is loaded so.

    Raises:
        ValueError: there is no such model, it is not a Yi-VL, it is incomplete, its parts do not fit, or
            it cannot be quantised so on this device.
    """
    device, as_stored = _parse_device(device), isinstance(dtype, str) and dtype == "auto"
    weights_dtype = None if as_stored else _parse_dtype(dtype)
    tower_from, quantize = _as_tower_from(tower_from), _as_scheme(quantize)
    folder = fetch(find(path), with_weights=True)
    method = _quantization_method(folder)
    if method and quantize is not None:
        raise ValueError(f"{folder} is quantised already ({method}); leave quantize={quantize!r} out.")
    if method and method != METHOD:
        return _load_as_quantized(folder, device, weights_dtype)
    checkpoint = open_model(folder, tower_from)
    quantization_config = make_config(quantize, checkpoint.config.text_config, device) if quantize is not None else None
    if method and str(device) not in ("cpu", "auto"):
        raise ValueError(
            f"{folder} was quantised for CPUs, and {device} is none. Load it with device='cpu', or load the original "
            "with quantize=... there."
        )
    if as_stored or (method and weights_dtype is None):  # that of its scales, where it is quantised
        weights_dtype = _parse_dtype(str(checkpoint.config.dtype))
    if weights_dtype is None:
        num_parameters = sum(tensor.shape.numel() for tensor in checkpoint.tensors.values())
        is_small_on_cpu = str(device) == "cpu" and num_parameters < _SMALL_PARAMETERS
        weights_dtype = torch.float32 if is_small_on_cpu else torch.bfloat16
    model, processor = build_model(
        checkpoint.in_dtype(weights_dtype), device, dtype=weights_dtype, quantization_config=quantization_config
    )
    tune_linears_(model)
    return model, processor


def build_model(
    checkpoint: Checkpoint,
    device: str | torch.device,
    model_class: type[YiVLForConditionalGeneration] = YiVLForConditionalGeneration,
    **options: Any,
) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """Read a checkpoint's tensors into a model in evaluation mode, and make its processor.

    Args:
        device: or one of accelerate's strategies, such as "auto".
        options: of `from_pretrained`, such as `dtype` and `quantization_config`.

    Raises:
        ValueError: the tensors cannot be read, or the device or a library refuses them.
    """
    try:
        with torch.device("cpu"):  # whatever torch.set_default_device says
            model = model_class.from_pretrained(
                None, config=checkpoint.config, state_dict=checkpoint.tensors, device_map=device, **options
            )
        processor = checkpoint.make_processor()
        model.generation_config = checkpoint.generation_config
        set_end_tokens_(model.generation_config, processor.tokenizer, processor.chat_format)
    except Exception as error:  # its files may hold anything
        where = f"{checkpoint.folder}: the model cannot be loaded on {shown(str(device))}"
        raise ValueError(f"{where}: {one_line(error)}.") from error
    return model.eval(), processor


def open_model(path: str | os.PathLike | None, tower_from: TowerFrom = "vit") -> Checkpoint:
    """The checkpoint in a folder or of a hub id; adapters are merged into their base. No tensor is read yet.

    Raises:
        ValueError: as `load_model`.
    """
    folder = fetch(find(path), with_weights=True)
    if not holds_adapters(folder):
        return open_checkpoint(folder, tower_from)
    with _base(folder, with_weights=True) as base:
        return merge(open_checkpoint(base, tower_from), folder)


def read_config(source: str) -> YiVLConfig:
    """The configuration of a model folder or hub id, of adapters that of their base; no weights are read or fetched.

    Raises:
        ValueError: there is none, or it is not a Yi-VL.
    """
    folder = fetch(source, with_weights=False)
    if not holds_adapters(folder):
        return read_configuration(folder)
    with _base(folder, with_weights=False) as base:
        return read_configuration(base)


def read_chat_format(source: str) -> ChatFormat:
    """The chat format of a model folder or hub id, of adapters that of their base; no tokenizer is read.

    Raises:
        ValueError: its processor_config.json is damaged, or names none that there is.
    """
    path, values = _read_processor_config(source)
    return as_choice(values.get("chat_format", YI_VL), f"chat_format in {path}", CHAT_FORMATS)  # type: ignore[return-value]


def read_max_tiles(source: str) -> int:
    """Most tiles of an image, likewise; 0 for none.

    Raises:
        ValueError: its processor_config.json is damaged, or an image cannot have so many.
    """
    path, values = _read_processor_config(source)
    image_processor = values.get("image_processor")
    value = image_processor.get("max_tiles", 0) if isinstance(image_processor, dict) else 0
    return as_max_tiles(value, f"max_tiles in {path}")


def load_processor(path: str | os.PathLike | None) -> YiVLProcessor:
    """The processor of a model folder or hub id, of adapters that of their base; no weights are read or fetched.

    Raises:
        ValueError: there is none, or it is not a Yi-VL.
    """
    folder = fetch(find(path), with_weights=False)
    if not holds_adapters(folder):
        return read_processor(folder)
    with _base(folder, with_weights=False) as base:
        return read_processor(base)


def fetch(source: str, with_weights: bool) -> Path:
    """The folder of a model: itself, or that of a hub id in the cache, after fetching what is missing."""
    if os.path.isdir(source):
        if not os.access(source, os.R_OK | os.X_OK):
            raise ValueError(f"{source} cannot be opened: there is no permission to read this folder.")
        return Path(source)
    weights = _HUB_WEIGHTS if with_weights else ()
    if is_modelscope(source):
        return fetch_modelscope(source, _HUB_FILES, weights)
    try:
        return _fetch_from_hub(source, [*_HUB_FILES, *weights])
    except Exception as error:  # huggingface_hub's kinds, and those of the HTTP client that its release uses
        raise ValueError(
            f"{source} is not a local folder, and could not be fetched from the hub: {_hub_reason(error)}. Give a "
            "folder or hub id of a Yi-VL."
        ) from error


def _fetch_from_hub(source: str, patterns: list[str]) -> Path:
    """The folder of a hub id in the cache, after fetching what is missing; if the hub does not answer, as it is.

    Before `snapshot_download`, which waits for the hub's first answer without a limit, the hub is asked with one.
    """
    if constants.HF_HUB_OFFLINE:
        return Path(snapshot_download(source, allow_patterns=patterns))
    cached = None
    try:
        cached = Path(snapshot_download(source, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        _logger.warning("Fetching %s from the Hugging Face hub ...", source)
    try:
        latest = HfApi().model_info(source, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:
        if cached is None:
            raise
        return cached
    names = filter_repo_objects([file.rfilename for file in latest.siblings or ()], allow_patterns=patterns)
    if cached is not None:
        if cached.name == latest.sha and all((cached / name).exists() for name in names):
            return cached
        _logger.warning("Fetching %s from the Hugging Face hub ...", source)
    return Path(snapshot_download(source, allow_patterns=patterns))


def _hub_reason(error: Exception) -> str:
    """Why the hub gave no model, in one line."""
    if isinstance(error, GatedRepoError):
        return "it is gated; ask for access on its page, then run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no model of this name, or it is private and needs `hf auth login`"
    is_local = getattr(error, "strerror", None)  # the disk is full, the cache cannot be written
    return one_line(error) + ("" if is_local else "; check the connection")


@contextmanager
def _base(folder: Path, with_weights: bool) -> Iterator[Path]:
    """The folder of the model that the adapters in `folder` adapt; errors name both."""
    name = base_of(folder)
    try:
        base = fetch(find(name), with_weights)
        if holds_adapters(base):
            raise ValueError("those are adapters themselves; merge them first (yi-vl convert).")
        if _quantization_method(base):
            raise ValueError("that is quantised; adapters are merged into the original.")
        yield base
    except ValueError as error:
        raise ValueError(f"{folder} holds adapters of {name}: {error}") from error


def _read_processor_config(source: str) -> tuple[Path, dict[str, Any]]:
    """The file processor_config.json of a model, of adapters that of their base, and its values: none of a foreign
    layout, whose chat format is Yi-VL's own and whose images have no tiles."""
    folder = fetch(source, with_weights=False)
    with _base(folder, with_weights=False) if holds_adapters(folder) else nullcontext(folder) as model:
        path = model / "processor_config.json"
        return path, read_json(path) if path.exists() else {}


def _quantization_method(folder: Path) -> str | None:
    """The method that a saved model was quantised by, if any; a damaged config.json is reported later."""
    try:
        return str(read_json(folder / "config.json")["quantization_config"]["quant_method"])
    except (ValueError, KeyError, TypeError):
        return None


def _load_as_quantized(
    folder: Path, device: str | torch.device, dtype: torch.dtype | None
) -> tuple[YiVLForConditionalGeneration, YiVLProcessor]:
    """A native checkpoint that another library quantised: transformers reads it."""
    read_configuration(folder)  # for its errors
    try:
        model = YiVLForConditionalGeneration.from_pretrained(folder, dtype=dtype or "auto", device_map=device)
        processor = YiVLProcessor.from_pretrained(folder)
        set_end_tokens_(model.generation_config, processor.tokenizer, processor.chat_format)
    except Exception as error:
        raise ValueError(f"{folder}: the quantised model cannot be loaded: {one_line(error)}") from error
    return model.eval(), processor


def _parse_device(device: str | int | torch.device | None) -> str | torch.device:
    """A device, or one of accelerate's strategies. A number is a GPU's, and -1 the CPU, as in pipelines."""
    if device is None:
        return _default_device()
    if isinstance(device, dict) or (isinstance(device, str) and device in _DEVICE_MAPS):
        return device  # type: ignore[return-value]
    if isinstance(device, str) and device.removeprefix("-").isdecimal():
        device = int(device)
    if isinstance(device, int) and not isinstance(device, bool):
        device = "cpu" if device == -1 else f"cuda:{device}"
    try:
        if isinstance(device, bool):
            raise TypeError("no device")
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device is {shown(device)}; expected 'cpu', 'cuda', 'cuda:1', 'mps', 'auto' or a GPU's number."
        ) from error
    if parsed.type == "meta":
        raise ValueError("device is meta, which holds no values; expected 'cpu', 'cuda', 'cuda:1', 'mps' or 'auto'.")
    return device if isinstance(device, str) else parsed


def _parse_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype of floating point."""
    if dtype is None:
        return None
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
    parsed = getattr(torch, _SHORT_DTYPES.get(name, name), None) if isinstance(name, str) else name
    if not isinstance(parsed, torch.dtype) or not parsed.is_floating_point:
        raise ValueError(
            f"dtype is {shown(dtype)}; expected a torch dtype or its name: bfloat16, float16, float32, or 'auto'."
        )
    return parsed


def _default_device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _as_tower_from(tower_from: Any) -> TowerFrom:
    return "vit" if tower_from is None else as_choice(tower_from, "tower_from", get_args(TowerFrom))  # type: ignore[return-value]


def _as_scheme(quantize: Any) -> Scheme | None:
    return None if quantize is None else as_choice(quantize, "quantize", get_args(Scheme))  # type: ignore[return-value]
