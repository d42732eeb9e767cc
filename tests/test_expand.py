"""`yi-vl expand`: every layout in, the same function or doubled layers out, and a run of the new layers alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from test_cli import Run, run  # noqa: F401  # a fixture
from tiny import OFFICIAL, tiny_config, tiny_model, tiny_processor
from toy_runs import losses

import yi_vl
from train.config import TrainConfig
from train.trainer import train
from yi_vl.arguments import ranges
from yi_vl.checkpoint import convert, open_checkpoint
from yi_vl.expand import Layer, expand, layers_after_every, layers_doubled
from yi_vl.model import YiVLForConditionalGeneration

pytestmark = pytest.mark.core

RELEASE = OFFICIAL / "checkpoint"
NUM_LAYERS = 2
WIDE = str(OFFICIAL / "wide.png")
ZERO = ("self_attn.o_proj.weight", "mlp.down_proj.weight")


@pytest.fixture
def make_source(tmp_path: Path) -> Callable[[str], Path]:
    """A function (layout) -> a folder in it."""

    def make(layout: str) -> Path:
        if layout == "official":
            return RELEASE
        if layout == "stem":  # a tower that only the native layout can hold, and a tied table
            config = tiny_config(stem_widths=[8, 16])
            config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
            YiVLForConditionalGeneration(config).save_pretrained(tmp_path / layout)
            tiny_processor(patch_size=28).save_pretrained(tmp_path / layout)
        else:
            convert(open_checkpoint(RELEASE), tmp_path / layout, layout)  # type: ignore[arg-type]
        return tmp_path / layout

    return make


def logits(folder: Path) -> torch.Tensor:
    """Of a prompt with an image, in float32."""
    loaded = yi_vl.load(folder, device="cpu", dtype=torch.float32)
    content = [{"type": "image"}, {"type": "text", "text": "What is this? 这是什么？"}]
    encoded = loaded.processor.encode_messages([{"role": "user", "content": content}])
    pixels = loaded.processor.image_processor([Image.open(WIDE)], return_tensors="pt")
    with torch.inference_mode():
        return loaded.model(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels["pixel_values"]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("layout", ["official", "llava-hf", "yi-vl", "stem"])
def test_new_layers_that_add_nothing_keep_every_bit(
    layout: str, make_source: Callable[[str], Path], tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    source, target = make_source(layout), tmp_path / "out"
    code, out, err = run("expand", str(source), str(target), "--after-every", "1")
    assert code == 0 and "Traceback" not in err
    assert "4 layers instead of 2, of which 1, 3 are new" in out and "computes what it did before" in out
    assert torch.equal(logits(target), logits(source))
    old, new = open_checkpoint(source), open_checkpoint(target)
    assert new.layout == "yi-vl" and new.config.text_config.num_hidden_layers == 4
    for name, tensor in new.tensors.items():
        match = re.fullmatch(r"(model\.language_model\.layers\.)(\d+)\.(.+)", name)
        original = old.tensors[f"{match[1]}{int(match[2]) // 2}.{match[3]}" if match else name][...]
        is_zero = match is not None and int(match[2]) % 2 == 1 and match[3] in ZERO
        assert tensor.dtype == original.dtype
        assert torch.equal(tensor[...], torch.zeros_like(original) if is_zero else original), name
    code, out, _ = run("info", str(target))
    assert code == 0 and "4 layers" in out
    question = ("ask", WIDE, "What is this?", "--max-new-tokens", "6", "-m")
    assert run(*question, str(target))[:2] == run(*question, str(source))[:2]


def test_doubled_layers_stand_behind_the_others(make_source: Callable[[str], Path], tmp_path: Path, run: Run) -> None:  # noqa: F811
    source = make_source("yi-vl")
    code, out, _ = run("expand", str(source), str(tmp_path / "out"), "--double", "0:2")
    assert code == 0 and "4 layers instead of 2, of which 2-3 are new" in out
    assert "computes something else" in out and "language: [2-3]}" in out
    old, new = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    for number, original in enumerate((0, 1, 0, 1)):
        for part in (*ZERO, "input_layernorm.weight"):
            name = f"model.language_model.layers.{{}}.{part}"
            assert torch.equal(new.tensors[name.format(number)][...], old.tensors[name.format(original)][...])
    assert not torch.equal(logits(tmp_path / "out"), logits(source))


def test_where_the_copies_stand() -> None:
    def shown(layers: list[Layer]) -> list[str]:
        return [f"{layer.source}{'+' * layer.is_new}" for layer in layers]

    assert shown(layers_after_every(5, 2)) == ["0", "1", "1+", "2", "3", "3+", "4"]
    assert shown(layers_after_every(3, 3)) == ["0", "1", "2", "2+"]
    assert shown(layers_doubled(4, 1, 3)) == ["0", "1", "2", "1+", "2+", "3"]
    yi_9b = layers_doubled(32, 12, 28)
    assert len(yi_9b) == 48
    assert ranges([position for position, layer in enumerate(yi_9b) if layer.is_new]) == ["28-43"]
    assert ranges([4, 9, 10, 11, 14]) == ["4", "9-11", "14"]


def test_it_is_written_shard_by_shard(tmp_path: Path, saved_bytes: list[int]) -> None:
    expanded = expand(open_checkpoint(RELEASE), layers_after_every(NUM_LAYERS, 1), keeps_function=True)
    convert(expanded, tmp_path / "out", "yi-vl", shard_bytes=300_000)
    assert len(saved_bytes) > 3 and max(saved_bytes) <= 300_000
    assert torch.equal(logits(tmp_path / "out"), logits(RELEASE))


def test_biases_are_zeroed_as_well(tmp_path: Path) -> None:
    config = tiny_config()
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    model = YiVLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path / "source")
    tiny_processor().save_pretrained(tmp_path / "source")
    expanded = expand(open_checkpoint(tmp_path / "source"), layers_after_every(2, 2), keeps_function=True)
    convert(expanded, tmp_path / "out", "yi-vl")
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "source"))


def _quantized(tmp_path: Path) -> list[str]:
    yi_vl.load(RELEASE, device="cpu", quantize="int8").save(tmp_path / "int8")
    return [str(tmp_path / "int8"), str(tmp_path / "out"), "--after-every", "1"]


def _foreign_quantized(tmp_path: Path) -> list[str]:
    source = tmp_path / "gptq"
    tiny_model().save_pretrained(source)
    tiny_processor().save_pretrained(source)
    values = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (source / "config.json").write_text(json.dumps(values))
    return [str(source), str(tmp_path / "out"), "--after-every", "1"]


def _adapters(tmp_path: Path) -> list[str]:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/adapter_config.json").write_text("{}")
    return [str(tmp_path / "adapters"), str(tmp_path / "out"), "--after-every", "1"]


def _existing(tmp_path: Path) -> list[str]:
    (tmp_path / "out").mkdir()
    return [str(RELEASE), str(tmp_path / "out"), "--after-every", "1"]


def _options(*options: str) -> Callable[[Path], list[str]]:
    return lambda tmp_path: [str(RELEASE), str(tmp_path / "out"), *options]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_quantized, "is quantised"),
        (_foreign_quantized, "was quantised by gptq"),
        (_adapters, "holds adapters; merge them first (yi-vl convert"),
        (_existing, "exists already"),
        (_options(), "--after-every N or --double A:B, one of the two"),
        (_options("--after-every", "1", "--double", "0:1"), "one of the two"),
        (_options("--after-every", "0"), "--after-every is 0; expected 1 to 2"),
        (_options("--after-every", "-1"), "--after-every is -1; expected 1 to 2"),
        (_options("--after-every", "3"), "--after-every is 3; expected 1 to 2"),
        (_options("--double", "1:3"), "--double is 1:3; expected A:B"),
        (_options("--double", "1:1"), "--double is 1:1; expected A:B"),
        (_options("--double", "2:1"), "--double is 2:1; expected A:B"),
        (_options("--double", "0-1"), "--double is '0-1'; expected A:B"),
        (_options("--double", ":1"), "--double is ':1'; expected A:B"),
        (lambda tmp_path: ["/no/such/model", str(tmp_path / "out"), "--after-every", "1"], "no such folder"),
    ],
)
def test_what_cannot_be_expanded_is_one_line(
    make: Callable[[Path], list[str]], reason: str, tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    arguments = make(tmp_path)
    code, out, err = run("expand", *arguments)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("yi-vl: ") and reason in err
    assert reason == "exists already" or not (tmp_path / "out").exists()


def test_the_printed_line_trains_the_new_layers_alone(
    configure: Callable[..., TrainConfig], tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    target = tmp_path / "expanded"
    _, out, _ = run("expand", str(RELEASE), str(target), "--after-every", "2")
    line = out.splitlines()[-1]
    assert yaml.safe_load(line) == {"trainable": {"vision": False, "projector": False, "language": [2]}}
    config = configure(
        f"init_from={{checkpoint: {target}, tower: null, language_model: null}}", "image_size=56", "steps=12",
        "lr.language=1e-2", line.replace(": ", "=", 1),
    )  # fmt: skip
    final = train(config)
    assert sum(losses(config)[-3:]) < sum(losses(config)[:3])
    before, after = (yi_vl.load(path, device="cpu", dtype=torch.float32).model.state_dict() for path in (target, final))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".language_model.layers.2." in name}
    answer: Any = yi_vl.load(final, device="cpu").predict(WIDE, "What is this?", max_new_tokens=2)
    assert isinstance(answer, str)
