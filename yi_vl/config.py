"""What a Yi-VL is made of: the configuration of tower, projector and language model, and the presets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from .arguments import as_float, shown
from .connector.config import ConnectorConfig
from .decoder.gated_config import YiGatedConfig, with_cross_layers, without_cross_layers

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI CLIP's, kept by OpenCLIP ViT-H-14 and by Yi-VL
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

TIMM = "timm/"  # before the name of a tower that open_clip has no model of
_CLASSES_FILE = Path("yi_vl_classes.py")
_CLASSES = {
    "AutoConfig": "YiVLConfig",
    "AutoModelForImageTextToText": "YiVLForConditionalGeneration",
    "AutoProcessor": "YiVLProcessor",
}
# Rotary positions whose frequencies do not depend on the length of the sequence.
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_PLAIN_TOWER_KEYS = {"image_size", "layers", "width", "head_width", "patch_size", "mlp_ratio"}


_LANGUAGE_MODELS: dict[str, tuple[Any, ...]] = {  # arguments of `yi_config`
    "6b": (4096, 11008, 32, 32, 4),
    "34b": (7168, 20480, 60, 56, 8),
    "6b-1.5": (4096, 11008, 32, 32, 4, 1e-6),
    "9b-1.5": (4096, 11008, 48, 32, 4, 1e-6),
    "34b-1.5": (7168, 20480, 60, 56, 8, 1e-6),
}
PRESETS = (*_LANGUAGE_MODELS, "nano")


class OpenClipVisionConfig(PreTrainedConfig):
    """A vision transformer of open_clip, by its dimensions. The defaults are ViT-H-14 at 448 px.

    Args:
        timm_model: the name of a tower that open_clip takes from timm (EVA02); None for open_clip's own.
        stem_widths: output channels of a convolutional stem that replaces the patch convolution; empty for a
            plain OpenCLIP tower. See `vision.ConvStem`.
        feature_layer: which block's output is the image feature; -2 is the penultimate block, whose successor and the
            final norm are stored but never run (Yi-VL `mm_vision_select_layer`).
    """

    model_type = "open_clip_vision"
    base_config_key = "vision_config"

    image_size: int = 448
    patch_size: int = 14
    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 32
    num_attention_heads: int = 16
    quick_gelu: bool = False
    timm_model: str | None = None
    stem_widths: list[int] | None = None
    feature_layer: int = -2

    @classmethod
    def from_open_clip(cls, name: str, **overrides: Any) -> OpenClipVisionConfig:
        """The configuration of an open_clip model's tower, by its name (`open_clip.list_models()`), or of one of timm's
        by `timm/NAME`.

        Raises:
            ValueError: the name is unknown, or the tower is not a plain OpenCLIP vision transformer.
        """
        import open_clip

        if name.startswith(TIMM):
            return cls._from_timm(name, {"timm_model_name": name.removeprefix(TIMM)}, overrides)
        model = open_clip.get_model_config(name)
        if model is None:
            raise ValueError(f"open_clip has no model named {name!r}; `open_clip.list_models()` lists the names.")
        tower = model["vision_cfg"]
        if "timm_model_name" in tower:
            return cls._from_timm(name, tower, overrides)
        unknown = sorted(set(tower) - _PLAIN_TOWER_KEYS)
        if unknown or not isinstance(tower["layers"], int):
            raise ValueError(
                f"The tower of {name!r} is not a plain OpenCLIP vision transformer (it sets "
                f"{', '.join(unknown) or 'layers'}); choose one whose vision_cfg has only "
                f"{', '.join(sorted(_PLAIN_TOWER_KEYS))}."
            )
        width = tower["width"]
        return cls(
            **{
                "image_size": tower.get("image_size", 224),
                "patch_size": tower["patch_size"],
                "hidden_size": width,
                "intermediate_size": int(width * tower.get("mlp_ratio", 4.0)),
                "num_hidden_layers": tower["layers"],
                "num_attention_heads": width // tower.get("head_width", 64),
                "quick_gelu": model.get("quick_gelu", False),
            }
            | overrides
        )

    @classmethod
    def _from_timm(cls, name: str, tower: dict[str, Any], overrides: dict[str, Any]) -> OpenClipVisionConfig:
        import timm
        import torch

        model_name = tower["timm_model_name"]
        try:
            with torch.device("meta"):
                trunk: Any = timm.create_model(model_name, pretrained=False)
        except RuntimeError as error:  # an unknown name
            raise ValueError(
                f"timm has no model named {model_name!r}; `timm.list_models()` lists the names."
            ) from error
        mean = tuple(trunk.default_cfg.get("mean", ()))
        if not hasattr(trunk, "blocks") or not hasattr(trunk, "set_input_size") or mean != IMAGE_MEAN:
            raise ValueError(
                f"The tower of {name!r}, timm's {model_name!r}, is not a vision transformer for pixels normalised as "
                "CLIP's, the only ones that the image transform makes; EVA02 towers are."
            )
        block, patch_size = trunk.blocks[0], trunk.patch_embed.patch_size[0]
        return cls(
            **{
                "image_size": tower.get("image_size", trunk.default_cfg["input_size"][-1]),
                "patch_size": patch_size,
                "hidden_size": trunk.embed_dim,
                "intermediate_size": block.mlp.fc2.in_features,
                "num_hidden_layers": len(trunk.blocks),
                "num_attention_heads": block.attn.num_heads,
                "timm_model": model_name,
            }
            | overrides
        )

    @property
    def is_plain(self) -> bool:
        """Whether this is open_clip's own transformer as it is: what the other layouts can hold."""
        return self.timm_model is None and not self.stem_widths

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return self.grid_size**2


class YiVLConfig(PreTrainedConfig):
    """An OpenCLIP tower, a connector (Yi-VL's LayerNorm MLP projector) and a Llama-architecture language model.

    With a connector of cross-attention the language model is a `YiGatedConfig`, which is made of a Llama's.

    `image_token_id` is the id of `<image_placeholder>`: the row after the last one of the tokenizer (64000 for Yi). The
    embedding table holds it (64064 rows for Yi, a multiple of 64).
    """

    model_type = "yi_vl"
    sub_configs = {
        "vision_config": OpenClipVisionConfig,
        "text_config": AutoConfig,
        "connector_config": ConnectorConfig,
    }

    vision_config: Any = None  # an OpenClipVisionConfig, also when given as a dict or not at all
    text_config: Any = None  # a LlamaConfig, likewise
    connector_config: Any = None  # a ConnectorConfig, likewise
    image_token_id: int = 64000
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.vision_config, PreTrainedConfig):
            self.vision_config = OpenClipVisionConfig(**(self.vision_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            self.text_config = AutoConfig.for_model(**{"model_type": "llama", **(self.text_config or {})})
        if not isinstance(self.connector_config, PreTrainedConfig):
            self.connector_config = ConnectorConfig(**(self.connector_config or {}))
        check_rope(self.text_config)
        connector: Any = self.connector_config
        if connector.is_cross_attention and not isinstance(self.text_config, YiGatedConfig):
            self.set_connector_(connector)
        if not connector.is_cross_attention and isinstance(self.text_config, YiGatedConfig):
            raise ValueError(
                f"The language model has blocks of gated cross-attention, and the connector is of type "
                f"{connector.type}; expected cross_attention."
            )
        super().__post_init__(**kwargs)

    def set_connector_(self, connector: ConnectorConfig) -> None:
        """Change the connector; the language model gets the blocks of cross-attention, or loses them, with it.

        Raises:
            ValueError: the language model cannot have such blocks.
        """
        self.connector_config = connector
        if connector.is_cross_attention:
            assert connector.every is not None
            self.text_config = with_cross_layers(self.text_config, connector.every)
        elif isinstance(self.text_config, YiGatedConfig):
            self.text_config = without_cross_layers(self.text_config)

    @property
    def num_image_tokens(self) -> int:
        """Tokens that an image takes in the prompt: P, or the one that cross-attention needs."""
        num_tokens = self.connector_config.num_prompt_tokens
        return self.vision_config.num_patches if num_tokens is None else num_tokens

    @property
    def num_image_features(self) -> int:
        """P: features of an image."""
        num_tokens = self.connector_config.num_tokens
        return self.vision_config.num_patches if num_tokens is None else num_tokens

    def to_diff_dict(self) -> dict[str, Any]:
        """What is saved: each part as if it were saved alone.

        So there is nothing that is PreTrainedConfig's default, and no name of the folder that a part came from.
        """
        values = super().to_diff_dict()
        for name in self.sub_configs:
            values[name] = getattr(self, name).to_diff_dict()
            values[name].pop("transformers_version", None)
        return values

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers does, and beside it a file by which a program that does not import yi_vl finds the classes.

        Inference servers load models by transformers' Auto classes; with `trust_remote_code` these read that file.
        """
        self.auto_map = {name: f"{_CLASSES_FILE.stem}.{classname}" for name, classname in _CLASSES.items()}
        super().save_pretrained(save_directory, *args, **kwargs)
        names = ", ".join(_CLASSES.values())
        text = (
            f"# Where transformers finds this model's classes; needs yi_vl installed.\nfrom yi_vl.auto import {names}\n"
        )
        (Path(save_directory) / _CLASSES_FILE).write_text(text, encoding="utf-8")


def check_rope(text_config: Any) -> None:
    """
    Raises:
        ValueError: the rotary positions are of a type whose cached keys depend on what comes later, or a number of them
            is out of its range.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"The rope_type is {shown(rope_type)}; expected one of {', '.join(_ROPE_TYPES)}. With dynamic and longrope "
            "the frequencies change with the length of a sequence, so that a cached prefix would not be exact."
        )
    for key, least in (("rope_theta", 0.0), ("factor", 1.0)):
        if rope.get(key) is not None and not as_float(rope[key], key) >= least:
            raise ValueError(f"{key} of the rotary positions is {rope[key]}; expected {least:g} or more.")
    if rope.get("rope_theta") == 0:
        raise ValueError("rope_theta of the rotary positions is 0; expected more.")


def yi_config(
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    rms_norm_eps: float = 1e-5,
) -> LlamaConfig:
    """A language model of Yi's recipe in any size. Yi-1.5 has another `rms_norm_eps`: 1e-6."""
    return LlamaConfig(
        vocab_size=64064,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=4096,
        rms_norm_eps=rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": 5e6},
        pad_token_id=0,
    )


def preset(name: str) -> YiVLConfig:
    """The configuration of a released size, of a size with Yi-1.5's language model, or of the bundled nano.

    No weights are read. Yi-1.5: config.json of 01-ai/Yi-1.5-9B, and of models that were made from the 6B-Chat and the
    9B-Chat; the 34B's `rms_norm_eps` is taken to be that of the others.

    Raises:
        ValueError: `name` is none of the presets.
    """
    if name in _LANGUAGE_MODELS:
        return YiVLConfig(vision_config=OpenClipVisionConfig(), text_config=yi_config(*_LANGUAGE_MODELS[name]))
    if name == "nano":
        return YiVLConfig(
            vision_config=OpenClipVisionConfig(
                patch_size=56,
                hidden_size=256,
                intermediate_size=1024,
                num_hidden_layers=6,
                num_attention_heads=4,
                stem_widths=[64, 128, 192],
            ),
            text_config=LlamaConfig(
                vocab_size=2624,
                hidden_size=256,
                intermediate_size=672,
                num_hidden_layers=7,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=1024,
                rms_norm_eps=1e-5,
                rope_parameters={"rope_type": "default", "rope_theta": 1e4},
                initializer_range=0.05,
                pad_token_id=0,
            ),
            image_token_id=2560,
        )
    raise ValueError(f"There is no preset {name!r}; the presets are {', '.join(PRESETS)}.")
