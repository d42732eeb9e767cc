"""GGUF files: what is in them, and what cannot be written. What llama.cpp computes with them: test_llama_cpp.py."""

from __future__ import annotations

import shutil
import sys
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_texts import texts
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tiny import OFFICIAL, tiny_model
from torch import Tensor

import yi_vl
from yi_vl.chat import render
from yi_vl.checkpoint import Checkpoint, convert, open_checkpoint
from yi_vl.checkpoint.gguf import GgufType, write_gguf
from yi_vl.checkpoint.gguf_tokenizer import GGUF_CHAT_TEMPLATE
from yi_vl.checkpoint.gguf_vision import vision_unsupported
from yi_vl.checkpoint.load import open_model
from yi_vl.checkpoint.read import LazyTensor
from yi_vl.checkpoint.verify import verify_gguf
from yi_vl.cli import app
from yi_vl.config import IMAGE_MEAN, OpenClipVisionConfig, YiVLConfig

gguf = pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")

CHECKPOINT = OFFICIAL / "checkpoint"
MARKER = "<__media_a1B2c3__>"
LAYERS, VISION = "model.language_model.layers.", "model.vision_tower.visual."


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return open_checkpoint(CHECKPOINT)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, source: Checkpoint) -> Path:
    """The tiny official checkpoint in float32."""
    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    write_gguf(source, folder, "f32")
    return folder


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The fields and the dequantized tensors of a file."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in reader.tensors
    }
    return fields, tensors


def test_the_language_model_is_written_as_llama_cpp_reads_it(files: Path, source: Checkpoint) -> None:
    fields, tensors = read(files / "model-f32.gguf")
    text = source.config.text_config
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "tiny"
    assert fields["llama.block_count"] == 2 and fields["llama.attention.head_count_kv"] == 2
    assert fields["llama.rope.freq_base"] == 5e6 and fields["llama.context_length"] == 4096
    assert len(tensors) == 3 + 9 * text.num_hidden_layers
    assert tensors["token_embd.weight"].shape == (900, 64), "rows of added tokens are not written"
    down = source.tensors[f"{LAYERS}1.mlp.down_proj.weight"][...].numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"], down)
    keys = source.tensors[f"{LAYERS}0.self_attn.k_proj.weight"][...].numpy()  # 2 heads of 16
    for head in range(2):
        for pair in range(8):
            for half in range(2):
                written = tensors["blk.0.attn_k.weight"][16 * head + 2 * pair + half]
                np.testing.assert_array_equal(written, keys[16 * head + 8 * half + pair])


def test_the_tower_is_written_so_that_the_class_token_may_stand_anywhere(files: Path, source: Checkpoint) -> None:
    fields, tensors = read(files / "mmproj-f32.gguf")
    stored = {name.removeprefix(VISION): tensor for name, tensor in source.tensors.items()}
    assert fields["clip.projector_type"] == "mlp" and fields["clip.use_gelu"] and fields["clip.has_vision_encoder"]
    assert fields["clip.vision.block_count"] == 3, "clip.cpp runs all but the last one"
    np.testing.assert_allclose(fields["clip.vision.image_mean"], IMAGE_MEAN, rtol=1e-6)
    assert not [name for name in tensors if "post_ln" in name], "clip.cpp would apply it"
    positions = stored["positional_embedding"][...].numpy()
    np.testing.assert_array_equal(tensors["v.patch_embd.bias"], positions[1:])
    np.testing.assert_array_equal(tensors["v.class_embd"], stored["class_embedding"][...].numpy() + positions[0])
    assert not tensors["v.position_embd.weight"].any() and tensors["v.position_embd.weight"].shape == positions.shape
    fused = stored["transformer.resblocks.1.attn.in_proj_bias"][...].numpy()
    joined = np.concatenate([tensors[f"v.blk.1.attn_{part}.bias"] for part in "qkv"])
    np.testing.assert_array_equal(joined, fused)
    for module, new in (("linear_1", 0), ("norm_1", 1), ("linear_2", 3), ("norm_2", 4)):
        weight = source.tensors[f"model.multi_modal_projector.{module}.weight"][...].numpy()
        np.testing.assert_array_equal(tensors[f"mm.{new}.weight"], weight)


@pytest.mark.parametrize("layout", ["yi-vl", "llava-hf"])
def test_every_layout_gives_the_same_files(layout: Any, files: Path, source: Checkpoint, tmp_path: Path) -> None:
    convert(source, tmp_path / "other", layout, shard_bytes=200_000)
    write_gguf(open_checkpoint(tmp_path / "other"), tmp_path / "tiny", "f32")
    written = {path.name: path.read_bytes() for path in (tmp_path / "tiny").iterdir()}
    assert written == {path.name: path.read_bytes() for path in files.iterdir()}


@pytest.mark.parametrize(("type", "vision_type"), [("f16", "f16"), ("bf16", "bf16"), ("q8_0", "f16")])
def test_types(type: GgufType, vision_type: str, source: Checkpoint, tmp_path: Path) -> None:
    notes = write_gguf(source, tmp_path / "out", type)
    assert len(notes) == 1 and "25814" in notes[0] and "25844" in notes[0]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"model-{type}.gguf", f"mmproj-{vision_type}.gguf", "Modelfile",
    }  # fmt: skip
    for name, file_type in ((f"model-{type}", type), (f"mmproj-{vision_type}", vision_type)):
        for tensor in gguf.GGUFReader(tmp_path / "out" / f"{name}.gguf").tensors:
            is_vector = len(tensor.shape) == 1 or tensor.name in ("v.patch_embd.bias", "v.position_embd.weight")
            expected = "F32" if is_vector else file_type.upper()
            if tensor.name == "v.patch_embd.weight" and file_type == "bf16":
                expected = "F32"  # llama.cpp convolves with no bfloat16
            assert tensor.tensor_type.name == expected, tensor.name
    assert type in verify_gguf(source, tmp_path / "out", type)


def test_a_bit_that_differs_is_found(files: Path, source: Checkpoint, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(files, tmp_path / "tiny"))
    assert "differ by 0 of" in verify_gguf(source, copy, "f32")
    path = copy / "mmproj-f32.gguf"
    damaged = bytearray(path.read_bytes())
    offset = int(gguf.GGUFReader(path).tensors[-1].data_offset)
    damaged[offset + 3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"mmproj-f32\.gguf differs from its source"):
        verify_gguf(source, copy, "f32")


def test_one_tensor_is_held_at_a_time(source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[weakref.ref] = []
    index = LazyTensor.__getitem__

    def record(tensor: LazyTensor, key: Any) -> Tensor:
        assert sum(held() is not None for held in reads) <= 1
        values = index(tensor, key)
        reads.append(weakref.ref(values.untyped_storage()))
        return values

    monkeypatch.setattr(LazyTensor, "__getitem__", record)
    write_gguf(source, tmp_path / "out", "q8_0")
    assert len(reads) > 70


# The tokenizer


def merge_by_score(text: str, fields: dict[str, Any]) -> list[int]:
    """As llama.cpp does with a vocabulary `llama`: the pair whose piece has the highest score is merged first."""
    ids = {token: id for id, token in enumerate(fields["tokenizer.ggml.tokens"])}
    scores = fields["tokenizer.ggml.scores"]
    symbols = list(text.replace(" ", "▁"))
    while True:
        pairs = [left + right for left, right in pairwise(symbols)]
        known = [(-scores[ids[pair]], place) for place, pair in enumerate(pairs) if pair in ids]
        if not known:
            break
        place = min(known)[1]
        symbols[place : place + 2] = [pairs[place]]
    as_bytes = [[ids[s]] if s in ids else [ids[f"<0x{byte:02X}>"] for byte in s.encode()] for s in symbols]
    return [id for group in as_bytes for id in group]


@pytest.mark.parametrize("model", [str(CHECKPOINT), None], ids=["official-tiny", "nano"])
def test_scores_give_the_tokenizers_ids(model: str | None, tmp_path: Path) -> None:
    checkpoint = open_model(model)
    write_gguf(checkpoint, tmp_path / "out", "q8_0")
    fields, _ = read(tmp_path / "out" / "model-q8_0.gguf")
    tokenizer = checkpoint.make_processor().tokenizer
    for text in texts():
        assert merge_by_score(text, fields) == tokenizer(text, add_special_tokens=False)["input_ids"], repr(text)


def test_types_of_tokens(files: Path) -> None:
    fields, _ = read(files / "model-f32.gguf")
    token_types = fields["tokenizer.ggml.token_type"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(token_types) == len(tokens) == fields["llama.vocab_size"] == 900
    type_of = {token: gguf.TokenType(value).name for token, value in zip(tokens, token_types)}
    assert type_of["<unk>"] == "UNKNOWN" and type_of["<|im_end|>"] == type_of["<|endoftext|>"] == "CONTROL"
    assert type_of["<0x0A>"] == "BYTE" and token_types.count(gguf.TokenType.BYTE) == 256
    assert type_of["###"] == "UNUSED" and tokens[fields["tokenizer.ggml.eot_token_id"]] == "###"
    assert tokens[fields["tokenizer.ggml.eos_token_id"]] == "<|endoftext|>"
    assert type_of["▁the"] == "NORMAL" and "<image_placeholder>" not in tokens
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"):
        assert fields[f"tokenizer.ggml.{flag}"] is False


CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is this?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "image"}]}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "这是什么？"}]}],
    [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which _> one?"}]}],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "This: "}, {"type": "image"}, {"type": "text", "text": "?"}],
        }
    ],
    [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "And this?"}]},
    ],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_template_gives_our_prompt(messages: list[dict[str, Any]]) -> None:
    """Of messages whose parts were joined to one string, with a marker for each image."""

    def joined(content: Any) -> str:
        return content if isinstance(content, str) else "".join(part.get("text", MARKER) for part in content)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment.globals["raise_exception"] = refuse
    template = environment.from_string(GGUF_CHAT_TEMPLATE)
    flat = [message | {"content": joined(message["content"])} for message in messages]
    expected = "".join(MARKER if s.is_image else s.text for s in render(messages, add_generation_prompt=True))
    assert template.render(messages=flat, add_generation_prompt=True) == expected
    with pytest.raises(TemplateError, match="user or assistant"):
        template.render(messages=[*flat, {"role": "tool", "content": "x"}])


def test_the_modelfile_of_ollama(files: Path) -> None:
    text = (files / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith("FROM ./model-f32.gguf\nFROM ./mmproj-f32.gguf\nTEMPLATE ")
    assert 'PARAMETER stop "###"' in text and "{{ .Content }}" in text


# What cannot be written


def test_nanos_language_model_alone_is_written(tmp_path: Path) -> None:
    (note,) = write_gguf(open_model(None), tmp_path / "nano", "f16")
    assert note.startswith("Only the language model is written") and "convolutional stem" in note
    assert {path.name for path in (tmp_path / "nano").iterdir()} == {"model-f16.gguf", "Modelfile"}


def test_towers_that_clip_cannot_hold_are_named() -> None:
    eva = OpenClipVisionConfig(timm_model="eva02_base_patch14_448")
    assert "eva02" in str(vision_unsupported(YiVLConfig(vision_config=eva)))
    assert "last block" in str(vision_unsupported(YiVLConfig(vision_config=OpenClipVisionConfig(feature_layer=-1))))
    assert vision_unsupported(YiVLConfig(vision_config=OpenClipVisionConfig())) is None


def test_what_cannot_be_written_is_refused_in_one_line(
    source: Checkpoint, tmp_path: Path, toy_language_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="llama-quantize") as raised:
        write_gguf(source, tmp_path / "out", "q4_k_m")
    assert "\n" not in str(raised.value)
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="exists already"):
        write_gguf(source, tmp_path / "there")
    yi_vl.load(CHECKPOINT, device="cpu", quantize="int8").save(tmp_path / "int8")
    with pytest.raises(ValueError, match="quantised"):
        write_gguf(open_checkpoint(tmp_path / "int8"), tmp_path / "out")
    large = {name: tensor for name, tensor in source.tensors.items()}
    large["lm_head.weight"] = _scaled(large["lm_head.weight"], 1e8)
    with pytest.raises(ValueError, match=r"output\.weight has values beyond float16"):
        write_gguf(Checkpoint(**{**vars(source), "tensors": large}), tmp_path / "out", "f16")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"yi_vl\[gguf\]"):
        write_gguf(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _scaled(tensor: LazyTensor, factor: float) -> LazyTensor:
    return LazyTensor(tensor.shape, tensor.dtype, tensor.pieces, tensor.added_rows, lambda values: values * factor)


def test_a_byte_level_tokenizer_is_refused(tmp_path: Path, toy_language_model: Path) -> None:
    from yi_vl.image import YiVLImageProcessor
    from yi_vl.processor import YiVLProcessor, prepare_tokenizer

    tiny_model().save_pretrained(tmp_path / "bytes")
    tokenizer = prepare_tokenizer(str(toy_language_model))
    YiVLProcessor(YiVLImageProcessor(size_px=56), tokenizer).save_pretrained(tmp_path / "bytes")
    with pytest.raises(ValueError, match="not a SentencePiece BPE"):
        write_gguf(open_checkpoint(tmp_path / "bytes"), tmp_path / "out")


def test_the_command_writes_compares_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["convert", str(CHECKPOINT), str(tmp_path / "out"), "--to", "gguf"]
    app([*arguments, "--type", "q8_0", "--verify"], standalone_mode=False)
    out, err = capsys.readouterr()
    assert "Verified: 83 tensors read back" in out and err.count("issues/25814") == 1
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(ValueError, match="llama-quantize"):
        app([*arguments, "--type", "q4_k_m"], standalone_mode=False)
    with pytest.raises(ValueError, match="--type q8_0 is for --to gguf"):
        app([*arguments[:3], "--type", "q8_0"], standalone_mode=False)
    with pytest.raises(ValueError, match="no place for quantized weights"):
        app([*arguments, "--quantize", "int8"], standalone_mode=False)
    assert not (tmp_path / "out").exists()
