"""Signs and cells begin as what their names are made of: a dog's sign as the mean direction of "dog", "dogs" and "狗".

What an image shows then resembles the words that ask about it, as a trained projector's output would, and a language
model need not learn hundreds of pairs of sign and word one by one before it can look anything up.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from train.nano.data.labels import BACKGROUND, LANGS, UNKNOWN, Lang
from train.nano.data.sample import Item
from train.nano.pretrain.mosaic_model import MosaicLanguageModel
from train.nano.pretrain.trees import GRIDS, first_cell
from train.nano.text.locations import COLUMNS
from train.nano.text.mosaic import SIGN_IDS
from train.nano.text.wording import noun, plural

_BOX = (0.0, 0.0, 1.0, 1.0)
_OWN = 0.5  # of a vector's standard deviation: what it does not share with other names


@torch.no_grad()
def init_signs_by_name(model: MosaicLanguageModel, token_ids: Callable[[str], list[int]]) -> None:
    """Overwrite the fresh embeddings of signs and cells, and make the head's rows those of the input embeddings.

    Args:
        token_ids: the ids of a text, without special tokens.
    """
    words = model.get_parameter("language_model.embed_tokens.weight")
    model.lm_head.weight.copy_(words)  # so that copying a word is one and the same map for all words

    def name(embedding: torch.Tensor, texts: list[str]) -> None:
        ids = sorted({index for text in texts for index in token_ids(text)})
        if ids:
            embedding.mul_(_OWN).add_(words[ids].sum(0) / len(ids) ** 0.5)

    for sign, index in SIGN_IDS.items():
        name(model.signs.weight[index], sign_names(sign))
    if model.has_cells:
        for grid in GRIDS:
            for index in range(grid**2):
                cell = f"{COLUMNS[index % grid]}{index // grid + 1}"
                name(model.cells.weight[first_cell(grid) + index], [cell, f" {cell}"])


def sign_names(sign: str) -> list[str]:
    """The texts that name a sign: as within a sentence, letters in capitals; none of background."""
    if sign in (BACKGROUND, UNKNOWN):
        return []
    category, _, name = sign.partition(" ")
    if category == "letter":
        return list(name.upper())
    if category == "digit":
        return [name]
    colour, _, shape = name.partition(" ")
    item = Item("shape", shape, _BOX, colour) if category == "shape" else Item(category, name, _BOX)  # type: ignore[arg-type]
    names = [_within(noun(item, lang), lang) for lang in LANGS]
    return names if category == "flag" else [*names, _within(plural(noun(item, "en")), "en")]


def _within(text: str, lang: Lang) -> str:
    return f" {text}" if lang == "en" else text
