"""Connectors in the trainer: fresh in a model from parts or a trained one, resumed exactly, counted, planned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_connectors import SMALL
from toy_runs import losses, stop_after, trainer

import yi_vl
from train.config import TrainableConfig, TrainConfig
from train.config_file import load_config, to_yaml
from train.init import initial_model, initial_processor
from train.plan.__main__ import _released, make_plan
from train.plan.batch import AVERAGE
from train.plan.count import count_flops
from train.plan.flops import Row, step_flops
from train.trainer import train
from yi_vl.config import preset
from yi_vl.connector.config import ABSTRACTOR, MLP, QFORMER, RESAMPLER, ConnectorConfig

Configure = Callable[..., TrainConfig]
ALIGN_6B = Path(__file__).parents[1] / "train/configs/6b/align-224.yaml"
TOKENS = {MLP: 4, QFORMER: 4, RESAMPLER: 5, ABSTRACTOR: 9}  # of a 28 px image in patches of 14


def setting(type_: str) -> str:
    sizes = "".join(f", {name}: {value}" for name, value in SMALL[type_].items())
    return f"init_from.connector={{type: {type_}{sizes}}}"


@pytest.mark.parametrize("type_", SMALL)
def test_trained_from_parts_it_learns_and_resumes_exactly(type_: str, configure: Configure, tmp_path: Path) -> None:
    whole = configure(setting(type_), f"run_dir={tmp_path}/whole")
    final = train(whole)
    expected = losses(whole)
    assert expected[-1] < expected[0]
    killed = configure(setting(type_), f"run_dir={tmp_path}/killed", "checkpoint.every_steps=2")
    stop_after(trainer(killed), 4)
    train(killed)
    assert losses(killed) == expected
    model = yi_vl.load(final, dtype="float32")
    assert model.model.config.connector_config.type == type_
    assert model.processor.tokens_per_image == model.model.config.num_image_tokens == TOKENS[type_]
    assert isinstance(model.predict([], "Hi", max_new_tokens=3), str)


def test_a_trained_models_connector_is_replaced(configure: Configure, tmp_path: Path) -> None:
    first = train(configure(f"run_dir={tmp_path}/first", "steps=1"))
    overrides = ["init_from.tower=null", "init_from.language_model=null", f"init_from.checkpoint={first}"]
    config = configure(*overrides, setting(QFORMER), f"run_dir={tmp_path}/second", "steps=1")
    assert initial_processor(config).tokens_per_image == 4
    model, processor = initial_model(config, torch.device("cpu"))
    assert model.config.connector_config.type == QFORMER and processor.num_image_tokens == 4
    assert yi_vl.load(train(config)).model.config.connector_config.type == QFORMER
    again = configure(*overrides[:2], f"init_from.checkpoint={tmp_path}/second/final", f"run_dir={tmp_path}/third")
    model, processor = initial_model(again, torch.device("cpu"))
    assert model.config.connector_config.type == QFORMER and processor.tokens_per_image == 4, "it stays"


def test_only_the_connector_can_be_trained(configure: Configure) -> None:
    config = configure(setting(RESAMPLER), "trainable={vision: false, language: false}", "steps=2")
    before = {
        name: tensor.clone() for name, tensor in initial_model(config, torch.device("cpu"))[0].state_dict().items()
    }
    after = yi_vl.load(train(config), dtype="float32").model.state_dict()
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("init_from.connector={type: perceiver}", "init_from.connector: .*'perceiver'; expected one of mlp, qformer"),
        ("init_from.connector={type: abstractor, num_tokens: 7}", "init_from.connector: .*num_tokens is 7"),
        ("init_from.connector={type: mlp, num_layers: 2}", "init_from.connector: .*no num_layers"),
        ("init_from.connector={num_tokens: 7}", "init_from.connector.type"),
        ("init_from.connector={type: qformer, tokens: 7}", "tokens"),
    ],
)
def test_a_wrong_setting_is_refused_when_the_config_is_read(override: str, message: str, configure: Configure) -> None:
    with pytest.raises(ValueError, match=message):
        configure(override)


def test_adapters_are_refused(configure: Configure, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"init_from\.connector cannot be set with trainable\.language: lora"):
        configure(
            "init_from.tower=null", "init_from.language_model=null", f"init_from.checkpoint={tmp_path}",
            setting(QFORMER), "trainable.language=lora",
        )  # fmt: skip


def test_preferences_are_refused_whose_reference_would_be_another_fresh_connector(configure: Configure) -> None:
    overrides = ["init_from.tower=null", "init_from.language_model=null", f"init_from.checkpoint={ALIGN_6B}"]
    with pytest.raises(ValueError, match=r"init_from\.connector makes a connector that knows nothing"):
        configure(
            *overrides,
            setting(QFORMER),
            "objective=dpo",
            "data.format=preference",
            "data.sources=[{name: a, shards: a.tar}]",
        )


def test_the_setting_is_kept_beside_the_checkpoints(configure: Configure, tmp_path: Path) -> None:
    config = configure(setting(ABSTRACTOR))
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("type_", [QFORMER, RESAMPLER, ABSTRACTOR])
def test_flops_are_those_that_are_counted(type_: str) -> None:
    model = preset("6b")
    model.connector_config = ConnectorConfig(type=type_)
    trains = TrainableConfig(vision=False, projector=True, language=False)
    config = TrainConfig(trainable=trains)
    row = Row(model.num_image_tokens + 32, 32)
    assert step_flops(model, trains, row) == pytest.approx(count_flops(model, config, row), rel=0.02)


@pytest.mark.parametrize(("overrides", "release"), [([], "6b"), (["init_from.connector={type: qformer}"], None)])
def test_a_plan_with_another_connector_has_not_the_releases_hours(overrides: list[str], release: str | None) -> None:
    made = make_plan(ALIGN_6B, overrides)
    assert _released([made]) == release
    assert made.rows[0][1].tokens == (256 if release else 32) + AVERAGE.caption
