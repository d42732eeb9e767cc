"""Long context: a raised base, linear and YaRN scaling, from the files to the cache; and what cannot be cached."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import OFFICIAL, prefill, tiny_config, tiny_processor, uncached
from toy_runs import losses
from transformers import LlamaForCausalLM

import yi_vl
from train.config import RopeConfig, TrainConfig
from train.init import set_rope_
from train.plan.__main__ import make_plan
from train.trainer import train
from yi_vl.checkpoint import convert, open_checkpoint
from yi_vl.checkpoint.gguf_language import language_fields
from yi_vl.checkpoint.load import read_config
from yi_vl.config import YiVLConfig
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.predict import YiVL

ROOT = Path(__file__).parents[1]
ROPES: dict[str, dict[str, Any]] = {
    "raised base": {"rope_type": "default", "rope_theta": 1e7},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 256},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}  # fmt: skip
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 4.0} | {
    "original_max_position_embeddings": 256
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


def config_with(rope: dict[str, Any]) -> YiVLConfig:
    config = tiny_config(max_position_embeddings=1024)
    text = config.text_config.to_dict() | {"rope_parameters": dict(rope)}
    return YiVLConfig(vision_config=config.vision_config, text_config=text, image_token_id=config.image_token_id)


def model_with(rope: dict[str, Any]) -> YiVL:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = YiVLForConditionalGeneration(config_with(rope)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # no two logits tie
    return YiVL(model, tiny_processor())


@pytest.fixture(scope="module", params=ROPES)
def rope_model(request: pytest.FixtureRequest) -> YiVL:
    return model_with(ROPES[request.param])


def llama_of(model: YiVLForConditionalGeneration) -> LlamaForCausalLM:
    llama = LlamaForCausalLM(model.config.text_config).eval()
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    return llama


@torch.inference_mode()
def test_logits_are_those_of_transformers_llama(rope_model: YiVL) -> None:
    input_ids = torch.arange(700).unsqueeze(0) % 900
    logits = rope_model.model(input_ids=input_ids).logits
    assert torch.equal(logits, llama_of(rope_model.model)(input_ids=input_ids).logits)
    plain = model_with({"rope_type": "default", "rope_theta": 1e4})
    assert not torch.allclose(logits, plain.model(input_ids=input_ids).logits, atol=1e-3), "the settings do something"


def test_cached_is_uncached(rope_model: YiVL) -> None:
    """Beyond the positions that were scaled as well, and with a prefix of an earlier turn."""
    conversation = [{"role": "system", "content": "word " * 200}, {"role": "user", "content": "What?"}]
    warm = uncached(rope_model)
    answer = warm.answer(conversation, max_new_tokens=6)
    conversation += [{"role": "assistant", "content": answer}, {"role": "user", "content": "And then?"}]

    def logits(model: YiVL) -> torch.Tensor:
        prompt = model.engine.prepare(conversation)
        assert (model.engine.prefixes.num_cached(prompt.key) > 256) == (model is warm)
        rows, seen = prefill(model, [prompt], max_tokens=64), []
        for _ in range(4):
            seen.append(rows.logits)
            rows.step(rows.logits.argmax(-1))
        return torch.cat(seen)

    cached = logits(warm)
    torch.testing.assert_close(cached, logits(uncached(rope_model)), atol=1e-3, rtol=0)
    prompt = rope_model.engine.prepare(conversation)
    with torch.inference_mode():
        whole = rope_model.model(input_ids=prompt.input_ids).logits[:, -1]
    torch.testing.assert_close(cached[:1], whole, atol=1e-3, rtol=0)


def test_positions_limit_the_prompt(rope_model: YiVL) -> None:
    assert rope_model.engine.max_prompt_tokens == 1023
    with pytest.raises(ValueError, match="the model holds 1024"):
        rope_model.predict(None, "word " * 2000)


def test_it_is_saved_and_loaded(rope_model: YiVL, tmp_path: Path) -> None:
    rope_model.save(tmp_path / "model")
    again = yi_vl.load(tmp_path / "model", device="cpu", dtype=torch.float32)
    assert again.model.config.text_config.rope_parameters == rope_model.model.config.text_config.rope_parameters
    frequencies = [yi.model.model.language_model.rotary_emb.inv_freq for yi in (again, rope_model)]
    assert torch.equal(*frequencies)
    question = "word " * 150
    assert again.predict(None, question, max_new_tokens=4) == rope_model.predict(None, question, max_new_tokens=4)


@pytest.mark.parametrize("rope", [DYNAMIC, LONG, {"rope_type": "new"}], ids=lambda rope: rope["rope_type"])
def test_frequencies_that_change_with_the_length_are_refused(rope: dict[str, Any], tmp_path: Path) -> None:
    problem = f"rope_type is '{rope['rope_type']}'; expected one of default, linear, yarn, llama3"
    with pytest.raises(ValueError, match=problem):
        config_with(rope)
    for layout in ("official", "native"):
        folder = tmp_path / layout
        if layout == "official":
            shutil.copytree(OFFICIAL / "checkpoint", folder)
        else:
            convert(open_checkpoint(OFFICIAL / "checkpoint"), folder, "yi-vl")
        path = folder / "config.json"
        values = json.loads(path.read_text())
        if layout == "official":
            values["rope_scaling"] = {"type": rope["rope_type"]} | {k: v for k, v in rope.items() if k != "rope_type"}
        else:
            values["text_config"]["rope_parameters"] = rope | {"rope_theta": 1e4}
        path.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=problem) as raised:
            yi_vl.load(folder, device="cpu")
        assert "config.json" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'"),
        ({"rope_theta": 0}, "rope_theta of the rotary positions is 0"),
        ({"factor": 0.0}, "factor of the rotary positions is 0"),
        ({"factor": [2]}, "factor is"),
    ],
)
def test_numbers_out_of_range_are_refused(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    convert(open_checkpoint(OFFICIAL / "checkpoint"), tmp_path / "model", "yi-vl")
    path = tmp_path / "model/config.json"
    values = json.loads(path.read_text())
    values["text_config"]["rope_parameters"] = ROPES["linear"] | change
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=problem):
        yi_vl.load(tmp_path / "model", device="cpu")


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str], Path]:
    """A function (name of a rope) -> a folder in the native layout with the test checkpoint's weights and that rope."""

    def make(name: str) -> Path:
        convert(open_checkpoint(OFFICIAL / "checkpoint"), tmp_path / name, "yi-vl")
        path = tmp_path / name / "config.json"
        values = json.loads(path.read_text())
        values["text_config"] |= {"rope_parameters": ROPES[name], "max_position_embeddings": 1024}
        path.write_text(json.dumps(values))
        shutil.copy(OFFICIAL / "checkpoint/tokenizer.model", tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("raised base", "official"),
        ("linear", "official"),
        ("raised base", "llava-hf"),
        ("linear", "llava-hf"),
        ("yarn", "llava-hf"),
        ("llama3", "llava-hf"),
    ],
)
def test_conversions_carry_it_both_ways(name: str, layout: Any, saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = saved(name)
    convert(open_checkpoint(source), tmp_path / "there", layout)
    convert(open_checkpoint(tmp_path / "there"), tmp_path / "back", "yi-vl")
    for folder in (source, tmp_path / "there", tmp_path / "back"):
        text = read_config(str(folder)).text_config
        assert text.rope_parameters == ROPES[name] and text.max_position_embeddings == 1024
    answers = [yi_vl.load(folder, device="cpu").predict(None, "Hi " * 300, max_new_tokens=4) for folder in
               (source, tmp_path / "there", tmp_path / "back")]  # fmt: skip
    assert len(set(answers)) == 1


def test_the_official_layout_refuses_what_its_code_does_not_know(saved: Callable[[str], Path], tmp_path: Path) -> None:
    source = saved("yarn")
    with pytest.raises(ValueError, match="type yarn, which the official code's transformers does not know"):
        convert(open_checkpoint(source), tmp_path / "official", "official")
    convert(open_checkpoint(saved("linear")), tmp_path / "linear-there", "official")
    values = json.loads((tmp_path / "linear-there/config.json").read_text())
    assert values["rope_scaling"] == {"type": "linear", "factor": 4.0}, "as transformers 4.36 reads it"


def test_gguf_has_linear_scaling_and_refuses_others() -> None:
    fields = language_fields(config_with(ROPES["linear"]).text_config)
    assert fields["llama.rope.scaling.factor"] == 4.0 and fields["llama.context_length"] == 1024
    assert language_fields(config_with(ROPES["raised base"]).text_config)["llama.rope.freq_base"] == 1e7
    with pytest.raises(ValueError, match="yarn"):
        language_fields(config_with(ROPES["yarn"]).text_config)


# A run that starts with other positions


@pytest.mark.parametrize(
    ("override", "expected", "positions"),
    [
        ("{theta: 1e7}", {"rope_type": "default", "rope_theta": 1e7}, 512),
        ("{theta: 1e7, max_positions: 2048}", {"rope_type": "default", "rope_theta": 1e7}, 2048),
        ("{scaling: linear, factor: 2}", {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, 1024),
        (
            "{scaling: yarn, factor: 4, theta: 2e4}",
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "rope_theta": 2e4},
            2048,
        ),
    ],
)
def test_a_run_starts_with_other_positions_and_saves_them(
    override: str, expected: dict[str, Any], positions: int, configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    config = configure("steps=2", f"init_from.rope={override}", f"max_tokens={positions}", "checkpoint.every_steps=1")
    final = train(config)
    text = read_config(str(final)).text_config
    assert text.rope_parameters == expected and text.max_position_embeddings == positions
    model = yi_vl.load(final, device="cpu")
    input_ids = torch.arange(500).unsqueeze(0) % 400
    with torch.inference_mode():
        logits = model.model(input_ids=input_ids).logits
        assert torch.equal(logits, llama_of(model.model)(input_ids=input_ids).logits)
    assert model.engine.max_prompt_tokens == positions - 1

    shutil.rmtree(final)  # resumed from the checkpoint of step 1, which has the positions already
    assert read_config(str(train(config))).text_config.rope_parameters == expected

    later = configure(
        f"init_from={{checkpoint: {final}, tower: null, language_model: null}}", f"run_dir={tmp_path}/later", "steps=1"
    )
    assert read_config(str(train(later))).text_config.rope_parameters == expected


def test_the_losses_of_the_run_are_those_of_the_new_positions(configure: Callable[..., TrainConfig]) -> None:
    """And not of the old ones with a new config.json: from parts, and from a checkpoint, the first loss differs."""
    plain = configure("steps=1")
    final = train(plain)
    start = f"init_from={{checkpoint: {final}, tower: null, language_model: null}}"
    for index, origin in enumerate(((), (start,))):
        runs = [
            configure(*origin, *changes, "steps=1", f"run_dir={plain.run_dir}-{index}-{len(changes)}")
            for changes in ((), ("init_from.rope={theta: 10}",))
        ]
        assert len({losses(run)[0] for run in runs if train(run)}) == 2


def test_factors_are_relative_to_the_positions_before_scaling() -> None:
    text = config_with(ROPES["yarn"]).text_config
    set_rope_(text, RopeConfig(scaling="yarn", factor=8))
    assert text.rope_parameters["original_max_position_embeddings"] == 256 and text.max_position_embeddings == 2048
    set_rope_(text, RopeConfig(theta=5e6))
    assert text.rope_parameters == {
        "rope_type": "yarn", "factor": 8, "original_max_position_embeddings": 256, "rope_theta": 5e6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("{}", "init_from.rope is empty"),
        ("{scaling: dynamic, factor: 2}", "init_from.rope.scaling is 'dynamic'; expected one of linear, yarn"),
        ("{scaling: yarn}", "scaling and factor are given together"),
        ("{factor: 2}", "scaling and factor are given together"),
        ("{scaling: yarn, factor: 0.5}", "init_from.rope.factor is 0.5; expected 1 or more"),
        ("{theta: 0}", "init_from.rope.theta is 0.0; it must be positive"),
        ("{theta: .inf}", "init_from.rope.theta is inf; expected a finite number"),
        ("{max_positions: -1}", "init_from.rope.max_positions is -1; it must be positive"),
        ("{base: 3}", "unknown key 'init_from.rope.base'; known here: theta, scaling, factor, max_positions"),
        ("3", "init_from.rope"),
    ],
)
def test_wrong_settings_are_named(configure: Callable[..., TrainConfig], override: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        configure(f"init_from.rope={override}")


def test_adapters_and_running_runs_cannot_change_them(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = configure("steps=2", "checkpoint.every_steps=1")
    final = train(config)
    with pytest.raises(ValueError, match=r"init_from\.rope cannot be set with trainable\.language: lora"):
        configure(
            f"init_from={{checkpoint: {final}, tower: null, language_model: null, rope: {{theta: 1e7}}}}",
            "trainable={vision: false, projector: true, language: lora}",
        )
    shutil.rmtree(final)
    with pytest.raises(ValueError, match=r"init_from\.rope"):
        train(configure("steps=2", "checkpoint.every_steps=1", "init_from.rope={theta: 1e7}"))


def test_samples_longer_than_the_positions_are_refused_by_run_and_plan(configure: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ValueError, match="max_tokens is 600, but the language model has 512 positions"):
        train(configure("max_tokens=600"))
    path = ROOT / "train/configs/9b-1.5/chat-448.yaml"
    with pytest.raises(ValueError, match="max_tokens is 16384, but the language model has 4096 positions"):
        make_plan(path, ["max_tokens=16384"])
    longer = make_plan(path, ["max_tokens=16384", "init_from.rope={max_positions: 16384}"])
    assert longer.model.text_config.max_position_embeddings == 16384
