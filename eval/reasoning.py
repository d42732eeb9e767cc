"""What part of a response is the answer: the text behind a model's reasoning, and inside its answer tags.

The one place that knows; `Answered.answer` applies it for the benchmarks, every protocol, submissions and the judge.
A response without any of these marks is returned unchanged, spaces and line ends included. Sources: the marks that
public models write, as their chat templates and vLLM's and SGLang's reasoning parsers have them.
"""

from __future__ import annotations

import re

# Opening and closing mark of reasoning, as regular expressions; upper and lower case are the same.
_NAMES = r"(?:[a-z]+[:_])?(?:think|thinking|thoughts?|reason(?:ing)?|reflection|analysis|scratchpad)"
_REASONING = (
    # DeepSeek-R1, Qwen, GLM, InternVL; <thinking>; LLaVA-CoT's <REASONING>; Keye-VL's <analysis>; <seed:think>
    (rf"<\s*{_NAMES}\s*>", rf"<\s*/\s*{_NAMES}\s*>"),
    (r"\[THINK\]", r"\[/THINK\]"),  # Magistral
    (r"◁think▷", r"◁/think▷"),  # Kimi-VL
    (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),  # Sky-T1, OpenThinker
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>"),  # Cohere Command A
    (r"<\|inner_prefix\|>", r"<\|inner_suffix\|>"),  # Apertus
    (r"<\|channel>", r"<channel\|>"),  # Gemma 4
    (r"<\|channel\|>\s*(?:analysis|commentary)", r"<\|channel\|>\s*final[^<]*<\|message\|>"),  # gpt-oss
    (r"\A\s*(?-i:analysis(?=[A-Z]))", r"(?-i:assistantfinal)"),  # gpt-oss without its special tokens
    (r"\[unused16\]", r"\[unused17\]"),  # openPangu
    (r"<unused94>", r"<unused95>"),  # MedGemma
    (r"\A\s*Here(?: is|'s) my thought process:", r"Here(?: is|'s) my response:"),  # Granite 3.2
    (r"\A\s*## Thinking$", r"^## Final Response$"),  # HuatuoGPT-o1
)
# What an answer stands between. A closing mark may be missing where the text begins with the opening one.
_ANSWER = (
    (r"<\|begin_of_box\|>", r"<\|end_of_box\|>"),  # GLM-4.1V and later
    (r"<\|begin_of_solution\|>", r"<\|end_of_solution\|>"),
    (r"<\|START_RESPONSE\|>", r"<\|END_RESPONSE\|>"),
    *((rf"<{name}>", rf"</{name}>") for name in ("answer", "final_answer", "response", "conclusion", "output")),
)
_TURN_END = re.compile(r"<[|｜](?:return|end|im_end|eot_id|endoftext|end▁of▁sentence)[|｜]>\Z")
_OPENING = re.compile("|".join(opening for opening, _ in _REASONING), re.IGNORECASE | re.MULTILINE)
_CLOSING = re.compile("|".join(closing for _, closing in _REASONING), re.IGNORECASE | re.MULTILINE)
_BETWEEN = [
    tuple(
        re.compile(pattern, re.IGNORECASE | re.DOTALL)
        for pattern in (f"{opening}((?:(?!{opening}).)*?){closing}", rf"\A\s*{opening}(.*)")
    )
    for opening, closing in _ANSWER
]


def has_reasoning(response: str) -> bool:
    """Whether a response holds a mark of reasoning, opening or closing."""
    return bool(_OPENING.search(response) or _CLOSING.search(response))


def answer_of(response: str) -> str:
    """The answer in a response: what stands behind the last closing mark of reasoning, without answer tags.

    A closing mark needs no opening one: chat templates often write the latter into the prompt. Reasoning that is opened
    and not closed (a response that was cut short) is no answer: "".
    """
    text, closings = response, list(_CLOSING.finditer(response))
    if closings:
        text = response[closings[-1].end() :]
    if _OPENING.search(text):
        return ""
    unwrapped = _unwrapped(text)
    if not closings and unwrapped is text:
        return response
    return _TURN_END.sub("", unwrapped.strip()).strip()


def _unwrapped(text: str) -> str:
    for pair, opening in _BETWEEN:
        if matches := pair.findall(text):
            text = matches[-1]
        elif open_ended := opening.match(text):
            text = open_ended[1]
    return text
