"""Models that `upcycle` made are quantized, adapted, trained and measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from test_cli import Run, run  # noqa: F401  # a fixture
from upcycled import EXPERTS, RELEASE, WIDE, dense, hybrid, logits, windows  # noqa: F401  # fixtures

import yi_vl
from train.config import TrainConfig
from train.nano.measure.evaluate import read_questions
from train.nano.measure.experts import count_experts, measure_experts
from train.trainer import train
from yi_vl.checkpoint import convert, open_checkpoint
from yi_vl.upcycle import Changes, upcycle

pytestmark = pytest.mark.core


def test_without_experts_it_is_quantized_as_a_dense_model(windows: Path, tmp_path: Path) -> None:  # noqa: F811
    quantized = yi_vl.load(windows, device="cpu", dtype=torch.float32, quantize="int8")
    answer = quantized.predict(WIDE, "What is this?", max_new_tokens=4)
    quantized.save(tmp_path / "int8")
    reloaded = yi_vl.load(tmp_path / "int8", device="cpu", dtype=torch.float32)
    assert reloaded.predict(WIDE, "What is this?", max_new_tokens=4) == answer
    expected = logits(windows)
    assert (logits(tmp_path / "int8") - expected).norm() < 0.2 * expected.norm()


def _adapted(base: Path, folder: Path, **options: Any) -> PeftModel:
    """A model whose adapters, saved to `folder`, are not what they were at first."""
    model = get_peft_model(
        yi_vl.load(base, dtype=torch.float32, device="cpu").model, LoraConfig(r=2, lora_alpha=4, **options)
    )
    model.peft_config["default"].base_model_name_or_path = str(base)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return model


def test_adapters_of_its_attention_are_merged(hybrid: Path, tmp_path: Path) -> None:  # noqa: F811
    model = _adapted(hybrid, tmp_path / "adapters", target_modules=["q_proj", "k_proj"]).merge_and_unload()
    expected, merged = model.state_dict(), yi_vl.load(tmp_path / "adapters", dtype=torch.float32).model.state_dict()
    original = yi_vl.load(hybrid, dtype=torch.float32).model.state_dict()
    assert sum(not torch.equal(original[name], tensor) for name, tensor in merged.items()) == 6 + 5
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, expected[name])


def test_other_adapters_are_refused_by_name(hybrid: Path, dense: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    _adapted(hybrid, tmp_path / "experts", target_parameters=["mlp.experts.gate_up_proj"], target_modules=[])
    _adapted(dense, tmp_path / "dense", target_modules=["k_proj", "up_proj"])
    config = tmp_path / "dense/adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(hybrid)}
    config.write_text(json.dumps(values))
    for folder, reason in (("experts", "target_parameters is ["), ("dense", "layers.3.self_attn.k_proj")):
        code, out, err = run("ask", "Hi", "-m", str(tmp_path / folder))
        assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err


def test_the_printed_line_trains_attention_alone(
    configure: Callable[..., TrainConfig], tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    target = tmp_path / "hybrid"
    _, out, _ = run("upcycle", str(RELEASE), str(target), *EXPERTS, "--every", "1", "--share", "2")
    line = out.splitlines()[-1]
    assert yaml.safe_load(line) == {"trainable": {"vision": False, "projector": False, "language": ["*.self_attn.*"]}}
    config = configure(
        f"init_from={{checkpoint: {target}, tower: null, language_model: null}}", "image_size=56", "steps=2",
        "lr.language=1e-2", line.replace(": ", "=", 1),
    )  # fmt: skip
    final = train(config)
    before, after = (yi_vl.load(path, device="cpu", dtype=torch.float32).model.state_dict() for path in (target, final))
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if ".self_attn." in name}


def test_experts_per_token_are_counted_by_skill(dense: Path, hybrid: Path, tmp_path: Path) -> None:  # noqa: F811
    rows = [
        {"id": "0", "skill": "flags", "lang": "en", "images": [WIDE], "question": "Flag?", "accepted": ["France."]},
        {
            "id": "1",
            "skill": "same",
            "lang": "zh",
            "images": [WIDE, WIDE],
            "question": "一样吗？",
            "accepted": ["是。"],
        },
        {"id": "2", "skill": "flags", "lang": "en", "images": [WIDE], "question": "Which?", "accepted": ["Chad."]},
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    convert(upcycle(open_checkpoint(dense), Changes(experts=3, slices=4)), tmp_path / "top-k", "yi-vl")
    counts = count_experts(yi_vl.load(tmp_path / "top-k", device="cpu"), read_questions(tmp_path))
    assert counts.keys() == {"flags", "same", "all"}
    assert [int(counts[skill]["image"][0]) for skill in ("flags", "same", "all")] == [2 * 16, 2 * 16, 4 * 16]
    for by_role in counts.values():
        for sums in by_role.values():
            assert sums[0] > 0 and torch.equal(sums[1:], 4 * sums[:1].expand(6))  # tokens, then experts of each layer
    table = [line.strip("|").split("|") for line in measure_experts(hybrid, tmp_path).splitlines()]
    assert [row[0].strip() for row in table[2:]] == ["flags (2)", "same (1)", "all (3)"]
    assert all(1 <= float(mean) <= 5 for row in table[2:] for mean in row[1:])
    with pytest.raises(ValueError, match="does not route by top-p"):
        measure_experts(tmp_path / "top-k", tmp_path)
