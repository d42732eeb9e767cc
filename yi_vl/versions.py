"""What differs between the versions of transformers that are allowed."""

from __future__ import annotations

import inspect

import transformers
from transformers import LlamaModel

# The name of a model's cache argument, which transformers 5.24 renamed.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

# transformers 5.16 has NaN in the router's gradient where a grouped product skips places of a token's experts.
HAS_GRADIENTS_OF_FREE_PLACES = not transformers.__version__.startswith("5.16.")
