"""The trainer: `python -m train CONFIG.yaml key.sub=value ...`. Imports yi_vl only, and nothing imports it."""

import logging

# PEFT imports it where it is installed, and on a CPU it then warns of kernels that no training needs
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
