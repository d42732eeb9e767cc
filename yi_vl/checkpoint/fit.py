"""Whether a model and a processor belong together."""

from __future__ import annotations

from ..config import YiVLConfig
from ..processor import YiVLProcessor


def check_fit(config: YiVLConfig, processor: YiVLProcessor) -> None:
    """
    Raises:
        ValueError: model and processor do not fit each other.
    """
    vision = config.vision_config
    for name, in_model, in_processor in (
        ("the image token's id", config.image_token_id, processor.image_token_id),
        ("the image size in pixels", vision.image_size, processor.image_processor.size_px),
        ("the patch size in pixels", vision.patch_size, processor.patch_size),
        ("the number of tokens per image", config.num_image_tokens, processor.tokens_per_image),
    ):
        if in_model != in_processor:
            raise ValueError(
                f"Model and processor do not fit: {name} is {in_model} in one, {in_processor} in the other."
            )
    if len(processor.tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(processor.tokenizer)} tokens, the model only {config.text_config.vocab_size}."
        )
    check_tiles(config, processor.image_processor.max_tiles)


def check_tiles(config: YiVLConfig, max_tiles: int) -> None:
    """
    Raises:
        ValueError: the model cannot take images in tiles.
    """
    if max_tiles and config.connector_config.is_cross_attention:
        raise ValueError(
            f"Images are cut into up to {max_tiles} tiles, and the connector is of type cross_attention: text would "
            "attend to the last tile alone. Set the tiles to 0, or take another connector."
        )
