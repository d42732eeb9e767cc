"""Nano's language model with embeddings that stand for tower and connector.

B rows, L tokens of a row, D language width, N mosaic tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from train.attention.cpu import round_up
from train.nano.pretrain.trees import IGNORED, NUM_CELLS, TREES, TreeBatch
from train.nano.text.mosaic import SIGN_IDS
from yi_vl.config import preset
from yi_vl.model import YiVLForConditionalGeneration

_INIT_STD = 0.05


@dataclass
class Shape:
    """The language model's dimensions. `vocab_size` counts the pieces of the tokenizer."""

    num_layers: int = 7
    width: int = 256
    num_heads: int = 4
    num_key_heads: int = 2
    mlp_width: int = 672
    vocab_size: int = 2560
    has_cells: bool = True  # an embedding for every cell; without it only the order tells where a mosaic's token lies

    def __post_init__(self) -> None:
        for divisor in ("num_heads", "num_key_heads"):
            whole = self.width if divisor == "num_heads" else self.num_heads
            if getattr(self, divisor) < 1 or whole % getattr(self, divisor):
                raise ValueError(f"{divisor} is {getattr(self, divisor)}, which does not divide {whole}.")

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=round_up(self.vocab_size + 1, 64),  # and the image token
            hidden_size=self.width,
            intermediate_size=self.mlp_width,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_heads,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
            initializer_range=_INIT_STD,
            pad_token_id=0,
        )


class MosaicLanguageModel(nn.Module):
    """The language model, its head, and the embeddings of signs and cells, which stand for tower and connector."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        config = shape.config()
        config._attn_implementation = TREES
        self.language_model: PreTrainedModel = AutoModel.from_config(config)
        self.lm_head = nn.Linear(shape.width, config.vocab_size, bias=False)
        self.signs = nn.Embedding(len(SIGN_IDS), shape.width)
        self.cells = nn.Embedding(NUM_CELLS, shape.width)
        for module in (self.lm_head, self.signs, self.cells):
            nn.init.normal_(module.weight, std=_INIT_STD)
        for layer in self.language_model.get_submodule("layers"):
            for name in ("self_attn.o_proj", "mlp.down_proj"):  # so that every layer begins as the identity
                nn.init.zeros_(layer.get_parameter(f"{name}.weight"))
        self.image_token_id = shape.vocab_size
        self.has_cells = shape.has_cells
        if not shape.has_cells:
            nn.init.zeros_(self.cells.weight)
        self.set_signs_trainable(True)

    def set_signs_trainable(self, is_trainable: bool) -> None:
        """Whether signs and cells are trained with the rest."""
        self.signs.requires_grad_(is_trainable)
        self.cells.requires_grad_(is_trainable and self.has_cells)

    def forward(self, batch: TreeBatch, noise: float = 0.0, precision: torch.dtype = torch.bfloat16) -> Tensor:
        """The hidden states of the rows' tokens, (B, L, D)"""
        config = self.language_model.config
        ids = torch.cat([batch.prefix, batch.input_ids.flatten()])  # (T,)
        positions = torch.cat([torch.arange(len(batch.prefix), device=ids.device), batch.position_ids.flatten()])
        embeddings = self.language_model.get_input_embeddings()(ids)  # (T, D)
        mosaics = self._mosaics(batch, noise)
        embeddings = embeddings.masked_scatter((ids == self.image_token_id).unsqueeze(-1), mosaics.to(embeddings.dtype))
        mask = batch.mask(precision).repeat(1, config.num_attention_heads // config.num_key_value_heads, 1)
        hidden = self.language_model(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            use_cache=False,
            tree_mask=mask[:, None].expand(-1, config.num_key_value_heads, -1, -1),
        ).last_hidden_state
        return hidden[0, len(batch.prefix) :].view(*batch.input_ids.shape, -1)

    def _mosaics(self, batch: TreeBatch, noise: float) -> Tensor:
        """(N, D), the noise a pure function of the batch's seed"""
        mosaics = self.signs(batch.signs) + self.cells(batch.cells)
        if not noise:
            return mosaics
        generator = torch.Generator().manual_seed(batch.seed)
        scale = noise * self.signs.weight.detach().std()
        return mosaics + scale * torch.randn(mosaics.shape, generator=generator).to(mosaics.device)

    def loss(self, batch: TreeBatch, noise: float) -> Tensor:
        """Cross-entropy per supervised token, in bfloat16 (2.7 times as fast as float32 where a CPU has it)."""
        with torch.autocast(self.signs.weight.device.type, torch.bfloat16):
            hidden = self(batch, noise)
            logits = self.lm_head(hidden[batch.labels != IGNORED])
        return F.cross_entropy(logits.float(), batch.labels[batch.labels != IGNORED])


def megabytes(shape: Shape) -> float:
    """The whole model's size in bfloat16, tower and projector included."""
    config = preset("nano")
    config.text_config = shape.config()
    with torch.device("meta"):
        model = YiVLForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters()) * 2 / 1e6
