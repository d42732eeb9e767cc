"""The trainer: `python -m train CONFIG.yaml key.sub=value ...`. Imports yi_vl only, and nothing imports it."""

import logging
import warnings

# What libraries say to their developers where they are installed: PEFT imports bitsandbytes, which on a CPU misses
# kernels that no training needs; transformers imports torchao; PEFT asks transformers by an old name.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
