"""yi_vl: an open, complete Yi-VL. `yi_vl.load()` gives a model that answers questions about images.

Names are resolved when first used, so that `import yi_vl` costs nothing. transformers' Auto classes know the model once
one of them has been used, or after `import yi_vl.auto`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .startup import paused_garbage_collection

if TYPE_CHECKING:
    from .auto import YiVLConfig as YiVLConfig
    from .auto import YiVLForConditionalGeneration as YiVLForConditionalGeneration
    from .auto import YiVLProcessor as YiVLProcessor
    from .engine.request_queue import BatchError as BatchError
    from .engine.request_queue import Generation as Generation
    from .predict import YiVL as YiVL
    from .predict import load as load

_HOMES = {
    "BatchError": ".engine.request_queue",
    "Generation": ".engine.request_queue",
    "YiVLConfig": ".auto",
    "YiVLForConditionalGeneration": ".auto",
    "YiVLProcessor": ".auto",
    "YiVL": ".predict",
    "load": ".predict",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'yi_vl' has no attribute {name!r}")
    with paused_garbage_collection():
        return getattr(import_module(_HOMES[name], __name__), name)
