"""The trainer on a CUDA device that is not there; see fake_cuda.py."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from conftest import chat_sample
from fake_cuda import CUDA, FakeCuda, device_of, fake_cuda
from tiny import tiny_model, tiny_processor
from toy_runs import losses, step_once, trainer

from train import loss, metrics, setup
from train.attention import packing
from train.attention.packing import Packing
from train.config import TrainConfig
from train.loss import Objective
from train.metrics import read_metrics
from train.speed import step as speed_step
from train.trainer import train
from yi_vl import hardware

Configure = Callable[..., TrainConfig]
VARIANTS = {
    "captions and chats": (),
    "captions alone": ("data.sources.1.weight=1e-9",),
    "checkpointed, one by one": ("activation_checkpointing=true", "micro_batch=1", "clip_norm=null"),
    "frozen language model": ("trainable.language=false",),
    "frozen tower": ("trainable.vision=false", "activation_checkpointing=true"),
    "bf16": ("precision=bf16", "activation_checkpointing=true"),
}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], AbstractContextManager[FakeCuda]]]:
    """The device, as a context; the trainer's clock may be read only when the device has done its work.

    accelerate keeps the device of a process, and refuses another.
    """

    def device() -> AbstractContextManager[FakeCuda]:
        AcceleratorState._reset_state(reset_partial_state=True)
        return fake_cuda(monkeypatch)

    yield device
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeCuda], None]:
    def watch(device: FakeCuda) -> None:
        for module in (metrics, hardware):
            monkeypatch.setattr(
                module,
                "time",
                SimpleNamespace(
                    perf_counter=device.clock,
                    **{name: getattr(time, name) for name in ("monotonic", "strftime", "gmtime")},
                ),
            )

    return watch


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_as_on_a_cpu(
    configure: Configure, tmp_path: Path, cuda: Any, watched: Any, variant: str
) -> None:
    """Padded there, packed here: the same losses, step by step."""
    overrides = (*VARIANTS[variant], "steps=2")
    train(expected := configure(*overrides, f"run_dir={tmp_path}/cpu"))
    with cuda() as device:
        watched(device)
        train(on_cuda := configure(*overrides, f"run_dir={tmp_path}/cuda"))
        assert device.num_operations > 1000
    tolerance = 2e-2 if variant == "bf16" else 1e-4
    assert losses(on_cuda) == pytest.approx(losses(expected), rel=tolerance) and len(losses(on_cuda)) == 2
    logged = read_metrics(tmp_path / "cuda/metrics.jsonl")
    assert all(row["peak_memory_gb"] > 0 and row["tflops_per_device"] > 0 for row in logged)


def test_nothing_of_a_step_is_left_on_the_cpu(configure: Configure, cuda: Any) -> None:
    with cuda():
        run = trainer(configure())
        assert run.objective._packing is None, "rows stay padded where flash-attn is not"
        step_once(run)
        state = [value for values in run.optimizer.optimizer.state.values() for value in values.values()]
        tensors = [*run.model.parameters(), *run.model.buffers(), *state]
        assert {device_of(tensor) for tensor in tensors} == {CUDA} and len(state) > 50


def test_a_batch_without_images_reaches_the_tower(
    configure: Configure, cuda: Any, tmp_path: Path, write_shard: Callable[..., Path]
) -> None:
    config = configure(f"data.sources.1.shards={tmp_path}/bare.tar", "data.sources.0.weight=1e-9")
    write_shard(tmp_path / "bare.tar", [chat_sample(7 * index + 6) for index in range(16)])
    with cuda():
        run = trainer(config)
        batch = next(iter(run.loader))
        assert all(micro.images is None for micro in batch.micro_batches)
        run.optimizer.zero_grad = lambda: None
        run.step(batch, batch.num_supervised)
        assert all(parameter.grad is not None for parameter in run.model.model.multi_modal_projector.parameters())


def test_rows_are_packed_where_flash_attn_is(
    configure: Configure, cuda: Any, watched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In flash-attn's place the mask that transformers makes of the same positions."""
    train(expected := configure("steps=2", f"run_dir={tmp_path}/cpu"))
    monkeypatch.setattr(packing, "is_flash_attn_2_available", lambda: True)
    monkeypatch.setattr(packing, "VARLEN", "eager")
    monkeypatch.setattr(setup, "use_varlen_attention_", lambda model, _: packing.use_varlen_attention_(model, "bf16"))
    monkeypatch.setitem(loss._PACKINGS, "eager", Packing)
    packed: list[type] = []
    forward = Objective.forward
    monkeypatch.setattr(
        Objective, "forward", lambda self, *args, **kw: packed.append(self._packing) or forward(self, *args, **kw)
    )
    with cuda() as device:
        watched(device)
        train(on_cuda := configure("steps=2", f"run_dir={tmp_path}/cuda"))
    assert set(packed) == {Packing}
    assert losses(on_cuda) == pytest.approx(losses(expected), rel=1e-4)


def test_adapters_train_beside_a_frozen_language_model(configure: Configure, cuda: Any, tmp_path: Path) -> None:
    base = train(configure(f"run_dir={tmp_path}/base", "steps=1"))
    with cuda():
        final = train(
            configure(
                f"run_dir={tmp_path}/lora", f"init_from={{checkpoint: {base}, tower: null, language_model: null}}",
                "trainable={vision: false, projector: true, language: lora}", "lora={rank: 4, alpha: 8, dropout: 0.1}",
                "steps=2", "activation_checkpointing=true", "precision=bf16",
            )
        )  # fmt: skip
    assert (final / "adapter_model.safetensors").stat().st_size > 0


def test_a_run_goes_on_and_shows_answers(configure: Configure, cuda: Any, watched: Any, tmp_path: Path) -> None:
    answers = f"generations={{shards: {tmp_path}/chats/0.tar, every_steps: 1, count: 2, max_new_tokens: 4}}"
    overrides = ("steps=3", "checkpoint.every_steps=1", answers)
    with cuda() as device:
        watched(device)
        config = configure(*overrides)
        train(config)
        whole = losses(config)
        shutil.rmtree(tmp_path / "run/final")
        AcceleratorState._reset_state(reset_partial_state=True)
        train(config)
    assert losses(config) == whole and len(whole) == 3
    assert len((tmp_path / "run/generations.jsonl").read_text().splitlines()) == 3


def test_steps_are_timed_when_the_gpu_is_done(
    cuda: Any, watched: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed_step, "_RATE_ROWS", 8)
    tiny_model(max_position_embeddings=4096).save_pretrained(tmp_path / "tiny")
    tiny_processor().save_pretrained(tmp_path / "tiny")
    work = speed_step.make_work(tmp_path, tmp_path / "tiny", "chat", (4, 2), 2, "fp32", compiles=False)
    with cuda() as device:
        watched(device)
        measured = speed_step.compare(work)
    assert measured["largest_loss_difference"] < 1e-4
