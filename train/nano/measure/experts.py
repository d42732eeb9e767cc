"""How many experts the tokens of held-out questions get by top-p, by skill: whether some are harder for the router."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from train.nano.measure.evaluate import Question, read_questions
from yi_vl import YiVL, load
from yi_vl.decoder.experts import Router

ROLES = IMAGE, PROMPT, ANSWER = "image", "prompt", "answer"


def measure_experts(path: Path, heldout: Path, every: int = 1) -> str:
    """A Markdown table: for each skill the mean number of experts per token, of images, of the other tokens of prompts
    and of answers in all layers together, then of all tokens in each layer.

    The answers are accepted ones, not the model's.

    Args:
        every: only each so many-th question is taken.

    Raises:
        ValueError: the questions or the model are not there, or it does not route by top-p.
    """
    questions = read_questions(heldout)[::every]
    model = load(path)
    text = model.model.config.text_config
    if not getattr(text, "num_experts", 0) or text.router_top_p is None:
        raise ValueError(f"{path} does not route by top-p: its tokens get equally many experts. See docs/upcycle.md.")
    counts = count_experts(model, questions)
    columns = [*ROLES, *(f"layer {index}" for index in range(text.num_hidden_layers))]
    lines = ["| skill (questions) | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for skill in sorted(counts, key=lambda skill: skill == "all"):
        num_questions = sum(skill in (question.skill, "all") for question in questions)
        by_role = torch.stack([counts[skill][role] for role in ROLES])  # (roles, 1 + L): tokens, experts
        means = (by_role[:, 1:].mean(1) / by_role[:, 0]).tolist()
        means += (by_role[:, 1:].sum(0) / by_role[:, 0].sum()).tolist()
        lines.append(f"| {skill} ({num_questions}) | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    return "\n".join(lines) + "\n"


def count_experts(model: YiVL, questions: Sequence[Question]) -> dict[str, dict[str, Tensor]]:
    """skill, or "all" -> role -> (1 + L,): the number of tokens, and of their experts in each of L layers."""
    num_layers = model.model.config.text_config.num_hidden_layers
    sums: dict[str, dict[str, Tensor]] = defaultdict(lambda: {role: torch.zeros(1 + num_layers) for role in ROLES})
    with torch.inference_mode(), _counted(model) as counted:
        for question in track(questions, "experts"):
            roles = _forward(model, question)
            per_token = torch.stack(counted).float()  # (L, S)
            counted.clear()
            for index, role in enumerate(ROLES):
                is_role = roles == index
                added = torch.cat([is_role.sum().float().unsqueeze(0), per_token[:, is_role].sum(1)])
                for skill in (question.skill, "all"):
                    sums[skill][role] += added
    return sums


def _forward(model: YiVL, question: Question) -> Tensor:
    """Compute a question with its answer; the index in `ROLES` of each token, (S,)."""
    content = [{"type": "image"}] * len(question.images) + [{"type": "text", "text": question.question}]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": question.accepted[0]},
    ]
    encoded = model.processor.encode_messages(messages, add_generation_prompt=False)
    images = []
    for path in question.images:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    pixels = model.processor.image_processor(images, return_tensors="pt")["pixel_values"]
    input_ids = torch.tensor(encoded.input_ids)
    model.model(
        input_ids=input_ids.unsqueeze(0).to(model.model.device),
        pixel_values=pixels.to(model.model.device, model.model.dtype),
        logits_to_keep=1,
    )
    is_answer = torch.tensor(encoded.loss_mask)
    is_image = input_ids == model.model.config.image_token_id
    return torch.where(is_image, ROLES.index(IMAGE), torch.where(is_answer, ROLES.index(ANSWER), ROLES.index(PROMPT)))


@contextmanager
def _counted(model: YiVL) -> Iterator[list[Tensor]]:
    """A list to which each layer's router adds how many experts the tokens of a forward pass get, (S,)."""
    counts: list[Tensor] = []

    def count(router: Router, _: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        counts.append((output[1] < router.config.num_experts).sum(-1).cpu())

    routers = [module for module in model.model.modules() if isinstance(module, Router)]
    handles = [router.register_forward_hook(count) for router in routers]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
