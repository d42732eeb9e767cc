"""Exact-match accuracy of a language model alone on held-out questions about mosaics, by task and language.

A whole batch is scored in one forward pass: greedy decoding gives exactly the expected answer if, after the prompt and
each beginning of that answer, the likeliest token is the answer's next one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from train.nano.pretrain.language import MosaicLanguageModel, load_run, megabytes
from train.nano.pretrain.trees import IGNORED, Row, Tree, TreeBatch, TreeEncoder
from train.nano.text.mosaic_texts import TASKS, MosaicText, TextLayout, TextQuestion, heldout_questions

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


def measure_runs(run_dirs: Sequence[Path], num_per_task: int, num_examples: int = 0) -> str:
    """Markdown: the table of all runs, after some wrong answers of each.

    Raises:
        ValueError: a folder has no run.
    """
    runs: dict[str, tuple[float, dict[str, float]]] = {}
    lines = []
    for run_dir in run_dirs:
        model, encoder, recipe, step = load_run(run_dir)
        scored = measure_tasks(model, encoder, recipe.layout, num_per_task)
        runs[f"{run_dir.name}, step {step}"] = megabytes(recipe.shape), task_scores(scored)
        wrong = [each.question for each in scored if not each.is_correct]
        lines += _examples(model, encoder, wrong[:: max(1, len(wrong) // max(1, num_examples))][:num_examples])
    return "\n".join([*lines, "", table(runs)]) if lines else table(runs)


def _examples(model: MosaicLanguageModel, encoder: TreeEncoder, questions: Sequence[TextQuestion]) -> list[str]:
    answers = greedy_answers(model, encoder, [question.text for question in questions])
    lines = []
    for question, answer in zip(questions, answers):
        prompt, expected = (turn["value"].replace("\n", " ") for turn in question.text.conversations[0])
        lines.append(f"{question.task}: {prompt[-90:]} | expected {expected!r}, answered {encoder.text(answer)!r}")
    return lines


def table(runs: dict[str, tuple[float, dict[str, float]]]) -> str:
    """Markdown: a row for each run with the whole model's MB, for each task "English / Chinese" in percent."""
    lines = ["| run | MB in bfloat16 | " + " | ".join(TASKS) + " |", "|---|---|" + "---|" * len(TASKS)]
    for name, (size_mb, scores) in runs.items():
        cells = [
            " / ".join(f"{100 * scores[key]:.1f}" for lang in ("en", "zh") if (key := f"{task} {lang}") in scores)
            for task in TASKS
        ]
        lines.append(f"| {name} | {size_mb:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@torch.inference_mode()
def greedy_answers(
    model: MosaicLanguageModel, encoder: TreeEncoder, texts: Sequence[MosaicText], max_new_tokens: int = 24
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
        batch, lengths = _batch(encoder, trees)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model(batch)
            last = torch.stack([row[length - 1] for row, length in zip(hidden, lengths)])
            likeliest = model.lm_head(last).argmax(-1)
        for answer, token in zip(answers, likeliest.tolist()):
            answer.append(token)
    return answers


def _are_correct(model: MosaicLanguageModel, encoder: TreeEncoder, trees: Sequence[Tree]) -> list[bool]:
    batch, _ = _batch(encoder, trees)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(batch)
        is_supervised = batch.labels != IGNORED
        likeliest = model.lm_head(hidden[is_supervised]).argmax(-1)
    is_wrong = torch.zeros_like(is_supervised)
    is_wrong[is_supervised] = likeliest != batch.labels[is_supervised]
    return (~is_wrong.any(1)).tolist()


def _batch(encoder: TreeEncoder, trees: Sequence[Tree]) -> tuple[TreeBatch, list[int]]:
    """One row for each tree, and the rows' lengths."""
    length = max(map(_num_tokens, trees))
    rows = [Row() for _ in trees]
    for row, tree in zip(rows, trees):
        row.add(tree, len(encoder.prefix), length)
    return TreeBatch.of(rows, length, encoder.prefix), [len(row.input_ids) for row in rows]


def _num_tokens(tree: Tree) -> int:
    return len(tree.trunk) + len(tree.branches[0][0])
