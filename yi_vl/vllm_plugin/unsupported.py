"""What vLLM cannot run, known without importing it."""

from __future__ import annotations

from typing import Any


def check_language_model(text_config: Any) -> None:
    """
    Raises:
        ValueError: the language model attends to images by keys that vLLM's cache has no place for.
    """
    if text_config.model_type == "yi_gated":
        raise ValueError(
            "This model has a connector of gated cross-attention (yi_gated), whose image keys vLLM's cache has no "
            "place for; use yi-vl serve."
        )
