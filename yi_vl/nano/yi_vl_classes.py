# Where transformers finds this model's classes; needs yi_vl installed.
from yi_vl.auto import YiVLConfig, YiVLForConditionalGeneration, YiVLProcessor
