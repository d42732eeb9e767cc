"""Gated cross-attention in the trainer: what is trained, batches, packing, adapters, exact resume, the plan."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from preference_runs import configure_preferences, pair_sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toy_runs import losses, stop_after, trainer
from transformers import LlamaConfig

import yi_vl
from train.config import TrainableConfig, TrainConfig
from train.data.batch import MicroBatch, StepBatch
from train.init import initial_model, initial_processor
from train.loss import Objective
from train.optim import component_parameters, set_trainable_
from train.plan.__main__ import _released, make_plan
from train.plan.count import count_flops, count_saved_bytes
from train.plan.flops import Row, batch_flops, step_batch_flops, step_flops
from train.trainer import train
from yi_vl.config import OpenClipVisionConfig, YiVLConfig
from yi_vl.connector.config import CROSS_ATTENTION, ConnectorConfig
from yi_vl.decoder.cross_attention import CROSS_BLOCK, GatedCrossAttention
from yi_vl.decoder.gated import cross_blocks
from yi_vl.decoder.gated_config import YiGatedConfig
from yi_vl.model import YiVLForConditionalGeneration

Configure = Callable[..., TrainConfig]
SETTING = "init_from.connector={type: cross_attention, every: 1, num_tokens: 3, num_layers: 1, num_heads: 4}"
FROZEN = "trainable={vision: false, projector: true, language: false}"
CONFIGS = Path(__file__).parents[1] / "train/configs"
CPU = torch.device("cpu")


def from_checkpoint(path: Path) -> tuple[str, ...]:
    return "init_from.tower=null", "init_from.language_model=null", f"init_from.checkpoint={path}"


@pytest.mark.parametrize("settings", [(FROZEN,), (), (FROZEN, "activation_checkpointing=true")], ids=str)
def test_trained_from_parts_it_learns_and_resumes_exactly(
    settings: tuple[str, ...], configure: Configure, tmp_path: Path
) -> None:
    settings += (SETTING, "lr.projector=1e-2")
    whole = configure(f"run_dir={tmp_path}/whole", *settings)
    before = {name: weight.clone() for name, weight in initial_model(whole, CPU)[0].state_dict().items()}
    final = train(whole)
    expected = losses(whole)
    assert expected[-1] < expected[0]
    killed = configure(f"run_dir={tmp_path}/killed", "checkpoint.every_steps=2", *settings)
    stop_after(trainer(killed), 4)
    train(killed)
    assert losses(killed) == expected
    loaded = yi_vl.load(final, dtype="float32")
    assert loaded.model.config.connector_config.type == CROSS_ATTENTION
    assert loaded.processor.tokens_per_image == loaded.model.config.num_image_tokens == 1
    if FROZEN in settings:
        changed = {name for name, weight in loaded.model.state_dict().items() if not torch.equal(weight, before[name])}
        assert changed and all("multi_modal_projector" in name or CROSS_BLOCK in name for name in changed)
        assert any(name.endswith("attention_gate") for name in changed)


def test_blocks_are_the_projectors_and_change_nothing_at_first(configure: Configure) -> None:
    config = configure(SETTING)
    torch.manual_seed(0)  # the table gets a fresh row
    model, processor = initial_model(config, CPU)
    torch.manual_seed(0)
    plain, _ = initial_model(configure(), CPU)
    assert isinstance(model.config.text_config, YiGatedConfig) and model.config.text_config.cross_layers == [0, 1]
    assert processor.num_image_tokens == initial_processor(config).tokens_per_image == 1
    blocks = cross_blocks(model.model.language_model)
    assert len(blocks) == 2
    by_component = component_parameters(model)
    in_projector = {id(parameter) for parameter in by_component["projector"]}
    assert all(id(parameter) in in_projector for block in blocks for parameter in block.parameters())
    counts = {name: sum(p.numel() for p in parameters) for name, parameters in by_component.items()}
    assert counts["language"] == sum(p.numel() for p in component_parameters(plain)["language"])
    ids = torch.randint(3, 300, (2, 10))
    ids[0, 2] = processor.image_token_id
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, pixel_values=torch.randn(1, 3, 28, 28)).logits
        assert torch.equal(logits, plain.eval()(input_ids=ids).logits)


def test_a_trained_models_connector_is_replaced_and_back(configure: Configure, tmp_path: Path) -> None:
    first = train(configure(f"run_dir={tmp_path}/first", "steps=1"))
    before = yi_vl.load(first, dtype="float32").model.state_dict()
    second = train(configure(*from_checkpoint(first), SETTING, FROZEN, f"run_dir={tmp_path}/second", "steps=2"))
    gated, _ = initial_model(configure(*from_checkpoint(second)), CPU)
    assert gated.config.connector_config.every == 1, "it stays"
    other = "init_from.connector={type: cross_attention, every: 2}"
    again, processor = initial_model(configure(*from_checkpoint(second), other), CPU)
    assert again.config.text_config.cross_layers == [1] and processor.tokens_per_image == 1
    (block,) = cross_blocks(again.model.language_model)
    assert not block.attention_gate.any() and block.q_proj.weight.std() > 0, "fresh"
    back, processor = initial_model(configure(*from_checkpoint(second), "init_from.connector={type: mlp}"), CPU)
    assert type(back.config.text_config) is LlamaConfig and processor.tokens_per_image == 4
    for model in (gated, again, back):
        for name, weight in model.state_dict().items():
            if "language_model" in name and CROSS_BLOCK not in name:
                assert torch.equal(weight, before[name])


@pytest.fixture
def opened(configure: Configure, tmp_path: Path) -> Path:
    """A checkpoint whose gates are open."""
    return train(configure(SETTING, f"run_dir={tmp_path}/opened", "steps=3", "lr.projector=3e-2", FROZEN))


def gradients(objective: Objective, micro: Any, pixels: Any) -> tuple[float, dict[str, torch.Tensor]]:
    objective.zero_grad()
    num_rows = len(micro.input_ids)
    loss, _ = objective(
        micro.input_ids, micro.attention_mask, micro.labels, pixels, torch.zeros(num_rows, dtype=torch.long),
        micro.shared_prefix_length if objective._packing is not None else 0,
    )  # fmt: skip
    loss.backward()
    named = objective.model.named_parameters()
    return float(loss.detach()), {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_packed_rows_learn_as_padded_ones(opened: Path, configure: Configure, tmp_path: Path) -> None:
    """Rows with one image, two or none, after a prefix that they share; packed they attend in groups."""
    run = trainer(configure(*from_checkpoint(opened), f"run_dir={tmp_path}/run"))
    batches: Iterator[Any] = iter(run.loader)
    micro_batches = [micro for _ in range(3) for micro in next(batches).micro_batches]
    counts = [(micro.input_ids == run.processor.image_token_id).sum(1).tolist() for micro in micro_batches]
    assert {count for each in counts for count in each} >= {0, 1, 2}
    assert any(micro.shared_prefix_length for micro in micro_batches)
    to_pixels = run.processor.image_processor.to_pixel_values
    packed = Objective(run.model, 1)
    run.model.model.language_model.set_attn_implementation("sdpa")
    padded = Objective(run.model, 1)
    assert padded._packing is None and packed._packing is not None
    for micro in micro_batches:
        pixels = to_pixels(micro.images) if micro.images is not None else None
        results = []
        for objective, attention in ((packed, "yi_vl_packed"), (padded, "sdpa")):
            run.model.model.language_model.set_attn_implementation(attention)
            results.append(gradients(objective, micro, pixels))
        (loss, grads), (expected_loss, expected) = results
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert grads.keys() == expected.keys()
        for name in grads:
            torch.testing.assert_close(grads[name], expected[name], rtol=1e-3, atol=1e-4, msg=name)


def test_a_batch_of_texts_uses_every_trained_parameter(opened: Path, configure: Configure, tmp_path: Path) -> None:
    run = trainer(configure(*from_checkpoint(opened), FROZEN, f"run_dir={tmp_path}/run"))
    ids = torch.randint(3, 300, (2, 9))
    arguments = (ids, torch.ones_like(ids), ids, None, torch.zeros(2, dtype=torch.long))
    loss, _ = run.objective(*arguments)
    loss.backward()
    trained = [p for p in run.model.parameters() if p.requires_grad]
    assert len(trained) > 20 and all(p.grad is not None and not p.grad.any() for p in trained)
    run.model.requires_grad_(False)
    assert torch.equal(run.objective(*arguments)[0], loss), "without what is unused it is the same"


def test_accumulated_gradients_are_the_whole_batchs(opened: Path, configure: Configure, tmp_path: Path) -> None:
    start = (*from_checkpoint(opened), FROZEN, "steps=2")
    results = []
    for size in (8, 2):
        config = configure(*start, f"run_dir={tmp_path}/{size}", f"micro_batch={size}")
        train(config)
        results.append(losses(config))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("trains", ["trainable.vision=false", "trainable={vision: false, language: lora}"])
def test_preferences_compare_with_the_trained_blocks(
    trains: str, opened: Path, configure: Configure, tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    """Both answers of a pair attend to its images, which are encoded once; both are the reference's at first."""
    shutil.copytree(opened, tmp_path / "start")
    write_shard(tmp_path / "pairs/0.tar", [pair_sample(i) for i in range(60)])
    made = configure_preferences(configure, tmp_path, write_shard)
    config = made(trains, "lora.dropout=0", "steps=4", f"run_dir={tmp_path}/preferences")
    train(config)
    assert losses(config)[0] == pytest.approx(math.log(2), rel=1e-4) and losses(config)[-1] != losses(config)[0]


@pytest.mark.parametrize("projector", [True, False])
def test_adapters_of_the_language_model_beside_the_blocks(
    projector: bool, opened: Path, configure: Configure, tmp_path: Path
) -> None:
    trains = f"trainable={{vision: false, projector: {str(projector).lower()}, language: lora}}"
    config = configure(*from_checkpoint(opened), trains, "lora={rank: 4, alpha: 8}", f"run_dir={tmp_path}/lora")
    run = trainer(config)
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert not any(CROSS_BLOCK in name and "lora" in name for name in names)
    assert any(CROSS_BLOCK in name for name in names) == projector
    run.run()
    run.save(tmp_path / "saved", with_state=False)
    killed = configure(
        *from_checkpoint(opened), trains, "lora={rank: 4, alpha: 8}", f"run_dir={tmp_path}/killed",
        "checkpoint.every_steps=2",
    )  # fmt: skip
    stop_after(trainer(killed), 4)
    train(killed)
    assert losses(killed) == losses(config)
    merged = yi_vl.load(tmp_path / "saved", dtype="float32").model.eval()
    ids = torch.randint(3, 300, (1, 10))
    ids[0, 2] = merged.config.image_token_id
    pixels = torch.randn(1, 3, 28, 28)
    with torch.inference_mode():
        run.model.model.language_model.set_attn_implementation("sdpa")
        expected = run.model.eval()(input_ids=ids, pixel_values=pixels).logits
        torch.testing.assert_close(merged(input_ids=ids, pixel_values=pixels).logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_selected_are_not_their_blocks(opened: Path, configure: Configure, tmp_path: Path) -> None:
    trains = "trainable={vision: false, projector: false, language: [1]}"
    run = trainer(configure(*from_checkpoint(opened), trains, f"run_dir={tmp_path}/run"))
    names = [name for name, parameter in run.model.named_parameters() if parameter.requires_grad]
    assert names and all("layers.1." in name and CROSS_BLOCK not in name for name in names)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("{type: cross_attention, every: 0}", "every is 0; expected a whole number of 1 or more"),
        ("{type: cross_attention, num_layers: 2}", "type cross_attention has no num_layers"),
        ("{type: cross_attention, hidden_size: 2}", "type cross_attention has no hidden_size"),
        ("{type: mlp, every: 2}", "type mlp has no every"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_config_is_read(setting: str, message: str, configure: Configure) -> None:
    with pytest.raises(ValueError, match=rf"init_from\.connector: .*{message}"):
        configure(f"init_from.connector={setting}")


def test_more_layers_than_there_are_is_refused(configure: Configure) -> None:
    with pytest.raises(ValueError, match="every is 4, and the language model has 2 layers; lower it"):
        initial_model(configure("init_from.connector={type: cross_attention}"), CPU)


def plan_model(**connector: Any) -> YiVLConfig:
    """No two dimensions alike."""
    return YiVLConfig(
        vision_config=OpenClipVisionConfig(
            image_size=70, patch_size=14, hidden_size=48, intermediate_size=200, num_hidden_layers=5,
            num_attention_heads=4,
        ),
        text_config=LlamaConfig(
            vocab_size=320, hidden_size=64, intermediate_size=168, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0,
        ),
        image_token_id=300,
        connector_config=ConnectorConfig(type=CROSS_ATTENTION, every=2, **connector),
    )  # fmt: skip


TRAINS = [
    TrainableConfig(),
    TrainableConfig(vision=False, projector=True, language=False),
    TrainableConfig(vision=True, projector=False, language=False),
    TrainableConfig(vision=False, projector=True, language=["2-"]),
    TrainableConfig(vision=False, projector=False, language=["4"]),
]


@pytest.mark.parametrize("trains", TRAINS, ids=str)
def test_flops_are_those_that_are_counted(trains: TrainableConfig) -> None:
    for model in (plan_model(), plan_model(num_tokens=6, num_layers=2, num_heads=4)):
        row = Row(61, 20)
        config = TrainConfig(trainable=trains)
        assert step_flops(model, trains, row) == pytest.approx(count_flops(model, config, row), rel=0.01)


@pytest.mark.parametrize("images", [True, False])
def test_counted_flops_and_saved_bytes_are_a_steps(images: bool) -> None:
    """Of rows that begin with their image, or are texts, in the trainer's own forward and backward pass."""
    config, trains = TrainConfig(precision="fp32"), TrainableConfig(vision=False, projector=True, language=False)
    config.trainable = trains
    row = Row(31, 20, has_image=images)
    model = YiVLForConditionalGeneration(plan_model())
    set_trainable_(model, config)
    objective = Objective(model, num_sources=1)
    ids = torch.ones(2, row.tokens, dtype=torch.long)
    ids[:, 0] = 300 if images else 1
    labels = torch.full_like(ids, -100)
    labels[:, -row.supervised :] = 5
    pixels = torch.randn(2, 3, 70, 70) if images else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = objective(ids, torch.ones_like(ids), labels, pixels, torch.zeros(2, dtype=torch.long))
        loss.backward()
    assert count_flops(model.config, config, row, num_rows=2) == counter.get_total_flops()
    saved = count_saved_bytes(model.config, config, row, 2, is_low=False, device="cpu")
    longer = count_saved_bytes(model.config, config, Row(62, 20, has_image=images), 2, is_low=False, device="cpu")
    assert 0 < saved.activations < longer.activations and saved.largest_layer < saved.activations


def test_mfu_counts_the_tokens_that_have_an_image_before_them() -> None:
    model, trains = plan_model(), TrainableConfig(vision=False, projector=True, language=False)
    ids = torch.ones(2, 20, dtype=torch.long)
    ids[0, 5] = 300  # 15 tokens see it, 3 of them padding
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    micro = MicroBatch(ids, mask, labels, torch.zeros(1, 3, 70, 70), torch.zeros(2, dtype=torch.long), 0)
    flops = step_batch_flops(model, trains, StepBatch([micro], [], 0, {}, []))
    arguments = (model, trains, mask, labels[:, 1:] != -100, 1)
    assert flops == batch_flops(*arguments, num_seeing=12) > batch_flops(*arguments, num_seeing=11)


def test_the_plan_counts_blocks_as_the_projectors() -> None:
    made = make_plan(CONFIGS / "6b/align-224.yaml", ["init_from.connector={type: cross_attention}"])
    parameters, plain = made.parameters, make_plan(CONFIGS / "6b/align-224.yaml", [])
    added = parameters.total["projector"] - plain.parameters.total["projector"]
    assert parameters.total["language"] == plain.parameters.total["language"]
    with torch.device("meta"):
        block = sum(p.numel() for p in GatedCrossAttention(made.model.text_config).parameters())
    assert added == 8 * block and made.rows[0][1].tokens == 1 + 32
    assert _released([made]) is None


def test_an_int4_base_has_its_blocks_in_full(opened: Path, configure: Configure, tmp_path: Path) -> None:
    """Adapters on four bits, beside blocks that are trained; or on four bits and frozen blocks."""
    for projector in ("true", "false"):
        config = configure(
            *from_checkpoint(opened), f"trainable={{vision: false, projector: {projector}, language: lora}}",
            "lora={rank: 4, alpha: 8, base: int4}", f"run_dir={tmp_path}/int4-{projector}", "steps=2",
        )  # fmt: skip
        run = trainer(config)
        weights = dict(run.model.named_parameters())
        of_blocks = [name for name in weights if CROSS_BLOCK in name]
        assert len(of_blocks) >= 2 * 11 and all(weights[name].dtype == torch.float32 for name in of_blocks)
        assert any(weights[name].requires_grad for name in of_blocks) == (projector == "true")
        assert any(weight.dtype == torch.uint8 for name, weight in weights.items() if "self_attn" in name)
        run.run()
        assert len(losses(config)) == 2


def test_tiles_are_refused(configure: Configure) -> None:
    with pytest.raises(ValueError, match=r"up to 4 tiles.*cross_attention"):
        initial_model(configure(SETTING, "image={tiles: 4}"), CPU)
    with pytest.raises(ValueError, match=r"up to 4 tiles.*cross_attention"):
        make_plan(CONFIGS / "6b-cross-attention/align-448.yaml", ["image={tiles: 4}"])
