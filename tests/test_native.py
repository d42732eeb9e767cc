"""Every tool of transformers takes the model; what inference servers ask of it holds."""

from __future__ import annotations

import copy
import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from PIL import Image
from tiny import IMAGE_TOKEN_ID, OFFICIAL, tiny_model, tiny_processor
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

import yi_vl
from yi_vl.model import YiVLForConditionalGeneration, YiVLModel
from yi_vl.processor import YiVLProcessor

pytestmark = pytest.mark.core

WIDE = OFFICIAL / "wide.png"
MESSAGES = [
    {"role": "user", "content": [{"type": "image", "url": str(WIDE)}, {"type": "text", "text": "What is this?"}]}
]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native")
    tiny_model().save_pretrained(path)
    tiny_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return dict(_chat(tiny_processor()))


def _chat(processor: YiVLProcessor) -> Any:
    return processor.apply_chat_template(
        MESSAGES, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


def test_auto_classes_give_yi_vl_classes(folder: Path) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is yi_vl.YiVLConfig
    assert type(AutoProcessor.from_pretrained(folder)) is YiVLProcessor
    assert type(AutoModelForImageTextToText.from_pretrained(folder)) is YiVLForConditionalGeneration
    assert type(AutoModel.from_pretrained(folder)) is YiVLModel


@pytest.mark.slow
def test_registration_is_one_import(folder: Path, tmp_path: Path) -> None:
    """`import yi_vl.auto` is all that Auto classes need; trust_remote_code finds it through the saved folder."""
    script = (
        "import os, sys\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor\n"
        "trust = os.fork() == 0\n"  # two processes that have not imported yi_vl
        "if not trust: os.wait(); import yi_vl.auto\n"
        "for auto in (AutoConfig, AutoProcessor, AutoModelForImageTextToText):\n"
        "    print(type(auto.from_pretrained(sys.argv[1], trust_remote_code=trust)).__module__, flush=True)\n"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["yi_vl.config", "yi_vl.processor", "yi_vl.model"] * 2, done.stderr[-2000:]


def test_the_pipeline_chats(folder: Path) -> None:
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    replies = pipe(text=MESSAGES, max_new_tokens=6, return_full_text=False, generate_kwargs={"do_sample": False})
    model = yi_vl.load(folder, device="cpu")
    expected = model.model.generate(**_chat(model.processor), max_new_tokens=6, do_sample=False)
    prompt_length = _chat(model.processor)["input_ids"].shape[1]
    text = model.processor.tokenizer.decode(expected[0, prompt_length:], skip_special_tokens=True)
    assert replies[0]["generated_text"] == text and text


def test_what_is_saved_is_loaded_to_the_bit(folder: Path, tmp_path: Path, inputs: dict[str, torch.Tensor]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = YiVLForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    assert yi_vl.load(folder, device="cpu").predict(WIDE, "Hi", max_new_tokens=4)


@pytest.mark.parametrize("on_disk", ["language_model", "vision_tower", "all"])
def test_weights_on_disk_give_the_same(
    folder: Path, tmp_path: Path, on_disk: str, inputs: dict[str, torch.Tensor]
) -> None:
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    device_map = {part: "disk" if on_disk in (part.removeprefix("model."), "all") else "cpu" for part in parts}
    model = YiVLForConditionalGeneration.from_pretrained(
        folder, device_map=device_map, offload_folder=str(tmp_path / "offload"), dtype=torch.float32
    )
    assert {p.device.type for p in model.parameters()} == ({"meta"} if on_disk == "all" else {"meta", "cpu"})
    torch.testing.assert_close(model(**inputs).logits, tiny_model()(**inputs).logits)


def test_modules_can_be_offloaded_one_by_one(inputs: dict[str, torch.Tensor]) -> None:
    expected = tiny_model()(**inputs).logits
    model = cpu_offload(tiny_model(), torch.device("cpu"), preload_module_classes=["MultiheadAttention"])
    torch.testing.assert_close(model(**inputs).logits, expected)


def test_lora_attaches_trains_merges_saves_and_loads(tmp_path: Path, inputs: dict[str, torch.Tensor]) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = tiny_model()
    before = base(**inputs).logits.detach()
    targets = r"model\.language_model\..*\.(q_proj|v_proj)"
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=targets))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1.0)  # falls for any of the first matrices that LoRA draws
    losses = []
    for _ in range(4):
        loss = model(**inputs, labels=inputs["input_ids"].clone().masked_fill_(inputs["input_ids"] == 900, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    learned = model(**inputs).logits.detach()
    assert (learned - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(loaded(**inputs).logits, learned)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(**inputs).logits, learned, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    tiny_processor().save_pretrained(tmp_path / "merged")
    whole = yi_vl.load(tmp_path / "merged", device="cpu").model
    torch.testing.assert_close(whole(**inputs).logits, learned, rtol=1e-4, atol=1e-4)


def test_the_compiled_forward_is_the_same(inputs: dict[str, torch.Tensor]) -> None:
    model = tiny_model()
    expected = model(**inputs).logits
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).logits, expected)


# What transformers' guide on models as a backend of inference servers asks, point by point.
# https://huggingface.co/docs/transformers/main/en/transformers_as_backend


def test_backend_attention_goes_through_the_interface(inputs: dict[str, torch.Tensor]) -> None:
    assert YiVLForConditionalGeneration._supports_attention_backend
    model, calls = tiny_model(), []
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return sdpa_attention_forward(*args, **{k: v for k, v in kwargs.items() if k != "from_a_server"})

    AttentionInterface.register("counted", counted)
    expected = model(**inputs).logits
    model.set_attn_implementation({"text_config": "counted"})
    torch.testing.assert_close(model(**inputs, from_a_server=1).logits, expected)
    num_layers = model.config.text_config.num_hidden_layers
    assert len(calls) == num_layers and all(call.get("from_a_server") == 1 for call in calls), "kwargs reach attention"


def test_backend_config_knows_its_parts() -> None:
    config = tiny_model().config
    assert config.sub_configs.keys() == {"vision_config", "text_config", "connector_config"}
    assert config.get_text_config() is config.text_config
    plan = YiVLForConditionalGeneration(config).model.language_model.config.base_model_tp_plan
    assert plan["layers.*.self_attn.q_proj"] and plan["layers.*.mlp.down_proj"], "tensor parallelism, from Llama"
    assert YiVLForConditionalGeneration._tp_plan["lm_head"]
    assert config.text_config.base_model_pp_plan, "pipeline parallelism, from Llama"


def test_backend_model_takes_embeddings_and_finds_image_features(inputs: dict[str, torch.Tensor]) -> None:
    model = tiny_model()
    assert {"inputs_embeds", "position_ids", "kwargs"} <= inspect.signature(YiVLModel.forward).parameters.keys()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    features = model.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    assert len(features) == 1 and features[0].shape == (16, 32), "one (patches, width) tensor per image"
    slots = inputs["input_ids"] == model.config.image_token_id
    embeds = embeds.masked_scatter(slots.unsqueeze(-1), torch.cat(list(features)))
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(**inputs).logits)
    assert model.get_output_embeddings() is model.lm_head
    assert model.get_decoder() is model.model.language_model


def test_backend_processor_counts_tokens_and_marks_images(inputs: dict[str, torch.Tensor]) -> None:
    processor = tiny_processor()
    assert processor.image_token_id == IMAGE_TOKEN_ID and processor.image_token == "<image_placeholder>"
    counted = processor._get_num_multimodal_tokens(image_sizes=[(61, 97), (40, 90)])
    assert counted["num_image_tokens"] == [16, 16] and counted["num_image_patches"] == [1, 1]
    made = processor(
        images=[Image.open(WIDE)],
        text="a <image_placeholder> b",
        return_mm_token_type_ids=True,
        return_tensors="pt",
    )
    marks = made["mm_token_type_ids"][0].tolist()
    assert sum(marks) == 16 and marks == [int(token == IMAGE_TOKEN_ID) for token in made["input_ids"][0].tolist()]
