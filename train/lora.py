"""LoRA adapters in a frozen language model, saved in PEFT's format.

Other trained components are copied and saved with them, whole (PEFT's `modules_to_save`). `yi_vl.load` and
`yi-vl convert` merge adapters saved here. PEFT is imported where it is needed: with bitsandbytes it takes seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from yi_vl.decoder.cross_attention import CROSS_BLOCK
from yi_vl.model import YiVLForConditionalGeneration

from .config import LORA, TrainConfig

if TYPE_CHECKING:
    from peft import PeftModel

_LINEARS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
_MODULES = {"vision": ["vision_tower"], "projector": ["multi_modal_projector", CROSS_BLOCK]}


def uses_adapters(config: TrainConfig) -> bool:
    """Whether the language model is trained by adapters."""
    return config.trainable.language == LORA


class Adapters:
    """Saves the adapters and other trained components of a model, and nothing frozen."""

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def save_pretrained(self, directory: Path, state_dict: dict[str, Tensor]) -> None:
        """Write PEFT's files; `state_dict` holds the adapted model's weights, by their names in the model."""
        named = {f"base_model.model.{name}": tensor for name, tensor in state_dict.items()}
        self._model.save_pretrained(str(directory), state_dict=named, save_embedding_layers=False)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """While it lasts the model computes what it did before it was adapted."""
        trained = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        with self._model.disable_adapter():
            yield
        for parameter, requires_grad in trained:  # which PEFT changes
            parameter.requires_grad_(requires_grad)


def add_adapters_(model: YiVLForConditionalGeneration, config: TrainConfig, directory: Path | None = None) -> Adapters:
    """Put adapters into `model`, and copies of the other trained components.

    Args:
        directory: of adapters to load; new ones have B = 0 and change nothing at first.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    lora = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # scales by alpha / r, a whole number or not
        lora_dropout=config.lora.dropout,
        target_modules=_LINEARS,
        modules_to_save=[module for name in _MODULES if getattr(config.trainable, name) for module in _MODULES[name]],
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    if config.init_from.checkpoint is not None:
        folder = Path(config.init_from.checkpoint).expanduser()
        is_folder = folder.is_dir()  # else a hub id
        lora.base_model_name_or_path = str(folder.absolute()) if is_folder else config.init_from.checkpoint
    if directory is not None:
        set_peft_model_state_dict(adapted, load_peft_weights(str(directory), device="cpu"))
    return Adapters(adapted)
