"""Questions in the prompt forms of MMMU and CMMMU, answered with a letter or a word, as those benchmarks ask.

Source: MMMU's llava1.5 configuration and CMMMU's prompts.
"""

from __future__ import annotations

import numpy as np

from train.nano.data.labels import Lang
from train.nano.data.sample import Truth
from train.nano.text.dialogue import QAPair, Turn, all_questions, multiple_choice
from train.nano.text.wording import lettered

CHOICE_EN = "Answer with the option's letter from the given choices directly."
CHOICE_ZH = (
    "请回答以下多项选择题，并选出正确选项。这些题目可能包括单选和多选题型。"
    "如果所提供的信息不足以确定一个明确的答案，那么请根据可用的数据和你的判断来选择最可能正确的选项。"
)
JUDGE_ZH = (
    "请回答以下判断题，并根据题目描述和所给的信息来判断问题中陈述的对错。"
    "如果信息不完整或不足以作出绝对判断，请运用你的逻辑推理和现有信息来做出最可能的判断。"
)
FILL_ZH = (
    "请回答以下填空题，并根据题目的要求和所提供的信息来给出最恰当的答案。"
    "如果信息不足以确切回答，那么请依据现有的数据和你的推理能力来填写最合理的答案。"
)

CHOICE_MARK = "问题："  # after which CMMMU has the image


def choice_conversation(rng: np.random.Generator, truth: Truth) -> list[Turn]:
    """One question in one of the benchmarks' forms, its image left out."""
    variant = rng.choice(["en", "zh", "judge", "fill"], p=[0.4, 0.35, 0.15, 0.1])
    if variant == "judge":
        statement, is_true = judgement(rng, truth)
        question, answer = judge_prompt(statement), "对" if is_true else "错"
    elif variant == "fill":
        qa = all_questions(rng, truth, "zh")[0]
        question, answer = fill_prompt(qa.question), qa.core
    else:
        lang: Lang = "en" if variant == "en" else "zh"
        chosen, options = multiple_choice(rng, truth, lang)
        question, answer = choice_prompt(chosen.question, options, lang), chosen.answer
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def with_image(rng: np.random.Generator, turns: list[Turn]) -> list[Turn]:
    """The image's marker put before the prompt or, as CMMMU has it, before the question within."""
    value = turns[0]["value"]
    if CHOICE_MARK in value and rng.random() < 0.7:
        value = value.replace(CHOICE_MARK, CHOICE_MARK + "<image>", 1)
    else:
        value = "<image>\n" + value
    return [{"from": "human", "value": value}, *turns[1:]]


def choice_prompt(question: str, options: list[str], lang: Lang) -> str:
    """A multiple-choice prompt: MMMU's in English, CMMMU's in Chinese."""
    listed = lettered(options) + "\n"
    if lang == "en":
        return f"{question}\n{listed}\n{CHOICE_EN}"
    return f"{CHOICE_ZH}\n\n{CHOICE_MARK}{question}\n选项：\n{listed}\n正确答案：\n"


def judge_prompt(statement: str) -> str:
    return f"{JUDGE_ZH}\n\n{CHOICE_MARK}{statement}\n正确答案：\n"


def fill_prompt(question: str) -> str:
    return f"{FILL_ZH}\n\n{CHOICE_MARK}{question}\n正确答案：\n"


def judgement(rng: np.random.Generator, truth: Truth, measured: bool = False) -> tuple[str, bool]:
    """A Chinese statement about the image, and whether it is true."""
    return statement(rng, *multiple_choice(rng, truth, "zh", measured))


def statement(rng: np.random.Generator, qa: QAPair, options: list[str]) -> tuple[str, bool]:
    """A question with one of its options claimed as the answer, and whether it is that."""
    is_true = bool(rng.random() < 0.5)
    wrong = [option for option in options if option != qa.core]
    claimed = qa.core if is_true or not wrong else wrong[rng.integers(len(wrong))]
    return f"{_strip_mark(qa)}答案是“{claimed}”。", claimed == qa.core


def _strip_mark(qa: QAPair) -> str:
    return qa.question if qa.question.endswith(("？", "。")) else qa.question + "。"
