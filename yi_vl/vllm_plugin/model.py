"""Yi-VL as vLLM runs it: its backend for transformers' models, less the tokens that must never be sampled."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from vllm.model_executor.models.transformers import TransformersMultiModalForCausalLM
from vllm.model_executor.models.transformers.multimodal import (
    MultiModalDummyInputsBuilder,
    MultiModalProcessingInfo,
    MultiModalProcessor,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tokenizers.registry import cached_tokenizer_from_config

from .hybrid import SharedKvCache


@MULTIMODAL_REGISTRY.register_processor(
    MultiModalProcessor, info=MultiModalProcessingInfo, dummy_inputs=MultiModalDummyInputsBuilder
)
class YiVLForConditionalGeneration(SharedKvCache, TransformersMultiModalForCausalLM):
    """vLLM's class by the name in config.json; the modules inside are `yi_vl.model.YiVLModel`'s."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)  # None with --skip-tokenizer-init
        self._num_tokens = self.text_config.vocab_size if tokenizer is None else len(tokenizer)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(T, D) -> (T, V): the image token and the rows that pad the table are -inf. None on ranks without a head."""
        logits = super().compute_logits(hidden_states)
        if logits is not None:
            logits[:, self._num_tokens :] = -math.inf
            logits[:, self.config.image_token_id] = -math.inf
        return logits
