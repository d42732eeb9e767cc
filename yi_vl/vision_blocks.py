"""The blocks of OpenCLIP's vision transformer, under open_clip's names of weights.

N images, L tokens (patches and the class token), Dv width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .config import OpenClipVisionConfig


class LayerNorm(nn.LayerNorm):
    """torch's, in the dtype of its input also under autocast, which computes it in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).to(x.dtype)


class QuickGELU(nn.Module):
    """OpenAI's approximation of GELU, for towers that were trained with it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class SelfAttention(nn.MultiheadAttention):
    """Attention among an image's tokens, its output projection called as the module that it is.

    torch's own takes that module's weight behind its back, which neither offloading nor an adapter survives.

    attend: the product of queries, keys and values, (N, heads, L, head_dim) each; the trainer sets its own on CPUs.
    """

    attend: Callable[[Tensor, Tensor, Tensor], Tensor] = staticmethod(F.scaled_dot_product_attention)

    def forward(self, query: Tensor) -> Tensor:  # type: ignore[override]
        """(N, L, Dv) -> (N, L, Dv), all tokens to all tokens"""
        num_images, length, _width = query.shape
        projected = F.linear(query, self.in_proj_weight, self.in_proj_bias)  # (N, L, 3 Dv)
        heads = projected.view(num_images, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        output = self.attend(*heads)  # (N, heads, L, head_dim)
        return self.out_proj(output.transpose(1, 2).reshape(num_images, length, -1))


class ResidualAttentionBlock(nn.Module):
    """Attention and feed-forward network, each behind a norm and beside the identity: (N, L, Dv) -> (N, L, Dv)"""

    def __init__(self, config: OpenClipVisionConfig) -> None:
        super().__init__()
        width, inner_width = config.hidden_size, config.intermediate_size
        self.ln_1 = LayerNorm(width)
        self.attn = SelfAttention(width, config.num_attention_heads, batch_first=True)
        self.ln_2 = LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, inner_width))
        self.mlp.add_module("gelu", QuickGELU() if config.quick_gelu else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(inner_width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The tower's blocks: (N, L, Dv) -> (N, L, Dv)"""

    def __init__(self, config: OpenClipVisionConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(config) for _ in range(config.num_hidden_layers))
        self.grad_checkpointing = False

    def forward(self, x: Tensor, feature_layer: int) -> Tensor:
        """What block `feature_layer` leaves; negative from the end. Later blocks are not run."""
        for block in self.resblocks[: block_index(feature_layer, self.resblocks) + 1]:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return x


def block_index(feature_layer: int, blocks: nn.ModuleList) -> int:
    """A block's index from the front; a negative one counts from the end."""
    return range(len(blocks))[feature_layer]
