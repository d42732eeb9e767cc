"""The trainer: `python -m train CONFIG.yaml key.sub=value ...`. Imports yi_vl only, and nothing imports it."""

import logging
import warnings

# Warnings that users can do nothing about: PEFT imports bitsandbytes, which misses kernels on a CPU that training does
# not use; transformers imports torchao; PEFT reads an attribute of transformers by its old name.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
