"""Conversations to model inputs: the tokenizer and the image transform behind transformers' processor interface."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.processing_utils import MultiModalData

from .arguments import as_choice, as_float, as_int
from .chat import (
    CHAT_FORMATS,
    CHATML,
    IM_END,
    IM_START,
    IMAGE_PLACEHOLDER,
    YI_VL,
    ChatFormat,
    Segment,
    render,
    strip_answer,
    strip_separator,
)
from .chat_template import CHAT_TEMPLATES
from .encode import Encoded, encode, expand
from .image import YiVLImageProcessor
from .image.tiles import as_max_tiles, choose_grid, num_inputs
from .image.transform import NUM_INPUTS
from .messages import as_messages
from .tokenizer import drop_prefix_space_, encode_typed_specials_as_text_, make_special_, renamed

_SENTENCEPIECE_FILE = "tokenizer.model"


class YiVLProcessor(ProcessorMixin):
    """Tokenizer and image processor of one model.

    Args:
        patch_size: of the vision tower, in pixels; with the image size it gives the number of tokens per image.
        num_image_tokens: tokens per image where the connector decides it (`ConnectorConfig.num_tokens`).
        chat_format: how conversations are written, and where an answer ends: `yi-vl` or `chatml`; see `chat.py`. The
            one place where a model's chat format is kept: processor_config.json.
        chat_template: None: that of the chat format.
    """

    def __init__(
        self,
        image_processor: YiVLImageProcessor | None = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        chat_template: str | None = None,
        chat_format: ChatFormat = YI_VL,
        num_image_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.patch_size = as_int(patch_size, "patch_size", 1)
        if num_image_tokens is not None:
            num_image_tokens = as_int(num_image_tokens, "num_image_tokens", 1)
        self.num_image_tokens = num_image_tokens
        as_float(tokenizer.model_max_length, "model_max_length of the tokenizer")  # which transformers compares
        self.image_token = IMAGE_PLACEHOLDER
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER)
        if not chat_template or chat_template in CHAT_TEMPLATES.values():
            chat_template = None  # one of ours, as it is saved: the format decides which
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.set_chat_format_(chat_format)

    def set_chat_format_(self, chat_format: ChatFormat) -> None:
        """Write conversations in this format from now on, and stop where its answers end.

        Raises:
            ValueError: there is no such format, or the tokenizer lacks a token of it.
        """
        chat_format = as_choice(chat_format, "chat_format", CHAT_FORMATS)  # type: ignore[assignment]
        if chat_format == CHATML:
            make_special_(self.tokenizer, (IM_START, IM_END))
        if self.chat_template is None or self.chat_template in CHAT_TEMPLATES.values():
            self.chat_template = CHAT_TEMPLATES[chat_format]
        self.chat_format = chat_format

    @property
    def tokens_per_image(self) -> int:
        """P: tokens that one image takes in the prompt; with tiles its thumbnail, and each of its tiles."""
        if self.num_image_tokens is not None:
            return self.num_image_tokens
        return (self.image_processor.size_px // self.patch_size) ** 2

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, padding_side: str = "left", **kwargs: Any
    ) -> Any:
        """As transformers does. An answer follows its prompt, so padding is in front, whatever an older file says.

        Raises:
            ValueError: a folder holds tokenizer.model alone, of which transformers would make another tokenizer.
        """
        processor = super().from_pretrained(pretrained_model_name_or_path, *args, padding_side=padding_side, **kwargs)
        folder = Path(pretrained_model_name_or_path, kwargs.get("subfolder") or "")
        _keep_sentencepiece_model_(processor.tokenizer, folder)
        if folder.is_dir() and not (folder / "tokenizer.json").is_file():
            raise ValueError(f"{folder} has no tokenizer.json; copy it there from where the model was saved.")
        return processor

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does, with the `tokenizer.model` that the tokenizer was made of, for the engines and layouts
        that read that file."""
        sentencepiece_model = getattr(self.tokenizer, "sentencepiece_model", None)
        if sentencepiece_model is not None:
            os.makedirs(save_directory, exist_ok=True)
            (Path(save_directory) / _SENTENCEPIECE_FILE).write_bytes(sentencepiece_model)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers does; what `chat.render` refuses is refused.

        `return_assistant_tokens_mask` gives the trainer's loss mask: every answer with the separator after it.

        Raises:
            ValueError: a conversation is malformed.
        """
        try:
            applied = super().apply_chat_template(conversation, *args, **kwargs)
        except TemplateError as error:
            raise ValueError(str(error)) from error
        if kwargs.get("return_assistant_tokens_mask") and not isinstance(applied, str) and "assistant_masks" in applied:
            self._correct_assistant_masks_(applied, conversation, bool(kwargs.get("add_generation_prompt")))
        return applied

    def _correct_assistant_masks_(self, applied: Any, conversation: Any, add_generation_prompt: bool) -> None:
        """transformers before 5.24 places the mask as if an image took the one token of its placeholder."""
        conversations = [conversation] if isinstance(conversation[0], dict) else conversation
        for row, messages in enumerate(conversations):
            encoded = self.encode_messages(messages, add_generation_prompt)
            # An image's tokens depend on its size, which the text does not say.
            expected = [
                (id, int(mask))
                for id, mask in zip(encoded.input_ids, encoded.loss_mask, strict=True)
                if id != self.image_token_id
            ]
            ids, masks = applied["input_ids"][row], applied["assistant_masks"][row]
            tokens = [index for index, is_token in enumerate(applied["attention_mask"][row]) if is_token]
            texts = [index for index in tokens if ids[index] != self.image_token_id]
            if [int(ids[index]) for index in texts] == [id for id, _ in expected]:  # else it is cut short, or of
                for index in tokens:  # another template
                    masks[index] = 0
                for index, (_, mask) in zip(texts, expected, strict=True):
                    masks[index] = mask

    def decode(self, token_ids: Any, skip_special_tokens: bool = False, **kwargs: Any) -> Any:
        """As transformers' tokenizers do; with `skip_special_tokens` without the separator that ended an answer."""
        decoded = self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens, **kwargs)
        if not skip_special_tokens:
            return decoded
        return self._strip_separator(decoded) if isinstance(decoded, str) else list(map(self._strip_separator, decoded))

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = False, **kwargs: Any) -> list[str]:
        """`decode` of each sequence."""
        decoded = self.tokenizer.batch_decode(sequences, skip_special_tokens=skip_special_tokens, **kwargs)
        return list(map(self._strip_separator, decoded)) if skip_special_tokens else list(decoded)

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """What `generate` returned as text, its prompt included or cut off; answers as `YiVL.predict` gives them.

        transformers' pipeline decodes prompts and outputs with this, and removes the one from the other.
        """
        texts = self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)
        return [strip_answer(text, self.chat_format) for text in texts] if skip_special_tokens else texts

    def _strip_separator(self, text: str) -> str:
        return strip_separator(text, self.chat_format)

    def encode(self, segments: Sequence[Segment], max_tokens: int | None = None) -> Encoded:
        """Token ids, loss mask and image positions of a rendered conversation or caption; see `encode.encode`.

        Each image has the tokens of its thumbnail; see `expand` for those of its tiles.
        """
        max_token_length = self._max_token_length if max_tokens is not None else 1
        return encode(
            segments, self.tokenizer, self.image_token_id, self.tokens_per_image, max_tokens, max_token_length
        )

    def encode_messages(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool = True, max_tokens: int | None = None
    ) -> Encoded:
        """The conversation in the chat format, ready for an answer; see `chat.render` for what messages are."""
        return self.encode(render(as_messages(messages), add_generation_prompt, self.chat_format), max_tokens)

    def expand(self, encoded: Encoded, num_inputs: Sequence[int], max_tokens: int | None = None) -> Encoded:
        """With the tokens of as many inputs of the tower for each image as `num_inputs` says; see `encode.expand`."""
        return expand(encoded, num_inputs, self.tokens_per_image, max_tokens)

    @cached_property
    def _max_token_length(self) -> int:
        """Characters of the longest token; a byte of one that is written as bytes is at most a character."""
        return max(map(len, self.tokenizer.get_vocab()))

    def replace_image_token(self, image_inputs: dict, image_idx: int, **_: Any) -> str:
        """transformers' hook: what one placeholder in a prompt's text becomes before it is tokenized."""
        count = int(image_inputs[NUM_INPUTS][image_idx]) if NUM_INPUTS in image_inputs else 1
        return IMAGE_PLACEHOLDER * (count * self.tokens_per_image)

    @property
    def unused_input_names(self) -> list[str]:
        """transformers' hook: what the image processor gives beside the model's inputs."""
        return [NUM_INPUTS]

    def _get_num_multimodal_tokens(self, image_sizes: list[list[int]] | None = None, **_: Any) -> MultiModalData:
        """transformers' hook for inference servers: tokens and patches per image of the given sizes."""
        if image_sizes is None:
            return MultiModalData()
        size_px, max_tiles = self.image_processor.size_px, self.image_processor.max_tiles
        counts = [num_inputs(choose_grid((width, height), size_px, max_tiles)) for height, width in image_sizes]
        num_tokens = [count * self.tokens_per_image for count in counts]
        return MultiModalData(num_image_tokens=num_tokens, num_image_patches=counts)


def chat_format_of(source: str, revision: str | None = None) -> ChatFormat:
    """The chat format of a native model folder or hub id, by its processor_config.json alone.

    Raises:
        ValueError: it is none that there is.
    """
    values, _ = YiVLProcessor.get_processor_dict(source, revision=revision)
    return as_choice(values.get("chat_format", YI_VL), "chat_format", CHAT_FORMATS)  # type: ignore[return-value]


def max_tiles_of(source: str, revision: str | None = None) -> int:
    """Most tiles of an image of a native model folder or hub id, likewise.

    Raises:
        ValueError: an image cannot have so many.
    """
    values, _ = YiVLProcessor.get_processor_dict(source, revision=revision)
    return as_max_tiles((values.get("image_processor") or {}).get("max_tiles", 0), "max_tiles")


def prepare_tokenizer(source: str, image_token_id: int | None = None) -> Any:
    """A language model's tokenizer with `<image_placeholder>` added after its last id, and no BOS or EOS of its own.

    The generic fast class takes the SentencePiece model as it is and gives the official ids exactly; `LlamaTokenizer`,
    which Yi's tokenizer_config.json names, would insert a leading space.

    Args:
        image_token_id: of a token that the tokenizer has already, and that becomes `<image_placeholder>`.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source, padding_side="left")
    sentencepiece_file = _sentencepiece_file(source)
    if sentencepiece_file is not None:
        drop_prefix_space_(tokenizer, sentencepiece_file)
    if image_token_id is not None:
        tokenizer = renamed(tokenizer, image_token_id)
    elif IMAGE_PLACEHOLDER not in tokenizer.get_added_vocab():
        tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE_PLACEHOLDER]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    encode_typed_specials_as_text_(tokenizer)
    if sentencepiece_file is not None:
        _keep_sentencepiece_model_(tokenizer, sentencepiece_file.parent)
    return tokenizer


def _sentencepiece_file(source: str) -> Path | None:
    """The file `tokenizer.model` of a folder or hub id, if it has one."""
    if Path(source).is_dir():
        path = Path(source) / _SENTENCEPIECE_FILE
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(source, _SENTENCEPIECE_FILE))
    except (OSError, ValueError, HfHubHTTPError):
        return None


def _keep_sentencepiece_model_(tokenizer: Any, folder: Path) -> None:
    """Remember the bytes of a folder's `tokenizer.model` (1 MB of Yi's): it may be gone when the tokenizer is saved."""
    if (folder / _SENTENCEPIECE_FILE).is_file():
        tokenizer.sentencepiece_model = (folder / _SENTENCEPIECE_FILE).read_bytes()
