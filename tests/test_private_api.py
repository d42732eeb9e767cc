"""The private API of other libraries that we use: each name, what it is used for, and that it exists.

transformers' public names are those that `transformers` itself exports. All others that yi_vl, train, eval and demo
import, every name with an underscore, and every private hook that they override must stand in a table below: when a
release takes one away, this file says which, and for what it was used.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.core

ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "torch", "torchvision", "accelerate", "peft", "open_clip", "timm", "tokenizers", "PIL")

USED = {
    "torch._make_per_channel_quantized_tensor": "int8 through FBGEMM; without it torch's own int8 kernel",
    "torch._subclasses.fake_tensor.FakeTensorMode": "pickled checkpoints without reading them; train.plan",
    "torch._weight_int8pack_mm": "int8 for one row, where FBGEMM is not exact",
    "torch.ops.aten._convert_weight_to_int4pack_for_cpu": "int4: weights as the CPU's kernel reads them",
    "torch.ops.aten._scaled_dot_product_flash_attention": "train.plan: what flash attention saves",
    "torch.ops.aten._to_copy.default": "train.plan: autocast's copies of weights",
    "torch.ops.aten._weight_int4pack_mm_for_cpu": "int4: the CPU's kernel",
    "torch.ops.mkldnn._linear_pointwise": "decoding with packed weights; without it they are not packed",
    "torch.ops.mkldnn._reorder_linear_weight": "decoding with packed weights; without it they are not packed",
    "torch.utils._python_dispatch.TorchDispatchMode": "train.plan: seeing the operations of a forward pass",
    "transformers.cache_utils.DynamicSlidingWindowLayer": "eval speed decoder: filling a cache's windows",
    "transformers.generation.BaseStreamer": "eval speed: when generate's tokens come",
    "transformers.initialization": "initialising a tower in the way that loading can skip",
    "transformers.integrations.moe.ExpertsInterface": "train.plan: experts on tensors without values",
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": "attention of prompts, beside that of one token",
    "transformers.masking_utils.create_causal_mask": "the hybrid decoder's full layers",
    "transformers.masking_utils.create_sliding_window_causal_mask": "the hybrid decoder's sliding layers",
    "transformers.masking_utils.sdpa_mask": "masks of the attention of one token",
    "transformers.modeling_outputs.BaseModelOutput": "the tower's output",
    "transformers.modeling_outputs.BaseModelOutputWithPast": "the model's output, whatever its cache is called",
    "transformers.modeling_outputs.BaseModelOutputWithPooling": "image features as inference servers take them",
    "transformers.modeling_outputs.CausalLMOutputWithPast": "the model's output with logits",
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": "the hybrid decoder: attention by its name",
    "transformers.models.idefics2.modeling_idefics2.Idefics2PerceiverResampler": "the resampler",
    "transformers.models.llama.modeling_llama.LlamaDecoderLayer": "the gated decoder's layers behind their block",
    "transformers.models.llama.modeling_llama.LlamaMLP": "the hybrid decoder's dense layers, blocks of the gated one",
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": "the hybrid and the gated decoder",
    "transformers.models.llama.modeling_llama.LlamaRotaryEmbedding": "random models: the one buffer that is not random",
    "transformers.models.llama.modeling_llama.apply_rotary_pos_emb": "the hybrid decoder",
    "transformers.models.llama.modeling_llama.eager_attention_forward": "the hybrid decoder",
    "transformers.models.mixtral.modeling_mixtral.MixtralExperts": "the hybrid decoder's experts",
    "transformers.processing_utils.MultiModalData": "tokens per image as inference servers ask for them",
    "transformers.quantizers.HfQuantizer": "int8 and int4 while a model is loaded",
    "transformers.quantizers.register_quantization_config": "int8 and int4 by a config.json's `quant_method`",
    "transformers.quantizers.register_quantizer": "int8 and int4 by a config.json's `quant_method`",
    "transformers.utils.can_return_tuple": "return_dict=False, as vLLM calls the model",
    "transformers.utils.generic.merge_with_config_defaults": "the hybrid decoder: use_cache of its config",
    "transformers.utils.is_flash_attn_2_available": "whether a micro-batch can be one sequence on a GPU",
    "transformers.utils.output_capturing.capture_outputs": "the hybrid decoder: output_hidden_states",
    "transformers.utils.quantization_config.QuantizationConfigMixin": "int8 and int4 in config.json",
}

OVERRIDDEN = {
    "transformers.PreTrainedModel._init_weights": "towers from nothing",
    "transformers.PreTrainedModel._no_split_modules": "device_map",
    "transformers.PreTrainedModel._skip_keys_device_placement": "a cache stays where it is",
    "transformers.PreTrainedModel._supports_attention_backend": "attention of inference servers",
    "transformers.PreTrainedModel._supports_flash_attn": "flash attention",
    "transformers.PreTrainedModel._supports_flex_attn": "flex attention",
    "transformers.PreTrainedModel._supports_sdpa": "torch's attention",
    "transformers.PreTrainedModel._tied_weights_keys": "a head that is the embedding table",
    "transformers.PreTrainedModel._tp_plan": "tensor parallelism",
    "transformers.quantizers.HfQuantizer._process_model_after_weight_loading": "packing",
    "transformers.quantizers.HfQuantizer._process_model_before_weight_loading": "empty packed layers",
    "transformers.quantizers.HfQuantizer.get_quantize_ops": "tensors are quantised one at a time",
    "transformers.quantizers.HfQuantizer.param_needs_quantization": "tensors are quantised one at a time",
    "transformers.LlamaTokenizer.added_tokens_decoder": "which tokens are special",
    "transformers.cache_utils.DynamicLayer.lazy_initialization": "a cache that grows in place",
}


@pytest.mark.parametrize("name", [*USED, *OVERRIDDEN])
def test_the_name_exists(name: str) -> None:
    try:
        _resolve(name)
    except (AttributeError, ModuleNotFoundError) as error:
        pytest.fail(f"{name} is gone ({error}); it was used for: {(USED | OVERRIDDEN)[name]}")


def test_the_table_is_complete_and_has_nothing_else() -> None:
    used = {name: str(path) for path in _sources() for name in _private_names(ast.parse(path.read_text("utf-8")))}
    assert {name: path for name, path in used.items() if name not in USED} == {}
    assert sorted(USED.keys() - used.keys()) == [], "no longer used"


def test_the_walk_finds_both_kinds() -> None:
    source = "from transformers.utils.generic import x_y\nimport torch\ntorch._a.b(torch.nn.Linear)\nself._own()\n"
    assert set(_private_names(ast.parse(source))) == {"transformers.utils.generic.x_y", "torch._a.b"}


def _sources() -> list[Path]:
    return [path for package in ("yi_vl", "train", "eval", "demo") for path in sorted((ROOT / package).rglob("*.py"))]


def _private_names(tree: ast.AST) -> Iterator[str]:
    inner: set[ast.AST] = set()  # of a longer chain, which has been seen whole
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name for name in names if name.split(".")[0] in LIBRARIES and _is_private(name))
        elif isinstance(node, ast.Attribute) and node not in inner:
            inner |= {part for part in ast.walk(node.value) if isinstance(part, ast.Attribute)}
            name = ast.unparse(node)
            if name.split(".")[0] in LIBRARIES and name.replace(".", "").isidentifier() and _has_underscore(name):
                yield name


def _is_private(name: str) -> bool:
    library, short = name.split(".")[0], name.rpartition(".")[2]
    is_exported = library != "transformers" or hasattr(_transformers(), short)
    return _has_underscore(name) or not is_exported


def _has_underscore(name: str) -> bool:
    return any(part.startswith("_") and not part.startswith("__") for part in name.split("."))


@cache
def _transformers() -> Any:
    return import_module("transformers")


def _resolve(name: str) -> Any:
    """A module, or an attribute of an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            resolved: Any = import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            resolved = getattr(resolved, part)
        return resolved
    raise ModuleNotFoundError(name)
