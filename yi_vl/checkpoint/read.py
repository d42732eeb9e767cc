"""A checkpoint of any layout as a native one: its configuration, its processor, and every tensor, read lazily."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..arguments import one_line
from ..auto import YiVLProcessor
from ..config import YiVLConfig
from ..image import YiVLImageProcessor
from ..model import YiVLForConditionalGeneration
from ..quantize import packed_config, replace_linears_
from .configuration import (
    Layout,
    default_generation_config,
    errors_of,
    llava_hf_config,
    load_tokenizer,
    native_config,
    official_config,
    read_config_json,
    read_generation_config,
    vit_folder,
)
from .key_map import EMBEDDING, HEAD, LLAVA_HF, OFFICIAL, OFFICIAL_VIT, TOWER, KeyMap, Slot, to_native
from .weight_files import Entry, WeightFiles, num_bytes, shortened

TowerFrom = Literal["vit", "shards"]


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is a native one, or a part of one."""

    files: WeightFiles
    name: str

    @property
    def entry(self) -> Entry:
        return self.files.entries[self.name]


@dataclass(frozen=True)
class LazyTensor:
    """A native tensor that is read when it is indexed with `...`, as transformers reads slices of safetensors."""

    shape: torch.Size
    dtype: torch.dtype  # to read it in; as stored, unless it is replaced
    pieces: tuple[Piece, ...]  # concatenated along the first dimension; none where `change` fills an empty tensor
    added_rows: Callable[[Tensor, int], Tensor] | None = None  # (the stored rows, the number to add) -> those to add
    change: Callable[[Tensor], Tensor] | None = None  # applied to the stored values, to merge adapters

    def __getitem__(self, index: Any) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        num_stored = 0
        for piece in self.pieces:  # each into its place: copies would take most of the memory of loading
            num_rows = piece.entry.shape[0] if self.shape else 0
            piece.files.read_into(piece.name, tensor.narrow(0, num_stored, num_rows) if self.shape else tensor)
            num_stored += num_rows
        if self.pieces and self.shape and num_stored < self.shape[0]:
            assert self.added_rows is not None
            tensor[num_stored:] = self.added_rows(tensor[:num_stored], self.shape[0] - num_stored)
        return (tensor if self.change is None else self.change(tensor))[index]

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point

    @property
    def num_bytes(self) -> int:
        return num_bytes(tuple(self.shape), self.dtype)


@dataclass
class Checkpoint:
    """A model on disk in any layout, with its configuration and tensors as native ones."""

    layout: Layout
    folder: Path
    config: YiVLConfig
    generation_config: GenerationConfig
    tensors: dict[str, LazyTensor]
    make_processor: Callable[[], YiVLProcessor]
    tower_copy: dict[str, LazyTensor] = field(default_factory=dict)  # the other of the official layout's two towers

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model, as stored; the tower may be stored in another."""
        return self.tensors[EMBEDDING].dtype

    def in_dtype(self, dtype: torch.dtype) -> Checkpoint:
        """The same checkpoint, whose floating-point tensors are read in `dtype`."""
        tensors = {
            name: replace(tensor, dtype=dtype) if tensor.is_floating_point() else tensor
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=tensors)


def open_checkpoint(folder: Path, tower_from: TowerFrom = "vit") -> Checkpoint:
    """Read the configuration and the headers of the weight files; no tensor is read yet.

    Args:
        tower_from: the official release stores the vision tower twice: in `vit/`, which the official code uses, and
            among the shards.

    Raises:
        ValueError: the folder holds no Yi-VL, or an incomplete or inconsistent one.
    """
    if tower_from not in ("vit", "shards"):
        raise ValueError(f"tower_from is {tower_from!r}; an official release has its tower in 'vit' and in 'shards'.")
    values, layout = read_config_json(folder)
    if layout == "official":
        return _open_official(folder, values, tower_from)
    if tower_from != "vit":
        raise ValueError(f"{folder} is not in the official layout: it has one copy of the tower, nothing to choose.")
    return _open_llava_hf(folder, values) if layout == "llava-hf" else _open_native(folder, values)


def read_processor(folder: Path) -> YiVLProcessor:
    """The processor of a checkpoint; its weight files are not needed.

    Raises:
        ValueError: the folder holds no Yi-VL, or its tokenizer or processor is damaged.
    """
    values, layout = read_config_json(folder)
    if layout == "official":
        return _processor_maker(*official_config(folder, values))()
    if layout == "llava-hf":
        config = llava_hf_config(folder, values)
        return _processor_maker(config, load_tokenizer(folder, config.image_token_id))()
    try:
        return YiVLProcessor.from_pretrained(folder)
    except Exception as error:  # its files may hold anything
        raise ValueError(f"{folder}: its processor cannot be loaded: {one_line(error)}.") from error


def largest_difference(checkpoint: Checkpoint) -> tuple[float, str]:
    """The largest absolute difference between a release's two copies of the vision tower, and the tensor that has it.

    Compared in the coarser of the two dtypes, so that rounding alone does not count.

    Raises:
        ValueError: the checkpoint has one copy only.
    """
    if not checkpoint.tower_copy:
        raise ValueError(f"{checkpoint.folder} has one copy of the vision tower; there is nothing to compare.")
    largest, where = 0.0, ""
    for name, other in checkpoint.tower_copy.items():
        first, second = checkpoint.tensors[name][...], other[...]
        coarser = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
        difference = float((first.to(coarser).float() - second.to(coarser).float()).abs().max())
        if not where or not difference <= largest:  # NaN counts as the largest
            largest, where = difference, name
    return largest, where


def _open_official(folder: Path, values: dict[str, Any], tower_from: TowerFrom) -> Checkpoint:
    config, tokenizer = official_config(folder, values)
    vit = vit_folder(folder, str(values["mm_vision_tower"]))
    in_shards = _find_pieces(folder, WeightFiles.find(folder), OFFICIAL)
    has_vit = any((vit / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))
    in_vit = _find_pieces(vit, WeightFiles.find(vit), OFFICIAL_VIT) if tower_from == "vit" or has_vit else {}
    tower_in_shards = {slot: piece for slot, piece in in_shards.items() if slot.name.startswith(TOWER)}
    others = {slot: piece for slot, piece in in_shards.items() if not slot.name.startswith(TOWER)}
    chosen, copy = (in_vit, tower_in_shards) if tower_from == "vit" else (tower_in_shards, in_vit)
    return Checkpoint(
        layout="official",
        folder=folder,
        config=config,
        generation_config=default_generation_config(config),
        tensors=_assemble(folder, config, others | chosen),
        make_processor=_processor_maker(config, tokenizer),
        tower_copy=_assemble(folder, config, copy, only_tower=True) if copy else {},
    )


def _open_llava_hf(folder: Path, values: dict[str, Any]) -> Checkpoint:
    config = llava_hf_config(folder, values)
    tensors = _assemble(folder, config, _find_pieces(folder, WeightFiles.find(folder), LLAVA_HF))
    make_processor = _processor_maker(config, load_tokenizer(folder, config.image_token_id))
    return Checkpoint("llava-hf", folder, config, default_generation_config(config), tensors, make_processor)


def _open_native(folder: Path, values: dict[str, Any]) -> Checkpoint:
    config = native_config(folder, values)
    files = WeightFiles.find(folder)
    tensors = _assemble(folder, config, {Slot(name): Piece(files, name) for name in files.entries})
    generation_config = read_generation_config(folder) or default_generation_config(config)
    return Checkpoint(
        "yi-vl", folder, config, generation_config, tensors, lambda: YiVLProcessor.from_pretrained(folder)
    )


def _processor_maker(config: YiVLConfig, tokenizer: Any) -> Callable[[], YiVLProcessor]:
    vision = config.vision_config
    return lambda: YiVLProcessor(YiVLImageProcessor(vision.image_size), tokenizer, patch_size=vision.patch_size)


def _find_pieces(folder: Path, files: WeightFiles, key_map: KeyMap) -> dict[Slot, Piece]:
    pieces: dict[Slot, Piece] = {}
    unknown = []
    for name, entry in files.entries.items():
        try:
            slot = to_native(name, key_map)
        except KeyError:
            unknown.append(f"{name} {tuple(entry.shape)}")
            continue
        if slot is not None:
            pieces[slot] = Piece(files, name)
    if unknown:
        raise ValueError(f"{folder}: {_count_tensors(unknown)} not of a Yi-VL: {shortened(unknown, 20)}.")
    return pieces


def _assemble(
    folder: Path, config: YiVLConfig, pieces: dict[Slot, Piece], only_tower: bool = False
) -> dict[str, LazyTensor]:
    """All tensors of the model from the pieces.

    Raises:
        ValueError: one is missing or of another shape, or a piece is left over.
    """
    shapes = _expected_shapes(folder, config)
    if only_tower:
        shapes = {name: shape for name, shape in shapes.items() if name.startswith(TOWER)}
    elif config.tie_word_embeddings and Slot(HEAD) not in pieces:
        del shapes[HEAD]
    missing, mismatched, tensors = [], [], {}
    remaining = dict(pieces)
    for name, shape in shapes.items():
        slots = [Slot(name)] if Slot(name) in remaining else [Slot(name, part) for part in range(3)]
        parts = [remaining.pop(slot) for slot in slots if slot in remaining]
        if len(parts) != len(slots):
            missing.append(f"{name} {tuple(shape)}")
            continue
        stored = _concatenated_shape(parts)
        added_rows = _ADDED_ROWS.get(name)
        lacks_rows = added_rows is not None and stored and config.image_token_id <= stored[0] < shape[0]
        fits = stored[1:] == tuple(shape)[1:] and (stored[:1] == tuple(shape)[:1] or lacks_rows)
        if not fits or any(part.entry.shape[1:] != parts[0].entry.shape[1:] for part in parts):
            mismatched.append(f"{name} is {tuple(stored)}, expected {tuple(shape)}")
            continue
        tensors[name] = LazyTensor(shape, parts[0].entry.dtype, tuple(parts), added_rows)
    unexpected = [f"{piece.name} {tuple(piece.entry.shape)}" for piece in remaining.values()]
    problems = [
        f"{_count_tensors(names)} {problem}: {shortened(names, 20)}"
        for names, problem in ((missing, "missing"), (unexpected, "unexpected"), (mismatched, "of another shape"))
        if names
    ]
    if problems:
        raise ValueError(f"{folder}: the weights do not fit config.json. {'. '.join(problems)}.")
    return tensors


def _expected_shapes(folder: Path, config: YiVLConfig) -> dict[str, torch.Size]:
    with torch.device("meta"), errors_of(folder / "config.json"):
        model = YiVLForConditionalGeneration(config)
        if quantization := getattr(config, "quantization_config", None):
            packed = packed_config(quantization)
            if packed is None:
                method = quantization.get("quant_method")
                raise ValueError(
                    f"{folder} was quantised by {method}, whose tensors are not read here. Give the original."
                )
            replace_linears_(model, packed)
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _concatenated_shape(parts: list[Piece]) -> tuple[int, ...]:
    shapes = [part.entry.shape for part in parts]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if all(shapes) else ()


def _zeros(rows: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, rows.shape[1])


def _copies_of_unknown(rows: Tensor, count: int) -> Tensor:
    """The first row, of `<unk>`, which no trained model generates; so an added token is never likelier."""
    return rows[:1].expand(count, -1)


_ADDED_ROWS = {EMBEDDING: _zeros, HEAD: _copies_of_unknown}


def _count_tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}"
