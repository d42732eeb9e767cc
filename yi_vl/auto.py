"""Registers Yi-VL with transformers' Auto classes and pipelines.

`yi_vl.load` and every public class of the package import this file; code that uses transformers alone needs
`import yi_vl.auto` once.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .config import OpenClipVisionConfig as OpenClipVisionConfig
from .config import YiVLConfig as YiVLConfig
from .decoder.config import YiHybridConfig as YiHybridConfig
from .decoder.gated import YiGatedForCausalLM as YiGatedForCausalLM
from .decoder.gated import YiGatedModel as YiGatedModel
from .decoder.gated_config import YiGatedConfig as YiGatedConfig
from .decoder.model import YiHybridForCausalLM as YiHybridForCausalLM
from .decoder.model import YiHybridModel as YiHybridModel
from .image import YiVLImageProcessor as YiVLImageProcessor
from .model import YiVLForConditionalGeneration as YiVLForConditionalGeneration
from .model import YiVLModel as YiVLModel
from .processor import YiVLProcessor as YiVLProcessor
from .vision import OpenClipTower as OpenClipTower

AutoConfig.register(OpenClipVisionConfig.model_type, OpenClipVisionConfig)
AutoConfig.register(YiVLConfig.model_type, YiVLConfig)
AutoConfig.register(YiHybridConfig.model_type, YiHybridConfig)
AutoConfig.register(YiGatedConfig.model_type, YiGatedConfig)
AutoModel.register(OpenClipVisionConfig, OpenClipTower)
AutoModel.register(YiVLConfig, YiVLModel)
AutoModel.register(YiHybridConfig, YiHybridModel)
AutoModel.register(YiGatedConfig, YiGatedModel)
AutoModelForCausalLM.register(YiHybridConfig, YiHybridForCausalLM)
AutoModelForCausalLM.register(YiGatedConfig, YiGatedForCausalLM)
AutoModelForImageTextToText.register(YiVLConfig, YiVLForConditionalGeneration)
AutoProcessor.register(YiVLConfig, YiVLProcessor)
# Under both names: transformers asks for "torchvision" first, and warns when it has to fall back.
AutoImageProcessor.register(
    YiVLConfig, image_processor_classes={"pil": YiVLImageProcessor, "torchvision": YiVLImageProcessor}
)
