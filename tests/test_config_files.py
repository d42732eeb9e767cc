"""Checkpoint folders with false or damaged files: refused in one line, before memory is allocated."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import OFFICIAL, tiny_yi_vl

import yi_vl
from yi_vl.checkpoint.load import read_config

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_yi_vl().save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(path: Path, name: str, value: Any) -> None:
    """Set `a.b` in a JSON file."""
    content = json.loads(path.read_text())
    *parents, last = name.split(".")
    section = content
    for parent in parents:
        section = section[parent]
    section[last] = value
    path.write_text(json.dumps(content))


def refuse(folder: Path, *problems: str) -> None:
    for function in (lambda: yi_vl.load(folder, device="cpu"), lambda: read_config(str(folder))):
        with pytest.raises(ValueError) as caught:
            function()
        message = str(caught.value)
        assert "\n" not in message and len(message) < 800, message
        assert all(problem in message for problem in (str(folder), *problems)), message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("text_config.num_hidden_layers", "x"),
        ("text_config.num_hidden_layers", 10**9),
        ("text_config.num_hidden_layers", 2.5),
        ("text_config.num_hidden_layers", True),
        ("text_config.num_hidden_layers", 0),
        ("text_config.vocab_size", -5),
        ("text_config.vocab_size", 10**12),
        ("text_config.hidden_size", [32]),
        ("text_config.intermediate_size", 10**15),
        ("text_config.num_attention_heads", 0),
        ("text_config.num_attention_heads", 7),
        ("text_config.num_key_value_heads", -1),
        ("text_config.head_dim", "64"),
        ("text_config.max_position_embeddings", -1),
        ("text_config.rms_norm_eps", float("nan")),
        ("text_config.rope_parameters", 3),
        ("text_config.pad_token_id", "x"),
        ("text_config.model_type", ["llama"]),
        ("text_config.model_type", "nonsense"),
        ("vision_config.image_size", "56"),
        ("vision_config.image_size", -1),
        ("vision_config.patch_size", 0),
        ("vision_config.num_hidden_layers", 10**9),
        ("vision_config.feature_layer", "last"),
        ("vision_config.feature_layer", 10**6),
        ("vision_config.feature_layer", 3),
        ("vision_config.feature_layer", -4),
        ("vision_config.feature_layer", None),
        ("image_token_id", "x"),
        ("image_token_id", 960),
        ("image_token_id", -1),
        ("num_labels", 10**9),
        ("id2label", 3),
        ("dtype", "bfloat17"),
        ("vision_config", "x"),
        ("text_config", [1]),
    ],
)
def test_values_of_no_model_are_named(folder: Path, name: str, value: Any) -> None:
    change(folder / "config.json", name, value)
    refuse(folder, "config.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [("text_config.hidden_act", "x"), ("vision_config.stem_widths", "x"), ("vision_config.timm_model", 3),
     ("vision_config.num_attention_heads", 5)],
)  # fmt: skip
def test_what_shows_when_the_model_is_made_is_named(folder: Path, name: str, value: Any) -> None:
    change(folder / "config.json", name, value)
    with pytest.raises(ValueError, match=r"describes no model that can be made|fit config\.json") as caught:
        yi_vl.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[]", "holds no configuration, but []"),
        (b"3", "holds no configuration, but 3"),
        (b"null", "holds no configuration"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"model_type":' * 200_000, "nested too deeply"),
        (b"{", "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "cannot be read"),
        (b'{"model_type": ["yi_vl"]}', "of type ['yi_vl']"),
    ],
)
def test_a_configuration_that_is_none_is_refused(folder: Path, content: bytes, problem: str) -> None:
    (folder / "config.json").write_bytes(content)
    refuse(folder, problem)


def test_a_configuration_that_is_no_file_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    path.unlink()
    os.mkfifo(path)
    refuse(folder, "it is no file")
    path.unlink()
    path.symlink_to("/dev/zero")
    refuse(folder, "it is no file")
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    refuse(folder, "at most")


@pytest.mark.parametrize("layout", ["official", "llava-hf"])
@pytest.mark.parametrize(("name", "value"), [("num_hidden_layers", 10**9), ("hidden_size", "x"), ("vocab_size", -5)])
def test_other_layouts_are_checked_too(tmp_path: Path, layout: str, name: str, value: Any) -> None:
    folder = Path(shutil.copytree(OFFICIAL / "checkpoint", tmp_path / "model"))
    if layout == "llava-hf":
        values = {"model_type": "llava", "vision_config": {}, "image_token_index": 900}
        (folder / "config.json").write_text(json.dumps(values | {"text_config": {"model_type": "llama", name: value}}))
    else:
        change(folder / "config.json", name, value)
    refuse(folder, "config.json", name)


def safetensors(header: object) -> bytes:
    content = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(content)) + content + bytes(64)


@pytest.mark.parametrize(
    "content",
    [
        struct.pack("<Q", 2**63 - 1) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        safetensors({"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 64]}}),
        safetensors({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 64]}}),
        safetensors({"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 64]}}),
        safetensors({"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 10**15]}}),
        safetensors({"a": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}),
        safetensors({"a": 3}),
        safetensors([]),
        safetensors(b"[" * 100_000),
        safetensors(b"\xff"),
        b"",
        b"1234",
    ],
)
def test_headers_that_lie_are_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or cut short") as caught:
        yi_vl.load(folder, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_pickle_that_claims_more_than_its_file_holds_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.zeros(1).expand(1 << 20, 1 << 20)}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than the whole file holds"):
        yi_vl.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("content", "problem"),
    [("[]", "holds no configuration"), ('{"weight_map": 3}', "no index"), ('{"weight_map": {"a": 3}}', "no index"),
     ("[" * 100_000, "nested too deeply")],
)  # fmt: skip
def test_an_index_that_is_none_is_refused(folder: Path, content: str, problem: str) -> None:
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=problem):
        yi_vl.load(folder, device="cpu")


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("processor_config.json", "image_processor.image_mean", 3),
        ("processor_config.json", "image_processor.image_mean", ["a", "b", "c"]),
        ("processor_config.json", "image_processor.image_std", [0, 0, 0]),
        ("processor_config.json", "image_processor.size_px", "x"),
        ("processor_config.json", "image_processor.size_px", 10**9),
        ("processor_config.json", "patch_size", 0),
        ("processor_config.json", "patch_size", "x"),
        ("tokenizer_config.json", "tokenizer_class", 3),
        ("tokenizer_config.json", "model_max_length", "x"),
        ("tokenizer_config.json", "model_max_length", [1]),
        ("generation_config.json", "eos_token_id", "x"),
        ("generation_config.json", "eos_token_id", {"a": 1}),
        ("tokenizer.json", "model", 3),
    ],
)
def test_the_files_beside_it_are_named_too(folder: Path, file: str, name: str, value: Any) -> None:
    change(folder / file, name, value)
    with pytest.raises(ValueError) as caught:
        yi_vl.load(folder, device="cpu").predict(None, "Hi", max_new_tokens=1)
    assert "\n" not in str(caught.value)


@pytest.fixture
def limited_memory() -> Iterator[None]:
    """Address space for 2 GB more than there is already: a billion of anything must fail at once, not the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (num_pages * resource.getpagesize() + (2 << 30), hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells how much memory a process has")
@pytest.mark.parametrize("name", ["num_labels", "text_config.num_hidden_layers", "vision_config.num_hidden_layers"])
def test_a_billion_of_anything_takes_no_memory(folder: Path, limited_memory: None, name: str) -> None:
    change(folder / "config.json", name, 10**9)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse(folder, name)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kilobytes
