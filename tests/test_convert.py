"""Every layout in and out: the official outputs, bit-exact round trips, and checkpoints that are not whole."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import OFFICIAL, official_messages, tiny_model, tiny_processor

import yi_vl
from yi_vl.checkpoint import Layout, convert, largest_difference, open_checkpoint
from yi_vl.checkpoint import weight_files as files_module
from yi_vl.checkpoint.key_map import LLAVA_HF, from_native, to_native
from yi_vl.checkpoint.key_map import OFFICIAL as OFFICIAL_NAMES
from yi_vl.config import preset

pytestmark = pytest.mark.core

CHECKPOINT = OFFICIAL / "checkpoint"
VIT = "vit/clip-vit-H-14-laion2B-s32B-b79K-yi-vl-tiny"
GOLDEN = json.loads((OFFICIAL / "golden.json").read_text(encoding="utf-8"))
ARRAYS = np.load(OFFICIAL / "golden.npz")


@pytest.fixture(scope="module")
def official() -> yi_vl.YiVL:
    return yi_vl.load(CHECKPOINT, device="cpu", dtype=torch.float32)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the official checkpoint to be spoilt."""
    return Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))


@pytest.mark.parametrize("case", list(GOLDEN))
def test_the_official_code_and_this_agree(case: str, official: yi_vl.YiVL) -> None:
    golden = GOLDEN[case]
    images = [Image.open(OFFICIAL / name) for name in golden["images"]]
    inputs = official.processor.encode_messages(official_messages(golden["turns"]))
    model, image_id = official.model, official.model.config.image_token_id
    assert _with_one_id_per_image(inputs.input_ids, image_id, 16) == golden["input_ids"]
    pixels = official.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, torch.from_numpy(ARRAYS[f"{case}.pixels"]), rtol=0, atol=1e-4)
    with torch.inference_mode():
        features = model.model.encode_images(pixels)
        logits = model(input_ids=torch.tensor([inputs.input_ids]), pixel_values=pixels).logits[0, :, :900]
        assert isinstance(logits, torch.Tensor)
        torch.testing.assert_close(features, torch.from_numpy(ARRAYS[f"{case}.image_features"]), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[-8:], torch.from_numpy(ARRAYS[f"{case}.last_logits"]), rtol=1e-4, atol=1e-4)
        means = torch.from_numpy(ARRAYS[f"{case}.logits_mean_abs"])
        torch.testing.assert_close(logits.abs().mean(-1), means, rtol=1e-4, atol=1e-4)
        ids = torch.tensor([inputs.input_ids])
        new = model.generate(
            input_ids=ids, pixel_values=pixels, do_sample=False, max_new_tokens=24, min_new_tokens=24, eos_token_id=None
        )
    assert new[0, ids.shape[1] :].tolist() == golden["generated"]


def _with_one_id_per_image(ids: list[int], image_id: int, patches: int) -> list[int]:
    """The official code's form: -200 for an image."""
    out: list[int] = []
    index = 0
    while index < len(ids):
        if ids[index] == image_id:
            out.append(-200)
            index += patches
        else:
            out.append(ids[index])
            index += 1
    return out


@pytest.mark.parametrize("to", ["yi-vl", "official", "llava-hf"])
def test_every_layout_goes_round_bit_for_bit(to: Layout, tmp_path: Path, official: yi_vl.YiVL) -> None:
    """official -> `to` in many shards -> native -> official, in float32 and bfloat16 side by side as the release is."""
    mixed = _in_bfloat16(shutil.copytree(CHECKPOINT, tmp_path / "mixed"))
    source = open_checkpoint(mixed)
    convert(source, tmp_path / "there", to, shard_bytes=200_000)
    assert len(list((tmp_path / "there").glob("*-of-*"))) > 3
    there = open_checkpoint(tmp_path / "there")
    assert there.layout == to
    _assert_same(source, there)
    convert(there, tmp_path / "back", "official")
    back = open_checkpoint(tmp_path / "back")
    _assert_same(source, back)
    assert back.tensors["lm_head.weight"].pieces[0].entry.shape[0] == 900, "the added rows are trimmed"
    again = yi_vl.load(tmp_path / "there", device="cpu", dtype=torch.float32)
    expected = yi_vl.load(mixed, device="cpu", dtype=torch.float32)
    image = OFFICIAL / "wide.png"
    assert again.predict(image, "What is this?", max_new_tokens=8) == expected.predict(
        image, "What is this?", max_new_tokens=8
    )
    text = "<|im_end|> 图片 a  b<image_placeholder>"
    ids = again.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids == official.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    typed = [{"role": "user", "content": f"{text}<unk><|reserved_3|><|im_start|><0x0A>"}]
    for folder in ("there", "back"):
        processor = open_checkpoint(tmp_path / folder).make_processor()
        assert processor.encode_messages(typed).input_ids == official.processor.encode_messages(typed).input_ids
    assert again.model.config.text_config.use_cache


def test_a_saved_model_keeps_its_sentencepiece_file(tmp_path: Path, official: yi_vl.YiVL) -> None:
    """By `save`, or as the trainer writes it, with the folder gone that it was loaded from."""
    official.save(tmp_path / "first")
    loaded = yi_vl.load(tmp_path / "first", device="cpu")
    shutil.rmtree(tmp_path / "first")
    loaded.save(tmp_path / "second")
    deepcopy(loaded.processor).save_pretrained(tmp_path / "third")
    expected = (CHECKPOINT / "tokenizer.model").read_bytes()
    assert all((tmp_path / name / "tokenizer.model").read_bytes() == expected for name in ("second", "third"))
    convert(open_checkpoint(tmp_path / "second"), tmp_path / "official", "official")
    assert (tmp_path / "official" / "tokenizer.model").read_bytes() == expected


def test_a_conversion_holds_two_shards_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    import yi_vl.checkpoint.write as target

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(target, "save_file", save)
    convert(open_checkpoint(CHECKPOINT), tmp_path / "out", "yi-vl", shard_bytes=300_000)
    assert len(held) > 3 and max(held) <= 300_000


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(done: int, total: int) -> None:
        assert not (tmp_path / "out").exists()
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(open_checkpoint(CHECKPOINT), tmp_path / "out", "yi-vl", shard_bytes=300_000, progress=stop)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.tmp").mkdir()  # as a killed one leaves it
    (tmp_path / ".out.tmp" / "config.json").write_text("{}")
    convert(open_checkpoint(CHECKPOINT), tmp_path / "out", "yi-vl")
    assert open_checkpoint(tmp_path / "out").layout == "yi-vl" and [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="exists already"):
        convert(open_checkpoint(CHECKPOINT), tmp_path / "out", "yi-vl")


def test_a_stem_fits_no_other_layout(tmp_path: Path) -> None:
    tiny_model(stem_widths=[8, 16]).save_pretrained(tmp_path / "stem")
    tiny_processor(patch_size=28).save_pretrained(tmp_path / "stem")
    for to in ("official", "llava-hf"):
        with pytest.raises(ValueError, match="convolutional stem"):
            convert(open_checkpoint(tmp_path / "stem"), tmp_path / "out", to)  # type: ignore[arg-type]


def test_both_towers_of_a_release(copy: Path) -> None:
    assert largest_difference(open_checkpoint(copy)) == (0.0, largest_difference(open_checkpoint(copy))[1])
    path = copy / VIT / "pytorch_model.bin"
    weights = torch.load(path, weights_only=True)
    weights["vision_model.encoder.layers.1.self_attn.k_proj.bias"][3] += 0.5
    torch.save(weights, path)
    difference, where = largest_difference(open_checkpoint(copy))
    assert difference == 0.5 and where.endswith("resblocks.1.attn.in_proj_bias")
    name = "model.vision_tower.visual.transformer.resblocks.1.attn.in_proj_bias"
    from_vit, from_shards = (open_checkpoint(copy, tower).tensors[name][...] for tower in ("vit", "shards"))  # type: ignore[arg-type]
    assert float((from_vit - from_shards).abs().max()) == 0.5
    picked = yi_vl.load(copy, device="cpu", tower_from="shards").model.state_dict()[name]
    torch.testing.assert_close(picked, from_shards, rtol=0, atol=0)
    convert(open_checkpoint(copy), copy / "native", "yi-vl")
    with pytest.raises(ValueError, match="one copy of the tower, nothing to choose"):
        yi_vl.load(copy / "native", device="cpu", tower_from="shards")
    with pytest.raises(ValueError, match="tower_from is 'both'"):
        yi_vl.load(copy, device="cpu", tower_from="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one copy of the vision tower"):
        largest_difference(open_checkpoint(copy / "native"))


def test_the_shards_alone_will_do(copy: Path) -> None:
    (copy / VIT / "pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match="has no weights"):
        open_checkpoint(copy)
    assert open_checkpoint(copy, "shards").tensors


def test_the_first_releases_names_of_the_norms(copy: Path) -> None:
    expected = open_checkpoint(CHECKPOINT)
    index_path = copy / "pytorch_model.bin.index.json"
    index = json.loads(index_path.read_text())
    old = {"input_layernorm": "ln1", "post_attention_layernorm": "ln2"}

    def renamed(name: str) -> str:
        for new, short in old.items():
            name = name.replace(new, short)
        return name

    for path in copy.glob("pytorch_model-*.bin"):
        torch.save({renamed(name): tensor for name, tensor in torch.load(path, weights_only=True).items()}, path)
    index["weight_map"] = {renamed(name): file for name, file in index["weight_map"].items()}
    index_path.write_text(json.dumps(index))
    assert "model.layers.0.ln1.weight" in index["weight_map"]
    _assert_same(expected, open_checkpoint(copy))


def test_safetensors_and_a_single_file_are_read_too(copy: Path) -> None:
    expected = open_checkpoint(CHECKPOINT)
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(copy.glob("pytorch_model*")):
        weights |= torch.load(path, weights_only=True) if path.suffix == ".bin" else {}
        path.unlink()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # as older transformers stored it
    save_file(weights, copy / "model.safetensors")
    _assert_same(expected, open_checkpoint(copy))


def test_views_in_a_pickle_are_read_as_what_they_show(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {"slice": base[1:3, 2:4], "turned": base.T, "whole": base, "none": base[:0], "one": base[2, 2]}
    torch.save(views, tmp_path / "pytorch_model.bin")
    files = files_module.WeightFiles.find(tmp_path)
    for name, tensor in torch.load(tmp_path / "pytorch_model.bin", weights_only=True).items():
        for dtype in (torch.float32, torch.bfloat16):
            read = torch.empty(tensor.shape, dtype=dtype)
            files.read_into(name, read)
            torch.testing.assert_close(read, tensor.to(dtype), rtol=0, atol=0)


def _spoil_missing(copy: Path) -> None:
    _edit_shard(copy, lambda weights: weights.pop("model.norm.weight", None), "model.norm.weight")


def _spoil_unexpected(copy: Path) -> None:
    save_file({"model.adapter.weight": torch.ones(3, 5)}, copy / "extra.safetensors")
    path = copy / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.adapter.weight"] = "extra.safetensors"
    path.write_text(json.dumps(index))


def _spoil_shape(copy: Path) -> None:
    def grow(weights: dict[str, torch.Tensor]) -> None:
        if "model.mm_projector.0.bias" in weights:
            weights["model.mm_projector.0.bias"] = torch.zeros(65)

    _edit_shard(copy, grow)


def _spoil_cut(copy: Path) -> None:
    path = copy / "pytorch_model-00002-of-00004.bin"
    path.write_bytes(path.read_bytes()[:200_000])


def _spoil_absent(copy: Path) -> None:
    (copy / "pytorch_model-00003-of-00004.bin").unlink()


def _spoil_code(copy: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (copy / "executed",))

    torch.save({"model.norm.weight": Evil()}, copy / "pytorch_model-00001-of-00004.bin", pickle_module=pickle)


def _spoil_traversal(copy: Path) -> None:
    _redirect(copy, "../outside.bin")


def _spoil_link(copy: Path) -> None:
    outside = copy.parent / "outside.bin"
    shutil.copy(copy / "pytorch_model-00001-of-00004.bin", outside)
    (copy / "linked.bin").symlink_to(outside)
    _redirect(copy, "linked.bin")


def _spoil_vit_path(copy: Path) -> None:
    _edit_config(copy, mm_vision_tower="../../vit")


def _spoil_no_vit(copy: Path) -> None:
    shutil.rmtree(copy / "vit")


def _spoil_projector(copy: Path) -> None:
    _edit_config(copy, mm_projector_type="mlp2x_gelu")


def _spoil_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.model").write_bytes(b"no model")


def _spoil_layers(copy: Path) -> None:
    _edit_config(copy, num_hidden_layers=3)


@pytest.mark.parametrize(
    ("spoil", "patterns"),
    [
        (_spoil_missing, [r"pytorch_model-0000\d-of-00004.bin lacks model.norm.weight"]),
        (_spoil_unexpected, [r"1 tensor not of a Yi-VL: model.adapter.weight \(3, 5\)"]),
        (_spoil_shape, [r"linear_1.bias is \(65,\), expected \(64,\)"]),
        (_spoil_cut, [r"pytorch_model-00002-of-00004.bin", "200,000 bytes", "cut short"]),
        (_spoil_absent, ["incomplete", "pytorch_model-00003-of-00004.bin"]),
        (_spoil_code, ["would run code"]),
        (_spoil_traversal, ["leads out of the checkpoint"]),
        (_spoil_link, ["leads out of the checkpoint"]),
        (_spoil_vit_path, ["mm_vision_tower", "leads out of the checkpoint"]),
        (_spoil_no_vit, ["incomplete", "vit/"]),
        (_spoil_projector, ["mm_projector_type is 'mlp2x_gelu'", "mlp2x_gelu_Norm"]),
        (_spoil_tokenizer, ["tokenizer cannot be loaded"]),
        (_spoil_layers, [r"9 tensors missing", r"layers.2.self_attn.q_proj.weight \(64, 64\)"]),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line(copy: Path, spoil: Any, patterns: list[str]) -> None:
    spoil(copy)
    with pytest.raises(ValueError) as raised:
        yi_vl.load(copy, device="cpu")
    for pattern in patterns:
        assert re.search(pattern, str(raised.value)), str(raised.value)
    assert "\n" not in str(raised.value) and not (copy / "executed").exists()


def test_the_hubs_cache_with_its_links_is_read(copy: Path, tmp_path: Path) -> None:
    """A snapshot is made of links to blobs, also below vit/."""
    repository = tmp_path / "models--01-ai--Yi-VL-6B"
    snapshot = repository / "snapshots" / "abc"
    (repository / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted(path for path in copy.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number}"
        link = snapshot / path.relative_to(copy)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    _assert_same(open_checkpoint(CHECKPOINT), open_checkpoint(snapshot))


@pytest.mark.parametrize(("size", "count"), [("6b", 818), ("34b", 1070)])
def test_every_name_of_the_full_sizes_has_its_counterpart(size: str, count: int) -> None:
    with torch.device("meta"):
        names = list(yi_vl.YiVLForConditionalGeneration(preset(size)).state_dict())
    for layout in (OFFICIAL_NAMES, LLAVA_HF):
        converted = [new for name in names for new in from_native(name, layout)]
        assert len(set(converted)) == len(converted) == count
        back = [to_native(name, layout) for name in converted]
        assert {slot.name for slot in back if slot} == set(names) and len(set(back)) == count
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.31.self_attn.out_proj.bias" in {
        new for name in names for new in from_native(name, OFFICIAL_NAMES)
    }


def _assert_same(first: Any, second: Any) -> None:
    """Equal tensors, to the bit and in the same dtypes."""
    assert first.tensors.keys() == second.tensors.keys()
    for name, tensor in first.tensors.items():
        left, right = tensor[...], second.tensors[name][...]
        assert left.dtype == right.dtype and torch.equal(left, right), name
    of_files = {"architectures": None, "auto_map": None}  # what a folder says of itself, not of the model
    assert first.config.to_dict() | of_files == second.config.to_dict() | of_files


def _in_bfloat16(folder: Path) -> Path:
    """The language model and projector in bfloat16, the tower of vit/ in float32, as the release has them."""
    for path in folder.glob("pytorch_model-*.bin"):
        torch.save({name: tensor.bfloat16() for name, tensor in torch.load(path, weights_only=True).items()}, path)
    _edit_config(folder, torch_dtype="bfloat16")
    return folder


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_shard(folder: Path, edit: Any, only_if: str = "") -> None:
    for path in folder.glob("pytorch_model-*.bin"):
        weights = torch.load(path, weights_only=True)
        if not only_if or only_if in weights:
            edit(weights)
            torch.save(weights, path)


def _redirect(folder: Path, file: str) -> None:
    path = folder / "pytorch_model.bin.index.json"
    text = path.read_text().replace("pytorch_model-00001-of-00004.bin", file)
    path.write_text(text)
