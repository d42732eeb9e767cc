"""A request on its way through the engine, and what a step gives it."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from .detokenizer import FinishReason, IncrementalDetokenizer
from .prefix_cache import PrefixKey
from .prompt import Prompt
from .prompt_lookup import PromptLookup
from .sampling import Sampling


@dataclass(frozen=True)
class StepOutput:
    """What one step gave a request: its new text (often none), and whether and why it is finished.

    Args:
        num_tokens: generated so far, the one that ended the answer included.
        error: why there is no answer, or no more of it; nothing follows.
    """

    request_id: int
    text: str
    finish_reason: FinishReason | None
    num_tokens: int
    error: Exception | None = None

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None


OnOutput = Callable[[StepOutput], None]


@dataclass(eq=False)
class Request:
    """A prompt that is being answered.

    Args:
        generator: for sampling; None if it is greedy.
        on_output: receives every output, in the thread that steps; it must neither raise nor block.
        client: requests of one client share slots fairly with those of others.
    """

    id: int
    prompt: Prompt
    sampling: Sampling
    detokenizer: IncrementalDetokenizer
    generator: torch.Generator | None
    on_output: OnOutput
    client: Hashable
    lookup: PromptLookup | None = None  # drafts its next tokens
    is_cancelled: bool = False

    @property
    def is_done(self) -> bool:
        """It needs no further step."""
        return self.is_cancelled or self.detokenizer.finish_reason is not None

    @property
    def key(self) -> PrefixKey:
        """Of the prompt, and all tokens generated so far."""
        return self.prompt.key.extended(self.detokenizer.tokens)

    def draft(self, max_tokens: int) -> list[int]:
        """Tokens that may come next; no more than the answer may still have."""
        num_left = self.detokenizer.num_left - 1  # a step generates one more than is drafted
        return self.lookup.draft(min(max_tokens, num_left)) if self.lookup else []

    def add(self, *tokens: int) -> StepOutput:
        """Append generated tokens, up to the one that ends the answer."""
        text = "".join([self.detokenizer.add(token) for token in tokens])
        if self.lookup:
            self.lookup.extend(tokens)
        return self._put(StepOutput(self.id, text, self.detokenizer.finish_reason, self.detokenizer.num_tokens))

    def fail(self, error: Exception) -> StepOutput:
        """End the request without a further token."""
        self.is_cancelled = True
        return self._put(StepOutput(self.id, "", None, self.detokenizer.num_tokens, error))

    def _put(self, output: StepOutput) -> StepOutput:
        if not self.is_cancelled or output.error:
            self.on_output(output)
        return output
