"""What vLLM is told of the hybrid decoder before a model is made: in its own processes, and without importing models.

Experts are left to transformers' kernels. vLLM's own take a fixed number of experts for each token: a place that top-p
leaves free ends its process.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from .unsupported import check_language_model

GATED = "YiGatedForCausalLM"
HYBRID = "YiHybridForCausalLM"  # `architectures` of config.json


class WithoutFusedExperts(ModelArchConfigConvertorBase):
    """vLLM's view of the configuration, in which there are no experts for it to replace."""

    def get_num_experts(self) -> int:
        """None; with `--enable-expert-parallel` vLLM then refuses to start."""
        return 0


class HybridModelConfig(VerifyAndUpdateConfig):
    """Refuses what the decoder cannot do."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """vLLM's hook.

        Raises:
            ValueError: the layers are to be divided among GPUs, or attend to images.
        """
        text: Any = vllm_config.model_config.hf_text_config
        check_language_model(text)
        size = vllm_config.parallel_config.pipeline_parallel_size
        if text.model_type == "yi_hybrid" and size > 1:
            raise ValueError(
                f"--pipeline-parallel-size {size}: layers of a yi_hybrid share keys and values, and stay on one GPU; "
                "use --tensor-parallel-size."
            )
