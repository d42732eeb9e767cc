"""The chat formats as Jinja templates, for tools that only know templates: transformers' pipelines, vLLM, TRL's
assistant mask.

The same walk as `chat.render`, with the same refusals; test_chat.py and test_chatml.py compare them. vLLM reads the
form of messages from a template's syntax tree: it must find one plain loop over a slice of `messages`, and in it one
over `message['content']`.
"""

from __future__ import annotations

from .chat import CHATML, IM_END, IM_START, IMAGE_PLACEHOLDER, SYSTEM_PROMPT, YI_VL, ChatFormat


def _template(default_system: str, system: str, question: str, answer: str, answer_header: str) -> str:
    """
    Args:
        default_system: a Jinja expression; without a system message it is `given`.
        system: Jinja code that writes `given`, as are `question` and `answer`, which write `walk.text`.
        answer_header: Jinja code that writes what an answer follows.
    """
    return (
        "{%- if not messages -%}"
        "{{- raise_exception('The conversation is empty; give at least one message from the user.') -}}"
        "{%- endif -%}"
        "{%- set has_system = messages[0]['role'] == 'system' -%}"
        "{%- set given = messages[0]['content'] if has_system else " + default_system + " -%}"
        "{%- if given is not string -%}"
        "{%- for part in given -%}"
        "{%- if part is not mapping or part['type'] != 'text' or part['text'] is not string -%}"
        "{{- raise_exception('A system message holds text only.') -}}"
        "{%- endif -%}{%- endfor -%}"
        "{%- set given = given | map(attribute='text') | join -%}"
        "{%- endif -%}" + system + "{%- set first = messages[1 if has_system else 0] -%}"
        "{%- set is_answer_first = first is defined and first['role'] == 'assistant' -%}"
        "{%- for message in messages[(1 if has_system else 0):] -%}"
        "{%- set expected = 'assistant' if (loop.index0 % 2 == 0) == is_answer_first else 'user' -%}"
        "{%- if message['role'] != expected -%}"
        "{{- raise_exception('Message ' ~ loop.index ~ ' is by ' ~ message['role'] ~ ', expected ' ~ expected ~ "
        "': user and assistant take turns, after at most one system message.') -}}"
        "{%- endif -%}"
        "{%- set walk = namespace(text='', typed='', has_images=false, has_text=false) -%}"
        "{%- if message['content'] is string -%}"
        "{%- set walk.text = message['content'] -%}{%- set walk.typed = message['content'] -%}"
        "{%- elif message['content'] is mapping or message['content'] is not iterable -%}"
        "{{- raise_exception('The content of a message is text or a list of parts.') -}}"
        "{%- else -%}"
        "{%- for part in message['content'] -%}"
        "{%- if part is mapping and part['type'] == 'image' -%}"
        "{%- set walk.text = walk.text + '" + IMAGE_PLACEHOLDER + "' -%}{%- set walk.has_images = true -%}"
        "{%- elif part is mapping and part['type'] == 'text' and part['text'] is string -%}"
        "{%- if part['text'] -%}"
        "{%- set walk.text = walk.text + ('\\n' if walk.has_images and not walk.has_text else '') + part['text'] -%}"
        "{%- set walk.typed = walk.typed + part['text'] -%}{%- set walk.has_text = true -%}"
        "{%- endif -%}"
        "{%- else -%}"
        "{{- raise_exception('A content part is of type text, with its words under `text`, or of type image.') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- endif -%}"
        "{%- if expected == 'assistant' -%}"
        + answer
        + "{%- elif walk.has_images or walk.typed | trim -%}"
        + question
        + "{%- else -%}"
        "{{- raise_exception('The question is empty; ask something in words, or show an image.') -}}"
        "{%- endif -%}"
        "{%- endfor -%}"
        "{%- if add_generation_prompt -%}"
        "{%- if messages[-1]['role'] != 'user' -%}"
        "{{- raise_exception('There is nothing to answer: the last message must be from the user.') -}}"
        "{%- endif -%}" + answer_header + "{%- endif -%}"
    )


CHAT_TEMPLATE = _template(
    default_system=repr(SYSTEM_PROMPT),
    system="{{- given + '\\n\\n###' -}}",
    question="{{- ' Human: ' + walk.text + '\\n###' -}}",
    answer="{{- ' Assistant:' -}}{%- generation -%}{{- ' ' + walk.text + '\\n###' -}}{%- endgeneration -%}",
    answer_header="{{- ' Assistant:' -}}",
)
_CHATML_HEADER = "{{- '" + IM_START + "assistant\\n' -}}"
CHATML_TEMPLATE = _template(
    default_system="''",
    system="{%- if given -%}{{- '" + IM_START + "system\\n' + given + '" + IM_END + "\\n' -}}{%- endif -%}",
    question="{{- '" + IM_START + "user\\n' + walk.text + '" + IM_END + "\\n' -}}",
    answer=_CHATML_HEADER + "{%- generation -%}{{- walk.text + '" + IM_END + "' -}}{%- endgeneration -%}{{- '\\n' -}}",
    answer_header=_CHATML_HEADER,
)
CHAT_TEMPLATES: dict[ChatFormat, str] = {YI_VL: CHAT_TEMPLATE, CHATML: CHATML_TEMPLATE}
