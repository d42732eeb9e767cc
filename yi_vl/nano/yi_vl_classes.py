# Where transformers finds this model's classes; needs yi_vl installed.
from yi_vl import YiVLConfig, YiVLForConditionalGeneration, YiVLProcessor
