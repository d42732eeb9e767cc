"""`yi-vl upcycle`: experts of the same function, windows and sharing switched on, and what holds the result or not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from test_cli import Run, run  # noqa: F401  # a fixture
from test_expand import make_source  # noqa: F401  # a fixture
from tiny import OFFICIAL, tiny_config, tiny_processor

import yi_vl
from train.config import TrainConfig
from train.nano.measure.evaluate import read_questions
from train.nano.measure.experts import count_experts, measure_experts
from train.trainer import train
from yi_vl.checkpoint import convert, open_checkpoint
from yi_vl.decoder.config import FULL, SLIDING, YiHybridConfig
from yi_vl.decoder.experts import Router
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.upcycle import Changes, upcycle

pytestmark = pytest.mark.core

RELEASE = OFFICIAL / "checkpoint"
NANO = Path(yi_vl.__file__).parent / "nano"
WIDE = str(OFFICIAL / "wide.png")
LAYER = "model.language_model.layers.{}."
EXPERTS = ("--experts", "3", "--slices", "4")
ATTENTION = ("--every", "2", "--window", "8")


def logits(folder: Path, with_image: bool = True, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of a prompt, (S, V)."""
    loaded = yi_vl.load(folder, device="cpu", dtype=dtype)
    content: list[dict[str, Any]] = [{"type": "text", "text": "What is this? 这是什么？"}]
    encoded = loaded.processor.encode_messages(
        [{"role": "user", "content": [{"type": "image"}, *content] if with_image else content}]
    )
    pixels = loaded.processor.image_processor([Image.open(WIDE)], return_tensors="pt")["pixel_values"].to(dtype)
    with torch.inference_mode():
        output = loaded.model(input_ids=torch.tensor([encoded.input_ids]), pixel_values=pixels if with_image else None)
    return output.logits[0].float()  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of random weights, spread so that a change of the function is seen in the logits."""
    folder = tmp_path_factory.mktemp("dense")
    config = tiny_config()
    config.text_config.num_hidden_layers = 6
    config.text_config.attention_bias = True
    torch.manual_seed(0)
    model = YiVLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def hybrid(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it at once: layers 1, 3 and 5 see all tokens, and 3 has the keys and values of 1."""
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    changes = Changes(experts=3, slices=4, every=2, window=8, top_p=0.3, max_experts=5)
    convert(upcycle(open_checkpoint(dense), changes), folder, "yi-vl")
    return folder


@pytest.fixture(scope="module")
def windows(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same attention, and dense feed-forward layers."""
    folder = tmp_path_factory.mktemp("windows") / "model"
    convert(upcycle(open_checkpoint(dense), Changes(every=2, window=8)), folder, "yi-vl")
    return folder


@pytest.mark.parametrize("layout", ["official", "llava-hf", "yi-vl", "stem"])
def test_experts_compute_what_the_feed_forward_layers_did(
    layout: str, make_source: Callable[[str], Path], tmp_path: Path, run: Run  # noqa: F811
) -> None:  # fmt: skip
    source, target = make_source(layout), tmp_path / "out"
    code, out, err = run("upcycle", str(source), str(target), *EXPERTS)
    assert code == 0 and "Traceback" not in err
    assert "12 experts of width" in out and "4 per token (top-k)" in out and "computes what it did before" in out
    for with_image in (True, False):
        torch.testing.assert_close(logits(target, with_image), logits(source, with_image), rtol=0, atol=1e-4)
    question = ("ask", WIDE, "What is this?", "--max-new-tokens", "6", "-m")
    assert run(*question, str(target))[:2] == run(*question, str(source))[:2]


def test_experts_are_slices_of_copies(dense: Path, tmp_path: Path) -> None:
    convert(upcycle(open_checkpoint(dense), Changes(experts=3, slices=4)), tmp_path / "out", "yi-vl")
    torch.testing.assert_close(logits(tmp_path / "out"), logits(dense), rtol=0, atol=1e-4)
    old, new = (
        {name: tensor[...] for name, tensor in open_checkpoint(path).tensors.items()}
        for path in (dense, tmp_path / "out")
    )
    routers = []
    for number in range(6):
        gate, up, down = (old[LAYER.format(number) + f"mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        prefix = LAYER.format(number) + "mlp."
        for expert in range(12):
            first = expert % 4 * 16
            columns = slice(first, first + 16)
            assert torch.equal(new[prefix + "experts.gate_up_proj"][expert], torch.cat([gate[columns], up[columns]]))
            assert torch.equal(new[prefix + "experts.down_proj"][expert], 4 * down[:, columns])
        rows = new[prefix + "gate.weight"].unflatten(0, (3, 4))
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        routers.append(rows[:, 0])
    distinct = torch.cat(routers)
    assert len(distinct.unique(dim=0)) == 18 and 0.01 < distinct.std() < 0.03
    assert {name for name in old if ".mlp." not in name} == {name for name in new if ".mlp." not in name}


def test_the_seed_draws_the_routers(dense: Path) -> None:
    def router(seed: int) -> torch.Tensor:
        upcycled = upcycle(open_checkpoint(dense), Changes(experts=2, seed=seed))
        return upcycled.tensors[LAYER.format(3) + "mlp.gate.weight"][...]

    assert torch.equal(router(7), router(7)) and not torch.equal(router(7), router(8))


def test_nano_keeps_its_function(tmp_path: Path, run: Run) -> None:  # noqa: F811
    target = tmp_path / "out"
    assert run("upcycle", str(NANO), str(target), "--experts", "4", "--slices", "4")[0] == 0
    for with_image in (True, False):
        torch.testing.assert_close(logits(target, with_image), logits(NANO, with_image), rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_autocast", [False, True])
def test_a_token_gets_a_whole_copy_in_16_bits(is_autocast: bool) -> None:
    """Where probabilities of several copies would often be equal."""
    config = YiHybridConfig(hidden_size=64, num_experts=16, num_experts_per_tok=4)
    router = Router(config).to(torch.float32 if is_autocast else torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        router.weight.copy_(torch.randn(4, 64).repeat_interleave(4, 0) * 0.02)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_autocast):
        _, ids, _ = router(torch.randn(4096, 64, dtype=torch.bfloat16))
    copies = ids // 4
    assert torch.equal(copies, copies[:, :1].expand_as(copies))


def test_what_is_switched_on_later_is_as_if_at_once(dense: Path, hybrid: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    steps = (EXPERTS, ATTENTION, ("--top-p", "0.3", "--max-experts", "5"))
    source = dense
    for number, options in enumerate(steps):
        target = tmp_path / str(number)
        code, out, _ = run("upcycle", str(source), str(target), *options)
        assert code == 0
        assert ("computes something else" in out) == (number > 0)
        source = target
    at_once, later = open_checkpoint(hybrid), open_checkpoint(source)
    assert later.config.text_config.to_dict() == at_once.config.text_config.to_dict()
    assert later.tensors.keys() == at_once.tensors.keys()
    assert all(torch.equal(tensor[...], later.tensors[name][...]) for name, tensor in at_once.tensors.items())


def test_windows_and_sharing(dense: Path, windows: Path, hybrid: Path) -> None:
    text = open_checkpoint(hybrid).config.text_config
    assert text.layer_types == [SLIDING, FULL] * 3 and text.sliding_window == 8
    assert text.kv_source_layers == [0, 1, 2, 1, 4, 5]
    assert (text.router_top_p, text.max_experts_per_tok, text.num_experts_per_tok) == (0.3, 5, 4)
    old, new = open_checkpoint(dense).tensors, open_checkpoint(windows).tensors
    dropped = {LAYER.format(3) + f"self_attn.{part}_proj.{end}" for part in "kv" for end in ("weight", "bias")}
    assert old.keys() - new.keys() == dropped and not new.keys() - old.keys()
    assert all(torch.equal(tensor[...], old[name][...]) for name, tensor in new.items())
    expected = logits(dense)
    for folder in (windows, hybrid):
        assert (logits(folder) - expected).abs().max() > 0.1


def test_sharing_alone_and_windows_alone(dense: Path) -> None:
    source = open_checkpoint(dense)
    shared = upcycle(source, Changes(share=3)).config.text_config
    assert shared.layer_types == [FULL] * 6 and shared.kv_source_layers == [0, 0, 0, 3, 3, 3]
    sliding = upcycle(source, Changes(every=2, window=16, share=1))
    assert sliding.config.text_config.kv_source_layers == list(range(6))
    narrower = upcycle(sliding, Changes(window=4)).config.text_config
    assert (narrower.layer_types, narrower.sliding_window) == (sliding.config.text_config.layer_types, 4)


def test_it_is_saved_loaded_and_generates(hybrid: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    loaded = yi_vl.load(hybrid, device="cpu", dtype=torch.float32)
    loaded.save(tmp_path / "saved")
    assert torch.equal(logits(tmp_path / "saved"), logits(hybrid))
    assert run("convert", str(hybrid), str(tmp_path / "converted"), "--verify")[0] == 0
    answer = loaded.predict(WIDE, "What is this?", max_new_tokens=6)
    assert run("ask", WIDE, "What is this?", "--max-new-tokens", "6", "-m", str(hybrid))[:2] == (0, answer + "\n")


def test_info_describes_it(hybrid: Path, dense: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setenv("COLUMNS", "300")
    code, out, _ = run("info", str(hybrid))
    assert code == 0
    for text in (
        "full in layers 1, 3, 5; a window of 8 tokens in layers 0, 2, 4",
        "shared by layers 1+3; all other layers have their own",
        "128 bytes per token beyond the window (bf16); 0.1 MB of 512 tokens, 2.9 times less",
        "12 experts of width 16 in each layer; per token the most probable up to a sum of 0.3, 5 at most (top-p)",
    ):
        assert text in out, text
    model = yi_vl.load(hybrid, device="cpu").model
    total = sum(p.numel() for p in (*model.model.language_model.parameters(), *model.lm_head.parameters()))
    active = total - 6 * 7 * 3 * 32 * 16
    assert f"{total:,} of the language model, at most {active:,} active per token" in out
    assert "int8" not in out and "hybrid" not in run("info", str(dense))[1].replace(str(dense), "")
    code, out, _ = run("info", str(hybrid), "--tensors")
    assert "layers.3.self_attn.k_proj" not in out and "mlp.experts.gate_up_proj" in out


def test_it_is_written_shard_by_shard(tmp_path: Path, saved_bytes: list[int]) -> None:
    convert(upcycle(open_checkpoint(RELEASE), Changes(experts=4)), tmp_path / "out", "yi-vl", shard_bytes=700_000)
    assert len(saved_bytes) > 3 and max(saved_bytes) <= 700_000
    torch.testing.assert_close(logits(tmp_path / "out"), logits(RELEASE), rtol=0, atol=1e-4)


def test_a_factor_that_16_bits_round_is_named(dense: Path, tmp_path: Path, run: Run) -> None:  # noqa: F811
    yi_vl.load(NANO, device="cpu", dtype=torch.bfloat16).save(tmp_path / "source")
    for slices, is_rounded in ((11, True), (8, False)):
        options = ("--experts", "2", "--slices", str(slices))
        _, out, _ = run("upcycle", str(tmp_path / "source"), str(tmp_path / str(slices)), *options)
        assert (f"times {slices} are rounded in bfloat16" in out) == is_rounded


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


def test_without_experts_it_is_quantized_as_a_dense_model(windows: Path, tmp_path: Path) -> None:
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


def test_adapters_of_its_attention_are_merged(hybrid: Path, tmp_path: Path) -> None:
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


def test_experts_per_token_are_counted_by_skill(dense: Path, hybrid: Path, tmp_path: Path) -> None:
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
