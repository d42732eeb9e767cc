"""The hybrid decoder as vLLM runs it: its backend for transformers' models, with one KV cache for layers that share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index


class SharedKvCache:
    """Layers that attend to another one's keys and values read its KV cache, instead of a copy in one of their own.

    vLLM's backend takes windows from `layer_types`, and knows sharing only from models written for vLLM.
    """

    text_config: Any

    def _get_attn_cls(self) -> Callable[..., Any]:
        """vLLM's hook: what makes a layer's attention."""
        attention: Callable[..., Any] = super()._get_attn_cls()  # type: ignore[misc]  # vLLM's class is the next one
        sources: list[int] | None = getattr(self.text_config, "kv_source_layers", None)
        if sources is None:
            return attention

        def make(*, prefix: str, **settings: Any) -> Any:
            index = extract_layer_index(prefix)
            if sources[index] != index:
                source = prefix.replace(f"layers.{index}.", f"layers.{sources[index]}.")
                settings["kv_sharing_target_layer_name"] = source
            return attention(prefix=prefix, **settings)

        return make


class YiHybridForCausalLM(SharedKvCache, TransformersForCausalLM):
    """vLLM's class by the name in config.json; the modules inside are `yi_vl.decoder`'s, experts included."""
