"""Batches of conversations as trees: a prefix that all share, mosaics that some conversations share, conversations.

Every image and the system prompt are computed once, however many questions are asked. A token attends to what is
before it in its own conversation, to the mosaic that this is about, and to the prefix; positions are those that the
conversation has alone. So a tree gives exactly what its conversations give one by one.

B rows, L tokens of a row, P tokens of the prefix, T = P + B*L, H query heads, K key heads, d head width, S keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from train.nano.text.mosaic_texts import MosaicText
from yi_vl.chat import from_llava, render, render_caption
from yi_vl.encode import Encoded, encode

TREES = "nano_trees"
IGNORED = -100
_NO_SAMPLE = -1
GRIDS = (4, 8)
NUM_CELLS = sum(grid * grid for grid in GRIDS)


def first_cell(grid: int) -> int:
    """Where a grid's cells begin in one list of the cells of all `GRIDS`."""
    return sum(other * other for other in GRIDS if other < grid)


@dataclass(frozen=True)
class Tree:
    """One trunk, a system prompt's rest and mosaics, and the conversations that follow it."""

    trunk: list[int]
    branches: list[tuple[list[int], list[bool]]]  # ids and loss mask
    cells: tuple[tuple[int, ...], ...]  # signs of the mosaics, in order
    sees_prefix: bool  # captions have no system prompt


@dataclass
class Row:
    """Some trees side by side; lists of equal length, one entry per token."""

    input_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)  # the next token, where it is supervised
    trees: list[int] = field(default_factory=list)
    branches: list[int] = field(default_factory=list)  # 0: the trunk
    sees_prefix: list[bool] = field(default_factory=list)
    signs: list[int] = field(default_factory=list)  # of the mosaics' tokens, in order
    cells: list[int] = field(default_factory=list)  # of the same, among the cells of all grids
    spans: list[tuple[int, int]] = field(default_factory=list)  # of each branch

    def add(self, tree: Tree, prefix_length: int, max_tokens: int) -> int:
        """Append the tree with as many branches as there is room for; returns their number, 0 where none fits."""
        room = max_tokens - len(self.input_ids) - len(tree.trunk)
        if not tree.branches or room < len(tree.branches[0][0]):
            return 0
        start = prefix_length if tree.sees_prefix else 0
        number = self.trees[-1] + 1 if self.trees else 0
        self._append(tree.trunk, [False] * len(tree.trunk), start, (number, 0), tree.sees_prefix)
        self.signs += [sign for cells in tree.cells for sign in cells]
        self.cells += [first_cell(isqrt(len(cells))) + index for cells in tree.cells for index in range(len(cells))]
        num_added = 0
        for ids, mask in tree.branches:
            if len(ids) <= room:
                num_added += 1
                self.spans.append((len(self.input_ids), len(self.input_ids) + len(ids)))
                self._append(ids, mask, start + len(tree.trunk), (number, num_added), tree.sees_prefix)
                room -= len(ids)
        return num_added

    def _append(
        self, ids: list[int], mask: list[bool], position: int, number: tuple[int, int], sees_prefix: bool
    ) -> None:
        self.input_ids += ids
        self.position_ids += range(position, position + len(ids))
        self.labels += [after if is_supervised else IGNORED for after, is_supervised in zip(ids[1:], mask[1:])]
        self.labels += [IGNORED] * bool(ids)
        self.trees += [number[0]] * len(ids)
        self.branches += [number[1]] * len(ids)
        self.sees_prefix += [sees_prefix] * len(ids)


class TreeEncoder:
    """Makes trees of texts.

    Args:
        tokenizer: with offsets, as `prepare_tokenizer` gives it.
    """

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self._tokenizer, self._image_token_id = tokenizer, image_token_id
        examples = ["?", "你", "a", "A", "<image>\n?"]
        prompts = [self._encode([{"from": "human", "value": example}], 1).input_ids for example in examples]
        self.prefix = _common_start(prompts)

    def trees(self, text: MosaicText) -> list[Tree]:
        """One tree for all conversations whose text up to the last mosaic is the same."""
        num_cells = len(text.cells[0]) if text.cells else 1
        trees: dict[tuple[int, ...], Tree] = {}
        for turns in text.conversations:
            encoded = self._caption(turns, num_cells) if text.is_caption else self._encode(turns, num_cells)
            skip = 0 if text.is_caption else len(self.prefix)
            assert text.is_caption or encoded.input_ids[:skip] == self.prefix, "the prompt has another prefix"
            end = encoded.image_starts[-1] + num_cells if text.cells else skip
            trunk, branch = encoded.input_ids[skip:end], (encoded.input_ids[end:], encoded.loss_mask[end:])
            tree = trees.setdefault(tuple(trunk), Tree(trunk, [], text.cells, not text.is_caption))
            tree.branches.append(branch)
        return list(trees.values())

    def prompt(self, text: MosaicText) -> Tree:
        """The tree of one conversation up to where its first answer begins."""
        (tree,) = self.trees(text)
        ids, mask = tree.branches[0]
        first = mask.index(True)
        return Tree(tree.trunk, [(ids[:first], mask[:first])], tree.cells, tree.sees_prefix)

    def token_ids(self, text: str) -> list[int]:
        """Without special tokens."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False).input_ids
        return ids

    def text(self, ids: list[int]) -> str:
        """The text of an answer's ids, up to the separator that ends it."""
        decoded: str = self._tokenizer.decode(ids)
        return decoded.partition("\n###")[0].strip()

    def _encode(self, turns: list[dict[str, str]], num_cells: int) -> Encoded:
        return encode(render(from_llava(turns)), self._tokenizer, self._image_token_id, num_cells)

    def _caption(self, turns: list[dict[str, str]], num_cells: int) -> Encoded:
        return encode(render_caption(turns[1]["value"]), self._tokenizer, self._image_token_id, num_cells)


def fill_rows(trees: Iterator[Tree], num_rows: int, max_tokens: int, prefix_length: int) -> list[Row]:
    """Rows of at most `max_tokens` tokens, each filled until a tree does not fit; what fits in no row is left out."""
    rows = [Row()]
    for tree in trees:
        if rows[-1].add(tree, prefix_length, max_tokens):
            continue
        if len(rows) == num_rows:
            break
        rows.append(Row())
        rows[-1].add(tree, prefix_length, max_tokens)
    return rows


@dataclass(frozen=True)
class TreeBatch:
    """Rows as tensors: (B, L) each, but `prefix` (P,), `signs` and `cells` (number of mosaic tokens,)."""

    prefix: Tensor
    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    trees: Tensor
    branches: Tensor
    sees_prefix: Tensor
    signs: Tensor
    cells: Tensor  # each one's index among the cells of all grids
    seed: int = 0

    @classmethod
    def of(cls, rows: Sequence[Row], length: int, prefix: list[int], seed: int = 0) -> TreeBatch:
        def padded(lists: list[list[Any]], pad: Any) -> Tensor:
            return torch.tensor([each + [pad] * (length - len(each)) for each in lists])

        return cls(
            prefix=torch.tensor(prefix),
            input_ids=padded([row.input_ids for row in rows], 0),
            position_ids=padded([row.position_ids for row in rows], 0),
            labels=padded([row.labels for row in rows], IGNORED),
            trees=padded([row.trees for row in rows], _NO_SAMPLE),
            branches=padded([row.branches for row in rows], 0),
            sees_prefix=padded([row.sees_prefix for row in rows], True),
            signs=torch.tensor([sign for row in rows for sign in row.signs], dtype=torch.long),
            cells=torch.tensor([cell for row in rows for cell in row.cells], dtype=torch.long),
            seed=seed,
        )

    def mask(self, dtype: torch.dtype) -> Tensor:
        """(B, L, P + L): 0 where a token attends, -inf elsewhere."""
        length = self.input_ids.shape[1]
        is_own = (self.branches[:, None] == 0) | (self.branches[:, None] == self.branches[:, :, None])
        sees = (self.trees[:, None] == self.trees[:, :, None]) & is_own
        sees &= torch.ones(length, length, dtype=torch.bool, device=sees.device).tril()
        prefix = self.sees_prefix[:, :, None].expand(-1, -1, len(self.prefix))
        hidden = ~torch.cat([prefix, sees], dim=2)
        return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def _common_start(sequences: Sequence[list[int]]) -> list[int]:
    common = []
    for tokens in zip(*sequences):
        if len(set(tokens)) > 1:
            break
        common.append(tokens[0])
    return common


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float,
    tree_mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, H, T, d), (1, K, T, d), (1, K, T, d) -> (1, T, H, d): the prefix once, then rows that attend to it.

    Args:
        tree_mask: as of `TreeBatch.mask`, repeated for every head: (B, K, H/K*L, S).
    """
    num_rows, groups, _, size = tree_mask.shape
    num_heads, width = query.shape[1], query.shape[3]
    length = tree_mask.shape[2] * groups // num_heads
    prefix = size - length
    query, key, value = (part.to(value.dtype).transpose(1, 2)[0] for part in (query, key, value))  # (T, heads, d)
    causal = torch.full((prefix, prefix), -torch.inf, dtype=value.dtype, device=value.device).triu(1)
    causal = causal.repeat(num_heads // groups, 1).expand(1, groups, -1, -1)
    first = _attend(query[None, :prefix], key[None, :prefix], value[None, :prefix], causal, scaling)
    keys, values = (
        torch.cat(
            [part[:prefix].expand(num_rows, -1, -1, -1), part[prefix:].view(num_rows, length, groups, width)], dim=1
        )
        for part in (key, value)
    )
    rest = _attend(query[prefix:].view(num_rows, length, num_heads, width), keys, values, tree_mask, scaling)
    return torch.cat([first.flatten(0, 1), rest.flatten(0, 1)])[None], None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """(B, L, H, d), (B, S, K, d), (B, S, K, d), (B, K, H/K*L, S) -> (B, L, H, d)

    The query heads that share a key head are rows of one product: torch's fused attention has a slow backward pass on
    CPUs.
    """
    batch, length, heads, width = query.shape
    groups, size = key.shape[2], key.shape[1]
    rows = query.transpose(1, 2).reshape(batch * groups, -1, width)  # (B*K, H/K*L, d)
    columns = key.permute(0, 2, 3, 1).reshape(batch * groups, width, size)
    scores = torch.baddbmm(mask.reshape(batch * groups, -1, size), rows, columns, alpha=scaling)
    output = torch.bmm(scores.softmax(-1), value.transpose(1, 2).reshape(batch * groups, size, width))
    return output.view(batch, heads, length, width).transpose(1, 2)


AttentionInterface.register(TREES, tree_attention)
