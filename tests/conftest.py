"""Fixtures that several tests share: a toy language model, a toy open_clip tower, and shards, all made on the fly."""

from __future__ import annotations

import io
import json
import os
import random
import sys
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

if TYPE_CHECKING:
    from train.config import TrainConfig

os.environ["HF_HUB_OFFLINE"] = "1"  # tests ask no hub

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
Members = dict[str, bytes]  # member name -> content, of one sample
RunApp = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """What a test draws does not depend on the tests that ran before it in the same process."""
    random.seed(0)
    if "torch" in sys.modules:  # the seed of a torch that is not yet imported is fixed too
        sys.modules["torch"].manual_seed(0)


@pytest.fixture
def run_app(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunApp:
    """A function (program, app, *arguments) that runs a command in this process: (exit code, stdout, stderr)."""
    from yi_vl import program

    def call(name: str, app: Callable[[], object], *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            program.run(app, "error")
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def two_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """`eval speed` measures twice, and not until the medians are known well."""
    monkeypatch.setattr("eval.speed.rounds._MIN_ROUNDS", 2)
    monkeypatch.setattr("eval.speed.rounds._MAX_ROUNDS", 2)


@pytest.fixture(scope="session")
def toy_language_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a Llama of 2 layers, width 32, with a tokenizer of 400 entries; Yi's special ids 0 to 2."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from yi_vl.chat import SYSTEM_PROMPT

    directory = tmp_path_factory.mktemp("toy_language_model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [SYSTEM_PROMPT, "### Human: What colour is it?\n### Assistant: It is red, green, blue or yellow.\n"] * 3
    special = ["<unk>", "<|startoftext|>", "<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<unk>",
    )
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def toy_tower(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name, known to open_clip, of a tower of 2 blocks, width 32, for 28 px images in patches of 14."""
    import open_clip

    path = tmp_path_factory.mktemp("towers") / "toy-tower.json"
    tower = {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
    text = {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1}
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": tower, "text_cfg": text}))
    open_clip.add_model_config(path)
    return "toy-tower"


@pytest.fixture
def write_shard() -> Callable[[Path, Iterable[tuple[str, Members]]], Path]:
    """A function (path, [(key, {suffix: content})]) that writes a WebDataset tar."""

    def write(path: Path, samples: Iterable[tuple[str, Members]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for key, members in samples:
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def configure(
    tmp_path: Path, write_shard: Callable[..., Path], toy_language_model: Path, toy_tower: str
) -> Callable[..., TrainConfig]:
    """A function (overrides) -> the settings of a toy run over captions and conversations written to tmp_path."""
    import torch

    from train.config_file import load_config

    torch.set_num_threads(1)  # at this size more threads only wait for each other

    for number in range(2):
        write_shard(tmp_path / f"captions/{number}.tar", [caption_sample(30 * number + i) for i in range(30)])
        write_shard(tmp_path / f"chats/{number}.tar", [chat_sample(30 * number + i) for i in range(30)])
    path = tmp_path / "toy.yaml"
    path.write_text(f"""
run_dir: {tmp_path}/run
init_from: {{tower: {{name: {toy_tower}}}, language_model: {toy_language_model}}}
image_size: 28
global_batch: 8
micro_batch: 4
steps: 6
precision: fp32
max_tokens: 400
lr: {{vision: 1e-3, projector: 1e-3, language: 1e-3}}
data:
  format: chat
  workers: 0
  shuffle_buffer: 16
  sources:
    - {{name: captions, shards: "{tmp_path}/captions/*.tar", format: caption}}
    - {{name: chats, shards: "{tmp_path}/chats/*.tar", weight: 2.0}}
log_every: 1
""")
    return lambda *overrides: load_config(path, overrides)


@pytest.fixture
def small_mmmu(tmp_path: Path) -> str:
    """Seven questions of two subjects, one of them open, one with two images."""
    from benchmark_rows import mmmu_row, write_mmmu

    return write_mmmu(
        tmp_path / "mmmu",
        Art_Theory=[mmmu_row("Art_Theory", number) for number in range(1, 5)],
        Math=[
            mmmu_row("Math", 1, "<image 2> then <image 1>?"),
            mmmu_row("Math", 2, question_type="open", options="[]", answer="['3.5', 'three and a half']"),
            mmmu_row("Math", 3, "No marker here"),
        ],
    )


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Yi-VL, saved."""
    from tiny import tiny_model, tiny_processor

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model(max_position_embeddings=1024).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def png(colour: str, size: tuple[int, int] = (32, 24)) -> bytes:
    """A PNG image in one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, COLOURS[colour]).save(file, "PNG")
    return file.getvalue()


def caption_sample(index: int) -> tuple[str, Members]:
    """An image in one colour and a caption that names it."""
    colour = list(COLOURS)[index % len(COLOURS)]
    return f"c{index:05d}", {"png": png(colour), "txt": f"a {colour} image".encode()}


def chat_sample(index: int) -> tuple[str, Members]:
    """A question about an image; every fifth sample has two images, every seventh none."""
    colours = [list(COLOURS)[index % len(COLOURS)], list(COLOURS)[index // 3 % len(COLOURS)]]
    count = 0 if index % 7 == 6 else 2 if index % 5 == 4 else 1
    question = "<image>" * count + ("\nWhat colour is it?" if count else "Hello!")
    answer = " and ".join(colours[:count]) if count else "Hello."
    conversation: list[dict[str, Any]] = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    suffixes = ["png"] if count == 1 else [f"{i}.png" for i in range(count)]
    members = {suffix: png(colour) for suffix, colour in zip(suffixes, colours)}
    return f"q{index:05d}", members | {"json": json.dumps({"conversations": conversation}).encode()}


@pytest.fixture
def saved_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of the tensors of each shard that a conversion writes, in order."""
    from safetensors.torch import save_file

    import yi_vl.checkpoint.write as target

    held: list[int] = []

    def save(tensors: dict[str, Any], path: Path, metadata: dict[str, str]) -> None:
        held.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, metadata)

    monkeypatch.setattr(target, "save_file", save)
    return held
