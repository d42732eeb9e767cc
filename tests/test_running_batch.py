"""The decode loop: padding, cached steps, rows that leave and join, and the shared prefix."""

from __future__ import annotations

import pytest
import torch
from tiny import IMAGE_TOKEN_ID, OFFICIAL, prefill, tiny_yi_vl
from torch.nn.utils.rnn import pad_sequence

from yi_vl.engine.prefix_cache import shared_prefix_length
from yi_vl.engine.prompt import Prompt
from yi_vl.engine.running_batch import RunningBatch
from yi_vl.predict import YiVL


@pytest.fixture(scope="module")
def yi_vl() -> YiVL:
    return tiny_yi_vl()


def two_prompts(yi_vl: YiVL) -> list[Prompt]:
    image = OFFICIAL / "wide.png"
    long = [{"type": "image", "image": image}, {"type": "text", "text": "What is in this image?"}]
    return [yi_vl.engine.prepare([{"role": "user", "content": content}]) for content in (long, "Hi")]


def padded(prompts: list[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (B, S), padded on the left."""
    rows = [prompt.input_ids[0] for prompt in prompts]
    masks = [torch.ones_like(row) for row in rows]
    ids, mask = (pad_sequence(tensors, batch_first=True, padding_side="left") for tensors in (rows, masks))
    return ids, mask


def test_prompts_hold_their_tokens_and_images(yi_vl: YiVL) -> None:
    prompts = two_prompts(yi_vl)
    assert [prompt.input_ids.shape for prompt in prompts] == [(1, len(prompt)) for prompt in prompts]
    assert [int((prompt.input_ids == IMAGE_TOKEN_ID).sum()) for prompt in prompts] == [16, 0]
    assert [[image.shape for image in prompt.images_uint8] for prompt in prompts] == [[(56, 56, 3)], []]


def pixel_values(yi_vl: YiVL, prompts: list[Prompt]) -> torch.Tensor:
    images = torch.stack([image for prompt in prompts for image in prompt.images_uint8])
    return yi_vl.processor.image_processor.to_pixel_values(images)


def cold_prefill(yi_vl: YiVL, *prompts: Prompt, max_tokens: int = 4096) -> RunningBatch:
    yi_vl.clear_cache()
    return prefill(yi_vl, prompts, max_tokens)


def decode_greedily(batch: RunningBatch, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedily: the tokens (B, steps), and the logits that each was chosen by (steps, B, V)."""
    tokens, logits = [], []
    for _ in range(num_steps):
        logits.append(batch.logits)
        tokens.append(batch.logits.argmax(-1))
        batch.step(tokens[-1])
    return torch.stack(tokens, dim=1), torch.stack(logits)


@pytest.mark.parametrize("max_tokens", [4096, 50, 1])
def test_cached_steps_equal_uncached_ones_however_the_prompts_are_chunked(yi_vl: YiVL, max_tokens: int) -> None:
    prompts = two_prompts(yi_vl)
    chosen, seen = decode_greedily(cold_prefill(yi_vl, *prompts, max_tokens=max_tokens), 8)
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            ids, num_tokens = torch.cat([prompt.input_ids[0], chosen[row]]), len(prompt)
            pixels = pixel_values(yi_vl, prompts) if row == 0 else None
            logits = yi_vl.model(input_ids=ids[None], pixel_values=pixels).logits[0]
            torch.testing.assert_close(seen[:, row], logits[num_tokens - 1 : -1], atol=1e-4, rtol=0)


def test_decoding_equals_transformers_generate(yi_vl: YiVL) -> None:
    prompts = two_prompts(yi_vl)
    tokens, _ = decode_greedily(cold_prefill(yi_vl, *prompts), 8)
    input_ids, attention_mask = padded(prompts)
    expected = yi_vl.model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        pixel_values=pixel_values(yi_vl, prompts),
        max_new_tokens=8,
        do_sample=False,
        eos_token_id=-1,  # none
    )
    assert torch.equal(tokens, expected[:, -8:])


def test_rows_that_are_removed_and_added_change_nothing_for_the_others(yi_vl: YiVL) -> None:
    prompts = two_prompts(yi_vl)
    alone = [yi_vl.engine.prepare([{"role": "user", "content": text}]) for text in ("Hi", "Tell me about a dog.")]
    expected, logits = decode_greedily(cold_prefill(yi_vl, alone[0]), 12)
    expected_new, logits_new = decode_greedily(cold_prefill(yi_vl, alone[1]), 6)

    batch = cold_prefill(yi_vl, *prompts)  # a request with an image, and "Hi"
    tokens, seen = decode_greedily(batch, 4)
    batch.select([1])  # the longer row leaves, and its padding with it
    assert batch.cache.get_seq_length() == len(prompts[1]) + 4
    more, seen_alone = decode_greedily(batch, 2)
    batch.extend(cold_prefill(yi_vl, alone[1]))
    both, seen_both = decode_greedily(batch, 6)
    assert torch.equal(torch.cat([tokens[1], more[0], both[0]]), expected[0])
    assert torch.equal(both[1], expected_new[0])
    seen_of_row = torch.cat([seen[:, 1], seen_alone[:, 0], seen_both[:, 0]])
    torch.testing.assert_close(seen_of_row, logits[:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(seen_both[:, 1], logits_new[:, 0], atol=1e-4, rtol=0)


def test_a_shared_prefix_is_prefilled_once_and_a_step_computes_one_position(
    yi_vl: YiVL, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, int]] = []
    positions: list[list[int]] = []
    forward = yi_vl.model.forward

    def watch(**inputs: torch.Tensor) -> object:
        outputs = forward(**inputs)
        read = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        calls.append((*read.shape[:2], outputs.logits.shape[1]))
        positions.append(inputs["position_ids"][-1].tolist())
        return outputs

    monkeypatch.setattr(yi_vl.model, "forward", watch)
    prompts = two_prompts(yi_vl)
    decode_greedily(cold_prefill(yi_vl, *prompts), 2)
    shared = shared_prefix_length([prompt.key for prompt in prompts])
    length, num_tokens = map(len, prompts)
    assert 100 < shared < num_tokens
    assert calls == [(1, shared, 1), (2, length - shared, 1), (2, 1, 1), (2, 1, 1)]
    assert positions[0] == list(range(shared))
    assert positions[1] == [0] * (length - num_tokens) + list(range(shared, num_tokens))  # padding shifts no row
    assert positions[2:] == [[num_tokens], [num_tokens + 1]]
