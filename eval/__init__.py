"""Measuring models: `python -m eval`. Runs from a checkout; imports yi_vl only."""

import logging

# transformers imports torchao where it is installed, and torch then warns of what torchao does.
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
