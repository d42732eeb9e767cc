"""Training in the chat format chatml: from parts, the loss mask, held-out samples, later stages, refusals."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tiny import OFFICIAL, tiny_config
from toy_runs import losses, trainer
from transformers import LlamaForCausalLM

import yi_vl
from train.config import TrainConfig
from train.data.batch import IGNORE
from train.generations import HeldOut
from train.init import initial_processor
from train.preview import preview
from train.trainer import train
from yi_vl.chat import CHATML, to_text
from yi_vl.chat_template import CHAT_TEMPLATE


@pytest.fixture
def configure_chatml(configure: Callable[..., TrainConfig], chatml_language_model: Path) -> Callable[..., TrainConfig]:
    """`configure` for a model from parts in chatml."""

    def configured(*overrides: str) -> TrainConfig:
        return configure(f"init_from.language_model={chatml_language_model}", "chat_format=chatml", *overrides)

    return configured


@pytest.fixture(scope="module")
def chatml_language_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama of two layers with a tokenizer that has Yi's ids of the marks."""
    directory = tmp_path_factory.mktemp("language_model")
    config = tiny_config().text_config
    config.vocab_size = 900
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(directory)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(OFFICIAL / "checkpoint" / name, directory)
    yield directory


def test_a_model_from_parts_learns_to_answer_in_chatml(
    configure_chatml: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    lr = "lr={vision: 1e-2, projector: 1e-2, language: 1e-2}"
    config = configure_chatml("steps=60", lr, f"data.sources=[{{name: chats, shards: '{tmp_path}/chats/*.tar'}}]")
    final = train(config)
    assert losses(config)[-1] < losses(config)[0] / 4
    model = yi_vl.load(final, device="cpu")
    assert model.processor.chat_format == CHATML
    assert model.predict(None, "Hello!", max_new_tokens=20) == "Hello."
    chat = model.chat()
    assert chat.ask("Hello!", max_new_tokens=20) == "Hello."
    assert chat.ask("Hello!", max_new_tokens=20)
    separator = model.processor.tokenizer.convert_tokens_to_ids("###")
    assert separator not in json.loads((final / "generation_config.json").read_text())["eos_token_id"]


def test_supervised_in_training_are_answers_with_their_end(
    configure_chatml: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    run = trainer(configure_chatml(f"data.sources=[{{name: chats, shards: '{tmp_path}/chats/*.tar'}}]"))
    answers = set()
    for micro_batch in next(iter(run.loader)).micro_batches:
        for ids, labels in zip(micro_batch.input_ids, micro_batch.labels):
            assert torch.equal(ids[labels != IGNORE], labels[labels != IGNORE])
            answers.add(run.processor.tokenizer.decode(labels[labels != IGNORE]))
    assert answers and all(answer.endswith("<|im_end|>") and answer.count("<|") == 1 for answer in answers)
    assert "red<|im_end|>" in preview(run.config, 8).replace("&lt;", "<").replace("&gt;", ">")


def test_held_out_samples_are_asked_in_chatml(configure_chatml: Callable[..., TrainConfig], tmp_path: Path) -> None:
    answers = f"generations={{shards: {tmp_path}/chats/0.tar, every_steps: 2, count: 2, max_new_tokens: 4}}"
    config = configure_chatml("steps=2", answers)
    run = trainer(config)
    assert isinstance(run.held_out, HeldOut)
    sample = run.held_out.samples[0]
    assert sample.reference == "red"
    assert to_text(sample.prompt).endswith("What colour is it?<|im_end|>\n<|im_start|>assistant\n")
    train(config)


def test_later_stages_have_the_checkpoints_format(
    configure_chatml: Callable[..., TrainConfig], configure: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    first = train(configure_chatml(f"run_dir={tmp_path}/first", "steps=1"))
    start = f"init_from={{checkpoint: {first}, tower: null, language_model: null}}"
    second = configure(start, f"run_dir={tmp_path}/second", "steps=1")
    assert initial_processor(second).chat_format == CHATML
    assert yi_vl.load(train(second), device="cpu").processor.chat_format == CHATML
    back = train(configure(start, f"run_dir={tmp_path}/back", "steps=1", "chat_format=yi-vl"))
    model = yi_vl.load(back, device="cpu")
    separator = model.processor.tokenizer.convert_tokens_to_ids("###")
    assert model.processor.chat_format == "yi-vl" and model.processor.chat_template == CHAT_TEMPLATE
    assert separator in json.loads((back / "generation_config.json").read_text())["eos_token_id"]

    lora = ("trainable={vision: false, projector: true, language: lora}", "lora={rank: 4, alpha: 8}")
    adapters = train(configure(start, f"run_dir={tmp_path}/lora", "steps=1", *lora))
    assert yi_vl.load(adapters, device="cpu").processor.chat_format == CHATML
    with pytest.raises(ValueError, match=r"chat_format cannot be set with trainable\.language: lora"):
        configure(start, "chat_format=chatml", *lora)


def test_the_format_cannot_change_within_a_run(configure_chatml: Callable[..., TrainConfig]) -> None:
    config = configure_chatml("steps=4", "checkpoint.every_steps=2")
    train(config)
    shutil.rmtree(Path(config.run_dir) / "final")
    with pytest.raises(
        ValueError, match=r"chat_format chatml, this run has yi-vl, but the model was trained in another"
    ):
        train(configure_chatml("steps=4", "checkpoint.every_steps=2", "chat_format=yi-vl"))


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("chat_format=alpaca", "chat_format is 'alpaca'; expected one of yi-vl, chatml, or null"),
        ("chat_format=", None),
    ],
)
def test_other_formats_are_refused(configure: Callable[..., TrainConfig], override: str, problem: str | None) -> None:
    if problem is None:
        assert configure(override).chat_format is None
    else:
        with pytest.raises(ValueError, match=problem):
            configure(override)


def test_parts_without_the_tokens_are_refused(configure: Callable[..., TrainConfig]) -> None:
    with pytest.raises(ValueError, match=r"no token <\|im_start\|>"):
        trainer(configure("chat_format=chatml"))
