"""A checkpoint of any layout as one of ours: its configuration, its tokenizer, and every tensor of ours, read lazily.

Layouts are told apart by what config.json holds. Called by loading.py, adapters.py and target.py; calls names.py,
files.py, and yi_vl's configuration, model and processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig

from ..arguments import as_int, shown
from ..auto import YiVLProcessor
from ..chat import IMAGE_PLACEHOLDER
from ..config import OpenClipVisionConfig, YiVLConfig
from ..image import YiVLImageProcessor
from ..model import YiVLForConditionalGeneration
from ..processor import prepare_tokenizer
from ..quantize import packed_config, replace_linears_
from .json_files import check_numbers, read_json
from .key_map import EMBEDDING, HEAD, LLAVA_HF, OFFICIAL, OFFICIAL_VIT, TOWER, Layout, Slot, to_ours
from .weight_files import Entry, WeightFiles, num_bytes

Kind = Literal["yi-vl", "official", "llava-hf"]
TowerFrom = Literal["vit", "shards"]
STOP_IDS = [2, 7]  # `<|endoftext|>` of the 34B's generation_config.json, `<|im_end|>` of the 6B's
_ROW_MULTIPLE = 64
_WHAT_TO_GIVE = "Give a Yi-VL as 01.AI released it, as llava-hf has it, or as this project saves it."
_NORM_EPS = 1e-5  # open_clip's, and every release's


@dataclass(frozen=True)
class Piece:
    """A stored tensor that is one of ours, or a part of one."""

    files: WeightFiles
    name: str

    @property
    def entry(self) -> Entry:
        return self.files.entries[self.name]


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of ours that is read when it is indexed with `...`, as transformers reads safetensors' slices."""

    shape: torch.Size
    dtype: torch.dtype  # to read it in; as stored, unless it is replaced
    pieces: tuple[Piece, ...]  # concatenated along the first dimension
    added_rows: Callable[[Tensor, int], Tensor] | None = None  # (the stored rows, how many are wanted) -> those
    change: Callable[[Tensor], Tensor] | None = None  # of what is stored, as adapters would have it

    def __getitem__(self, index: Any) -> Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        num_stored = 0
        for piece in self.pieces:  # each into its place: copies are what loading would take most memory for
            num_rows = piece.entry.shape[0] if self.shape else 0
            piece.files.read_into(piece.name, tensor.narrow(0, num_stored, num_rows) if self.shape else tensor)
            num_stored += num_rows
        if self.shape and num_stored < self.shape[0]:
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
    """A model on disk, whatever its layout, in our terms."""

    kind: Kind
    folder: Path
    config: YiVLConfig
    generation_config: GenerationConfig
    tensors: dict[str, LazyTensor]
    make_processor: Callable[[], YiVLProcessor]
    tower_copy: dict[str, LazyTensor] = field(default_factory=dict)  # of the official layout: the other of its two

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model, as stored; the tower may be stored in another."""
        return self.tensors[EMBEDDING].dtype


def kind_of(config: Any) -> Kind | None:
    """Which layout a config.json is of, by its content; None for another model."""
    if not isinstance(config, dict):
        return None
    if config.get("model_type") == YiVLConfig.model_type:
        return "yi-vl"
    if config.get("model_type") == "llava" and "mm_vision_tower" in config:
        return "official"
    if config.get("model_type") == "llava" and "vision_config" in config:
        return "llava-hf"
    return None


def read_configuration(folder: Path) -> YiVLConfig:
    """The configuration alone, in our terms; no file of weights need be there.

    Raises:
        ValueError: the folder holds no Yi-VL, or says things that no Yi-VL does.
    """
    config, kind = _read_config(folder)
    if kind == "official":
        return _official_config(folder, config)[0]
    return _llava_hf_config(folder, config) if kind == "llava-hf" else _native_config(folder, config)


def open_checkpoint(folder: Path, tower_from: TowerFrom = "vit") -> Checkpoint:
    """Read configuration and file headers; no tensor is read yet.

    Args:
        tower_from: the official release stores the vision tower twice: in `vit/`, which the official code uses, and
            among the shards.

    Raises:
        ValueError: the folder holds no Yi-VL, or an incomplete or inconsistent one; says what and where.
    """
    if tower_from not in ("vit", "shards"):
        raise ValueError(f"tower_from is {tower_from!r}; an official release has its tower in 'vit' and in 'shards'.")
    config, kind = _read_config(folder)
    if kind == "official":
        return _open_official(folder, config, tower_from)
    if tower_from != "vit":
        raise ValueError(f"{folder} is not in the official layout: it has one copy of the tower, nothing to choose.")
    return _open_llava_hf(folder, config) if kind == "llava-hf" else _open_ours(folder, config)


def _read_config(folder: Path) -> tuple[dict[str, Any], Kind]:
    path = folder / "config.json"
    config = read_json(path)
    kind = kind_of(config)
    if kind is None:
        raise ValueError(f"{folder} holds {_described(config)}. {_WHAT_TO_GIVE}")
    check_numbers(config, path)
    return config, kind


@contextmanager
def _described_by(path: Path) -> Iterator[None]:
    """What libraries raise on values that they do not expect, as a `ValueError` that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise  # which is our own
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise ValueError(f"{path} describes no model that can be made: {reason}.") from error


def _open_official(folder: Path, config: dict[str, Any], tower_from: TowerFrom) -> Checkpoint:
    ours, tokenizer = _official_config(folder, config)
    vit = _vit_folder(folder, str(config["mm_vision_tower"]))
    shards = WeightFiles.find(folder)
    in_shards = _gather(folder, shards, OFFICIAL)
    in_vit = _gather(vit, WeightFiles.find(vit), OFFICIAL_VIT) if tower_from == "vit" or _has_weights(vit) else {}
    copy = {slot: piece for slot, piece in in_shards.items() if slot.name.startswith(TOWER)}
    language = {slot: piece for slot, piece in in_shards.items() if not slot.name.startswith(TOWER)}
    chosen, other = (in_vit, copy) if tower_from == "vit" else (copy, in_vit)
    tensors = _assemble(folder, ours, language | chosen)
    others = _assemble(folder, ours, other, only_tower=True) if other else {}
    return Checkpoint(
        "official", folder, ours, _generation_config(ours), tensors, _processor_maker(ours, tokenizer), others
    )


def _open_llava_hf(folder: Path, config: dict[str, Any]) -> Checkpoint:
    ours = _llava_hf_config(folder, config)
    tensors = _assemble(folder, ours, _gather(folder, WeightFiles.find(folder), LLAVA_HF))
    tokenizer = _tokenizer(folder, ours.image_token_id)
    return Checkpoint("llava-hf", folder, ours, _generation_config(ours), tensors, _processor_maker(ours, tokenizer))


def _official_config(folder: Path, config: dict[str, Any]) -> tuple[YiVLConfig, Any]:
    """Ours, and the tokenizer, which says which id is the first that is free."""
    _expect(
        folder,
        config,
        mm_projector_type="mlp2x_gelu_Norm",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_aspect_ratio="pad",
    )
    vit = _vit_folder(folder, str(config["mm_vision_tower"]))
    with _described_by(vit / "config.json"):
        vision_values = read_json(vit / "config.json")
        check_numbers(vision_values, vit / "config.json")
        vision = _vision_config(vit, vision_values)
    tokenizer = _tokenizer(folder)
    with _described_by(folder / "config.json"):
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        return _our_config(folder, vision, config, image_token_id, config), tokenizer


def _llava_hf_config(folder: Path, config: dict[str, Any]) -> YiVLConfig:
    _expect(folder, config, vision_feature_layer=-2, vision_feature_select_strategy="default")
    with _described_by(folder / "config.json"):
        image_token_id = int(config.get("image_token_index", config.get("image_token_id", -1)))
        vision = _vision_config(folder, config["vision_config"])
        return _our_config(folder, vision, config["text_config"], image_token_id, config)


def _native_config(folder: Path, config: dict[str, Any]) -> YiVLConfig:
    with _described_by(folder / "config.json"):
        native = YiVLConfig.from_dict(config)
        if not 0 <= native.image_token_id < native.text_config.vocab_size:
            raise ValueError(
                f"image_token_id is {native.image_token_id}, beyond the {native.text_config.vocab_size} of vocab_size"
            )
        num_layers = native.vision_config.num_hidden_layers
        as_int(native.vision_config.feature_layer, "vision_config.feature_layer", -num_layers, num_layers - 1)
        return native


def _open_ours(folder: Path, config: dict[str, Any]) -> Checkpoint:
    ours = _native_config(folder, config)
    files = WeightFiles.find(folder)
    tensors = _assemble(folder, ours, {Slot(name): Piece(files, name) for name in files.entries})
    generation_config = _read_generation_config(folder) or _generation_config(ours)
    return Checkpoint("yi-vl", folder, ours, generation_config, tensors, lambda: YiVLProcessor.from_pretrained(folder))


def _read_generation_config(folder: Path) -> GenerationConfig | None:
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    ids = read_json(path).get("eos_token_id")
    for id in ids if isinstance(ids, list) else [ids]:
        if id is not None:
            as_int(id, f"{path}: eos_token_id", 0)
    with _described_by(path):
        return GenerationConfig.from_pretrained(folder)


def _gather(folder: Path, files: WeightFiles, layout: Layout) -> dict[Slot, Piece]:
    found: dict[Slot, Piece] = {}
    unknown = []
    for name, entry in files.entries.items():
        try:
            slot = to_ours(name, layout)
        except KeyError:
            unknown.append(f"{name} {tuple(entry.shape)}")
            continue
        if slot is not None:
            found[slot] = Piece(files, name)
    if unknown:
        raise ValueError(f"{folder}: {_counted(unknown, 'tensor')} not of a Yi-VL: {_some(unknown)}.")
    return found


def _assemble(
    folder: Path, config: YiVLConfig, found: dict[Slot, Piece], only_tower: bool = False
) -> dict[str, LazyTensor]:
    """Every tensor that the model wants, of the right shape, and nothing else."""
    with torch.device("meta"), _described_by(folder / "config.json"):
        model = YiVLForConditionalGeneration(config)
        if quantization := getattr(config, "quantization_config", None):
            packed = packed_config(quantization)
            if packed is None:
                method = quantization.get("quant_method")
                raise ValueError(
                    f"{folder} was quantised by {method}, whose tensors are not read here. Give the original."
                )
            replace_linears_(model, packed)
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if only_tower:
        wanted = {name: shape for name, shape in wanted.items() if name.startswith(TOWER)}
    elif config.tie_word_embeddings and Slot(HEAD) not in found:
        del wanted[HEAD]
    missing, mismatched, tensors = [], [], {}
    left = dict(found)
    for name, shape in wanted.items():
        whole = left.pop(Slot(name), None)
        thirds = [left.pop(Slot(name, part), None) for part in range(3)] if whole is None else []
        pieces = [piece for piece in (whole, *thirds) if piece is not None]
        if not pieces or (whole is None and len(pieces) != 3):
            missing.append(f"{name} {tuple(shape)}")
            continue
        rows = sum(piece.entry.shape[0] for piece in pieces) if shape else 0
        stored = (rows, *pieces[0].entry.shape[1:]) if shape else pieces[0].entry.shape
        added = _ADDED_ROWS.get(name)
        is_trimmed = added is not None and config.image_token_id <= rows < shape[0] and stored[1:] == tuple(shape)[1:]
        fits = stored == tuple(shape) or is_trimmed
        if not fits or any(piece.entry.shape[1:] != pieces[0].entry.shape[1:] for piece in pieces):
            mismatched.append(f"{name} is {tuple(stored)}, expected {tuple(shape)}")
            continue
        tensors[name] = LazyTensor(shape, pieces[0].entry.dtype, tuple(pieces), added)
    unexpected = [f"{piece.name} {tuple(piece.entry.shape)}" for piece in left.values()]
    problems = [
        f"{_counted(names, 'tensor')} {what}: {_some(names)}"
        for names, what in ((missing, "missing"), (unexpected, "unexpected"), (mismatched, "of another shape"))
        if names
    ]
    if problems:
        raise ValueError(f"{folder}: the weights do not fit config.json. {'. '.join(problems)}.")
    return tensors


def largest_difference(checkpoint: Checkpoint) -> tuple[float, str]:
    """How far the release's two copies of the vision tower are apart: the largest absolute difference, and where.

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


def _zeros(rows: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, rows.shape[1])


def _copies_of_unknown(rows: Tensor, count: int) -> Tensor:
    """An added token is then never likelier than `<unk>`, the first row, which no trained model says."""
    return rows[:1].expand(count, -1)


_ADDED_ROWS = {EMBEDDING: _zeros, HEAD: _copies_of_unknown}


def _our_config(
    folder: Path,
    vision: OpenClipVisionConfig,
    text: dict[str, Any],
    image_token_id: int,
    whole: dict[str, Any],
) -> YiVLConfig:
    if text.get("model_type") not in ("llama", "llava"):
        raise ValueError(f"{folder}: its language model is a {text.get('model_type')!r}, expected a llama.")
    num_rows = max(int(text["vocab_size"]), -(-(image_token_id + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    copied = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "max_position_embeddings", "rms_norm_eps", "attention_bias", "hidden_act", "initializer_range", "head_dim",
    )  # fmt: skip
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {"rope_type": "default"}
    language = LlamaConfig(
        vocab_size=num_rows,
        **{key: text[key] for key in copied if text.get(key) is not None},
        rope_parameters={"rope_theta": text.get("rope_theta", 10000.0)} | rope,
        bos_token_id=text.get("bos_token_id", 1),
        eos_token_id=STOP_IDS,
        pad_token_id=0,
        use_cache=True,  # the release says false
    )
    dtype = whole.get("dtype") or whole.get("torch_dtype") or text.get("torch_dtype") or "bfloat16"
    tied = bool(text.get("tie_word_embeddings", False))
    return YiVLConfig(
        vision_config=vision, text_config=language, image_token_id=image_token_id, tie_word_embeddings=tied, dtype=dtype
    )


def _vision_config(folder: Path, found: dict[str, Any]) -> OpenClipVisionConfig:
    """From a Hugging Face CLIPVisionConfig, whose defaults are those of ViT-B-32."""
    activation = found.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"{folder}: the tower's hidden_act is {activation!r}, expected gelu or quick_gelu.")
    _expect(folder, {"layer_norm_eps": _NORM_EPS, "num_channels": 3} | found, layer_norm_eps=_NORM_EPS, num_channels=3)
    return OpenClipVisionConfig(
        image_size=found.get("image_size", 224),
        patch_size=found.get("patch_size", 32),
        hidden_size=found.get("hidden_size", 768),
        intermediate_size=found.get("intermediate_size", 3072),
        num_hidden_layers=found.get("num_hidden_layers", 12),
        num_attention_heads=found.get("num_attention_heads", 12),
        quick_gelu=activation == "quick_gelu",
    )


def _generation_config(config: YiVLConfig) -> GenerationConfig:
    """Both sizes' stop ids; what is past the tokenizer is never said."""
    added = range(config.image_token_id, config.text_config.vocab_size)
    return GenerationConfig(bos_token_id=1, eos_token_id=STOP_IDS, pad_token_id=0, suppress_tokens=list(added))


def _tokenizer(folder: Path, image_token_id: int | None = None) -> Any:
    """The tokenizer with `<image_placeholder>` after its last id, or in the place of what llava-hf calls its image."""
    try:
        tokenizer = prepare_tokenizer(str(folder), image_token_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {first_line}") from error
    return tokenizer


def _processor_maker(config: YiVLConfig, tokenizer: Any) -> Callable[[], YiVLProcessor]:
    vision = config.vision_config
    return lambda: YiVLProcessor(YiVLImageProcessor(vision.image_size), tokenizer, patch_size=vision.patch_size)


def _vit_folder(folder: Path, name: str) -> Path:
    """`mm_vision_tower` is a path relative to the snapshot, and stays inside it."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: mm_vision_tower {name!r} leads out of the checkpoint; it is not opened.")
    if not (path / "config.json").exists():
        raise ValueError(
            f"{folder} is incomplete: config.json names the vision tower {name!r}, but there is no {path}/config.json. "
            "Fetch the folder vit/ as well."
        )
    return path


def _has_weights(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("model.safetensors", "pytorch_model.bin"))


def _described(config: dict[str, Any]) -> str:
    if "model_type" not in config:
        return "a config.json without a model_type"
    return f"a model of type {shown(config['model_type'])}"


def _expect(folder: Path, found: dict[str, Any], **expected: Any) -> None:
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise ValueError(f"{folder}: {key} is {found[key]!r} in its configuration; a Yi-VL has {value!r}.")


def _counted(names: Iterable[str], what: str) -> str:
    count = len(list(names))
    return f"{count} {what}{'s' if count > 1 else ''}"


def _some(names: list[str], limit: int = 20) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
