"""What differs between the versions of transformers that are allowed."""

from __future__ import annotations

import inspect

from transformers import LlamaModel

# The name of a model's cache argument, which transformers 5.24 renamed.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
