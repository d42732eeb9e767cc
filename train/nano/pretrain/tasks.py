"""Exact-match accuracy of a language model alone on held-out questions about mosaics, by task and language.

A whole batch is scored in one forward pass: greedy decoding gives exactly the expected answer if, after the prompt and
each beginning of that answer, the likeliest token is the answer's next one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from train.nano.pretrain.mosaic_model import MosaicLanguageModel
from train.nano.pretrain.trainer import to_device
from train.nano.pretrain.trees import IGNORED, Row, Tree, TreeBatch, TreeEncoder
from train.nano.text.mosaic_texts import MosaicText, TextLayout, TextQuestion, heldout_questions

_ROWS = 32


@dataclass(frozen=True)
class Scored:
    """A question and whether it is answered exactly as expected."""

    question: TextQuestion
    is_correct: bool


@torch.inference_mode()
def measure_tasks(
    model: MosaicLanguageModel, encoder: TreeEncoder, layout: TextLayout, num_per_task: int
) -> list[Scored]:
    """So many held-out questions for each task and language."""
    was_training = model.training
    model.eval()
    questions = heldout_questions(layout, num_per_task)
    trees = [encoder.trees(question.text)[0] for question in questions]
    by_length = sorted(range(len(trees)), key=lambda i: _num_tokens(trees[i]))
    correct: dict[int, bool] = {}
    for start in range(0, len(by_length), _ROWS):
        chunk = by_length[start : start + _ROWS]
        correct |= zip(chunk, _are_correct(model, encoder, [trees[i] for i in chunk]))
    model.train(was_training)
    return [Scored(question, correct[index]) for index, question in enumerate(questions)]


def task_scores(scored: Iterable[Scored]) -> dict[str, float]:
    """ "task language" -> share of correct answers"""
    groups: dict[str, list[bool]] = defaultdict(list)
    for each in scored:
        groups[f"{each.question.task} {each.question.lang}"].append(each.is_correct)
    return {name: round(sum(right) / len(right), 4) for name, right in groups.items()}


@torch.inference_mode()
def greedy_answers(
    model: MosaicLanguageModel, encoder: TreeEncoder, texts: Sequence[MosaicText], max_new_tokens: int = 48
) -> list[list[int]]:
    """The ids that greedy decoding gives for each conversation's first question, up to a line break's separator."""
    prompts = [encoder.prompt(text) for text in texts]
    if not prompts:
        return []
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(max_new_tokens):
        trees = [
            Tree(tree.trunk, [(tree.branches[0][0] + answer, [False] * (len(tree.branches[0][0]) + len(answer)))],
                 tree.cells, tree.sees_prefix)
            for tree, answer in zip(prompts, answers)
        ]  # fmt: skip
        batch, lengths = _batch(model, encoder, trees)
        with torch.autocast(batch.prefix.device.type, torch.bfloat16):
            hidden = model(batch)
            last = torch.stack([row[length - 1] for row, length in zip(hidden, lengths)])
            likeliest = model.lm_head(last).argmax(-1)
        for answer, token in zip(answers, likeliest.tolist()):
            answer.append(token)
    return answers


def _are_correct(model: MosaicLanguageModel, encoder: TreeEncoder, trees: Sequence[Tree]) -> list[bool]:
    batch, _ = _batch(model, encoder, trees)
    with torch.autocast(batch.prefix.device.type, torch.bfloat16):
        hidden = model(batch)
        is_supervised = batch.labels != IGNORED
        likeliest = model.lm_head(hidden[is_supervised]).argmax(-1)
    is_wrong = torch.zeros_like(is_supervised)
    is_wrong[is_supervised] = likeliest != batch.labels[is_supervised]
    return (~is_wrong.any(1)).tolist()


def _batch(model: MosaicLanguageModel, encoder: TreeEncoder, trees: Sequence[Tree]) -> tuple[TreeBatch, list[int]]:
    """One row for each tree, on the model's device, and the rows' lengths."""
    length = max(map(_num_tokens, trees))
    rows = [Row() for _ in trees]
    for row, tree in zip(rows, trees):
        row.add(tree, len(encoder.prefix), length)
    batch = to_device(TreeBatch.of(rows, length, encoder.prefix), model.signs.weight.device)
    return batch, [len(row.input_ids) for row in rows]


def _num_tokens(tree: Tree) -> int:
    return len(tree.trunk) + len(tree.branches[0][0])
