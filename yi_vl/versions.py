"""What differs between the versions of transformers that are allowed."""

from __future__ import annotations

import inspect

import transformers
from transformers import LlamaModel

# The name of a model's cache argument, which transformers 5.24 renamed.
CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"

# transformers 5.16's experts cannot leave places of a token free: its eager ones fail, grouped ones give NaN gradients.
EXPERTS_SKIP_FREE_PLACES = not transformers.__version__.startswith("5.16.")
