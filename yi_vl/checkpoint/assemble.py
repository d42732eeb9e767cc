"""A Yi-VL from its parts: an open_clip tower and a Llama-architecture language model, joined by a fresh projector."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from ..arguments import one_line
from ..chat import IMAGE_PLACEHOLDER
from ..config import TIMM, OpenClipVisionConfig, YiVLConfig, check_rope
from ..connector import Connector, build_connector
from ..connector.config import ConnectorConfig
from ..decoder.cross_attention import CROSS_BLOCK, GatedCrossAttention
from ..generation import set_end_tokens_
from ..model import YiVLForConditionalGeneration
from ..processor import prepare_tokenizer
from ..vision import OpenClipTower

logger = logging.getLogger(__name__)

_CONTRASTIVE_HEADS = ("proj", "head.", "trunk.head.")
_LAST_OF_TIMM = ("norm.", "fc_norm.", "head.")  # behind the block whose output is taken
_TABLE_MULTIPLE = 64  # rows of the embedding table, for fast matrix products


def from_parts(
    tower: str, pretrained: str | None, language_model: str, image_size: int
) -> tuple[YiVLForConditionalGeneration, Any]:
    """The model in float32, with Yi-VL's projector, and its tokenizer with `<image_placeholder>` added.

    Args:
        tower: an open_clip model's name, such as ViT-H-14, or timm/ and the name of a timm model.
        pretrained: the tag of its weights, such as laion2b_s32b_b79k, or a weight file; None for random weights.
        language_model: a directory or hub id, of a language model or of a Yi-VL, whose language model is taken.
        image_size: in pixels; the tower's position grid is resized to it.

    Raises:
        ValueError: a part does not exist, or does not fit.
    """
    vision_tower = _load_tower(tower, pretrained)
    if image_size != vision_tower.config.image_size:
        vision_tower.resize_grid_(image_size)
    language, tokenizer = _load_language(language_model)
    image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
    num_rows = max(language.config.vocab_size, -(-(image_token_id + 1) // _TABLE_MULTIPLE) * _TABLE_MULTIPLE)
    if num_rows != language.config.vocab_size:
        language.resize_token_embeddings(num_rows)

    config = YiVLConfig(
        vision_config=vision_tower.config,
        text_config=language.config,
        image_token_id=image_token_id,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    with torch.device("meta"):  # the weights are there already
        model = YiVLForConditionalGeneration(config)
    model.model.vision_tower = vision_tower
    model.model.multi_modal_projector = fresh_connector(config, language)
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.generation_config = language.generation_config
    set_end_tokens_(model.generation_config, tokenizer)
    return model, tokenizer


def _load_language(name: str) -> tuple[LlamaForCausalLM, Any]:
    """A language model in float32, or that of a Yi-VL; and its tokenizer with `<image_placeholder>` added."""
    try:
        config = AutoConfig.from_pretrained(name)
        text_config = config.get_text_config()
        check_rope(text_config)
        if getattr(config, "quantization_config", None):
            method = dict(config.quantization_config).get("quant_method")
            raise ValueError(f"its weights are quantised ({method}), and are to be trained. Give the original.")
        if text_config.model_type != "llama":
            raise ValueError(f"it is a {text_config.model_type} model; the language model must be a llama")
        tokenizer = prepare_tokenizer(name)
        if not isinstance(config, YiVLConfig):
            language: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
            return language, tokenizer
        whole = YiVLForConditionalGeneration.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise ValueError(f"The language model {name!r} cannot be loaded: {one_line(error)}.") from error
    with torch.device("meta"):
        language = LlamaForCausalLM(whole.config.text_config)
    language.model, language.lm_head = whole.model.language_model, whole.lm_head
    language.generation_config = whole.generation_config
    return language, tokenizer


def replace_connector_(model: YiVLForConditionalGeneration, connector: ConnectorConfig) -> None:
    """Give a model another connector, with fresh weights in float32. The language model gets the blocks of
    cross-attention with it, or loses them; its other weights stay.

    Raises:
        ValueError: the language model cannot have such blocks.
    """
    config, language = model.config, model.model.language_model
    had_blocks = config.connector_config.is_cross_attention
    config.set_connector_(connector)
    if had_blocks or connector.is_cross_attention:
        model.model.language_model = _with_fresh_blocks(language, config.text_config)
        model.tie_weights()
    fresh = fresh_connector(config, model.model.language_model)
    model.model.multi_modal_projector = fresh.to(language.device)


def _with_fresh_blocks(language: PreTrainedModel, text_config: Any) -> PreTrainedModel:
    """A language model as of another configuration, which differs in the blocks of cross-attention alone."""
    with torch.device("meta"):
        model: PreTrainedModel = AutoModel.from_config(text_config)
    kept = {name: weight for name, weight in language.state_dict().items() if f".{CROSS_BLOCK}." not in name}
    model.load_state_dict(kept, strict=False, assign=True)
    model.rotary_emb = language.rotary_emb
    for layer in model.layers:  # type: ignore[union-attr]
        if getattr(layer, CROSS_BLOCK, None) is not None:
            block = GatedCrossAttention(text_config)
            block.apply(model._init_weights)
            layer.cross_block = block.to(language.device)
    return model.train(language.training)


def fresh_connector(config: YiVLConfig, language: PreTrainedModel) -> Connector:
    """The connector of a configuration with fresh weights in float32, linear layers drawn as the language model's."""
    connector = build_connector(
        config.connector_config, config.vision_config.hidden_size, config.text_config.hidden_size
    )
    connector.apply(language._init_weights)
    connector.init_weights_()
    return connector


def _load_tower(name: str, pretrained: str | None) -> OpenClipTower:
    import open_clip

    config = OpenClipVisionConfig.from_open_clip(name)
    if name.startswith(TIMM):
        return _load_timm_tower(name, config, pretrained)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is not None and not Path(pretrained).exists() and pretrained not in tags:
        raise ValueError(
            f"There are no weights {pretrained!r} for the tower {name!r}: no such file, and open_clip's tags are "
            f"{', '.join(tags) or 'none'}."
        )
    tower = OpenClipTower(config)
    if pretrained is None:
        return tower
    try:
        weights = open_clip.create_model(name, pretrained=pretrained).visual.state_dict()
    except (OSError, RuntimeError) as error:
        raise ValueError(f"The weights {pretrained!r} do not load into {name!r}: {one_line(error)}.") from error
    tower.visual.load_state_dict(
        {key: tensor for key, tensor in weights.items() if not key.startswith(_CONTRASTIVE_HEADS)}
    )
    return tower


def _load_timm_tower(name: str, config: OpenClipVisionConfig, pretrained: str | None) -> OpenClipTower:
    from timm.models import load_checkpoint

    if pretrained is not None and not Path(pretrained).is_file():
        raise ValueError(f"There are no weights {pretrained!r} for the tower {name!r}: no such file.")
    tower = OpenClipTower(config)
    if pretrained is None:
        return tower
    try:
        trunk: Any = tower.visual.trunk
        loaded = load_checkpoint(trunk, pretrained, strict=False)
    except Exception as error:  # whatever the file makes of torch.load
        raise ValueError(f"The weights {pretrained!r} do not load into {name!r}: {one_line(error)}.") from error
    different = [*loaded.missing_keys, *loaded.unexpected_keys]
    if wrong := [key for key in different if not key.startswith(_LAST_OF_TIMM)]:
        raise ValueError(f"The weights {pretrained!r} do not load into {name!r}: {wrong[0]} is in one of both only.")
    return tower
