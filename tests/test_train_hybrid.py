"""Training a decoder of hybrid attention and experts: one loss however it is computed, routing by step, metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid import (
    TRAINED,
    Configure,
    assert_close,
    configure_hybrid,
    gradients_of,
    hybrid_config,
    inputs_of,
    text_config,
)
from preference_runs import pair_sample
from test_train_processes import rows
from toy_runs import stop_after, trainer

import yi_vl
from train import loss as objective_module
from train.attention.cpu import GroupedPacking
from train.attention.packing import Packing
from train.config import TrainableConfig, TrainConfig
from train.config_decoder import ExpertsConfig
from train.data.batch import StepBatch
from train.experts import expert_metrics, set_experts_
from train.loss import Objective
from train.optim import checkpoint_activations_, set_trainable_
from train.trainable import language_names
from train.trainer import train
from yi_vl.model import YiVLForConditionalGeneration

NO_BALANCE = "experts={balance_weights: [0, 0, 0], entropy_weight: 1}"


@pytest.fixture
def hybrid(configure: Configure, tmp_path: Path) -> Configure:
    return configure_hybrid(configure, tmp_path / "start")


@pytest.mark.parametrize("trains", TRAINED, ids=str)
def test_checkpointing_changes_no_gradient(hybrid: Configure, trains: TrainableConfig) -> None:
    """Shared keys and values and the auxiliary loss included, which is not added where no router is trained."""
    results = []
    for is_checkpointed in (False, True):
        run, inputs = inputs_of(hybrid("data.sources.0.weight=0.001"))
        set_trainable_(run.model, replace(run.config, trainable=trains, activation_checkpointing=is_checkpointed))
        if is_checkpointed:
            checkpoint_activations_(run.model)
        step = Objective(run.model, 2)
        loss, per_source = step(**inputs)
        assert (loss.item() > per_source[:, 0].sum().item() + 1) == (trains.language is True)
        results.append((loss, gradients_of(run.model, loss)))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert_close(results[1][1], results[0][1])
    assert any("mlp.gate" in name for name in results[0][1]) == (trains.language is True)


@pytest.mark.parametrize("num_parts", [1, 2])
def test_packed_rows_are_padded_rows(hybrid: Configure, monkeypatch: pytest.MonkeyPatch, num_parts: int) -> None:
    """Attention over windows smaller than a row and than the shared prefix, and the auxiliary losses.

    Parts of a micro-batch are other tokens where the prefix is computed once, so these are compared with one part.
    """
    config = hybrid("data.sources.0.weight=0.001", f"experts={{top_p: 0.4, balance_parts: {num_parts}}}")
    run, inputs = inputs_of(config)
    padded_model = YiVLForConditionalGeneration(copy.deepcopy(run.model.config))  # with attention of its own
    padded_model.load_state_dict(run.model.state_dict())
    padded_model.model.language_model.set_attn_implementation("eager")
    on_cpu, padded = Objective(run.model, 2), Objective(padded_model, 2)
    assert on_cpu._packing is GroupedPacking and padded._packing is None
    monkeypatch.setitem(objective_module._PACKINGS, "eager", Packing)
    like_flash = Objective(padded_model, 2)
    prefix = inputs["shared_prefix_length"]
    assert prefix > 2 * run.model.config.text_config.sliding_window
    expected, _ = padded(**inputs)
    expected_gradients = gradients_of(padded_model, expected)
    expected_sums = padded.take_expert_sums()
    variants = [(like_flash, 0), (on_cpu, 0)] + ([(on_cpu, prefix)] if num_parts == 1 else [])
    for step, prefix_length in variants:
        loss, _ = step(**inputs | {"shared_prefix_length": prefix_length})
        torch.testing.assert_close(loss, expected)
        gradients = gradients_of(step.model, loss)
        assert_close(gradients, {name: expected_gradients[name] for name in gradients})
        torch.testing.assert_close(step.take_expert_sums(), expected_sums, rtol=1e-4, atol=1e-4)


def test_the_whole_rows_are_seen_without_a_window(hybrid: Configure) -> None:
    """So that the test before would notice a window that is ignored."""
    run, inputs = inputs_of(hybrid("data.sources.0.weight=0.001"))
    step = Objective(run.model, 2)
    windowed, _ = step(**inputs)
    for layer in run.model.model.language_model.layers:
        layer.self_attn.sliding_window = None
    assert not torch.isclose(step(**inputs)[0], windowed, rtol=1e-3)


def kept_gradients(config: TrainConfig, make_batch: Callable[[StepBatch], StepBatch] = lambda batch: batch) -> Any:
    run = trainer(config)
    batch = make_batch(next(iter(run.loader)))
    run.optimizer.step, run.optimizer.zero_grad = (lambda: None), (lambda: None)
    run.step(batch, batch.num_terms)
    return {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}, batch


def test_accumulation_is_one_big_batch(hybrid: Configure) -> None:
    """The entropy is a mean over the tokens of a step, however they are cut."""
    expected, _ = kept_gradients(hybrid("micro_batch=8", "clip_norm=null", NO_BALANCE))
    without, _ = kept_gradients(hybrid("micro_batch=8", "clip_norm=null", NO_BALANCE.replace("1}", "0}")))
    gate = next(name for name in expected if "mlp.gate" in name)
    assert not torch.allclose(expected[gate], without[gate], rtol=0.1)
    for micro_batch in (4, 3):
        gradients, batch = kept_gradients(hybrid(f"micro_batch={micro_batch}", "clip_norm=null", NO_BALANCE))
        assert len(batch.micro_batches) == -(-8 // micro_batch)
        assert_close(gradients, expected)


def test_the_number_of_micro_batches_does_not_count(hybrid: Configure) -> None:
    """The same micro-batch three times in a step has the gradient that it has once, auxiliary losses included."""
    settings = ("micro_batch=8", "clip_norm=null", "experts.balance_weights=[3, 2, 4]")
    thrice = lambda batch: replace(batch, micro_batches=batch.micro_batches * 3)  # noqa: E731
    assert_close(kept_gradients(hybrid(*settings), thrice)[0], kept_gradients(hybrid(*settings))[0])


ROUTED = ("experts={top_p: 0.4, top_p_from_step: 3, norm_topk_prob: false, balance_parts: 3, max_experts: 3}",)


@pytest.mark.parametrize("stopped_at", [3, 5])
def test_routing_changes_by_step_and_a_stopped_run_goes_on_exactly(
    hybrid: Configure, tmp_path: Path, stopped_at: int
) -> None:
    """Stopped before top-p begins and after; rows of the log span what was done before and after."""
    settings = ("steps=6", "checkpoint={every_steps: 2, keep_last: 9}", "log_every=3", *ROUTED)
    whole = hybrid(f"run_dir={tmp_path}/whole", *settings)
    final = train(whole)
    stopped = hybrid(f"run_dir={tmp_path}/stopped", *settings)
    stop_after(trainer(stopped), stopped_at)
    train(stopped)
    logged_rows = [
        [{key: row[key] for key in ("step", "loss", "grad_norm", "experts")} for row in rows(config)]
        for config in (whole, stopped)
    ]
    assert logged_rows[0] == logged_rows[1]
    weights = [torch.load(path / "step-00000004/training_state.pt") for path in (final.parent, tmp_path / "stopped")]
    assert weights[0]["ranks"][0]["log"]["per_source"].equal(weights[1]["ranks"][0]["log"]["per_source"])
    first, last = (row["experts"]["experts_per_token"] for row in logged_rows[0])
    assert first == [2.0] * 4 and all(number < 2 for number in last)
    saved = [text_config(final.parent / f"step-0000000{step}") for step in (2, 4)] + [text_config(final)]
    assert [each["router_top_p"] for each in saved] == [None, 0.4, 0.4]
    assert [each["norm_topk_prob"] for each in saved] == [True, False, False]
    assert saved[2]["max_experts_per_tok"] == saved[2]["router_balance_parts"] == 3
    assert (final.parent / "experts.png").stat().st_size > 1000


def test_routing_is_a_function_of_the_step() -> None:
    config = hybrid_config(norm_topk_prob=False)
    for step in (0, 7, 2, 3, 1):
        set_experts_(config, ExpertsConfig(top_p=0.3, top_p_from_step=3, norm_topk_prob=False), step)
        assert (config.router_top_p, config.norm_topk_prob) == ((0.3, False) if step >= 3 else (None, True))
    untouched = hybrid_config(router_top_p=0.2, norm_topk_prob=False).to_dict()
    same = hybrid_config(router_top_p=0.2, norm_topk_prob=False)
    set_experts_(same, ExpertsConfig(), 5)
    assert same.to_dict() == untouched


def test_the_start_says_how_tokens_are_routed(hybrid: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    train(hybrid("steps=1", *ROUTED))
    output = " ".join(capsys.readouterr().err.split())
    assert (
        "experts: 6 in each layer, top 2 for each token for 3 steps, then as few for each token as reach 0.4" in output
    )
    assert "3 at most (top_p_from_step is after the end)" in output
    assert "balance losses 0.2, 0.3, 0.5 over ranks, one rank and its 3 parts; entropy 0.1" in output
    assert "experts per token 2.00" in output


def test_held_out_loss_has_no_auxiliary_loss(hybrid: Configure, tmp_path: Path) -> None:
    validation = f"validation={{sources: [{{name: held, shards: {tmp_path}/chats/0.tar}}], samples: 3}}"
    config = hybrid("steps=1", validation, "experts.balance_weights=[0, 1000, 0]")
    train(config)
    losses = [row["validation_loss"] for row in rows(config) if "validation_loss" in row]
    (row,) = (row for row in rows(config) if "loss" in row)
    assert len(losses) == 2 and max(losses) < 20 and row["loss"] < 20 < row["experts"]["auxiliary_loss"][0]


def test_preferences_train_experts_too(hybrid: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> None:
    write_shard(tmp_path / "pairs/0.tar", [pair_sample(i) for i in range(20)])
    config = hybrid(
        "steps=2", "objective=dpo", "data.format=preference", "experts.top_p=0.4", "experts.top_p_from_step=1",
        f"data.sources=[{{name: pairs, shards: '{tmp_path}/pairs/*.tar'}}]",
    )  # fmt: skip
    run, inputs = trainer(config), {}
    inputs = run._inputs(next(iter(run.loader)).micro_batches[0])
    (loss, _), (weighted, _) = run.objective(**inputs), run.objective(**inputs, router_weight=10.0)
    sums = run.objective.take_expert_sums()
    assert weighted.item() - loss.item() == pytest.approx(
        10 * sum(expert_metrics(sums)["auxiliary_loss"]) / 4, rel=1e-3
    )
    train(config)
    assert all(0 <= row["preference"]["accuracy"] <= 1 and len(row["experts"]["entropy"]) == 4 for row in rows(config))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ("experts.top_p=1.5", "experts.top_p is 1.5; expected more than 0, to 1"),
        ("experts.top_p_from_step=4", "top_p_from_step is 4, but there is no experts.top_p"),
        ("experts.balance_weights=[1, 2]", "expected three numbers"),
        ("experts.balance_weights=[1, 2, -1]", "expected three numbers"),
        ("experts.entropy_weight=-1", "must not be negative"),
        ("experts.balance_parts=0", "must be positive"),
        ("experts={top_p: 0.5, max_experts: 0}", "must be positive"),
        ("experts.experts_a_token=4", "unknown key"),
        ("distill={teacher: x, weight: 0}", "distill.weight is 0"),
        ("distill={teacher: x, weight: 2}", "distill.weight is 2"),
        ("distill={teacher: x, temperature: 0}", "distill.temperature is 0"),
        ("distill.weight=1", "name distill.teacher"),
    ],
)
def test_a_wrong_setting_is_refused(configure: Configure, settings: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        configure(settings)
    assert "\n" not in str(caught.value)


def test_what_a_model_cannot_do_is_refused_by_name(configure: Configure, hybrid: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"experts has settings, but .*toy_language_model.* has no experts"):
        trainer(configure("experts.entropy_weight=0.1"))
    with pytest.raises(ValueError, match=r"max_experts is 7, but each layer of .*start has 6"):
        trainer(hybrid("experts={top_p: 0.4, max_experts: 7}"))
    with pytest.raises(ValueError, match=r"max_experts is 3, but .*start routes by top-k"):
        trainer(hybrid("experts.max_experts=3"))
    with pytest.raises(ValueError, match=r"lora.base: int4 .* most of .*start are experts"):
        trainer(hybrid("trainable={vision: false, language: lora}", "lora.base=int4"))
    with pytest.raises(ValueError, match=r"experts cannot be set with trainable.language: lora"):
        hybrid("trainable={vision: false, language: lora}", "experts.top_p=0.4")
    with pytest.raises(ValueError, match="distill is for objective likelihood"):
        hybrid("objective=dpo", "data={format: preference, sources: [{name: a, shards: b}]}", "distill.teacher=x")


@pytest.mark.parametrize("settings", [{}, {"attention_bias": True}, {"num_experts": 0, "mlp_bias": True}])
def test_the_names_are_the_models(configure: Configure, tmp_path: Path, settings: dict[str, Any]) -> None:
    run = trainer(configure_hybrid(configure, tmp_path / "start", **settings)())
    text = run.model.config.text_config
    names = {name for name, _ in run.model.named_parameters() if "language_model" in name or "lm_head" in name}
    expected = language_names(4, text.attention_bias, text.mlp_bias, text.kv_source_layers, text.num_experts > 0)
    assert set(expected) == names and len(expected) == len(names)


def test_layers_and_patterns_select_experts(hybrid: Configure) -> None:
    run = trainer(hybrid("trainable={vision: false, projector: false, language: ['3', '*.mlp.gate.*']}"))
    trained = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    layers = {name for name in trained if ".layers.3." in name}
    assert trained - layers == {f"model.language_model.layers.{number}.mlp.gate.weight" for number in range(3)}
    assert {"mlp.experts.down_proj", "self_attn.q_proj.weight"} <= {name.split(".3.")[1] for name in layers}
    assert not any("k_proj" in name for name in layers), "its keys are layer 1's"


def test_adapters_are_on_attention_alone_and_say_so(
    hybrid: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("trainable={vision: false, language: lora}", "lora={rank: 4, alpha: 8}", "lr.language=1e-2")
    final = train(hybrid("steps=2", *settings))
    output = " ".join(capsys.readouterr().err.split())
    assert "experts: without adapters" in output and "the routers are frozen, so there is no auxiliary loss" in output
    merged, start = (yi_vl.load(path).model.state_dict() for path in (final, tmp_path / "start"))
    moved = {name for name in start if "layers" in name and not torch.equal(start[name].float(), merged[name].float())}
    assert moved and all(".self_attn." in name for name in moved if "language_model" in name)
    assert len([name for name in moved if "language_model" in name]) == 4 * 4 - 2
