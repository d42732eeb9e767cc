"""A run starts from whatever `yi_vl.load` reads, and refuses what it refuses with the same sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import OFFICIAL
from toy_runs import losses, trainer

import yi_vl
from train.config import TrainConfig
from train.init import initial_model, initial_processor
from train.trainer import train
from yi_vl.checkpoint import convert, open_checkpoint
from yi_vl.checkpoint import load as loading

RELEASE = OFFICIAL / "checkpoint"
IMAGE_SIZE_PX = open_checkpoint(RELEASE).config.vision_config.image_size
LORA = ("trainable={vision: false, projector: true, language: lora}", "lora={rank: 4, alpha: 8}", "lr.language=1e-2")

StartFrom = Callable[..., TrainConfig]


@pytest.fixture
def start_from(configure: Callable[..., TrainConfig]) -> StartFrom:
    """A function (checkpoint, overrides) -> the settings of a toy run that starts from it."""

    def settings(checkpoint: object, *overrides: str) -> TrainConfig:
        start = f"init_from={{checkpoint: {checkpoint}, tower: null, language_model: null}}"
        return configure(start, f"image_size={IMAGE_SIZE_PX}", *overrides)

    return settings


@pytest.fixture
def make_checkpoint(tmp_path: Path, start_from: StartFrom) -> Callable[[str], Path]:
    """A function (layout) -> a folder in it, with the weights of the official test checkpoint; adapters change them."""

    def make(layout: str) -> Path:
        if layout == "official":
            return RELEASE
        if layout == "adapters":
            return train(start_from(RELEASE, *LORA, f"run_dir={tmp_path}/adapters", "steps=3"))
        convert(open_checkpoint(RELEASE), tmp_path / layout, layout)  # type: ignore[arg-type]
        return tmp_path / layout

    return make


@pytest.mark.parametrize("layout", ["official", "llava-hf", "yi-vl", "adapters"])
def test_a_run_starts_from_every_layout_that_load_reads(
    layout: str, make_checkpoint: Callable[[str], Path], start_from: StartFrom, tmp_path: Path
) -> None:
    folder = make_checkpoint(layout)
    config = start_from(folder, f"run_dir={tmp_path}/run")
    expected = yi_vl.load(folder, device="cpu", dtype=torch.float32)
    model, processor = initial_model(config, torch.device("cpu"))
    state = model.state_dict()
    for name, tensor in expected.model.state_dict().items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], tensor), name
    text = "### Human: <image_placeholder>\nWhat is this?"
    for made in (processor, initial_processor(config)):
        assert made.tokenizer(text).input_ids == expected.processor.tokenizer(text).input_ids
        assert made.image_processor.size_px == IMAGE_SIZE_PX and made.patch_size == expected.processor.patch_size

    final = train(config)
    assert losses(config)[-1] < losses(config)[0]
    assert yi_vl.load(final, device="cpu").predict(OFFICIAL / "wide.png", "What is this?", max_new_tokens=2) is not None


def test_a_hub_id_is_read_and_named_by_its_adapters(
    start_from: StartFrom, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested = []

    def download(repository: str, **_: object) -> str:
        requested.append(repository)
        return str(RELEASE)

    monkeypatch.setattr(loading, "snapshot_download", download)
    final = train(start_from("01-ai/Yi-VL-6B", *LORA, f"run_dir={tmp_path}/run", "steps=1"))
    assert set(requested) == {"01-ai/Yi-VL-6B"}
    assert json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"] == "01-ai/Yi-VL-6B"
    assert yi_vl.load(final, device="cpu").predict(None, "Hi", max_new_tokens=1) is not None


def _remove_vit(folder: Path) -> None:
    shutil.rmtree(folder / "vit")


def _truncate_weights(folder: Path) -> None:
    weights = next(folder.glob("pytorch_model*.bin"))
    weights.write_bytes(weights.read_bytes()[:1000])


def _remove_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def _make_another_model(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))


@pytest.mark.parametrize(
    "spoil", [shutil.rmtree, _remove_vit, _truncate_weights, _remove_tokenizer, _make_another_model]
)
@pytest.mark.parametrize("base", ["null", "int4"])
def test_a_wrong_folder_is_refused_as_load_refuses_it(
    spoil: Callable[[Path], None], base: str, start_from: StartFrom, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(RELEASE, tmp_path / "copy"))
    spoil(folder)
    with pytest.raises(ValueError) as by_load:
        yi_vl.load(folder, device="cpu")
    with pytest.raises(ValueError) as by_trainer:
        trainer(start_from(folder, *LORA, f"lora.base={base}"))
    assert str(by_trainer.value) == str(by_load.value)


def test_quantized_models_and_adapters_of_adapters_are_refused(
    make_checkpoint: Callable[[str], Path], start_from: StartFrom, tmp_path: Path
) -> None:
    yi_vl.load(RELEASE, device="cpu", quantize="int8").save(tmp_path / "int8")
    with pytest.raises(ValueError, match="int8 is quantised and cannot be trained"):
        trainer(start_from(tmp_path / "int8"))
    with pytest.raises(ValueError, match=r"holds adapters.*yi-vl convert"):
        trainer(start_from(make_checkpoint("adapters"), *LORA))
