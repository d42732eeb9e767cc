"""Training a decoder of hybrid attention and experts: losses, routing by step, metrics, distillation, and limits."""

from __future__ import annotations

import copy
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunApp
from hybrid import Configure, configure_hybrid, hybrid_config, level_one
from preference_runs import pair_sample
from processes import CONTEXT, finish, free_port, output_path, start
from test_train_processes import launched, logged, one_process, rows
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import stop_after, trainer

import yi_vl
from train import loss as objective_module
from train.attention.cpu import GroupedPacking
from train.attention.packing import Packing
from train.config import TrainableConfig, TrainConfig
from train.config_decoder import DistillConfig, ExpertsConfig
from train.data.batch import StepBatch
from train.distill import DistillObjective, kl_divergences
from train.experts import expert_metrics, layer_sums, set_experts_
from train.loss import Objective
from train.metrics import flatten
from train.optim import checkpoint_activations_, set_trainable_
from train.plan import __main__ as plan
from train.plan.count import count_flops, count_saved_bytes
from train.plan.estimate import count_parameters
from train.plan.flops import Row, batch_flops
from train.trainable import language_names
from train.trainer import Trainer, train
from yi_vl.decoder.experts import RouterSums, router_sums
from yi_vl.decoder.losses import balance_loss, router_loss, router_losses
from yi_vl.model import YiVLForConditionalGeneration

TRAINED = (TrainableConfig(), TrainableConfig(False, False, ["*.self_attn.*"]), TrainableConfig(True, True, False))
NO_BALANCE = "experts={balance_weights: [0, 0, 0], entropy_weight: 1}"


@pytest.fixture
def hybrid(configure: Configure, tmp_path: Path) -> Configure:
    return configure_hybrid(configure, tmp_path / "start")


def gradients_of(model: YiVLForConditionalGeneration, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def assert_close(gradients: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-3) -> None:
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=1e-5, msg=name)


# --- losses

PROBABILITIES = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3]])
IDS = torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1]])  # 2 is no expert, but a place that top-p leaves free


def sums_of(mask: Tensor | None = None, num_parts: int = 2, probabilities: Tensor = PROBABILITIES) -> RouterSums:
    return router_sums(
        probabilities, torch.tensor([[0, 1], [0, 2], [1, 2], [0, 1]])[: len(probabilities)], mask, num_parts
    )


def test_losses_are_those_computed_by_hand() -> None:
    """f = (3/4, 1/4), P = (0.6, 0.4) of all; of the halves (1, 0), (0.75, 0.25) and (1/2, 1/2), (0.45, 0.55)."""
    probabilities = PROBABILITIES.clone().requires_grad_()
    sums = sums_of(probabilities=probabilities)
    whole, parts = 2 * (0.75 * 0.6 + 0.25 * 0.4), (2 * 0.75 + 2 * 0.5 * (0.45 + 0.55)) / 2
    entropy = -sum(p * math.log(p) for row in PROBABILITIES.tolist() for p in row) / 4
    config = hybrid_config(router_balance_weights=[0.2, 0.3, 0.5], router_entropy_weight=0.1)
    loss = router_loss([sums], config)
    assert loss.item() == pytest.approx(0.2 * whole + 0.3 * whole + 0.5 * parts + 0.1 * entropy)
    assert balance_loss(sums).item() == pytest.approx(parts)
    alone = hybrid_config(router_balance_weights=[0.0, 1.0, 0.0], router_entropy_weight=0.0)
    router_loss([sums], alone).backward()
    assert probabilities.grad is not None
    torch.testing.assert_close(probabilities.grad, torch.tensor([[2 * 0.75 / 4, 2 * 0.25 / 4]]).expand(4, 2))
    other = sums_of(probabilities=PROBABILITIES.flip(1))
    assert router_losses([sums, other], alone).tolist() == pytest.approx([whole, 2 * (0.75 * 0.6 + 0.25 * 0.4)])


def test_padding_does_not_count_and_a_token_may_stand_for_several() -> None:
    padded, ids = (torch.cat([x[:1], x[2:3], x[1:]]) for x in (PROBABILITIES, IDS))
    masked = router_sums(padded, ids, torch.tensor([[1, 0, 1, 1, 1]]), 2)
    for kept, expected in zip(masked, sums_of()):
        torch.testing.assert_close(kept, expected)
    assert masked.routed.sum(0).tolist() == [3, 3], "the place that top-p leaves free is no expert"
    twice = router_sums(*(torch.cat([x, x[:1]]) for x in (PROBABILITIES, IDS)), None, 1)
    for weighted, repeated in zip(sums_of(torch.tensor([[2, 1, 1, 1]]), num_parts=1), twice):
        torch.testing.assert_close(weighted, repeated)


def test_metrics_of_a_layer_are_those_computed_by_hand() -> None:
    """Expert 0 gets three tokens, expert 1 three, expert 2 none; one place of each of two tokens is free."""
    ids = torch.tensor([[0, 1], [0, 3], [1, 3], [0, 1]])
    sums = router_sums(F.pad(PROBABILITIES, (0, 1)), ids, None, 2)
    metrics = expert_metrics(2 * layer_sums([sums, sums], torch.tensor([0.5, 0.7])))
    assert metrics["experts_per_token"] == [1.5, 1.5] and metrics["unused_experts"] == [1, 1]
    assert metrics["max_load"] == pytest.approx([1.5, 1.5]) and metrics["auxiliary_loss"] == pytest.approx([0.5, 0.7])
    assert metrics["entropy"][0] == pytest.approx(sums.entropy.sum().item() / 4)
    assert flatten({"experts": metrics})["experts/auxiliary_loss/1"] == pytest.approx(0.7)


@pytest.mark.slow
def test_the_balance_over_ranks_is_that_of_all_tokens(tmp_path: Path) -> None:
    """On two ranks with other numbers of tokens; gradients averaged by tokens are those of one process."""
    port = free_port()
    ranks = [CONTEXT.Process(target=level_one, args=(rank, port, tmp_path)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    assert finish(ranks) == [0, 0]
    expected, gradient = level_one()
    for rank in range(2):
        loss, of_rank = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(of_rank, gradient)


# --- one objective, however it is computed


def inputs_of(config: TrainConfig, **overrides: Any) -> tuple[Trainer, dict[str, Any]]:
    run = trainer(config)
    micro = next(iter(run.loader)).micro_batches[-1]
    assert micro.shared_prefix_length > 20 and micro.images is not None and not micro.attention_mask.all()
    return run, run._inputs(micro) | {"router_weight": 50.0} | overrides


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


# --- a run

ROUTED = ("experts={top_p: 0.4, top_p_from_step: 3, norm_topk_prob: false, balance_parts: 3, max_experts: 3}",)


def text_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["text_config"]  # type: ignore[no-any-return]


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
    said = " ".join(capsys.readouterr().err.split())
    assert "experts: 6 in each layer, top 2 for each token for 3 steps, then as few for each token as reach 0.4" in said
    assert "3 at most (top_p_from_step is after the end)" in said
    assert "balance losses 0.2, 0.3, 0.5 over ranks, one rank and its 3 parts; entropy 0.1" in said
    assert "experts per token 2.00" in said


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


# --- parts of the language model


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
    said = " ".join(capsys.readouterr().err.split())
    assert "experts: without adapters" in said and "the routers are frozen, so there is no auxiliary loss" in said
    merged, start = (yi_vl.load(path).model.state_dict() for path in (final, tmp_path / "start"))
    moved = {name for name in start if "layers" in name and not torch.equal(start[name].float(), merged[name].float())}
    assert moved and all(".self_attn." in name for name in moved if "language_model" in name)
    assert len([name for name in moved if "language_model" in name]) == 4 * 4 - 2


# --- distillation


def test_the_kl_is_that_computed_by_hand() -> None:
    teacher, model = torch.tensor([[2.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    p, q = (F.softmax(logits / 2, dim=-1)[0].tolist() for logits in (teacher, model))
    expected = sum(a * math.log(a / b) for a, b in zip(p, q))
    assert kl_divergences(teacher, model, 2.0).item() == pytest.approx(expected, rel=1e-5)
    assert kl_divergences(model, model, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_a_model_learns_from_its_teacher(hybrid: Configure, tmp_path: Path) -> None:
    """The healing stage: attention alone is trained, beside the model before its windows were cut."""
    teacher = tmp_path / "teacher"
    run = trainer(hybrid())
    run.model.config.text_config.sliding_window = 400
    run.save(teacher, with_state=False)
    before = yi_vl.load(teacher).model.state_dict()
    distill = f"distill={{teacher: {teacher}, weight: 1, temperature: 2}}"
    heal = "trainable={vision: false, projector: false, language: ['*.self_attn.*']}"
    config = hybrid("steps=12", "lr.language=3e-3", "schedule.warmup=0", "micro_batch=8", distill, heal)
    final = train(config)
    divergence = [row["distillation"]["kl"] for row in rows(config)]
    assert sum(divergence[-3:]) < 0.8 * sum(divergence[:3])
    assert all(row["loss"] == pytest.approx(4 * row["distillation"]["kl"], rel=1e-4) for row in rows(config))
    after = yi_vl.load(final).model.state_dict()
    assert after.keys() == before.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".self_attn." in name for name in moved)
    assert all(torch.equal(tensor, before[name]) for name, tensor in yi_vl.load(teacher).model.state_dict().items())


def test_a_teacher_that_agrees_adds_nothing(hybrid: Configure) -> None:
    run, inputs = inputs_of(hybrid("data.sources.0.weight=0.001"))
    plain, _ = Objective(run.model, 2)(**inputs | {"router_weight": 0.0})
    twin = YiVLForConditionalGeneration(run.model.config)
    twin.load_state_dict(run.model.state_dict())
    step = DistillObjective(run.model, 2, DistillConfig("x", 0.25, 3.0), lambda: twin.eval())
    loss, per_source = step(**inputs | {"router_weight": 0.0})
    torch.testing.assert_close(loss, 0.75 * plain)
    assert per_source[:, 2].sum().item() == pytest.approx(plain.item(), rel=1e-4)
    assert per_source[:, 3].sum().item() == pytest.approx(0, abs=1e-3)
    torch.testing.assert_close(step.eval()(**inputs)[0], plain)


def test_a_run_does_not_change_between_a_teacher_and_none(hybrid: Configure, tmp_path: Path) -> None:
    config = hybrid("steps=4", "checkpoint={every_steps: 2, keep_last: 1}")
    stop_after(trainer(config), 3)
    with pytest.raises(ValueError, match=r"distill.teacher null, this run has .*start, but .* of another loss"):
        trainer(hybrid("steps=4", f"distill.teacher={tmp_path}/start"))


def test_a_teacher_of_other_tokens_is_refused(hybrid: Configure, tiny_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"distill.teacher .* has 960 tokens, the model that learns 448"):
        trainer(hybrid(f"distill.teacher={tiny_folder}", "image_size=56"))


# --- plan

ROW = Row(tokens=30, supervised=9)


def counted_step(model: YiVLForConditionalGeneration, trains: TrainableConfig) -> Callable[[], Tensor]:
    set_trainable_(model, TrainConfig(trainable=trains))
    patches = model.config.vision_config.num_patches
    ids = torch.ones(2, ROW.tokens, dtype=torch.long)
    ids[:, :patches] = model.config.image_token_id
    labels = torch.full_like(ids, -100)
    labels[:, -ROW.supervised :] = 5
    size_px = model.config.vision_config.image_size
    pixels = torch.randn(2, 3, size_px, size_px)
    step = partial(Objective(model, 1), ids, torch.ones_like(ids), labels, pixels, torch.zeros(2, dtype=torch.long))
    return lambda: step()[0]


@pytest.mark.parametrize(
    "trains",
    [
        *TRAINED,
        TrainableConfig(False, False, ["*.layers.1.self_attn.v_proj.*"]),
        TrainableConfig(False, False, ["*.gate.*"]),
        TrainableConfig(False, True, ["*.layers.2.mlp.experts.down_proj", "*.layers.0.*norm*"]),
    ],
    ids=str,
)
def test_operations_are_exact(hybrid: Configure, trains: TrainableConfig) -> None:
    """But for the window of attention, whose products the reference computes whole."""
    model = trainer(hybrid()).model
    model.model.language_model.set_attn_implementation("sdpa")
    model.model.language_model.set_experts_implementation("batched_mm")
    text, config = model.config.text_config, TrainConfig(trainable=trains)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        counted_step(model, trains)().backward()
    text.sliding_window = ROW.tokens
    mask = torch.ones(2, ROW.tokens, dtype=torch.bool)
    supervised = torch.arange(ROW.tokens).expand(2, -1) < ROW.supervised
    assert batch_flops(model.config, trains, mask, supervised, 2) == counter.get_total_flops()
    for window in (ROW.tokens, 7):
        text.sliding_window = window
        assert 2 * count_flops(model.config, config, ROW) == batch_flops(model.config, trains, mask, supervised, 2)
    more = batch_flops(model.config, trains, mask, supervised, 2, experts_per_token=3.0)
    assert more > batch_flops(model.config, trains, mask, supervised, 2, experts_per_token=2.0)


def test_a_plan_counts_the_experts(
    hybrid: Configure, tmp_path: Path, run_app: RunApp, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = hybrid("experts.top_p=0.4")
    model = trainer(config).model
    counted = count_parameters(model.config, config)
    assert counted.total["language"] == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "language" in name or "lm_head" in name
    )
    assert counted.largest_unit == sum(p.numel() for p in model.model.language_model.layers[0].parameters())
    saved = [count_saved_bytes(model.config, replace(config, precision="bf16"), ROW, 2, False, "cpu")]
    more = replace(config, precision="bf16")
    model.config.text_config.max_experts_per_tok = 6
    saved.append(count_saved_bytes(model.config, more, ROW, 2, False, "cpu"))
    assert saved[1].activations > 1.2 * saved[0].activations and saved[0].weight_copies == saved[1].weight_copies
    settings = tmp_path / "toy.yaml"
    start = f"init_from={{checkpoint: {tmp_path}/start, tower: null, language_model: null}}"
    code, out, err = run_app("plan", plan.app, settings, start, "experts.top_p=0.4", "distill.teacher=x", "--gpus", 2)
    assert code == 0, err
    assert "experts: 6 in each layer, 0.1 M parameters; counted for each token are 4 at most" in " ".join(out.split())
    assert "the teacher, whole on each GPU, and its forward passes are not counted" in out


# --- many ranks


@pytest.fixture
def two_ranks(hybrid: Configure, tmp_path: Path) -> Configure:
    return lambda *overrides: hybrid(
        f"data.sources=[{{name: chats, shards: '{tmp_path}/chats/*.tar'}}]", "data.workers=1", "log_samples=true",
        "steps=4", "experts={top_p: 0.4, top_p_from_step: 2, balance_weights: [0, 1, 1]}", *overrides,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_learn_as_one(two_ranks: Configure, tmp_path: Path, kind: str) -> None:
    """With auxiliary losses, but the balance over ranks, which one process does not have; and with metrics that a
    resumed run has as well."""
    expected = one_process(two_ranks(f"run_dir={tmp_path}/one"))
    config = two_ranks("checkpoint={every_steps: 3, keep_last: 1}")
    environment = launched(kind) if kind == "fsdp" else {}
    assert finish(start(config, 2, **environment)) == [0, 0], output_path(config, 1).read_text()
    assert logged(config) == pytest.approx(expected, rel=2e-4)
    final = Path(config.run_dir) / "final"
    assert text_config(final)["router_top_p"] == 0.4
    tokens = [row["experts"]["experts_per_token"] for row in rows(config)]
    assert tokens[0] == [2.0] * 4 and all(number < 2 for number in tokens[-1])
    before = [(row["loss"], row["experts"]) for row in rows(config)]
    os.rename(final, final.with_name("first"))
    assert finish(start(config, 2, **environment)) == [0, 0], output_path(config, 1).read_text()
    assert [(row["loss"], row["experts"]) for row in rows(config)] == before


@pytest.mark.slow
def test_spread_weights_learn_from_a_teacher(two_ranks: Configure, tmp_path: Path) -> None:
    """Which is whole on each rank."""
    settings = (f"distill.teacher={tmp_path}/start", "trainable.language=['*.self_attn.*', '*.gate.*']")
    expected = one_process(two_ranks(f"run_dir={tmp_path}/one", *settings))
    config = two_ranks(*settings)
    assert finish(start(config, 2, **launched("fsdp"))) == [0, 0], output_path(config, 1).read_text()
    assert logged(config) == pytest.approx(expected, rel=2e-4)
