"""yi_vl: an open, complete Yi-VL. `yi_vl.load()` gives a model that answers questions about pictures.

Names are resolved when first used, so that `import yi_vl` costs nothing. transformers' Auto classes know the model as
soon as both packages are imported, in whichever order.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

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

# importing them registers what they define
_REGISTERING = ("yi_vl.config", "yi_vl.model", "yi_vl.processor", "yi_vl.quantize")

_NEEDED_WHOLE = ("yi_vl.config", "yi_vl.vision", "yi_vl.image")  # by those


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'yi_vl' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)


def register(finished: str = "") -> None:
    """Make transformers' Auto classes know the model. Runs when transformers is imported, or at once if it is.

    Args:
        finished: the module that calls this in its last line.
    """
    loading = (name for name in _NEEDED_WHOLE if name != finished and name in sys.modules)
    if any(getattr(sys.modules[name].__spec__, "_initializing", False) for name in loading):
        return  # it is being imported, has just imported transformers, and ends by calling this
    for module in _REGISTERING:
        import_module(module)


register_post_import_hook(lambda _: register(), "transformers")
