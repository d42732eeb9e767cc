"""yi_vl: an open, complete Yi-VL. `yi_vl.load()` gives a model that answers questions about pictures.

Names are resolved when first used, so that `import yi_vl` costs nothing; using any of the classes registers the model
with transformers' Auto classes.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import YiVLConfig as YiVLConfig
    from .model import YiVLForConditionalGeneration as YiVLForConditionalGeneration
    from .predict import YiVL as YiVL
    from .predict import load as load
    from .processor import YiVLProcessor as YiVLProcessor

_HOMES = {
    "YiVLConfig": ".config",
    "YiVLForConditionalGeneration": ".model",
    "YiVLProcessor": ".processor",
    "YiVL": ".predict",
    "load": ".predict",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'yi_vl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)
