"""Pretraining of nano's language model alone, on mosaics: images that a perfect tower would have seen.

A mosaic's tokens stand where an image's will stand. The embedding of one is that of its sign (what the patch shows)
plus that of its cell (where it lies), with a little noise: tower and connector are later trained to give the same. So
nothing that is learned here has to be learned again from images.

D language width.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoModelForCausalLM

from train.attention.cpu import keep_memory
from train.nano.data.labels import FLAGS, THINGS
from train.nano.pretrain.init import train_tokenizer
from train.nano.pretrain.mosaic_model import MosaicLanguageModel, Shape
from train.nano.pretrain.named_signs import init_signs_by_name
from train.nano.pretrain.tasks import measure_tasks, task_scores
from train.nano.pretrain.trainer import (
    RECIPE,
    STATE,
    LoopRecipe,
    prepare_run,
    read_recipe,
    train_loop,
)
from train.nano.pretrain.trees import Tree, TreeBatch, TreeEncoder, fill_rows
from train.nano.text.mosaic_texts import MosaicText, TextLayout, list_text, training_text
from train.nano.text.wording import plural
from yi_vl.chat import render, to_text
from yi_vl.hardware import gpu_or_cpu
from yi_vl.processor import prepare_tokenizer

TOKENIZER, SIGNS_FILE = "tokenizer", "signs.safetensors"
_NUM_TEXTS, _PROMPT_REPEATS = 4000, 200  # that the tokenizer is trained on
_THING_REPEATS, _FLAG_REPEATS = 500, 40  # things are asked about, and are one token each where they are one word


@dataclass
class LanguageRecipe:
    """A run: `shape` and `layout` are what an ablation changes."""

    shape: Shape = field(default_factory=Shape)
    layout: TextLayout = field(default_factory=TextLayout)
    loop: LoopRecipe = field(default_factory=lambda: LoopRecipe(num_steps=12_000, learning_rate=1e-3))
    num_rows: int = 24
    row_tokens: int = 256
    noise: float = 0.2  # standard deviation of the noise on mosaics, in those of the signs
    lists_until: int = 1000  # steps; until then all texts are questions about several items at once
    signs_until: int = 1500  # steps; then signs and cells stay, and a tower can be matched while this goes on
    num_threads: int = 1
    num_questions: int = 100  # for each task and language, at every measurement


class TreeStream(IterableDataset[TreeBatch]):
    """The batches of a run from a step on, each a pure function of the seed and its number."""

    def __init__(self, encoder: TreeEncoder, recipe: LanguageRecipe, first: int) -> None:
        self.encoder, self.recipe, self.first = encoder, recipe, first

    def __iter__(self) -> Iterator[TreeBatch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        torch.set_num_threads(1)
        for step in range(self.first + offset, self.recipe.loop.num_steps, stride):
            yield self.batch(step)

    def batch(self, step: int) -> TreeBatch:
        recipe = self.recipe
        rng = np.random.default_rng([recipe.loop.seed, step])
        draw = list_text if step < recipe.lists_until else training_text
        rows = fill_rows(self._trees(rng, draw), recipe.num_rows, recipe.row_tokens, len(self.encoder.prefix))
        return TreeBatch.of(rows, recipe.row_tokens, self.encoder.prefix, seed=step)

    def _trees(
        self, rng: np.random.Generator, draw: Callable[[np.random.Generator, TextLayout], MosaicText]
    ) -> Iterator[Tree]:
        while True:
            yield from self.encoder.trees(draw(rng, self.recipe.layout))


def pretrain_language(run_dir: Path, recipe: LanguageRecipe) -> None:
    """Train a language model from fresh weights, or continue to; `run_dir/final` then has it for `match`.

    Raises:
        ValueError: the folder has a run of another recipe.
    """
    keep_memory()
    prepare_run(run_dir, recipe, recipe.num_threads, recipe.loop.seed)
    encoder = load_encoder(run_dir, recipe)
    model = MosaicLanguageModel(recipe.shape)
    init_signs_by_name(model, encoder.token_ids)
    model.to(gpu_or_cpu())

    def batches(first: int) -> Iterator[TreeBatch]:
        workers = recipe.loop.num_workers
        stream = TreeStream(encoder, recipe, first)
        return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))

    def loss_of(batch: TreeBatch) -> Tensor:
        model.set_signs_trainable(batch.seed < recipe.signs_until)  # a batch's seed is its step
        return model.loss(batch, recipe.noise)

    train_loop(
        run_dir,
        model,
        recipe.loop,
        batches,
        loss_of,
        lambda: task_scores(measure_tasks(model, encoder, recipe.layout, recipe.num_questions)),
        layers=model.get_submodule("language_model.layers"),
    )
    _write_checkpoint(run_dir / "final", run_dir / TOKENIZER, model)


def load_run(run_dir: Path) -> tuple[MosaicLanguageModel, TreeEncoder, LanguageRecipe, int]:
    """The model of a run as last saved, its encoder and recipe, and how many steps it was trained for.

    Raises:
        ValueError: the folder has no run.
    """
    if not (run_dir / STATE).exists():
        raise ValueError(f"{run_dir} has no {STATE}: `python -m train.nano language {run_dir}` makes one.")
    recipe = recipe_of(run_dir)
    state = torch.load(run_dir / STATE, map_location="cpu", weights_only=True)
    model = MosaicLanguageModel(recipe.shape)
    model.load_state_dict(state["module"])
    return model.eval().to(gpu_or_cpu()), load_encoder(run_dir, recipe), recipe, state["step"]


def recipe_of(run_dir: Path) -> LanguageRecipe:
    """The recipe that a run was started with."""
    return read_recipe(LanguageRecipe, run_dir / RECIPE)


def _write_checkpoint(folder: Path, tokenizer: Path, model: MosaicLanguageModel) -> None:
    """An ordinary language model, and the signs that `match` aligns the tower with."""
    text_model = AutoModelForCausalLM.from_config(model.language_model.config, attn_implementation="sdpa")
    text_model.model.load_state_dict(model.language_model.state_dict())
    text_model.lm_head.load_state_dict(model.lm_head.state_dict())
    text_model.save_pretrained(folder)
    shutil.copytree(tokenizer, folder, dirs_exist_ok=True)
    save_file({"signs": model.signs.weight.detach(), "cells": model.cells.weight.detach()}, folder / SIGNS_FILE)


def load_encoder(run_dir: Path, recipe: LanguageRecipe) -> TreeEncoder:
    """With the run's tokenizer, which is trained first if it is not there."""
    folder = run_dir / TOKENIZER
    if not (folder / "tokenizer_config.json").exists():
        train_tokenizer(tokenizer_texts(recipe.layout), folder, recipe.shape.vocab_size)
    return TreeEncoder(prepare_tokenizer(str(folder)), recipe.shape.vocab_size)


def tokenizer_texts(layout: TextLayout) -> Iterator[str]:
    """Training texts without their mosaics; the prompt and all names are repeated, so that they take few tokens."""
    yield from [to_text(render([{"role": "user", "content": "?"}]))] * _PROMPT_REPEATS
    for thing in THINGS.values():
        yield from [f" {thing.en}\n {plural(thing.en)}\n{thing.zh}"] * _THING_REPEATS
    for flag in FLAGS.values():
        yield from [f" {flag.en}\n{flag.zh}"] * _FLAG_REPEATS
    for index in range(_NUM_TEXTS):
        for turns in training_text(np.random.default_rng([1, index]), layout).conversations:
            yield from (turn["value"].replace("<image>", "") for turn in turns)


def load_signs(folder: Path) -> tuple[Tensor, Tensor]:
    """(number of signs, D), (number of cells, D)"""
    tensors = load_file(folder / SIGNS_FILE)
    return tensors["signs"], tensors["cells"]
