"""The preference stage: its loss against numbers by hand and another computation, pairs in batches, its reference
model, exact resume, and what is refused."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import configure_preferences, pair_sample
from torch import Tensor
from toy_runs import losses, step_once, stop_after, trainer

from train import setup
from train.config import DpoConfig, TrainConfig
from train.config_file import load_config
from train.data.batch import IGNORE, MicroBatch, collate
from train.data.encoder import SampleEncoder
from train.data.shard_reader import read_shard
from train.dpo import PreferenceObjective, preference_losses
from train.init import initial_processor
from train.metrics import read_metrics, validation_rows
from train.plan.__main__ import Hardware, make_plan
from train.plan.batch import SampleTokens
from train.plan.estimate import strategies
from train.trainer import Trainer, train
from yi_vl.model import YiVLForConditionalGeneration

Configure = Callable[..., TrainConfig]
LORA = ("trainable={projector: false, language: lora}", "lora={rank: 4, alpha: 8, dropout: 0.1}", "lr.language=1e-2")


@pytest.fixture
def pairs(configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]) -> Configure:
    return configure_preferences(configure, tmp_path, write_shard)


def rows(config: TrainConfig) -> list[dict[str, Any]]:
    return read_metrics(Path(config.run_dir) / "metrics.jsonl")


POLICY = torch.tensor([[-10.0, -12.0], [-3.0, -2.0]])
REFERENCE = torch.tensor([[-11.0, -11.5], [-2.5, -3.0]])
NUM_TOKENS = torch.tensor([[5, 10], [2, 4]])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # margins: 0.1 (1 + 0.5) = 0.15 and 0.1 (-0.5 - 1) = -0.15; -log sigmoid of both
        ({}, [0.620957, 0.770957]),
        ({"beta": 2.0}, [0.048587, 3.048587]),  # margins 3 and -3
        ({"label_smoothing": 0.1}, [0.9 * 0.620957 + 0.1 * 0.770957, 0.9 * 0.770957 + 0.1 * 0.620957]),
        # 0.1 (1 / 5 + 0.5 / 10) = 0.025 and 0.1 (-0.5 / 2 - 1 / 4) = -0.05
        ({"length_normalized": True}, [0.680725, 0.718460]),
        ({"sft_weight": 0.5}, [0.620957 + 0.5 * 10 / 5, 0.770957 + 0.5 * 3 / 2]),
    ],
    ids=str,
)
def test_the_loss_by_hand(settings: dict[str, Any], expected: list[float]) -> None:
    result, rewards = preference_losses(POLICY, REFERENCE, NUM_TOKENS, DpoConfig(**settings))
    torch.testing.assert_close(result, torch.tensor(expected), rtol=0, atol=2e-6)
    if not settings:
        torch.testing.assert_close(rewards, torch.tensor([[0.1, -0.05], [-0.05, 0.1]]))


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"length_normalized": True}, {"sft_weight": 1.0}])
def test_the_chosen_answer_is_pushed_up_and_the_rejected_down(settings: dict[str, Any]) -> None:
    policy = POLICY.clone().requires_grad_()
    preference_losses(policy, REFERENCE, NUM_TOKENS, DpoConfig(**settings))[0].sum().backward()
    assert policy.grad is not None
    assert (policy.grad[:, 0] < 0).all() and (policy.grad[:, 1] > 0).all()


def test_extreme_margins_stay_finite() -> None:
    policy = torch.tensor([[-1e4, 0.0], [0.0, -1e4]]).requires_grad_()
    result, _ = preference_losses(policy, torch.zeros(2, 2), NUM_TOKENS, DpoConfig(beta=1.0))
    result.sum().backward()
    assert result.tolist() == [1e4, 0.0] and policy.grad is not None and policy.grad.isfinite().all()


def answer_log_probability(
    model: YiVLForConditionalGeneration, input_ids: Tensor, labels: Tensor, pixel_values: Tensor | None
) -> Tensor:
    """Of one row without padding, from the model's own logits."""
    logits = model(input_ids=input_ids[None], pixel_values=pixel_values).logits[0, :-1]
    by_token = logits.float().log_softmax(-1).gather(1, input_ids[1:, None]).squeeze(1)
    return by_token[labels[1:] != IGNORE].sum()


def plain_copy(run: Trainer) -> YiVLForConditionalGeneration:
    """The run's model with the usual attention."""
    model = YiVLForConditionalGeneration(copy.deepcopy(run.model.config))
    model.load_state_dict(run.model.state_dict())
    model.model.language_model.set_attn_implementation("eager")
    return model


def row_images(run: Trainer, micro: MicroBatch) -> list[Tensor | None]:
    """The pixel values of each row, taken from the image tokens of the rows and the order of the images."""
    assert micro.images is not None and micro.image_index is not None
    pixels = run.processor.image_processor.to_pixel_values(micro.images)
    taken, of_rows = 0, []
    for ids in micro.input_ids:
        count = int((ids == run.processor.image_token_id).sum()) // run.processor.tokens_per_image
        of_rows.append(pixels[micro.image_index[taken : taken + count]] if count else None)
        taken += count
    assert taken == len(micro.image_index)
    return of_rows


def test_loss_and_gradients_are_those_of_another_computation(pairs: Configure) -> None:
    """Packed, with shared images encoded once, against each row alone through the model's own forward pass."""
    run = trainer(pairs("micro_batch=8", "trainable.vision=true", "dpo.beta=0.3"))
    micro = next(iter(run.loader)).micro_batches[0]
    assert micro.num_pairs == 8 and micro.images is not None and 2 * len(micro.images) == len(micro.image_index or ())
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))  # else policy and reference are the same
    start = run.config.init_from.checkpoint
    assert start is not None
    reference = YiVLForConditionalGeneration.from_pretrained(start, dtype=torch.float32).eval()
    policy = plain_copy(run)
    images = row_images(run, micro)
    logps: dict[YiVLForConditionalGeneration, list[Tensor]] = {policy: [], reference: []}
    for ids, mask, labels, pixels in zip(micro.input_ids, micro.attention_mask, micro.labels, images):
        num_tokens = int(mask.sum())
        for model in logps:
            logps[model].append(answer_log_probability(model, ids[:num_tokens], labels[:num_tokens], pixels))
    expected = torch.zeros(())
    for row in range(0, 16, 2):
        chosen, rejected = (logps[policy][i] - logps[reference][i].detach() for i in (row, row + 1))
        expected = expected + torch.log1p(torch.exp(-0.3 * (chosen - rejected)))
    loss, per_source = run.objective(**run._inputs(micro))
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(per_source[0, :2], torch.tensor([expected.item(), 8.0]), rtol=1e-4, atol=1e-4)
    rewards = 0.3 * (torch.stack(logps[policy]) - torch.stack(logps[reference])).detach().view(8, 2)
    margins = (rewards[:, 0] - rewards[:, 1]).tolist()
    metrics = dict(zip(PreferenceObjective.metric_names, per_source[0, 2:].tolist()))
    assert metrics["accuracy"] == sum(margin > 0 for margin in margins)
    assert metrics["reward_margin"] == pytest.approx(sum(margins), rel=1e-3, abs=1e-3)
    assert metrics["reward_chosen"] - metrics["reward_rejected"] == pytest.approx(metrics["reward_margin"], abs=1e-3)
    assert metrics["logp_chosen"] == pytest.approx(torch.stack(logps[policy][::2]).sum().item(), rel=1e-4)
    assert metrics["logp_rejected"] == pytest.approx(torch.stack(logps[policy][1::2]).sum().item(), rel=1e-4)

    loss.backward()
    expected.backward()
    named = dict(policy.named_parameters())
    with_gradient = {name for name, parameter in run.model.named_parameters() if parameter.grad is not None}
    assert {name.split(".")[1] for name in with_gradient} >= {"vision_tower", "multi_modal_projector", "language_model"}
    for name, parameter in run.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, named[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_both_rows_of_a_pair_have_its_images(pairs: Configure, tmp_path: Path) -> None:
    config = pairs()
    encoder = SampleEncoder(initial_processor(config), config.data, config.max_tokens)
    samples = [encoder.encode(raw, 0) for raw in read_shard(str(tmp_path / "pairs/0.tar"))]
    assert {len(sample.images) for sample in samples} == {0, 1, 2}
    micro = collate(samples, 0)
    assert micro.images is not None and micro.image_index is not None
    assert len(micro.images) == sum(len(sample.images) for sample in samples), "each image is there once"
    expected = [image for sample in samples for _ in sample.rows for image in sample.images]
    assert torch.equal(micro.images[micro.image_index], torch.stack(expected))


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_a_pair_is_never_split(pairs: Configure, micro_batch: int) -> None:
    run = trainer(pairs(f"micro_batch={micro_batch}"))
    tokenizer = run.processor.tokenizer
    for _, batch in zip(range(3), run.loader):
        assert sum(micro.num_pairs for micro in batch.micro_batches) == batch.num_terms == 8 == len(batch.names)
        for micro in batch.micro_batches:
            assert len(micro.input_ids) == 2 * micro.num_pairs <= 2 * micro_batch
            for row in range(0, len(micro.input_ids), 2):
                prompts, answers = [], []
                for ids, labels in zip(micro.input_ids[row : row + 2], micro.labels[row : row + 2]):
                    first = int((labels != IGNORE).nonzero()[0])
                    prompts.append(tokenizer.decode(ids[:first]))
                    answers.append(tokenizer.decode(ids[first:][labels[first:] != IGNORE]).strip())
                assert prompts[0] == prompts[1] and prompts[0].endswith("Assistant:")
                assert not answers[0].startswith("It is") and answers[1].startswith("It is")
                assert all(answer.count("###") == 1 for answer in answers), "only the last answer is supervised"


def test_accumulation_is_one_big_batch(pairs: Configure) -> None:
    """The step is normalized by its pairs, whatever the micro-batches, and not by their tokens."""
    steps = []
    for micro_batch in (8, 3, 1):
        run = trainer(pairs(f"micro_batch={micro_batch}", "clip_norm=null"))
        run.optimizer.step, run.optimizer.zero_grad = (lambda: None), (lambda: None)  # keep the gradients
        per_source, norm = step_once(run)
        gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        assert per_source[0, 1] == 8
        steps.append((per_source, norm, gradients))
    for per_source, norm, gradients in steps[1:]:
        torch.testing.assert_close(per_source, steps[0][0], rtol=1e-4, atol=1e-4)
        assert norm == pytest.approx(steps[0][1], rel=1e-3)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, steps[0][2][name], rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "settings",
    [(), LORA, (*LORA, "trainable.vision=true", "trainable.projector=true"), ("activation_checkpointing=true",)],
    ids=["copy", "lora", "lora and whole components", "checkpointed"],
)
def test_the_reference_is_the_initial_model_and_training_prefers_the_chosen(
    pairs: Configure, settings: tuple[str, ...]
) -> None:
    config = pairs("steps=25", "dpo.beta=0.5", "schedule.warmup=0.1", *settings)
    run = trainer(config)
    trainable = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    modes = {name: module.training for name, module in run.model.named_modules()}
    assert run.run() == 0
    assert trainable == {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert modes == {name: module.training for name, module in run.model.named_modules()}
    first, last = rows(config)[0], rows(config)[-1]
    if "lora" not in str(settings):  # dropout
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7), "the policy is the reference"
        assert first["preference"]["reward_margin"] == 0 == first["preference"]["accuracy"]
    assert last["preference"]["accuracy"] > 0.9 and last["preference"]["reward_margin"] > 0.5
    assert last["loss"] < 0.6 and last["loss_per_source"] == {"pairs": last["loss"]}
    margin = last["preference"]["reward_chosen"] - last["preference"]["reward_rejected"]
    assert margin == pytest.approx(last["preference"]["reward_margin"], abs=1e-5)


def test_adapters_off_and_a_frozen_copy_are_one_reference(pairs: Configure) -> None:
    """At the same policy: adapters merged into whole weights, and the adapters themselves."""
    adapted = trainer(pairs(*LORA, "lora={rank: 4, alpha: 8, dropout: 0}"))
    for name, parameter in adapted.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1)
    inputs = adapted._inputs(next(iter(adapted.loader)).micro_batches[0])
    _, from_adapters = adapted.objective(**inputs)
    adapted.save(Path(adapted.config.run_dir) / "adapters", with_state=False)
    whole = trainer(pairs())
    whole.model.load_state_dict(
        {name: tensor for name, tensor in yi_vl_weights(Path(adapted.config.run_dir) / "adapters").items()}
    )
    _, from_copy = whole.objective(**inputs)
    assert abs(float(from_copy[0, 3])) > 1e-3, "the policy is another model"
    torch.testing.assert_close(from_adapters, from_copy, rtol=1e-3, atol=1e-3)


def yi_vl_weights(folder: Path) -> dict[str, Tensor]:
    import yi_vl

    return yi_vl.load(folder, dtype=torch.float32, device="cpu").model.state_dict()


@pytest.mark.parametrize("settings", [(), LORA], ids=["copy", "lora"])
def test_the_held_out_loss_is_of_pairs_and_changes_nothing(
    pairs: Configure, tmp_path: Path, write_shard: Callable[..., Path], settings: tuple[str, ...]
) -> None:
    """Adapters are switched off and on again in eval mode."""
    write_shard(tmp_path / "held.tar", [pair_sample(500 + i) for i in range(6)])
    held_out = f"validation={{every_steps: 3, samples: 6, sources: [{{name: held, shards: {tmp_path}/held.tar}}]}}"
    plain, validated = (
        pairs(f"run_dir={tmp_path}/{name}", *settings, *more) for name, more in (("plain", ()), ("with", (held_out,)))
    )
    assert trainer(plain).run() == trainer(validated).run() == 0
    assert losses(plain) == losses(validated)
    first, *others = validation_rows(rows(validated))
    assert first["step"] == 0 and first["validation_loss"] == pytest.approx(math.log(2), abs=1e-6), "per pair"
    assert [row["step"] for row in others] == [3, 6] and others[-1]["validation_loss"] < first["validation_loss"]


@pytest.mark.parametrize("settings", [(), LORA], ids=["copy", "lora"])
def test_a_stopped_run_resumes_exactly(pairs: Configure, tmp_path: Path, settings: tuple[str, ...]) -> None:
    settings = (*settings, "checkpoint={every_steps: 2, keep_last: 1}", "data.workers=1", "log_every=2")
    whole = pairs(f"run_dir={tmp_path}/whole", *settings)
    stopped = pairs(f"run_dir={tmp_path}/stopped", *settings)
    train(whole)
    stop_after(trainer(stopped), 5)
    train(stopped)
    assert len(losses(whole)) == 3
    keys = ("step", "loss", "grad_norm", "preference")
    assert [[row[key] for key in keys] for row in rows(stopped)] == [[row[key] for key in keys] for row in rows(whole)]
    (weights,) = (tmp_path / "whole/final").glob("*.safetensors")
    assert (tmp_path / "stopped/final" / weights.name).read_bytes() == weights.read_bytes()


def test_settings_of_a_resumed_run(pairs: Configure, configure: Configure, tmp_path: Path) -> None:
    every = "checkpoint={every_steps: 2, keep_last: 1}"
    stop_after(trainer(pairs(every)), 3)
    with pytest.raises(ValueError, match="objective dpo, this run has likelihood, but the checkpoint's optimizer"):
        train(configure(every, "data.format=chat", f"init_from={{checkpoint: {tmp_path}/start, tower: null, "
                               "language_model: null}", "trainable.vision=false"))  # fmt: skip
    (tmp_path / "start").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="start': there is no such folder"):
        train(pairs(every))
    moved = f"init_from={{checkpoint: {tmp_path}/moved, tower: null, language_model: null}}"
    assert train(pairs(every, moved, "dpo.beta=0.2")).is_dir()


def test_a_sharded_model_needs_references_in_its_shards(pairs: Configure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup, "is_sharded", lambda _: True)
    with pytest.raises(ValueError, match=r"dpo.reference: model does not go with FSDP.*train.shards reference"):
        trainer(pairs())


def test_the_memory_of_a_copy_is_reported(pairs: Configure, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    for settings, is_reported in (((), True), (LORA, False)):
        Trainer(pairs(*settings), Console(stderr=True, width=400))
        assert ("frozen copy of" in capsys.readouterr().err) == is_reported


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["objective=ppo"], "objective is 'ppo'; expected one of likelihood, dpo"),
        (["objective=likelihood"], r"format of source 'pairs' is preference, and objective is likelihood"),
        (["data.format=chat"], r"format of source 'pairs' is chat, and objective is dpo"),
        (["dpo.beta=0"], "dpo.beta is 0.0; it must be positive"),
        (["dpo.beta=.nan"], "dpo.beta is nan; expected a finite number"),
        (["dpo.label_smoothing=0.5"], "dpo.label_smoothing is 0.5; expected 0 to below 0.5"),
        (["dpo.sft_weight=-1"], "dpo.sft_weight is -1.0; it must not be negative"),
        (["dpo.reference=disk"], "dpo.reference is 'disk'; expected one of model, shards"),
        (["dpo.gamma=1"], "unknown key 'dpo.gamma'; known here: beta, reference"),
        (["init_from={checkpoint: null, tower: {name: x}, language_model: y}"], "init_from.checkpoint"),
        (["dpo.reference=shards", "trainable={language: lora}", "lora.base=int4"], "set dpo.reference to model"),
        (["objective=likelihood", "data.format=chat", "dpo.beta=0.2"], "dpo has settings, but objective is likelihood"),
    ],
)  # fmt: skip
def test_a_wrong_setting_is_refused_and_named(pairs: Configure, overrides: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named) as caught:
        pairs(*overrides)
    assert "\n" not in str(caught.value)


def test_the_config_of_a_run_without_an_objective_still_loads(tmp_path: Path, configure: Configure) -> None:
    from train.config_file import to_yaml

    text = to_yaml(configure())
    old = "\n".join(
        line for line in text.splitlines() if not line.startswith(("objective", "dpo"))
        and not line.startswith(("  beta:", "  reference:", "  label_smoothing:", "  length_normalized:", "  sft_"))
    )  # fmt: skip
    (tmp_path / "old.yaml").write_text(old)
    assert load_config(tmp_path / "old.yaml") == configure()


def test_held_out_answers_are_compared_with_the_chosen(pairs: Configure, tmp_path: Path) -> None:
    shown = f"generations={{shards: {tmp_path}/pairs/0.tar, every_steps: 1, count: 2, max_new_tokens: 4}}"
    train(pairs("steps=1", shown))
    page = (tmp_path / "run/generations.html").read_text()
    assert page.count("<article>") == 2 and "<b>red</b>" in page and "It is" not in page


def test_the_plan_counts_both_answers_the_copy_and_its_forward_pass() -> None:
    config = Path(__file__).parents[1] / "train/configs/nano/preference.yaml"
    hardware, ddp = Hardware(1, 80e9, 312, 0.4), strategies("bf16")[0]
    sources, tokens = ("dpo.reference=shards", "dpo.reference=model"), SampleTokens(chat=64)
    plans = [make_plan(config, ["trainable.language=true", source], "nano", tokens) for source in sources]
    assert [made.rows_per_gpu(hardware) for made in plans] == [16, 16]
    weights = [made.memory(hardware, ddp, made.rows[0][1], False).weights for made in plans]
    assert weights[1] - weights[0] == 2 * sum(plans[0].parameters.total.values())
    assert 1.3 < plans[1].flops(False) / plans[0].flops(False) < 2
