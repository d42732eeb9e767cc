"""int8 and int4: near the original, saved and loaded again, nothing else touched, never the whole model in memory."""

from __future__ import annotations

import json
import math
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_cli import Run, run  # noqa: F401  a fixture
from tiny import OFFICIAL, tiny_yi_vl
from torch import nn

import yi_vl
from yi_vl import quantize
from yi_vl.checkpoint import convert, open_checkpoint
from yi_vl.checkpoint import load as loading
from yi_vl.checkpoint import summary as sizes
from yi_vl.checkpoint.assemble import from_parts
from yi_vl.checkpoint.weight_files import WeightFiles
from yi_vl.quantize import SCHEMES, Int4Linear, Int8Linear, int4, int8, packed_layers

DOG = Path(__file__).parents[1] / "docs/images/dog.png"
QUESTION = "What is in this image?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, 32 wide, in bfloat16."""
    path = tmp_path_factory.mktemp("original") / "model"
    made = tiny_yi_vl()
    made.model.to(torch.bfloat16)
    made.save(path)
    return path


def logits_of(model: yi_vl.YiVL, image: Path = OFFICIAL / "wide.png") -> torch.Tensor:
    content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
    inputs = model.engine.model_inputs(model.engine.prepare([{"role": "user", "content": content}]))
    with torch.inference_mode():
        outputs = model.model(**inputs)
    return outputs.logits[0].float()


@pytest.mark.core
@pytest.mark.parametrize(("scheme", "bound"), [("int8", 0.002), ("int4", 0.15)])
def test_nano_moves_little(scheme: str, bound: float) -> None:
    exact = logits_of(yi_vl.load(device="cpu"), DOG).log_softmax(-1)
    model = yi_vl.load(device="cpu", quantize=scheme)  # type: ignore[arg-type]
    measured = logits_of(model, DOG).log_softmax(-1)
    divergence = (exact.exp() * (exact - measured)).sum(-1).mean()
    assert 0 < divergence < bound
    assert "dog" in model.predict(DOG, QUESTION)
    requests = [(DOG, QUESTION), (DOG, "图片里是什么？"), (None, "Hello!")]
    assert model.predict_batch(requests) == [model.predict(*request) for request in requests]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_linears_of_the_language_model_and_nothing_else(folder: Path, scheme: str) -> None:
    original = yi_vl.load(folder, device="cpu").model
    model = yi_vl.load(folder, device="cpu", quantize=scheme).model  # type: ignore[arg-type]
    linears = {name for name, module in original.named_modules() if isinstance(module, nn.Linear)}
    expected = {name for name in linears if name.startswith("model.language_model.")} | {"lm_head"}
    assert {name for name, _ in packed_layers(model)} == expected
    state = model.state_dict()
    for name, tensor in original.state_dict().items():
        if name.rpartition(".")[0] not in expected:
            assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_saved_and_loaded_again(folder: Path, tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    model = yi_vl.load(folder, device="cpu", dtype=dtype, quantize=scheme)  # type: ignore[arg-type]
    model.save(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin"))
    again = yi_vl.load(tmp_path / "saved", device="cpu")
    assert again.model.dtype == dtype
    assert torch.equal(logits_of(again), logits_of(model))
    from transformers import AutoModelForImageTextToText

    native = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved", dtype=dtype).eval()
    assert torch.equal(logits_of(yi_vl.YiVL(native, model.processor)), logits_of(model))
    for options in ({"quantize": "int8"}, {"quantize": scheme}):
        with pytest.raises(ValueError, match="is quantised already"):
            yi_vl.load(tmp_path / "saved", **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="quantised for CPUs"):
        yi_vl.load(tmp_path / "saved", device="cuda")
    with pytest.raises(ValueError, match="exists already"):
        model.save(tmp_path / "saved")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["int8", "int8 without FBGEMM", "int4"])
@pytest.mark.parametrize("shape", [(48, 96), (200, 128)])
def test_few_rows_and_many_are_the_same_product(
    monkeypatch: pytest.MonkeyPatch, variant: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Rows of any size: a large one does not spoil a small one beside it."""
    torch.manual_seed(0)
    if variant == "int8 without FBGEMM":
        monkeypatch.setattr(int8, "_has_fbgemm", lambda: False)
    linear = nn.Linear(shape[1], shape[0], dtype=dtype, bias=False)
    layer: Any = Int4Linear(linear, group_size=32) if variant == "int4" else Int8Linear(linear)
    for name, tensor in layer.quantize(linear.weight.detach()).items():
        setattr(layer, name, tensor)
    stored, num_bytes = layer.state_dict(), layer.nbytes
    layer.pack_()
    assert num_bytes <= layer.nbytes < 1.4 * num_bytes
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())
    layer.load_state_dict(stored)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in layer.state_dict().items())
    x = torch.randn(2, 50, shape[1], dtype=dtype)
    x[0] *= 100
    with torch.inference_mode():
        many, exact = layer(x), linear(x)
        few = torch.stack([layer(row[None]) for row in x.flatten(0, 1)]).view_as(many)
        last = layer(x[:, -1:])  # of every row of a batch, as the head is asked for them: not contiguous
    differences = {"int8": 0.012, "int8 without FBGEMM": 0.006, "int4": 0.12}
    same = differences["int8"] if variant == "int8" else 1e-6 if dtype == torch.float32 else 0.005
    for row in range(2):
        assert (last[row, 0] - many[row, -1]).norm() < same * exact[row, -1].norm()
        assert (few[row] - many[row]).norm() < same * exact[row].norm()
        assert (many[row] - exact[row]).norm() < differences[variant] * exact[row].norm()


def test_int8_works_where_fbgemm_does_not(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """What one processor saved another loads; and a torch without FBGEMM's tensors is no error."""
    if not int8._has_fbgemm():
        pytest.skip("it does not work here")
    yi_vl.load(folder, device="cpu", quantize="int8").save(tmp_path / "saved")
    with_it = logits_of(yi_vl.load(tmp_path / "saved", device="cpu"))
    monkeypatch.delattr(torch, "_make_per_channel_quantized_tensor")
    int8._has_fbgemm.cache_clear()
    without_it = logits_of(yi_vl.load(tmp_path / "saved", device="cpu"))
    int8._has_fbgemm.cache_clear()
    assert 0 < (with_it - without_it).norm() < 0.02 * without_it.norm()


def test_the_original_is_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most two matrices: one that is quantised, and the one before it or after it."""
    alive: dict[int, int] = {}
    peak = 0
    convert_ = quantize._Quantize.convert

    def counted(self: Any, input_dict: dict[str, Any], **options: Any) -> Any:
        nonlocal peak
        (weight,) = input_dict.values()
        weight = weight[0] if isinstance(weight, list) else weight
        alive[id(weight)] = weight.nbytes
        weakref.finalize(weight, alive.pop, id(weight))
        peak = max(peak, sum(alive.values()))
        return convert_(self, input_dict, **options)

    monkeypatch.setattr(quantize._Quantize, "convert", counted)
    model = yi_vl.load(device="cpu", dtype=torch.bfloat16, quantize="int8").model  # nano
    matrices = sorted(2 * layer.in_features * layer.out_features for _, layer in packed_layers(model))
    assert matrices[-1] <= peak <= sum(matrices[-2:]) < sum(matrices) / 4
    assert not alive


def test_impossible_options_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            yi_vl.load(folder, **options)

    refuse("quantize is 'int3'; expected one of int8, int4", quantize="int3")
    refuse("works on CPUs and NVIDIA GPUs, not on 'mps'", device="mps", quantize="int8")
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    refuse(r"torchao.quantization is missing.*yi_vl\[quantize\]", device="cuda", quantize="int4")
    monkeypatch.setattr(quantize, "_GROUP_SIZES", (64,))
    refuse("groups of 64, and this model's layers are 32, 64 wide", device="cpu", quantize="int4")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    int4.packed_rows.cache_clear()
    refuse("AVX2 or AVX512", device="cpu", quantize="int4")
    int4.packed_rows.cache_clear()


def test_a_gpu_would_get_torchao(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """Its configuration, as far as it runs without a GPU: int8 works everywhere, if slowly."""
    pytest.importorskip("torchao")
    text_config = loading.read_config(str(folder)).text_config
    assert quantize.make_config("int4", text_config, "cuda:0").to_dict()["quant_method"] == "torchao"
    torchao_config = quantize.make_config("int8", None, "cuda")
    monkeypatch.setattr(loading, "make_config", lambda *_: torchao_config)
    model = yi_vl.load(folder, device="cpu", dtype=torch.bfloat16, quantize="int8")
    quantized = {name for name, p in model.model.named_parameters() if type(p).__name__ == "Int8Tensor"}
    assert quantized == {
        f"{name}.weight"
        for name, module in model.model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(("model.language_model.", "lm_head"))
    }
    model.save(tmp_path / "saved")
    again = yi_vl.load(tmp_path / "saved", device="cpu")
    assert torch.equal(logits_of(again), logits_of(model))
    with pytest.raises(ValueError, match="quantised by torchao"):
        open_checkpoint(tmp_path / "saved")
    config = loading.read_config(str(tmp_path / "saved"))
    assert sizes.scheme_of(config) == "Int8WeightOnlyConfig of torchao"
    entries = WeightFiles.find(tmp_path / "saved").entries
    measured = sizes.measure_quantized(config, tmp_path / "saved")
    assert measured.num_tensors == len(entries)
    stored = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in entries.values())
    assert sum(measured.memory_bytes.values()) == stored
    assert measured.memory_bytes["projector"] == 2 * measured.num_parameters["projector"]  # bfloat16 as it was
    assert sizes.tensor_shapes(config, tmp_path / "saved")["lm_head._weight_qdata"] == (960, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sizes_are_those_of_the_loaded_model(run: Run, folder: Path, tmp_path: Path, scheme: str, dtype: Any) -> None:  # noqa: F811
    saved = tmp_path / "saved"
    yi_vl.load(folder, device="cpu", dtype=dtype, quantize=scheme).save(saved)  # type: ignore[arg-type]
    config = loading.read_config(str(saved))
    measured = sizes.measure_quantized(config, saved)
    model = yi_vl.load(saved, device="cpu").model
    parts = {
        "vision tower": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "language model": [model.model.language_model, model.lm_head],
    }
    assert measured.memory_bytes == {name: sum(map(quantize.num_bytes, modules)) for name, modules in parts.items()}
    assert measured.num_parameters == sizes.measure(loading.read_config(str(folder))).num_parameters
    stored = {name: entry.shape for name, entry in WeightFiles.find(saved).entries.items()}
    assert sizes.tensor_shapes(config, saved) == stored and measured.num_tensors == len(stored)
    (saved / "model.safetensors").unlink()  # no weights are read
    code, out, err = run("info", str(saved))
    assert (code, err) == (0, "") and scheme in out and str(dtype).removeprefix("torch.") in out
    assert f"{sum(measured.memory_bytes.values()) / 1e6:,.1f}" in out and "official" not in out
    assert "lm_head.weight_scale" in run("info", str(saved), "--tensors")[1]


def test_layouts_that_cannot_hold_quantized_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    yi_vl.load(folder, device="cpu", quantize="int8").save(tmp_path / "saved")
    checkpoint = open_checkpoint(tmp_path / "saved")
    for layout in ("official", "llava-hf"):
        with pytest.raises(ValueError, match="is quantised, and the layout"):
            convert(checkpoint, tmp_path / "other", layout)  # type: ignore[arg-type]
    convert(checkpoint, tmp_path / "copy", "yi-vl")
    assert torch.equal(logits_of(yi_vl.load(tmp_path / "copy")), logits_of(yi_vl.load(tmp_path / "saved")))


def test_adapters_are_not_merged_into_it(folder: Path, tmp_path: Path) -> None:
    yi_vl.load(folder, device="cpu", quantize="int8").save(tmp_path / "saved")
    (tmp_path / "adapters").mkdir()
    content = json.dumps(
        {"base_model_name_or_path": str(tmp_path / "saved"), "peft_type": "LORA", "r": 2, "lora_alpha": 4}
    )
    (tmp_path / "adapters" / "adapter_config.json").write_text(content)
    for read in (yi_vl.load, lambda path: loading.read_config(str(path))):
        with pytest.raises(ValueError, match="that is quantised; adapters are merged into the original"):
            read(tmp_path / "adapters")


def test_a_quantized_language_model_is_not_trained(toy_language_model: Path, toy_tower: str, tmp_path: Path) -> None:
    for file in toy_language_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | {
        "quantization_config": {"quant_method": "gptq", "bits": 4}
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantised \(gptq\)"):
        from_parts(toy_tower, None, str(tmp_path), 28)


def test_the_command_line(run: Run, folder: Path, tmp_path: Path) -> None:  # noqa: F811
    saved = str(tmp_path / "saved")
    assert run("convert", str(folder), saved, "--quantize", "int4") == (0, f"{saved} is written.\n", "")
    code, answer, _ = run("ask", "Hi", "--model", saved, "--max-new-tokens", "3")
    assert code == 0
    assert run("ask", "Hi", "--model", str(folder), "--quantize", "int4", "--max-new-tokens", "3")[1] == answer
    code, _, error = run("ask", "Hi", "--model", saved, "--quantize", "int8")
    assert code == 2 and "is quantised already" in error
    code, _, error = run("convert", str(folder), saved + "-2", "--quantize", "int4", "--to", "official")
    assert code == 2 and "has no place for quantized weights" in error


def test_measuring(folder: Path) -> None:
    from eval.speed.quantize import compare_quantize, measure_load

    variants = compare_quantize(folder, prompt_tokens=20, new_tokens=3)["variants"]
    assert list(variants) == ["bf16", "int8", "int4"]
    assert (
        variants["int8"]["relative_memory"] < 1
        and variants["bf16"]["kl"] == 0 < variants["int8"]["kl"] < variants["int4"]["kl"]
    )
    measured: list[Any] = []
    measure_load(folder, "int8", SimpleNamespace(send=measured.append))
    measure_load(folder, "int3", SimpleNamespace(send=measured.append))  # type: ignore[arg-type]
    assert measured[0]["weights_gb"] > 0 and "int3" in measured[1]
