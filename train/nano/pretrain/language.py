"""Pretraining of nano's language model alone, on mosaics: images that a perfect tower would have seen.

A mosaic's tokens stand where an image's will stand. The embedding of one is that of its sign (what the patch shows)
plus that of its cell (where it lies), with a little noise: tower and connector are later trained to give the same. So
nothing that is learned here has to be learned again from images.

B rows, L tokens of a row, D language width, N mosaic tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from train.attention.cpu import keep_memory, round_up
from train.nano.data.labels import FLAGS, THINGS
from train.nano.pretrain.init import init_checkpoint, train_tokenizer
from train.nano.pretrain.trainer import RECIPE, STATE, LoopRecipe, read_recipe, remember_recipe, train_loop
from train.nano.pretrain.trees import IGNORED, NUM_CELLS, TREES, Tree, TreeBatch, TreeEncoder, fill_rows
from train.nano.text.mosaic import SIGN_IDS
from train.nano.text.mosaic_texts import TextLayout, training_text
from yi_vl.chat import render, to_text
from yi_vl.config import preset
from yi_vl.model import YiVLForConditionalGeneration
from yi_vl.processor import prepare_tokenizer

TOKENIZER, SIGNS_FILE = "tokenizer", "signs.safetensors"
_NUM_TEXTS, _NAME_REPEATS, _PROMPT_REPEATS = 4000, 40, 200  # that the tokenizer is trained on
_INIT_STD = 0.05


@dataclass
class Shape:
    """The language model's dimensions. `vocab_size` counts the pieces of the tokenizer."""

    num_layers: int = 7
    width: int = 256
    num_heads: int = 4
    num_key_heads: int = 2
    mlp_width: int = 704
    vocab_size: int = 2048
    has_cells: bool = True  # an embedding for every cell; without it only the order tells where a mosaic's token lies

    def __post_init__(self) -> None:
        for divisor in ("num_heads", "num_key_heads"):
            whole = self.width if divisor == "num_heads" else self.num_heads
            if getattr(self, divisor) < 1 or whole % getattr(self, divisor):
                raise ValueError(f"{divisor} is {getattr(self, divisor)}, which does not divide {whole}.")

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=round_up(self.vocab_size + 1, 64),  # and the image token
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_heads,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            initializer_range=_INIT_STD,
            pad_token_id=0,
        )


@dataclass
class LanguageRecipe:
    """A run: `shape` and `form` are what an ablation changes."""

    shape: Shape = field(default_factory=Shape)
    layout: TextLayout = field(default_factory=TextLayout)
    loop: LoopRecipe = field(default_factory=LoopRecipe)
    num_rows: int = 24
    row_tokens: int = 256
    noise: float = 0.2  # standard deviation of the noise on mosaics, in those of the signs
    num_threads: int = 1
    num_questions: int = 100  # for each task and language, at every measurement


class MosaicLanguageModel(nn.Module):
    """The language model, its head, and the embeddings of signs and cells, which stand for tower and connector."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = shape.config()
        config._attn_implementation = TREES
        self.language_model: PreTrainedModel = AutoModel.from_config(config)
        self.lm_head = nn.Linear(shape.width, config.vocab_size, bias=False)
        self.signs = nn.Embedding(len(SIGN_IDS), shape.width)
        self.cells = nn.Embedding(NUM_CELLS, shape.width)
        for module in (self.lm_head, self.signs, self.cells):
            nn.init.normal_(module.weight, std=_INIT_STD)
        self.image_token_id = shape.vocab_size
        if not shape.has_cells:
            nn.init.zeros_(self.cells.weight)
            self.cells.requires_grad_(False)

    def forward(self, batch: TreeBatch, noise: float = 0.0, precision: torch.dtype = torch.bfloat16) -> Tensor:
        """The hidden states of the rows' tokens, (B, L, D)"""
        config = self.language_model.config
        ids = torch.cat([batch.prefix, batch.input_ids.flatten()])  # (T,)
        positions = torch.cat([torch.arange(len(batch.prefix)), batch.position_ids.flatten()])
        embeddings = self.language_model.get_input_embeddings()(ids)  # (T, D)
        mosaics = self._mosaics(batch, noise)
        embeddings = embeddings.masked_scatter((ids == self.image_token_id).unsqueeze(-1), mosaics.to(embeddings.dtype))
        mask = batch.mask(precision).repeat(1, config.num_attention_heads // config.num_key_value_heads, 1)
        hidden = self.language_model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            use_cache=False,
            tree_mask=mask[:, None].expand(-1, config.num_key_value_heads, -1, -1),
        ).last_hidden_state
        return hidden[0, len(batch.prefix) :].view(*batch.input_ids.shape, -1)

    def _mosaics(self, batch: TreeBatch, noise: float) -> Tensor:
        """(N, D), the noise a pure function of the batch's seed"""
        mosaics = self.signs(batch.signs) + self.cells(batch.cells)
        if not noise:
            return mosaics
        generator = torch.Generator().manual_seed(batch.seed)
        scale = noise * self.signs.weight.detach().std()
        return mosaics + scale * torch.randn(mosaics.shape, generator=generator)

    def loss(self, batch: TreeBatch, noise: float) -> Tensor:
        """Cross-entropy per supervised token, in bfloat16 (2.7 times as fast as float32 where a CPU has it)."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self(batch, noise)
            logits = self.lm_head(hidden[batch.labels != IGNORED])
        return F.cross_entropy(logits.float(), batch.labels[batch.labels != IGNORED])


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
        rows = fill_rows(self._trees(rng), recipe.num_rows, recipe.row_tokens, len(self.encoder.prefix))
        return TreeBatch.of(rows, recipe.row_tokens, self.encoder.prefix, seed=step)

    def _trees(self, rng: np.random.Generator) -> Iterator[Tree]:
        while True:
            yield from self.encoder.trees(training_text(rng, self.recipe.layout))


def pretrain_language(run_dir: Path, recipe: LanguageRecipe) -> None:
    """Train a language model from fresh weights, or continue to; `run_dir/final` then has it for `match`.

    Raises:
        ValueError: the folder has a run of another recipe.
    """
    from train.nano.measure.language import measure_tasks, task_scores

    keep_memory()
    torch.set_num_threads(recipe.num_threads)
    run_dir.mkdir(parents=True, exist_ok=True)
    remember_recipe(run_dir, asdict(recipe))
    encoder = load_encoder(run_dir, recipe)
    torch.manual_seed(recipe.loop.seed)
    model = MosaicLanguageModel(recipe.shape)

    def batches(first: int) -> Iterator[TreeBatch]:
        workers = recipe.loop.num_workers
        stream = TreeStream(encoder, recipe, first)
        return iter(DataLoader(stream, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None))

    train_loop(
        run_dir,
        model,
        recipe.loop,
        batches,
        lambda batch: model.loss(batch, recipe.noise),
        lambda: task_scores(measure_tasks(model, encoder, recipe.layout, recipe.num_questions)),
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
    state = torch.load(run_dir / STATE, weights_only=True)
    model = MosaicLanguageModel(recipe.shape)
    model.load_state_dict(state["module"])
    return model.eval(), load_encoder(run_dir, recipe), recipe, state["step"]


def megabytes(shape: Shape) -> float:
    """The whole model's size in bfloat16, tower and projector included."""
    config = preset("nano")
    config.text_config = shape.config()
    with torch.device("meta"):
        model = YiVLForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters()) * 2 / 1e6


def recipe_of(run_dir: Path) -> LanguageRecipe:
    """The recipe that a run was started with."""
    return read_recipe(LanguageRecipe, run_dir / RECIPE)


def _write_checkpoint(folder: Path, tokenizer: Path, model: MosaicLanguageModel) -> None:
    """A whole model with a fresh tower, and the signs that `match` aligns the tower with."""
    init_checkpoint(tokenizer, folder, text_config=model.language_model.config)
    whole = YiVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    whole.model.language_model.load_state_dict(model.language_model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    whole.save_pretrained(folder)
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
    for named in (*THINGS.values(), *FLAGS.values()):
        yield from [f" {named.en}\n{named.zh}"] * _NAME_REPEATS
    for index in range(_NUM_TEXTS):
        for turns in training_text(np.random.default_rng([1, index]), layout).conversations:
            yield from (turn["value"].replace("<image>", "") for turn in turns)


def load_signs(folder: Path) -> tuple[Tensor, Tensor]:
    """(number of signs, D), (number of cells, D)"""
    tensors = load_file(folder / SIGNS_FILE)
    return tensors["signs"], tensors["cells"]
