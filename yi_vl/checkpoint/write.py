"""Writing a checkpoint in any of the three layouts, file by file, and only in place when it is complete.

Called by cli.py; calls source.py and names.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..chat import IMAGE_PLACEHOLDER
from ..config import IMAGE_MEAN, IMAGE_STD, OpenClipVisionConfig
from ..generation import set_end_tokens_
from .key_map import EMBEDDING, HEAD, LLAVA_HF, OFFICIAL, OFFICIAL_VIT, TOWER, Layout, from_ours
from .read import Checkpoint, Kind, LazyTensor
from .weight_files import num_bytes

SHARD_BYTES = 4_000_000_000
_SHARD_NUMBER = re.compile(r"-\d{5}-of-\d{5}")
_VIT = "vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl"
_LLAVA_IMAGE, _LLAVA_PAD = "<image>", "<pad>"


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
    to: Kind,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write `source` to the new folder `target`, holding no more than two shards in memory.

    Args:
        progress: is called with the bytes written so far, and all there are.

    Raises:
        ValueError: the folder exists, there is no room, or the layout cannot hold the model.
    """
    if to != "yi-vl" and getattr(source.config, "quantization_config", None):
        raise ValueError(
            f"{source.folder} is quantised, and the layout {to!r} has no place for that. Give the original."
        )
    if target.exists():
        raise ValueError(f"{target} exists already; choose another name, or remove it.")
    files, write_rest = _PLANS[to](source, shard_bytes)
    total = sum(output.num_bytes for file in files for output in file.outputs)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.absolute().parent).free
    if free < total:
        raise ValueError(f"{target}: {total / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free.")
    partial = target.absolute().parent / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    try:
        done = 0
        for file in files:
            path = partial / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            tensors = {output.name: output.read().contiguous() for output in file.outputs}
            if path.suffix == ".safetensors":
                save_file(tensors, path, metadata={"format": "pt"})
            else:
                torch.save(tensors, path)
            done += sum(output.num_bytes for output in file.outputs)
            if progress is not None:
                progress(done, total)
        _write_index(partial, files)
        write_rest(partial)
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


_Plan = tuple[list[OutputFile], Callable[[Path], None]]


def _plan_ours(source: Checkpoint, shard_bytes: int) -> _Plan:
    outputs = [
        Output(name, tuple(tensor.shape), tensor.dtype, lambda tensor=tensor: tensor[...])  # type: ignore[misc]
        for name, tensor in source.tensors.items()
    ]

    def write_rest(folder: Path) -> None:
        processor = source.make_processor()
        processor.save_pretrained(folder)
        set_end_tokens_(source.generation_config, processor.tokenizer)
        source.generation_config.save_pretrained(folder)
        source.config.architectures = ["YiVLForConditionalGeneration"]
        source.config.dtype = source.dtype
        source.config.save_pretrained(folder)

    return _sharded(outputs, shard_bytes, "model", "safetensors"), write_rest


def _plan_official(source: Checkpoint, shard_bytes: int) -> _Plan:
    _expect_plain_tower(source, "official")
    num_rows, dtype = source.config.image_token_id, source.dtype
    outputs = [
        output
        for name, tensor in source.tensors.items()
        for output in _renamed(name, tensor, OFFICIAL, dtype, num_rows)
    ]
    vit = [
        output
        for name, tensor in source.tensors.items()
        if name.startswith(TOWER)
        for output in _renamed(name, tensor, OFFICIAL_VIT, tensor.dtype)
    ]
    if not (source.folder / "tokenizer.model").exists():
        raise ValueError(
            f"The official layout needs the SentencePiece file tokenizer.model, which {source.folder} does not have; "
            "copy it there from the language model's release."
        )

    def write_rest(folder: Path) -> None:
        vision, text = source.config.vision_config, source.config.text_config
        _copy_tokenizer_model(source, folder)
        _write_json(folder / "tokenizer_config.json", _official_tokenizer_config(source))
        _write_json(
            folder / "generation_config.json",
            {"bos_token_id": 1, "eos_token_id": _end_token_ids(source), "pad_token_id": 0}
            | {"max_length": text.max_position_embeddings},
        )
        dtype_of_vit = next(output.dtype for output in vit)
        _write_json(folder / _VIT / "config.json", _clip_config(vision, dtype_of_vit))
        _write_json(folder / _VIT / "preprocessor_config.json", _clip_preprocessor(vision))
        _write_json(
            folder / "config.json",
            _llama_fields(source, num_rows)
            | {
                "architectures": ["LlavaLlamaForCausalLM"],
                "model_type": "llava",
                "image_aspect_ratio": "pad",
                "mm_hidden_size": vision.hidden_size,
                "mm_projector_type": "mlp2x_gelu_Norm",
                "mm_use_im_patch_token": False,
                "mm_use_im_start_end": False,
                "mm_vision_select_feature": "patch",
                "mm_vision_select_layer": vision.feature_layer,
                "mm_vision_tower": f"./{_VIT}",
                "use_mm_proj": True,
                "torch_dtype": _name_of(dtype),
            },
        )

    files = [*_sharded(outputs, shard_bytes, "pytorch_model", "bin"), OutputFile(f"{_VIT}/pytorch_model.bin", vit)]
    return files, write_rest


def _plan_llava_hf(source: Checkpoint, shard_bytes: int) -> _Plan:
    _expect_plain_tower(source, "llava-hf")
    outputs = [
        output for name, tensor in source.tensors.items() for output in _renamed(name, tensor, LLAVA_HF, tensor.dtype)
    ]

    def write_rest(folder: Path) -> None:
        vision, text = source.config.vision_config, source.config.text_config
        image, pad = source.config.image_token_id, source.config.image_token_id + 1
        _copy_tokenizer_model(source, folder)
        _save_llava_tokenizer(source.make_processor().tokenizer, image, pad, folder)
        preprocessor = _clip_preprocessor(vision) | {"processor_class": "LlavaProcessor"}
        _write_json(folder / "preprocessor_config.json", preprocessor)
        _write_json(
            folder / "processor_config.json",
            {
                "processor_class": "LlavaProcessor",
                "image_token": _LLAVA_IMAGE,
                "patch_size": vision.patch_size,
                "vision_feature_select_strategy": "default",
                "num_additional_image_tokens": 1,
            },
        )
        _write_json(
            folder / "generation_config.json",
            {"bos_token_id": 1, "eos_token_id": _end_token_ids(source), "pad_token_id": pad},
        )
        _write_json(
            folder / "config.json",
            {
                "architectures": ["LlavaForConditionalGeneration"],
                "model_type": "llava",
                "ignore_index": -100,
                "image_token_index": image,
                "pad_token_id": pad,
                "projector_hidden_act": "gelu",
                "vision_feature_layer": vision.feature_layer,
                "vision_feature_select_strategy": "default",
                "tie_word_embeddings": source.config.tie_word_embeddings,
                "torch_dtype": _name_of(source.dtype),
                "text_config": _llama_fields(source, text.vocab_size)
                | {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "pad_token_id": pad},
                "vision_config": _clip_config(vision, source.dtype),
            },
        )

    return _sharded(outputs, shard_bytes, "model", "safetensors"), write_rest


_PLANS: dict[Kind, Callable[[Checkpoint, int], _Plan]] = {
    "yi-vl": _plan_ours,
    "official": _plan_official,
    "llava-hf": _plan_llava_hf,
}


def _renamed(
    name: str, tensor: LazyTensor, layout: Layout, dtype: torch.dtype, num_rows: int | None = None
) -> Iterator[Output]:
    """What becomes of one tensor of ours; `num_rows` trims the embedding tables."""
    theirs = from_ours(name, layout)
    for part, their_name in enumerate(theirs):
        shape = tuple(tensor.shape)
        if len(theirs) == 3:
            shape = (shape[0] // 3, *shape[1:])
        elif num_rows is not None and name in (EMBEDDING, HEAD):
            shape = (num_rows, *shape[1:])

        def read(part: int = part, rows: int = shape[0] if shape else 0) -> Tensor:
            whole = tensor[...]
            return whole.narrow(0, part * rows, rows).to(dtype, copy=True) if whole.ndim else whole.to(dtype)

        yield Output(their_name, shape, dtype, read)


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


def _sharded(outputs: list[Output], shard_bytes: int, stem: str, suffix: str) -> list[OutputFile]:
    shards = _shards(outputs, shard_bytes)
    if len(shards) == 1:
        return [OutputFile(f"{stem}.{suffix}", shards[0])]
    return [
        OutputFile(f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}", shard)
        for number, shard in enumerate(shards, start=1)
    ]


def _write_index(folder: Path, files: list[OutputFile]) -> None:
    """Beside several shards: which tensor is in which."""
    shards = [file for file in files if _SHARD_NUMBER.search(file.path)]
    if not shards:
        return
    weight_map = {output.name: file.path for file in shards for output in file.outputs}
    total = sum(output.num_bytes for file in shards for output in file.outputs)
    name = _SHARD_NUMBER.sub("", shards[0].path)
    _write_json(folder / f"{name}.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _expect_plain_tower(source: Checkpoint, layout: Kind) -> None:
    if not source.config.vision_config.is_plain:
        raise ValueError(
            f"{source.folder} has a tower that is not open_clip's plain one (a convolutional stem, or one of timm's); "
            f"the layout {layout!r} has no place for it."
        )


def _llama_fields(source: Checkpoint, vocab_size: int) -> dict[str, Any]:
    text = source.config.text_config
    return {
        "attention_bias": text.attention_bias,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": text.hidden_act,
        "hidden_size": text.hidden_size,
        "initializer_range": text.initializer_range,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_position_embeddings,
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": text.rope_parameters["rope_theta"],
        "tie_word_embeddings": source.config.tie_word_embeddings,
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _clip_config(vision: OpenClipVisionConfig, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu" if vision.quick_gelu else "gelu",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": 1e-5,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_hidden_layers,
        "patch_size": vision.patch_size,
        "torch_dtype": _name_of(dtype),
    }


def _clip_preprocessor(vision: OpenClipVisionConfig) -> dict[str, Any]:
    side = vision.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(IMAGE_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(IMAGE_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }


def _end_token_ids(source: Checkpoint) -> list[int]:
    set_end_tokens_(source.generation_config, source.make_processor().tokenizer)
    ends: list[int] = source.generation_config.eos_token_id  # type: ignore[assignment]
    return ends


def _official_tokenizer_config(source: Checkpoint) -> dict[str, Any]:
    """With all special tokens: without them a reader cannot know that `<|im_end|>` in a text is to stay text."""
    fields = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    special = {
        str(id): {field: getattr(token, field) for field in fields}
        for id, token in source.make_processor().tokenizer.added_tokens_decoder.items()
        if id < source.config.image_token_id and token.content != IMAGE_PLACEHOLDER
    }
    return {
        "add_bos_token": False,
        "add_eos_token": False,
        "added_tokens_decoder": special,
        "additional_special_tokens": [token["content"] for token in special.values() if token["special"]],
        "bos_token": "<|startoftext|>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "legacy": True,
        "model_max_length": source.config.text_config.max_position_embeddings,
        "pad_token": "<unk>",
        "padding_side": "left",
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }


def _save_llava_tokenizer(tokenizer: Any, image: int, pad: int, folder: Path) -> None:
    """Our tokenizer with `<image>` for `<image_placeholder>`, and `<pad>` after it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        if token["id"] == image:
            token["content"] = _LLAVA_IMAGE
    if not any(token["id"] == pad for token in content["added_tokens"]):
        like_image = next(token for token in content["added_tokens"] if token["id"] == image)
        content["added_tokens"].append(like_image | {"id": pad, "content": _LLAVA_PAD})
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings_path = folder / "tokenizer_config.json"
    settings = settings_path.read_text(encoding="utf-8").replace(IMAGE_PLACEHOLDER, _LLAVA_IMAGE)
    _write_json(settings_path, json.loads(settings) | {"pad_token": _LLAVA_PAD})


def _copy_tokenizer_model(source: Checkpoint, folder: Path) -> None:
    if (source.folder / "tokenizer.model").exists():
        shutil.copyfile(source.folder / "tokenizer.model", folder / "tokenizer.model")


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
