"""The JSON files and tokenizers that the official and the llava-hf layout have beside the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from ..chat import IMAGE_PLACEHOLDER
from ..config import IMAGE_MEAN, IMAGE_STD, OpenClipVisionConfig
from ..generation import set_end_tokens_
from .read import Checkpoint

VIT_FOLDER = "vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl"
_LLAVA_IMAGE, _LLAVA_PAD = "<image>", "<pad>"


def write_official_files(source: Checkpoint, folder: Path, vit_dtype: torch.dtype) -> None:
    vision, text = source.config.vision_config, source.config.text_config
    _copy_tokenizer_model(source, folder)
    write_json(folder / "tokenizer_config.json", _official_tokenizer_config(source))
    generation_config = {
        "bos_token_id": 1,
        "eos_token_id": _end_token_ids(source),
        "pad_token_id": 0,
        "max_length": text.max_position_embeddings,
    }
    write_json(folder / "generation_config.json", generation_config)
    write_json(folder / VIT_FOLDER / "config.json", _clip_config(vision, vit_dtype))
    write_json(folder / VIT_FOLDER / "preprocessor_config.json", _clip_preprocessor(vision))
    rope_scaling = None
    if text.rope_parameters["rope_type"] == "linear":  # in the words of transformers 4.36, which the official code has
        rope_scaling = {"type": "linear", "factor": text.rope_parameters["factor"]}
    config = _llama_config(source, source.config.image_token_id) | {
        "rope_scaling": rope_scaling,
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu_Norm",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": vision.feature_layer,
        "mm_vision_tower": f"./{VIT_FOLDER}",
        "use_mm_proj": True,
        "torch_dtype": _dtype_name(source.dtype),
    }
    write_json(folder / "config.json", config)


def write_llava_hf_files(source: Checkpoint, folder: Path) -> None:
    vision, text = source.config.vision_config, source.config.text_config
    image_id, pad_id = source.config.image_token_id, source.config.image_token_id + 1
    _copy_tokenizer_model(source, folder)
    _save_llava_tokenizer(source.make_processor().tokenizer, image_id, pad_id, folder)
    preprocessor = _clip_preprocessor(vision) | {"processor_class": "LlavaProcessor"}
    write_json(folder / "preprocessor_config.json", preprocessor)
    processor = {
        "processor_class": "LlavaProcessor",
        "image_token": _LLAVA_IMAGE,
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    write_json(folder / "processor_config.json", processor)
    generation_config = {"bos_token_id": 1, "eos_token_id": _end_token_ids(source), "pad_token_id": pad_id}
    write_json(folder / "generation_config.json", generation_config)
    text_config = _llama_config(source, text.vocab_size) | {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "pad_token_id": pad_id,
    }
    config = {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "ignore_index": -100,
        "image_token_index": image_id,
        "pad_token_id": pad_id,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": vision.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": source.config.tie_word_embeddings,
        "torch_dtype": _dtype_name(source.dtype),
        "text_config": text_config,
        "vision_config": _clip_config(vision, source.dtype),
    }
    write_json(folder / "config.json", config)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _llama_config(source: Checkpoint, vocab_size: int) -> dict[str, Any]:
    text = source.config.text_config
    rope_scaling = {key: value for key, value in text.rope_parameters.items() if key != "rope_theta"}
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
        "rope_scaling": None if text.rope_parameters["rope_type"] == "default" else rope_scaling,
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
        "torch_dtype": _dtype_name(dtype),
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
    processor = source.make_processor()
    set_end_tokens_(source.generation_config, processor.tokenizer, processor.chat_format)
    ends: list[int] = source.generation_config.eos_token_id  # type: ignore[assignment]
    return ends


def _official_tokenizer_config(source: Checkpoint) -> dict[str, Any]:
    """With all special tokens: without them a reader cannot know that `<|im_end|>` in a text stays text."""
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


def _save_llava_tokenizer(tokenizer: Any, image_id: int, pad_id: int, folder: Path) -> None:
    """The tokenizer with `<image>` for `<image_placeholder>`, and `<pad>` after it."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        if token["id"] == image_id:
            token["content"] = _LLAVA_IMAGE
    if not any(token["id"] == pad_id for token in content["added_tokens"]):
        image_token = next(token for token in content["added_tokens"] if token["id"] == image_id)
        content["added_tokens"].append(image_token | {"id": pad_id, "content": _LLAVA_PAD})
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    settings_path = folder / "tokenizer_config.json"
    settings = settings_path.read_text(encoding="utf-8").replace(IMAGE_PLACEHOLDER, _LLAVA_IMAGE)
    write_json(settings_path, json.loads(settings) | {"pad_token": _LLAVA_PAD})


def _copy_tokenizer_model(source: Checkpoint, folder: Path) -> None:
    if (source.folder / "tokenizer.model").exists():
        shutil.copyfile(source.folder / "tokenizer.model", folder / "tokenizer.model")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
