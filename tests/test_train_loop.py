"""The loop at toy size: three real stages, frozen parts, accumulation, and a killed run that resumes exactly."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny import tiny_config, tiny_model
from torch import nn
from toy_runs import losses, step_once, trainer

from train import loss as objective
from train import setup
from train.attention.cpu import GroupedPacking
from train.attention.packing import Packing
from train.config import ScheduleConfig, TrainConfig
from train.config_file import load_config
from train.data.batch import num_supervised
from train.loss import Objective
from train.metrics import METRICS_FILE, read_metrics
from train.optim import components, parameter_groups, set_learning_rates_
from train.trainer import train
from yi_vl.model import YiVLForConditionalGeneration


def weights(model: YiVLForConditionalGeneration) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.core
def test_three_stages(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    stages = {
        "align": ("image_size=28", "trainable.language=false"),
        "upscale": ("image_size=56", "trainable.language=false"),
        "chat": ("image_size=56", "data.sources.0.weight=0.01"),
    }
    previous: str | None = None
    final_losses = []
    for name, overrides in stages.items():
        start = f"init_from={{checkpoint: {previous}, tower: null, language_model: null}}"
        config = configure(
            f"run_dir={tmp_path}/{name}", "steps=20", "lr.language=3e-3", *overrides, *([start] if previous else [])
        )
        final = train(config)
        curve = losses(config)
        assert sum(curve[-5:]) < sum(curve[:5]), f"the loss of {name} does not fall: {curve}"
        assert (final.parent / "loss.png").stat().st_size > 1000
        model = YiVLForConditionalGeneration.from_pretrained(final)
        assert model.config.vision_config.image_size == config.image_size
        assert load_config(final / "config.yaml") == config
        final_losses.append(curve[-1])
        previous = str(final)
    assert final_losses[2] < final_losses[0]
    assert train(config) == final, "a finished run is not trained again"


@pytest.mark.parametrize("frozen", ["vision", "projector", "language"])
def test_frozen_parts_stay_to_the_last_bit(configure: Callable[..., TrainConfig], frozen: str) -> None:
    run = trainer(configure(f"trainable.{frozen}=false"))
    before = weights(run.model)
    set_learning_rates_(run.optimizer, 0, 6, ScheduleConfig(warmup=0.0))
    step_once(run)
    moved = {name for name, tensor in run.model.state_dict().items() if not torch.equal(tensor, before[name])}
    for component, modules in components(run.model).items():
        ids = {id(parameter) for module in modules for parameter in module.parameters()}
        names = {name for name, parameter in run.model.named_parameters() if id(parameter) in ids}
        assert bool(moved & names) == (component != frozen)


def test_a_tied_table_learns_once() -> None:
    config = tiny_config()
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = YiVLForConditionalGeneration(config)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    learning = [id(parameter) for group in parameter_groups(model, TrainConfig()) for parameter in group["params"]]
    assert len(learning) == len(set(learning)) == len(list(model.parameters()))


def test_batch_statistics_of_a_frozen_tower_stay(configure: Callable[..., TrainConfig]) -> None:
    from yi_vl.vision import ConvStem

    run = trainer(configure("trainable.vision=false"))
    assert not any(module.training for module in run.model.model.vision_tower.modules())
    assert run.model.model.multi_modal_projector.training
    tower = run.model.model.vision_tower
    tower.visual.conv1 = ConvStem(14, [8], 32).requires_grad_(False).eval()
    before = {name: tensor.clone() for name, tensor in tower.named_buffers()}
    assert before
    step_once(run)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tower.named_buffers())


def test_accumulation_is_one_big_batch(configure: Callable[..., TrainConfig]) -> None:
    steps = []
    for micro_batch in (8, 4, 3):
        run = trainer(configure(f"micro_batch={micro_batch}", "clip_norm=null"))
        batch = next(iter(run.loader))
        assert len(batch.micro_batches) == -(-8 // micro_batch)
        run.optimizer.zero_grad()
        run.optimizer.step, run.optimizer.zero_grad = (lambda: None), (lambda: None)  # keep the gradients
        per_source, norm = run.step(batch, batch.num_supervised)
        gradients = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
        steps.append((per_source.sum(0), norm, gradients))
    for per_source, norm, gradients in steps[1:]:
        torch.testing.assert_close(per_source, steps[0][0])
        assert norm == pytest.approx(steps[0][1], rel=1e-4)
        assert gradients.keys() == steps[0][2].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, steps[0][2][name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_objective_is_the_models_own_loss(
    configure: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed with its prefix run once, as on a CPU, packed with flash-attn, and padded: the same, gradients too.

    In flash-attn's place the mask that transformers makes of the same positions.
    """
    run = trainer(configure("data.sources.0.weight=0.001"))
    micro = next(iter(run.loader)).micro_batches[-1]
    inputs = run._inputs(micro)
    assert micro.shared_prefix_length > 20 and micro.images is not None and not micro.attention_mask.all()
    usual = YiVLForConditionalGeneration(copy.deepcopy(run.model.config))  # with attention of its own
    usual.load_state_dict(run.model.state_dict())
    usual.model.language_model.set_attn_implementation("eager")
    reference = usual(
        input_ids=micro.input_ids,
        attention_mask=micro.attention_mask,
        pixel_values=inputs["pixel_values"],
        labels=micro.labels,
        num_items_in_batch=torch.tensor(1),
    ).loss
    expected = gradients_of(usual, reference)
    on_cpu, padded = Objective(run.model, 2), Objective(usual, 2)
    assert on_cpu._packing is GroupedPacking and padded._packing is None
    monkeypatch.setitem(objective._PACKINGS, "eager", Packing)
    variants = [
        (on_cpu, micro.shared_prefix_length),
        (on_cpu, 0),
        (padded, 0),
        (Objective(usual, 2), micro.shared_prefix_length),
    ]
    for variant, prefix in variants:
        loss, per_source = variant(**inputs | {"shared_prefix_length": prefix})
        torch.testing.assert_close(loss, reference)
        torch.testing.assert_close(
            per_source.sum(0), torch.stack([reference, torch.tensor(num_supervised(micro.labels))])
        )
        gradients = gradients_of(variant.model, loss)
        assert gradients.keys() <= expected.keys()  # the trainer asks for none where none comes
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.fixture
def another_precision() -> Iterator[None]:
    """accelerate keeps the first precision of a process, and refuses another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("another_precision")
@pytest.mark.parametrize("language", ["false", "lora"])
def test_frozen_matrices_take_half_the_memory_and_nothing_changes(
    configure: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, language: str
) -> None:
    """A model as it is released, in bf16; one matrix is finer than that, and stays as it is."""
    released = trainer(configure("precision=bf16"))
    released.model.to(torch.bfloat16).float()
    released.model.model.language_model.layers[0].mlp.down_proj.weight.data += 1e-4
    released.save(tmp_path / "released", with_state=False)
    start_from = f"init_from={{checkpoint: {tmp_path}/released, tower: null, language_model: null}}"
    settings = (start_from, f"trainable.language={language}", "precision=bf16")

    whole, runs = [], []
    for keeps_low in (False, True):
        with monkeypatch.context() as patch:
            if not keeps_low:
                patch.setattr(setup, "cast_frozen_", lambda *_: None)
            runs.append(trainer(configure(*settings, f"run_dir={tmp_path}/{keeps_low}")))
        torch.manual_seed(0)
        whole.append([runs[-1].step(batch, batch.num_supervised) for batch in islice(runs[-1].loader, 3)])
    for (losses_high, norm_high), (losses_low, norm_low) in zip(*whole, strict=True):
        assert torch.equal(losses_high, losses_low) and norm_high == norm_low
    high, low = (dict(run.model.named_parameters()) for run in runs)
    assert all(torch.equal(low[name].float(), parameter) for name, parameter in high.items())
    narrow = {name for name, parameter in low.items() if parameter.dtype == torch.bfloat16}
    frozen = {
        f"{name}.weight"
        for name, module in runs[0].model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    }
    (fine,) = (name for name in frozen if "layers.0.mlp.down_proj" in name)
    assert narrow == frozen - {fine} and any("lm_head" in name for name in narrow)


@pytest.mark.parametrize("frozen", ["none", "language", "vision"])
def test_checkpointing_changes_nothing_but_what_is_kept(configure: Callable[..., TrainConfig], frozen: str) -> None:
    """The same loss and gradients, packed; and far fewer bytes between forward and backward pass."""
    overrides = [] if frozen == "none" else [f"trainable.{frozen}=false"]
    kept, results = [], []
    for is_checkpointed in (False, True):
        run = trainer(configure(f"activation_checkpointing={is_checkpointed}", *overrides))
        inputs = run._inputs(next(iter(run.loader)).micro_batches[-1])
        sizes: dict[int, int] = {}

        def keep(tensor: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = run.objective(**inputs)
        weights_too = {p.untyped_storage().data_ptr() for p in run.model.parameters()}
        kept.append(sum(size for place, size in sizes.items() if place not in weights_too))
        results.append((loss, gradients_of(run.model, loss)))
    assert kept[1] < 0.6 * kept[0]
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys()
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=0, atol=1e-6, msg=name)


def gradients_of(model: YiVLForConditionalGeneration, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


# what changes over a run, also behind the checkpoint at step 4
CHANGES = (
    "schedule={shape: wsd, warmup: 1, decay_fraction: 0.5, vision: {shape: constant}}",
    "batch_ramp=[[2, 12], [5, 4]]",
    "data.sources.0.weight=[2, 0]",
)


@pytest.mark.core
@pytest.mark.parametrize(("workers", "changes"), [(0, ()), (2, CHANGES)])
def test_a_stopped_run_goes_on_exactly(
    configure: Callable[..., TrainConfig], tmp_path: Path, workers: int, changes: tuple[str, ...]
) -> None:
    settings = (f"data.workers={workers}", "checkpoint={every_steps: 2, keep_last: 1}", *changes)
    whole = configure(f"run_dir={tmp_path}/whole", *settings)
    train(whole)

    stopped = configure(f"run_dir={tmp_path}/stopped", *settings)
    run = trainer(stopped)
    real_step, names = run.step, []

    def step_until_killed(batch: Any, num_supervised: int) -> Any:
        if run.done_steps == 5:
            raise KeyboardInterrupt
        names.append(batch.names)
        return real_step(batch, num_supervised)

    run.step = step_until_killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run.run()
    assert [path.name for path in sorted(Path(stopped.run_dir).glob("step-*"))] == ["step-00000004"]
    (Path(stopped.run_dir) / ".step-00000006.tmp").mkdir()  # a save that was cut short
    train(stopped)
    assert losses(stopped) == losses(whole) and len(losses(whole)) == 6
    for key in ("lr", "batch_size", "samples_seen"):
        first, second = ([row[key] for row in read_metrics(Path(c.run_dir) / METRICS_FILE)] for c in (stopped, whole))
        assert first == second
    whole_weights, resumed_weights = (
        YiVLForConditionalGeneration.from_pretrained(Path(config.run_dir) / "final").state_dict()
        for config in (whole, stopped)
    )
    assert all(torch.equal(whole_weights[name], resumed_weights[name]) for name in whole_weights)


def test_a_missing_start_is_one_line(configure: Callable[..., TrainConfig], tmp_path: Path) -> None:
    start = f"init_from={{checkpoint: {tmp_path}/none, tower: null, language_model: null}}"
    with pytest.raises(ValueError, match="there is no such folder"):
        train(configure(f"run_dir={tmp_path}/other", start))


def test_metrics_say_what_people_ask(configure: Callable[..., TrainConfig]) -> None:
    config = configure("steps=3", "trainable.vision=false", "lr.language=2e-3", "schedule.warmup=0")
    train(config)
    row = json.loads((Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["step"] == 3 and set(row["loss_per_source"]) <= {"captions", "chats"}
    assert set(row["lr"]) == {"projector", "language"}
    assert row["lr"]["language"] == pytest.approx(2 * row["lr"]["projector"])
    assert row["samples_seen"] == 24 and row["samples_per_second"] > 0 and row["grad_norm"] > 0


@pytest.mark.parametrize("stem_widths", [None, [8, 16]])
def test_a_batch_without_images_gives_vision_a_zero_gradient(stem_widths: list[int] | None) -> None:
    """So that ranks with and without images exchange the same gradients."""
    model = tiny_model(stem_widths=stem_widths).train()
    ids = torch.arange(10, 58).repeat(2, 1)  # (B, S)
    loss, _ = Objective(model, 1)(ids, torch.ones_like(ids), ids, None, torch.zeros(2, dtype=torch.long))
    loss.backward()
    for part in (model.model.multi_modal_projector, model.model.vision_tower.visual.conv1):
        for parameter in part.parameters():
            assert parameter.grad is not None and not parameter.grad.any()
    model.zero_grad()
    model.model.vision_tower.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(False)
    assert Objective(model, 1)(ids, torch.ones_like(ids), ids, None, torch.zeros(2, dtype=torch.long))[0] == loss
