"""The vision tower: pixels in, patch features out.

OpenCLIP's vision transformer, with open_clip's names of weights, behind transformers' model interface. open_clip itself
is not imported: it takes half a second. N images, C channels, P patches, L = P + 1 tokens, Dv width.
"""

from __future__ import annotations

import logging
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput

from .config import OpenClipVisionConfig
from .vision_blocks import LayerNorm, Transformer, block_index

logger = logging.getLogger(__name__)


class PatchConv2d(nn.Conv2d):
    """A convolution whose stride is its kernel, as one matrix product: same weights, ~10x faster backward on CPU."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        p = self.kernel_size[0]
        x = x.reshape(n, c, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)  # (N, gh, gw, C, p, p)
        x = F.linear(x.reshape(n, height // p, width // p, c * p * p), self.weight.flatten(1), self.bias)
        return x.permute(0, 3, 1, 2)  # (N, out, gh, gw), channels last in memory


class ResidualConv(nn.Module):
    """A 3x3 convolution beside the identity: (N, C, h, w) -> (N, C, h, w)"""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(F.relu(x)))


class ConvStem(nn.Sequential):
    """A small convolutional network in place of the patch convolution, for towers too small to learn one from patches.

    One patch convolution to the first width, then a convolution of stride 2 to every next width, each followed by a
    residual one, and at last to the tower's. The overall stride is the patch size: the grid is that of the plain tower.

    Source: measured on held-out artwork, all else equal: four convolutions took a tower's things from 33% to 51%.
    """

    def __init__(self, patch_size: int, widths: list[int], out_width: int) -> None:
        first_stride, remainder = divmod(patch_size, 2 ** len(widths))
        if remainder:
            raise ValueError(
                f"A stem of {len(widths)} widths halves the image {len(widths)} times after its first convolution; "
                f"patch_size {patch_size} is not divisible by {2 ** len(widths)}."
            )
        layers: list[nn.Module] = [
            PatchConv2d(3, widths[0], first_stride, first_stride, bias=False),
            nn.BatchNorm2d(widths[0]),
        ]
        for narrow, wide in pairwise(widths):
            layers += [nn.ReLU(), _halving(narrow, wide), nn.BatchNorm2d(wide), ResidualConv(wide)]
        layers += [nn.ReLU(), _halving(widths[-1], out_width), nn.BatchNorm2d(out_width)]
        super().__init__(*layers)


def _halving(narrow: int, wide: int) -> nn.Conv2d:
    return nn.Conv2d(narrow, wide, 3, stride=2, padding=1, bias=False)


class PatchFeatures(nn.Module):
    """OpenCLIP's vision transformer without its contrastive head, which is not part of Yi-VL."""

    def __init__(self, config: OpenClipVisionConfig) -> None:
        super().__init__()
        width, patch_size = config.hidden_size, config.patch_size
        self.conv1: nn.Module = (
            ConvStem(patch_size, config.stem_widths, width)
            if config.stem_widths
            else PatchConv2d(3, width, patch_size, patch_size, bias=False)
        )
        self.class_embedding = nn.Parameter(torch.zeros(width))  # random by `OpenClipTower._init_weights`
        self.positional_embedding = nn.Parameter(torch.zeros(config.num_patches + 1, width))
        self.ln_pre = LayerNorm(width)
        self.transformer = Transformer(config)
        self.ln_post = LayerNorm(width)

    def forward(self, x: Tensor, feature_layer: int) -> Tensor:
        """(N, 3, H, W) -> what block `feature_layer` leaves, without the class token, (N, P, Dv)"""
        patches = self.conv1(x).flatten(2).transpose(1, 2)  # (N, P, Dv)
        class_tokens = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([class_tokens, patches], dim=1)  # (N, L, Dv)
        tokens = self.ln_pre(tokens + self.positional_embedding.to(tokens.dtype))
        return self.transformer(tokens, feature_layer)[:, 1:]

    def resize_(self, image_size: int, patch_size: int) -> None:
        """Make the position grid one for images of another size."""
        old = self.positional_embedding
        grid = resize_position_grid(old.data, image_size // patch_size)
        self.positional_embedding = nn.Parameter(grid, old.requires_grad)

    def unused_modules(self, feature_layer: int) -> list[nn.Module]:
        """Modules behind the block whose output is taken."""
        blocks = self.transformer.resblocks
        return [*blocks[block_index(feature_layer, blocks) + 1 :], self.ln_post]

    @property
    def grad_checkpointing(self) -> bool:
        """Whether the blocks keep their inputs only."""
        return self.transformer.grad_checkpointing

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's towers have it."""
        self.transformer.grad_checkpointing = enable


class TimmPatchFeatures(nn.Module):
    """A tower that open_clip takes from timm (EVA02), under the names that open_clip gives its weights."""

    def __init__(self, config: OpenClipVisionConfig) -> None:
        import timm

        super().__init__()
        assert config.timm_model is not None
        self.trunk: Any = timm.create_model(
            config.timm_model, pretrained=False, img_size=config.image_size, num_classes=0, global_pool="token"
        )

    def forward(self, x: Tensor, feature_layer: int) -> Tensor:
        """(N, 3, H, W) -> what block `feature_layer` leaves, without the class token, (N, P, Dv)"""
        features: Tensor = self.trunk.forward_intermediates(
            x, indices=[feature_layer], stop_early=True, intermediates_only=True, output_fmt="NLC"
        )[0]
        return features

    def resize_(self, image_size: int, patch_size: int) -> None:
        """Make the position grids, learned and rotary, ones for images of another size."""
        self.trunk.set_input_size(img_size=(image_size, image_size))

    def unused_modules(self, feature_layer: int) -> list[nn.Module]:
        """Modules behind the block whose output is taken."""
        blocks = self.trunk.blocks
        return [*blocks[block_index(feature_layer, blocks) + 1 :], self.trunk.norm, self.trunk.fc_norm]

    @property
    def grad_checkpointing(self) -> bool:
        """Whether the blocks keep their inputs only."""
        return bool(self.trunk.grad_checkpointing)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As `PatchFeatures` has it."""
        self.trunk.set_grad_checkpointing(enable)


class OpenClipTower(PreTrainedModel):
    """A vision transformer that open_clip has; its output is the penultimate block's, without the class token."""

    config: OpenClipVisionConfig
    config_class = OpenClipVisionConfig
    base_model_prefix = "visual"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["ResidualAttentionBlock", "EvaBlock", "ConvStem"]
    # Every implementation gives the same: the tower has its own (torch's, unmasked).
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: OpenClipVisionConfig) -> None:
        super().__init__(config)
        self.visual = TimmPatchFeatures(config) if config.timm_model else PatchFeatures(config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: object) -> BaseModelOutput:
        """(N, 3, H, W) -> last_hidden_state (N, P, Dv)

        Raises:
            ValueError: the images are not of the size the position grid was made for.
        """
        size_px = self.config.image_size
        if tuple(pixel_values.shape[-2:]) != (size_px, size_px):
            raise ValueError(
                f"The vision tower takes {size_px}x{size_px} images, these are {tuple(pixel_values.shape[-2:])}; "
                "use the model's own processor, or resize the tower's position grid (`resize_grid_`)."
            )
        pixel_values = pixel_values.to(next(self.visual.parameters()).dtype)
        if not len(pixel_values):
            shape = (0, self.config.num_patches, self.config.hidden_size)
            return BaseModelOutput(last_hidden_state=pixel_values.new_zeros(shape))
        return BaseModelOutput(last_hidden_state=self.visual(pixel_values, self.config.feature_layer))

    def resize_grid_(self, image_size: int) -> None:
        """Make the tower one for images of another size; the patch size stays. In place."""
        if image_size % self.config.patch_size:
            raise ValueError(
                f"image_size {image_size} is not a multiple of the tower's patch size {self.config.patch_size}."
            )
        self.visual.resize_(image_size, self.config.patch_size)
        self.config.image_size = image_size

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers sets this on every module of a model that has it; `visual` does the checkpointing."""
        return self.visual.grad_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.visual.set_grad_checkpointing(enable)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PatchFeatures):
            std = module.class_embedding.shape[0] ** -0.5
            init.normal_(module.class_embedding, std=std)
            init.normal_(module.positional_embedding, std=std)
        elif hasattr(module, "init_non_persistent_buffers"):  # timm's rotary positions, which no file holds
            module.init_non_persistent_buffers()  # type: ignore[operator]
        elif isinstance(module, nn.Conv2d):
            init.kaiming_normal_(module.weight, nonlinearity="relu")


def resize_position_grid(positions: Tensor, grid: int) -> Tensor:
    """Position embeddings for another grid: bicubic, antialiased, in fp32, the class token's row kept.

    (1 + g*g, Dv) -> (1 + grid*grid, Dv), in the dtype given. Source: open_clip's own resize; Yi-VL's is unpublished.
    """
    old_grid = math.isqrt(positions.shape[0] - 1)
    if old_grid**2 + 1 != positions.shape[0]:
        raise ValueError(
            f"{positions.shape[0]} position embeddings are not a square grid and one class token; "
            "the tower cannot be resized."
        )
    if old_grid == grid:
        return positions
    class_row, rows = positions[:1], positions[1:]
    rows = rows.float().reshape(1, old_grid, old_grid, -1).permute(0, 3, 1, 2)  # (1, Dv, g, g)
    rows = F.interpolate(rows, size=(grid, grid), mode="bicubic", antialias=True, align_corners=False)
    rows = rows.permute(0, 2, 3, 1).reshape(grid * grid, -1)
    logger.info("Resized the position grid from %d x %d to %d x %d.", old_grid, old_grid, grid, grid)
    return torch.cat([class_row, rows.to(positions.dtype)])
