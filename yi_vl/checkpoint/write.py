"""Writing a checkpoint in any of the three layouts, shard by shard; it appears under its name when it is complete."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..chat import CHATML, YI_VL
from ..files import atomic_path
from ..generation import set_end_tokens_
from .configuration import Layout
from .foreign_files import VIT_FOLDER, write_json, write_llava_hf_files, write_official_files
from .key_map import EMBEDDING, HEAD, LLAVA_HF, OFFICIAL, OFFICIAL_VIT, TOWER, KeyMap, from_native
from .read import Checkpoint, LazyTensor
from .weight_files import num_bytes

SHARD_BYTES = 4_000_000_000
_ONLY_NATIVE = {  # what the other layouts lack, by the type of the language model
    "yi_hybrid": "windows, shared keys and values, or experts",
    "yi_gated": "blocks of gated cross-attention",
}
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}")


@dataclass(frozen=True)
class Output:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def num_bytes(self) -> int:
        return num_bytes(self.shape, self.dtype)


@dataclass(frozen=True)
class OutputFile:
    """A file of weights to be written, relative to the checkpoint."""

    path: str
    outputs: list[Output]


def convert(
    source: Checkpoint,
    target: Path,
    to: Layout,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `source` to the new folder `target`, holding no more than two shards in memory.

    Args:
        progress: is called with the bytes written so far, and all there are.

    Raises:
        ValueError: the folder exists, there is no room, or the layout cannot hold the model.
    """
    check_target(source, target, to)
    files, write_other_files = _PLANS[to](source, shard_bytes)
    total_bytes = sum(output.num_bytes for file in files for output in file.outputs)
    check_space(target, total_bytes)
    with atomic_path(target) as partial:
        written_bytes = 0
        if progress is not None:
            progress(0, total_bytes)
        for file in files:
            path = partial / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {output.name: output.read().contiguous() for output in file.outputs}
            if path.suffix == ".safetensors":
                save_file(tensors, path, metadata={"format": "pt"})
            else:
                torch.save(tensors, path)
            written_bytes += sum(output.num_bytes for output in file.outputs)
            if progress is not None:
                progress(written_bytes, total_bytes)
        _write_index(partial, files)
        write_other_files(partial)


def check_target(source: Checkpoint, target: Path, to: str) -> None:
    """
    Raises:
        ValueError: the folder exists, or the layout cannot hold a quantized model, its language model, chat format,
            tiles or positions.
    """
    if to != "yi-vl" and getattr(source.config, "quantization_config", None):
        raise ValueError(
            f"{source.folder} is quantised, and the layout {to!r} has no place for that. Give the original."
        )
    model_type = source.config.text_config.model_type
    if to != "yi-vl" and model_type != "llama":
        raise ValueError(
            f"{source.folder} has a language model of the type {model_type}, and the layout {to!r} has no place for "
            f"its {_ONLY_NATIVE[model_type]}. Keep it in the layout 'yi-vl'."
        )
    if target.exists():
        raise ValueError(f"{target} exists already; choose another name, or remove it.")
    if to != "yi-vl" and source.layout == "yi-vl" and (max_tiles := source.make_processor().image_processor.max_tiles):
        raise ValueError(
            f"{source.folder} cuts images into up to {max_tiles} tiles, for which the layout {to!r} has no place: its "
            "readers would show the model thumbnails alone. Keep it in the layout 'yi-vl'."
        )
    is_foreign = to in ("official", "llava-hf")
    if is_foreign and source.layout == "yi-vl" and source.make_processor().chat_format != YI_VL:
        raise ValueError(
            f"{source.folder} has the chat format {CHATML}, for which the layout {to!r} has no place: its readers "
            "would write prompts with ###. Keep it in the layout 'yi-vl', or convert to gguf."
        )
    rope_type = source.config.text_config.rope_parameters.get("rope_type", "default")
    if to == "official" and rope_type not in ("default", "linear"):
        raise ValueError(
            f"{source.folder} has rotary positions of the type {rope_type}, which the official code's transformers "
            "does not know. Convert to 'llava-hf', or keep it in the layout 'yi-vl'."
        )


def check_space(target: Path, num_bytes: int) -> None:
    """
    Raises:
        ValueError: the disk has no room for so many bytes.
    """
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    free_bytes = shutil.disk_usage(target.absolute().parent).free
    if free_bytes < num_bytes:
        raise ValueError(f"{target}: {num_bytes / 1e9:.1f} GB are needed, {free_bytes / 1e9:.1f} GB are free.")


_Plan = tuple[list[OutputFile], Callable[[Path], None]]  # files of weights, and a function that writes the others


def _plan_native(source: Checkpoint, shard_bytes: int) -> _Plan:
    outputs = [
        Output(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor[...])  # type: ignore[misc]
        for name, tensor in source.tensors.items()
    ]

    def write_other_files(folder: Path) -> None:
        processor = source.make_processor()
        processor.save_pretrained(folder)
        set_end_tokens_(source.generation_config, processor.tokenizer, processor.chat_format)
        source.generation_config.save_pretrained(folder)
        source.config.architectures = ["YiVLForConditionalGeneration"]
        source.config.dtype = source.dtype
        source.config.save_pretrained(folder)

    return _split(outputs, shard_bytes, "model", "safetensors"), write_other_files


def _plan_official(source: Checkpoint, shard_bytes: int) -> _Plan:
    _expect_yi_vl_parts(source, "official")
    num_rows = source.config.image_token_id
    outputs = [
        output
        for name, tensor in source.tensors.items()
        for output in _convert_tensor(name, tensor, OFFICIAL, source.dtype, num_rows)
    ]
    vit = [
        output
        for name, tensor in source.tensors.items()
        if name.startswith(TOWER)
        for output in _convert_tensor(name, tensor, OFFICIAL_VIT, tensor.dtype)
    ]
    if not (source.folder / "tokenizer.model").exists():
        raise ValueError(
            f"The official layout needs the SentencePiece file tokenizer.model, which {source.folder} does not have; "
            "copy it there from the language model's release."
        )
    files = [*_split(outputs, shard_bytes, "pytorch_model", "bin"), OutputFile(f"{VIT_FOLDER}/pytorch_model.bin", vit)]
    return files, lambda folder: write_official_files(source, folder, vit[0].dtype)


def _plan_llava_hf(source: Checkpoint, shard_bytes: int) -> _Plan:
    _expect_yi_vl_parts(source, "llava-hf")
    outputs = [
        output
        for name, tensor in source.tensors.items()
        for output in _convert_tensor(name, tensor, LLAVA_HF, tensor.dtype)
    ]
    return _split(outputs, shard_bytes, "model", "safetensors"), lambda folder: write_llava_hf_files(source, folder)


_PLANS: dict[Layout, Callable[[Checkpoint, int], _Plan]] = {
    "yi-vl": _plan_native,
    "official": _plan_official,
    "llava-hf": _plan_llava_hf,
}


def _convert_tensor(
    name: str, tensor: LazyTensor, key_map: KeyMap, dtype: torch.dtype, num_rows: int | None = None
) -> Iterator[Output]:
    """A native tensor in another layout; `num_rows` trims the embedding tables."""
    new_names = from_native(name, key_map)
    for part, new_name in enumerate(new_names):
        shape = tuple(tensor.shape)
        if len(new_names) == 3:
            shape = (shape[0] // 3, *shape[1:])
        elif num_rows is not None and name in (EMBEDDING, HEAD):
            shape = (num_rows, *shape[1:])

        def read(part: int = part, rows: int = shape[0] if shape else 0) -> Tensor:
            whole = tensor[...]
            return whole.narrow(0, part * rows, rows).to(dtype, copy=True) if whole.ndim else whole.to(dtype)

        yield Output(new_name, shape, dtype, read)


def _shards(outputs: list[Output], shard_bytes: int) -> list[list[Output]]:
    shards: list[list[Output]] = [[]]
    filled = 0
    for output in outputs:
        if shards[-1] and filled + output.num_bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(output)
        filled += output.num_bytes
    return shards


def _split(outputs: list[Output], shard_bytes: int, stem: str, suffix: str) -> list[OutputFile]:
    shards = _shards(outputs, shard_bytes)
    if len(shards) == 1:
        return [OutputFile(f"{stem}.{suffix}", shards[0])]
    return [
        OutputFile(f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}", shard)
        for number, shard in enumerate(shards, start=1)
    ]


def _write_index(folder: Path, files: list[OutputFile]) -> None:
    """The index of several shards: the file of each tensor."""
    shards = [file for file in files if _SHARD_NUMBER.search(file.path)]
    if not shards:
        return
    weight_map = {output.name: file.path for file in shards for output in file.outputs}
    total = sum(output.num_bytes for file in shards for output in file.outputs)
    name = _SHARD_NUMBER.sub("", shards[0].path)
    write_json(folder / f"{name}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _expect_yi_vl_parts(source: Checkpoint, layout: Layout) -> None:
    connector = source.config.connector_config
    if not connector.is_projector:
        raise ValueError(
            f"{source.folder} has a connector of type {connector.type}; the layout {layout!r} has a place for the "
            "projector of type mlp only."
        )
    if not source.config.vision_config.is_plain:
        raise ValueError(
            f"{source.folder} has a tower that is not open_clip's plain one (a convolutional stem, or one of timm's); "
            f"the layout {layout!r} has no place for it."
        )
