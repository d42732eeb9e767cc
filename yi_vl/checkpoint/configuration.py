"""The configuration and the tokenizer of a checkpoint in any layout, converted to native ones.

Layouts are told apart by the content of config.json, never by a name.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from transformers import GenerationConfig, LlamaConfig

from ..arguments import as_int, one_line, shown
from ..auto import OpenClipVisionConfig, YiVLConfig  # which registers the decoders that a native config.json may name
from ..chat import IMAGE_PLACEHOLDER
from ..processor import prepare_tokenizer
from .json_files import check_numbers, read_json

Layout = Literal["yi-vl", "official", "llava-hf"]
_STOP_IDS = [2, 7]  # `<|endoftext|>` of the 34B's generation_config.json, `<|im_end|>` of the 6B's
_ROW_MULTIPLE = 64
_NORM_EPS = 1e-5  # open_clip's, and every release's
_TEXT_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "attention_bias", "hidden_act", "initializer_range", "head_dim",
)  # fmt: skip


def layout_of(config: Any) -> Layout | None:
    """The layout that a config.json belongs to; None for another model."""
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
    """The native configuration of a checkpoint; its weight files are not needed.

    Raises:
        ValueError: the folder holds no Yi-VL, or a value that no Yi-VL has.
    """
    values, layout = read_config_json(folder)
    if layout == "official":
        return official_config(folder, values)[0]
    return llava_hf_config(folder, values) if layout == "llava-hf" else native_config(folder, values)


def read_config_json(folder: Path) -> tuple[dict[str, Any], Layout]:
    """The values of config.json, and the layout that they belong to.

    Raises:
        ValueError: it is missing or damaged, of another model, or has a number out of its range.
    """
    path = folder / "config.json"
    values = read_json(path)
    layout = layout_of(values)
    if layout is None:
        has_type = "model_type" in values
        model = f"a model of type {shown(values['model_type'])}" if has_type else "a config.json without a model_type"
        raise ValueError(
            f"{folder} holds {model}. Give a Yi-VL as 01.AI released it, as llava-hf has it, or as this project saves "
            "it."
        )
    check_numbers(values, path)
    return values, layout


def official_config(folder: Path, values: dict[str, Any]) -> tuple[YiVLConfig, Any]:
    """The native configuration, and the tokenizer, whose first free id is the image token's."""
    _expect(
        folder,
        values,
        mm_projector_type="mlp2x_gelu_Norm",
        mm_vision_select_layer=-2,
        mm_vision_select_feature="patch",
        image_aspect_ratio="pad",
    )
    vit = vit_folder(folder, str(values["mm_vision_tower"]))
    with errors_of(vit / "config.json"):
        vision_values = read_json(vit / "config.json")
        check_numbers(vision_values, vit / "config.json")
        vision = _vision_config(vit, vision_values)
    tokenizer = load_tokenizer(folder)
    with errors_of(folder / "config.json"):
        image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        return _make_config(folder, vision, values, image_token_id, values), tokenizer


def llava_hf_config(folder: Path, values: dict[str, Any]) -> YiVLConfig:
    _expect(folder, values, vision_feature_layer=-2, vision_feature_select_strategy="default")
    with errors_of(folder / "config.json"):
        image_token_id = int(values.get("image_token_index", values.get("image_token_id", -1)))
        vision = _vision_config(folder, values["vision_config"])
        return _make_config(folder, vision, values["text_config"], image_token_id, values)


def native_config(folder: Path, values: dict[str, Any]) -> YiVLConfig:
    with errors_of(folder / "config.json"):
        config = YiVLConfig.from_dict(values)
        if not 0 <= config.image_token_id < config.text_config.vocab_size:
            raise ValueError(
                f"image_token_id is {config.image_token_id}, beyond the {config.text_config.vocab_size} of vocab_size"
            )
        num_layers = config.vision_config.num_hidden_layers
        as_int(config.vision_config.feature_layer, "vision_config.feature_layer", -num_layers, num_layers - 1)
        return config


def default_generation_config(config: YiVLConfig) -> GenerationConfig:
    """The stop ids of both sizes; ids that the tokenizer does not have are suppressed."""
    added = range(config.image_token_id, config.text_config.vocab_size)
    return GenerationConfig(bos_token_id=1, eos_token_id=_STOP_IDS, pad_token_id=0, suppress_tokens=list(added))


def read_generation_config(folder: Path) -> GenerationConfig | None:
    """A native checkpoint's generation_config.json, if it has one."""
    path = folder / "generation_config.json"
    if not path.exists():
        return None
    ids = read_json(path).get("eos_token_id")
    for id in ids if isinstance(ids, list) else [ids]:
        if id is not None:
            as_int(id, f"{path}: eos_token_id", 0)
    with errors_of(path):
        return GenerationConfig.from_pretrained(folder)


def load_tokenizer(folder: Path, image_token_id: int | None = None) -> Any:
    """The tokenizer with `<image_placeholder>` after its last id, or in the place of llava-hf's image token."""
    try:
        return prepare_tokenizer(str(folder), image_token_id)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder}: its tokenizer cannot be loaded: {one_line(error)}.") from error


def vit_folder(folder: Path, name: str) -> Path:
    """The folder of `mm_vision_tower`, a path relative to the snapshot and inside it."""
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts or not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{folder}: mm_vision_tower {name!r} leads out of the checkpoint; it is not opened.")
    if not (path / "config.json").exists():
        raise ValueError(
            f"{folder} is incomplete: config.json names the vision tower {name!r}, but there is no {path}/config.json. "
            "Fetch the folder vit/ as well."
        )
    return path


@contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Turns the exceptions that libraries raise on unexpected values into a `ValueError` that names the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(path.parent) in str(error):
            raise  # it names the checkpoint already
        # All lines: the first of a validation error of huggingface_hub does not say what is wrong.
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        raise ValueError(f"{path} describes no model that can be made: {reason}.") from error


def _make_config(
    folder: Path, vision: OpenClipVisionConfig, text: dict[str, Any], image_token_id: int, values: dict[str, Any]
) -> YiVLConfig:
    """
    Args:
        text: the values that describe the language model.
        values: those of the whole config.json.
    """
    if text.get("model_type") not in ("llama", "llava"):
        raise ValueError(f"{folder}: its language model is a {text.get('model_type')!r}, expected a llama.")
    num_rows = max(int(text["vocab_size"]), -(-(image_token_id + 1) // _ROW_MULTIPLE) * _ROW_MULTIPLE)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {"rope_type": "default"}
    if "type" in rope:  # its name until transformers 4.43
        rope = {"rope_type": rope["type"]} | {key: value for key, value in rope.items() if key != "type"}
    text_config = LlamaConfig(
        vocab_size=num_rows,
        **{key: text[key] for key in _TEXT_KEYS if text.get(key) is not None},
        rope_parameters={"rope_theta": text.get("rope_theta", 10000.0)} | rope,
        bos_token_id=text.get("bos_token_id", 1),
        eos_token_id=_STOP_IDS,
        pad_token_id=0,
        use_cache=True,  # false in the release
    )
    return YiVLConfig(
        vision_config=vision,
        text_config=text_config,
        image_token_id=image_token_id,
        tie_word_embeddings=bool(text.get("tie_word_embeddings", False)),
        dtype=values.get("dtype") or values.get("torch_dtype") or text.get("torch_dtype") or "bfloat16",
    )


def _vision_config(folder: Path, values: dict[str, Any]) -> OpenClipVisionConfig:
    """From a Hugging Face CLIPVisionConfig, whose defaults are those of ViT-B-32."""
    activation = values.get("hidden_act", "quick_gelu")
    if activation not in ("gelu", "quick_gelu"):
        raise ValueError(f"{folder}: the tower's hidden_act is {activation!r}, expected gelu or quick_gelu.")
    _expect(folder, {"layer_norm_eps": _NORM_EPS, "num_channels": 3} | values, layer_norm_eps=_NORM_EPS, num_channels=3)
    return OpenClipVisionConfig(
        image_size=values.get("image_size", 224),
        patch_size=values.get("patch_size", 32),
        hidden_size=values.get("hidden_size", 768),
        intermediate_size=values.get("intermediate_size", 3072),
        num_hidden_layers=values.get("num_hidden_layers", 12),
        num_attention_heads=values.get("num_attention_heads", 12),
        quick_gelu=activation == "quick_gelu",
    )


def _expect(folder: Path, values: dict[str, Any], **expected: Any) -> None:
    for key, value in expected.items():
        if values.get(key, value) != value:
            raise ValueError(f"{folder}: {key} is {values[key]!r} in its configuration; a Yi-VL has {value!r}.")
