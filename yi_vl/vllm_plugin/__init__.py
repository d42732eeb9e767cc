"""vLLM's entry point for Yi-VL (`vllm.general_plugins`): vLLM calls `register` in each of its processes.

With it Yi-VL needs no flags there (no `--trust-remote-code`, no `--model-impl`), and its answers are those of
`yi_vl.load`: see `renderer.py` for prompts, `model.py` for which tokens can be sampled, `answer.py` for the text,
`hybrid.py` for the hybrid decoder.
Written against vLLM 0.32.
"""

from __future__ import annotations

from typing import Any

_ARCHITECTURE = "YiVLForConditionalGeneration"  # `architectures` of config.json
_MODE = "yi_vl"  # vLLM chooses tokenizer and renderer by one name, its `--tokenizer-mode`


def register() -> None:
    """Make vLLM know Yi-VL. Calling it again changes nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    import yi_vl.auto  # noqa: F401  # configuration, processor and model, for transformers' Auto classes

    from ..processor import max_tiles_of
    from .answer import strip_answers
    from .hybrid_config import GATED, HYBRID, HybridModelConfig, WithoutFusedExperts

    class YiVLModelConfig(HybridModelConfig):
        """What is given on the command line, or stands in generation_config.json, is left as it is."""

        @staticmethod
        def verify_and_update_model_config(model_config: Any) -> None:
            """Use the renderer below, and answer greedily where a client does not say how, as `yi_vl` does.

            Raises:
                ValueError: the model's images have tiles.
            """
            if max_tiles := max_tiles_of(model_config.model, model_config.revision):
                raise ValueError(
                    f"{model_config.model} cuts images into up to {max_tiles} tiles, which vLLM is not told of here. "
                    "Serve it with yi-vl serve."
                )
            if model_config.tokenizer_mode == "auto":
                model_config.tokenizer_mode = _MODE
            is_auto = model_config.generation_config == "auto"
            if is_auto and "temperature" not in model_config.get_diff_sampling_param():
                model_config.override_generation_config |= {"temperature": 0.0}

    if _MODE not in RENDERER_REGISTRY.renderers:  # vLLM warns of a second registration
        RENDERER_REGISTRY.register(_MODE, f"{__name__}.renderer", "YiVLRenderer")
        TokenizerRegistry.register(_MODE, "vllm.tokenizers.hf", "CachedHfTokenizer")
    ModelRegistry.register_model(_ARCHITECTURE, f"{__name__}.model:YiVLForConditionalGeneration")
    MODELS_CONFIG_MAP[_ARCHITECTURE] = YiVLModelConfig
    ModelRegistry.register_model(HYBRID, f"{__name__}.hybrid:{HYBRID}")
    MODELS_CONFIG_MAP |= dict.fromkeys((HYBRID, GATED), HybridModelConfig)
    MODEL_ARCH_CONFIG_CONVERTORS |= dict.fromkeys(("yi_vl", "yi_hybrid"), WithoutFusedExperts)
    strip_answers()
