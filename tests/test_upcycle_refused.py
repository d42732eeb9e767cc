"""What `yi-vl upcycle` refuses, and what refuses a model that it made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_cli import Run, run  # noqa: F401  # a fixture
from tiny import tiny_config, tiny_processor
from upcycled import EXPERTS, RELEASE, dense, hybrid  # noqa: F401  # fixtures

import yi_vl
from yi_vl.model import YiVLForConditionalGeneration

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "Nothing is to change: give --experts and --slices, --every and --window, or --top-p"),
        (("--experts", "1"), "Nothing is to change"),
        (("--experts", "0"), "--experts is 0; it must be at least 1"),
        (("--experts", "2", "--slices", "-1"), "--slices is -1; it must be at least 1"),
        (("--experts", "2", "--slices", "5"), "--slices is 5; expected a divisor of 64, the width"),
        (("--every", "0", "--window", "8"), "--every is 0; expected 1 to 6, the number of layers"),
        (("--every", "7", "--window", "8"), "--every is 7; expected 1 to 6, the number of layers"),
        (("--every", "3"), "say how many tokens the others see: --window W"),
        (("--every", "3", "--window", "1"), "--window is 1; expected a number of tokens of 2 or more"),
        (("--window", "8"), "--window is for layers without full attention; add --every E"),
        (("--every", "1", "--window", "8"), "--window is for layers without full attention; add --every E"),
        (("--every", "2", "--window", "8", "--share", "4"), "--share is 4; expected 1 to 3, the number of layers"),
        (("--share", "0"), "--share is 0; expected 1 to 6"),
        (("--top-p", "0.4"), "--top-p and --max-experts are for a model with experts; add --experts"),
        ((*EXPERTS, "--top-p", "0"), "--top-p is 0.0; expected more than 0 and at most 1"),
        ((*EXPERTS, "--top-p", "nan"), "--top-p is nan; expected more than 0 and at most 1"),
        ((*EXPERTS, "--top-p", "0.4", "--max-experts", "13"), "--max-experts is 13; expected 1 to 12"),
        ((*EXPERTS, "--max-experts", "4"), "--max-experts is for routing by top-p; add --top-p"),
        (("--experts", "99999", "--slices", "4"), "--experts times --slices is 399996; it must be from 1 to 4,096"),
        ((*EXPERTS, "--seed", "-1"), "--seed is -1"),
    ],
)
def test_what_cannot_be_upcycled_is_one_line(
    options: tuple[str, ...], reason: str, dense: Path, tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    code, out, err = run("upcycle", str(dense), str(tmp_path / "out"), *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("yi-vl: ") and reason in err
    assert not (tmp_path / "out").exists()


def _quantized(tmp_path: Path) -> Path:
    yi_vl.load(RELEASE, device="cpu", quantize="int8").save(tmp_path / "int8")
    return tmp_path / "int8"


def _adapters(tmp_path: Path) -> Path:
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters/adapter_config.json").write_text("{}")
    return tmp_path / "adapters"


def _existing(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return RELEASE


def _biased(tmp_path: Path) -> Path:
    config = tiny_config()
    config.text_config.mlp_bias = True
    YiVLForConditionalGeneration(config).save_pretrained(tmp_path / "biased")
    tiny_processor().save_pretrained(tmp_path / "biased")
    return tmp_path / "biased"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_quantized, "is quantised"),
        (_adapters, "holds adapters; merge them first (yi-vl convert"),
        (_existing, "exists already"),
        (_biased, "has biases in its feed-forward layers (mlp_bias)"),
        (lambda tmp_path: Path("/no/such/model"), "no such folder"),
    ],
)
def test_sources_that_cannot_be_upcycled(
    make: Callable[[Path], Path], reason: str, tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    code, out, err = run("upcycle", str(make(tmp_path)), str(tmp_path / "out"), *EXPERTS)
    assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (EXPERTS, "has 12 experts in each layer already; leave --experts and --slices out"),
        (("--share", "1"), "Layer 3 would need keys and values of its own, and has shared those of layer 1"),
        (("--every", "4"), "Layer 3 would need keys and values of its own"),
    ],
)
def test_what_was_given_up_does_not_come_back(
    options: tuple[str, ...], reason: str, hybrid: Path, tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    code, out, err = run("upcycle", str(hybrid), str(tmp_path / "out"), *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("convert", "{}", "OUT", "--to", "official"), "type yi_hybrid, and the layout 'official' has no place"),
        (("convert", "{}", "OUT", "--to", "llava-hf"), "type yi_hybrid, and the layout 'llava-hf' has no place"),
        (("convert", "{}", "OUT", "--to", "gguf"), "type yi_hybrid, and the layout 'gguf' has no place"),
        (("convert", "{}", "OUT", "--quantize", "int8"), "quantize='int8' is for linear layers, and this model has 12"),
        (
            ("ask", "Hi", "-m", "{}", "--quantize", "int4"),
            "quantize='int4' is for linear layers, and this model has 12",
        ),
        (("expand", "{}", "OUT", "--after-every", "2"), "type yi_hybrid, whose layers differ. Expand the dense model"),
    ],
)
def test_what_cannot_hold_it_refuses_it_by_name(
    command: tuple[str, ...], reason: str, hybrid: Path, tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    target = tmp_path / "out"
    words = [word.replace("{}", str(hybrid)).replace("OUT", str(target)) for word in command]
    code, out, err = run(*words)
    assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err
    assert not target.exists()


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"kv_source_layers": [0, 1, 3, 3, 4, 5]}, "kv_source_layers[2] is 3"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries; expected 6"),
        ({"num_experts": 10**9}, "num_experts is 1000000000"),
        ({"num_experts": 4, "max_experts_per_tok": 4}, "of another shape"),
    ],
)
def test_a_damaged_configuration_is_one_line(
    values: dict[str, Any], reason: str, hybrid: Path, tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in hybrid.iterdir():
        (folder / file.name).symlink_to(file) if file.suffix != ".safetensors" else (folder / file.name).hardlink_to(
            file
        )
    config = json.loads((hybrid / "config.json").read_text())
    config["text_config"] |= values
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    code, out, err = run("ask", "Hi", "-m", str(folder))
    assert (code, out) == (2, "") and err.count("\n") == 1 and reason in err
