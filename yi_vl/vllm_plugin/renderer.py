"""Chats as token ids for vLLM, by the walk that everything else here uses, so that typed text stays text."""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm.inputs import TokensPrompt
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.params import ChatParams
from vllm.utils.async_utils import make_async

from ..chat import end_of_message, render
from ..encode import Encoded, encode
from ..messages import as_messages
from ..processor import chat_format_of
from ..server.conversation import merge_messages
from .answer import mark_

Message = dict[str, Any]
_ROLES = ("system", "developer", "user", "assistant")


class YiVLRenderer(HfRenderer):
    """Renders chats by `chat.render` after `merge_messages`, as the server of this package does.

    A template of the user's own (`--chat-template`) is rendered as vLLM does it.
    """

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self._chat_format = chat_format_of(self.model_config.model, self.model_config.revision)
        if self.tokenizer is not None:
            mark_(self.tokenizer, self._chat_format)
        self._encode_async = make_async(self._encode, executor=self._executor)

    def render_messages(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """vLLM's hook: messages as the client sent them -> parsed ones, and the prompt with its images.

        Raises:
            ValueError: no answer can be given to them; vLLM's server makes it status 400.
        """
        if params.chat_template is not None:
            return super().render_messages(messages, params)
        params = _keeping_image_mode(params)
        parsed, images, uuids = parse_chat_messages(
            messages,
            self.model_config,
            content_format="openai",
            media_io_kwargs=params.media_io_kwargs,
            mm_processor_kwargs=params.mm_processor_kwargs,
        )
        return parsed, _prompt(self._encode(parsed, params), images, uuids)

    async def render_messages_async(self, messages: list[Any], params: ChatParams) -> tuple[list[Any], Any]:
        """The same; images are fetched and text is tokenized beside the event loop."""
        if params.chat_template is not None:
            return await super().render_messages_async(messages, params)
        params = _keeping_image_mode(params)
        parsed, images, uuids = await parse_chat_messages_async(
            messages,
            self.model_config,
            content_format="openai",
            media_io_kwargs=params.media_io_kwargs,
            mm_processor_kwargs=params.mm_processor_kwargs,
        )
        return parsed, _prompt(await self._encode_async(parsed, params), images, uuids)

    def _encode(self, parsed: list[Message], params: ChatParams) -> list[int]:
        """Token ids with one image token per image, which vLLM's processor repeats."""
        options = params.chat_template_kwargs
        if options.get("tools"):
            raise ValueError("tools: Yi-VL was not trained to call tools; leave them out.")
        is_continued = bool(options.get("continue_final_message"))
        add_generation_prompt = bool(options.get("add_generation_prompt", True)) and not is_continued
        segments = render(as_messages(merge_messages(_checked(parsed))), add_generation_prompt, self._chat_format)
        if is_continued:
            if parsed[-1]["role"] != "assistant":
                raise ValueError("continue_final_message: the last message must be the assistant's.")
            del segments[-len(end_of_message(self._chat_format)) :]
        tokenizer, config = self.get_tokenizer(), self.model_config.hf_config
        tokens_per_image = config.num_image_tokens
        encoded = encode(
            segments,
            tokenizer,
            config.image_token_id,
            tokens_per_image,
            max_tokens=self.model_config.max_model_len - 1,
            max_token_length=tokenizer.max_chars_per_token,
        )
        return _one_token_per_image(encoded, tokens_per_image)


def _keeping_image_mode(params: ChatParams) -> ChatParams:
    """Images in the mode of their file: transparency is the image transform's to deal with, as everywhere else."""
    given = params.media_io_kwargs or {}
    image = {"image_mode": None} | given.get("image", {})
    return dataclasses.replace(params, media_io_kwargs=given | {"image": image})


def _checked(parsed: list[Message]) -> list[Message]:
    for message in parsed:
        if message["role"] not in _ROLES or message.get("tool_calls"):
            what = "tool calls" if message.get("tool_calls") else f"the role {message['role']!r}"
            raise ValueError(f"messages: Yi-VL knows no {what}; it takes {', '.join(_ROLES)} with text and images.")
    return parsed


def _one_token_per_image(encoded: Encoded, tokens_per_image: int) -> list[int]:
    repeated = {start + patch for start in encoded.image_starts for patch in range(1, tokens_per_image)}
    return [id for index, id in enumerate(encoded.input_ids) if index not in repeated]


def _prompt(input_ids: list[int], images: Any, uuids: Any) -> TokensPrompt:
    prompt = TokensPrompt(prompt_token_ids=input_ids)
    if images is not None:
        prompt["multi_modal_data"] = images
    if uuids is not None:
        prompt["multi_modal_uuids"] = uuids
    return prompt
