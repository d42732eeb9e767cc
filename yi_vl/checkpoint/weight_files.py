"""The tensors in a checkpoint's weight files, pickled or safetensors: their headers, and one tensor at a time.

Nothing is unpickled with code execution (`weights_only=True`), nothing outside the checkpoint is opened, and no file is
read whole: a tensor's bytes are read from where its file says they are.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..arguments import one_line
from .json_files import read_json

_BLOCK_ELEMENTS = 1 << 18
_INDEXED = ("model.safetensors", "pytorch_model.bin")  # preferred first; each with or without an `.index.json`


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    byte_offset: int  # of its storage in the file
    first: int  # element of the storage
    stride: tuple[int, ...]


class WeightFiles:
    """The names, shapes and values of all tensors in a folder's weight files."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self.entries = entries

    @classmethod
    def of(cls, path: Path) -> WeightFiles:
        """The tensors of one file.

        Raises:
            ValueError: it is missing or damaged.
        """
        if not path.is_file():
            raise ValueError(f"{path.parent} is incomplete: there is no {path.name}.")
        return cls(_read_file(path))

    @classmethod
    def find(cls, folder: Path) -> WeightFiles:
        """The tensors of `folder`: indexed or single, safetensors before pickles.

        Raises:
            ValueError: there are none, one is missing, damaged or outside the checkpoint, or the index disagrees.
        """
        for name in _INDEXED:
            index = folder / f"{name}.index.json"
            if index.is_file():
                return cls(_read_indexed(folder, index))
            if (folder / name).is_file():
                return cls(_read_file(_inside(folder, name)))
        raise ValueError(
            f"{folder} has no weights: expected model.safetensors or pytorch_model.bin, or an index of several."
        )

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill `out`, contiguous and of the tensor's shape, with its values; they are rounded to the dtype of `out`."""
        entry = self.entries[name]
        if 0 in entry.shape:
            return
        if entry.stride == _strides(entry.shape):
            _read_elements(entry, name, out.view(-1))
            return
        num_elements = 1 + sum(step * (size - 1) for step, size in zip(entry.stride, entry.shape, strict=True))
        storage = torch.empty(num_elements, dtype=entry.dtype, device="cpu")
        _read_elements(entry, name, storage)
        out.copy_(storage.as_strided(entry.shape, entry.stride))


def _read_elements(entry: Entry, name: str, out: Tensor) -> None:
    """Fill `out`, (number of elements,), with what lies in the file one after the other.

    Plain reads: memory-mapped pages would count, and stay, as this process's own. Block by block where the dtype
    changes: malloc keeps the holes that whole tensors of another dtype leave behind, 0.9 GB of them in the 6B.
    """
    with entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.byte_offset + entry.first * entry.dtype.itemsize)
        for block in [out] if out.dtype == entry.dtype else out.split(_BLOCK_ELEMENTS):
            stored = block if block.dtype == entry.dtype else torch.empty(block.shape, dtype=entry.dtype, device="cpu")
            view = memoryview(stored.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
            while len(view):
                num_read = stream.readinto(view)
                if not num_read:
                    raise ValueError(f"{entry.file} is cut short: {name} ends beyond its end. Fetch it again.")
                view = view[num_read:]
            if stored is not block:
                block.copy_(stored)


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Those of a contiguous tensor."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _read_indexed(folder: Path, index: Path) -> dict[str, Entry]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} is no index of weights: it has no `weight_map` from tensors' names to files.")
    names_of: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names_of.setdefault(file, []).append(name)
    paths = {file: _inside(folder, file) for file in names_of}
    absent = sorted(file for file, path in paths.items() if not path.is_file())
    if absent:
        raise ValueError(f"{folder} is incomplete: {index.name} names {', '.join(absent)}, which are not there.")
    entries: dict[str, Entry] = {}
    for file, names in names_of.items():
        stored = _read_file(paths[file])
        missing = sorted(set(names) - set(stored))
        if missing:
            raise ValueError(f"{paths[file]} lacks {shortened(missing, 8)}, which {index.name} says it holds.")
        entries |= {name: stored[name] for name in names}
    return entries


def _read_file(path: Path) -> dict[str, Entry]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Entry]:
    try:
        with safe_open(path, "pt"):  # checks the header, and its length, against the file's size
            pass
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
            begin = stream.tell()
        entries = {}
        for name, fields in header.items():
            if name != "__metadata__":
                shape, dtype = tuple(fields["shape"]), _SAFETENSORS_DTYPES[fields["dtype"]]
                entries[name] = Entry(path, shape, dtype, begin + fields["data_offsets"][0], 0, _strides(shape))
        return entries
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(_damaged(path, error)) from error


def _read_pickle(path: Path) -> dict[str, Entry]:
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} ({path.stat().st_size:,} bytes) is not a torch file of this decade (a zip archive): it is cut "
            "short, or was written by torch before 1.6. Fetch it again, or save it with a current torch."
        )
    try:
        with FakeTensorMode():  # tensors without values, that know where in the file these are
            loaded = torch.load(path, weights_only=True)
        entries = {}
        for name, tensor in loaded.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
            if num_bytes(tuple(tensor.shape), tensor.dtype) > path.stat().st_size:
                raise ValueError(f"{name!r} has the shape {tuple(tensor.shape)}, more than the whole file holds")
            offset = int(tensor.untyped_storage()._checkpoint_offset)  # type: ignore[arg-type, attr-defined]
            entries[name] = Entry(
                path, tuple(tensor.shape), tensor.dtype, offset, int(tensor.storage_offset()), tuple(tensor.stride())
            )
        return entries
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and would run code when it is loaded; it is not opened. Only load "
            f"such a file if you trust it, and save its tensors as safetensors. ({one_line(error)})"
        ) from error
    except Exception as error:  # a damaged pickle raises nearly every one
        raise ValueError(_damaged(path, error)) from error


def _inside(folder: Path, name: str) -> Path:
    """The file of this name in a checkpoint's folder.

    Links lead nowhere else but to the blobs of the same repository in the hub's cache, which are what its snapshots
    are made of.
    """
    path = folder / name
    snapshots = (parent for parent in folder.absolute().parents if parent.name == "snapshots")
    allowed = [folder.resolve(), *((parent.parent / "blobs").resolve() for parent in snapshots)]
    if Path(name).is_absolute() or not any(path.resolve().is_relative_to(root) for root in allowed):
        raise ValueError(f"{name!r} leads out of the checkpoint {folder}; it is not opened.")
    return path


def _damaged(path: Path, error: Exception) -> str:
    return f"{path} ({path.stat().st_size:,} bytes) is damaged or cut short: {one_line(error)}. Fetch it again."


def shortened(names: list[str], limit: int) -> str:
    """The first names of a list, and the number of the others."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
