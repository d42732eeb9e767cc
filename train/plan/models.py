"""The configurations of the models that runs start from, without their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from yi_vl.arguments import one_line
from yi_vl.checkpoint.find import find
from yi_vl.checkpoint.load import read_config
from yi_vl.config import PRESETS, OpenClipVisionConfig, YiVLConfig, preset

from ..checkpoint import FINAL
from ..config import InitConfig, TrainConfig
from ..config_file import load_config
from ..init import set_connector_, set_rope_

_LANGUAGE_MODELS = {  # whose shapes are known without the hub
    "01-ai/Yi-6B-Chat": "6b",
    "01-ai/Yi-34B-Chat": "34b",
    "01-ai/Yi-1.5-6B-Chat": "6b-1.5",
    "01-ai/Yi-1.5-9B-Chat": "9b-1.5",
    "01-ai/Yi-1.5-34B-Chat": "34b-1.5",
}


def initial_model(init: InitConfig, path: Path) -> YiVLConfig:
    """The model that a config at `path` starts from: its checkpoint's, or that of the config beside it that makes it.

    Raises:
        ValueError: neither is there.
    """
    if init.checkpoint is None:
        assert init.tower is not None and init.language_model is not None  # config.load_config sees to it
        text = _text_config(init.language_model)
        tower = OpenClipVisionConfig.from_open_clip(init.tower.name)
        return YiVLConfig(vision_config=tower, text_config=text, tie_word_embeddings=text.tie_word_embeddings)
    if Path(init.checkpoint).is_dir():
        return read_config(find(init.checkpoint))
    made_by = maker_of(init.checkpoint, path)
    if made_by is None:
        raise ValueError(
            f"{path}: {init.checkpoint} is not there yet, nor a config beside this one that makes it; say --model with "
            f"a folder or one of {', '.join(PRESETS)}."
        )
    maker, other = made_by
    model = initial_model(maker.init_from, other)
    set_rope_(model.text_config, maker.init_from.rope)
    set_connector_(model, maker.init_from.connector)
    return model


def maker_of(checkpoint: str, path: Path) -> tuple[TrainConfig, Path] | None:
    """The config beside the one at `path` whose run makes a checkpoint, and its path."""
    for other in sorted(set(path.parent.glob("*.yaml")) - {path}):
        try:
            maker = load_config(other)
        except ValueError:
            continue  # it makes no model, such as a search's config
        if Path(maker.run_dir) / FINAL == Path(checkpoint):
            return maker, other
    return None


def read_model(name: str) -> YiVLConfig:
    return preset(name) if name in PRESETS else read_config(find(name))


def _text_config(language_model: str) -> Any:
    if language_model in _LANGUAGE_MODELS:
        return preset(_LANGUAGE_MODELS[language_model]).text_config
    try:
        config = AutoConfig.from_pretrained(language_model)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise ValueError(f"The language model {language_model!r} cannot be found ({reason}); say --model.") from error
    if config.model_type != "llama":
        raise ValueError(f"{language_model!r} is a {config.model_type} model; the language model must be a llama.")
    return config
