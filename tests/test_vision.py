"""The vision tower computes what open_clip's does, seen through transformers' interface."""

from __future__ import annotations

import open_clip
import pytest
import torch
from open_clip.transformer import LayerNorm, QuickGELU, VisionTransformer
from tiny import tiny_config
from torch import nn

from yi_vl.config import OpenClipVisionConfig
from yi_vl.vision import ConvStem, OpenClipTower, PatchConv2d, resize_position_grid


@pytest.fixture
def tower() -> OpenClipTower:
    torch.manual_seed(0)
    return OpenClipTower(tiny_config().vision_config).eval()


def pixels(num_images: int = 2, size_px: int = 56) -> torch.Tensor:
    return torch.randn(num_images, 3, size_px, size_px, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_patch_convolution_equals_torchs(bias: bool) -> None:
    reference = nn.Conv2d(3, 8, 14, 14, bias=bias)
    layer = PatchConv2d(3, 8, 14, 14, bias=bias)
    layer.load_state_dict(reference.state_dict())
    x = pixels().requires_grad_()
    torch.testing.assert_close(layer(x), reference(x), atol=1e-5, rtol=1e-5)
    for a, b in zip(
        torch.autograd.grad(layer(x).pow(2).sum(), [x, *layer.parameters()]),
        torch.autograd.grad(reference(x).pow(2).sum(), [x, *reference.parameters()]),
    ):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("feature_layer", [-2, -1, 0])
@pytest.mark.parametrize("is_autocast", [False, True])
def test_features_are_those_of_a_block_of_open_clips_tower(
    quick_gelu: bool, feature_layer: int, is_autocast: bool
) -> None:
    config = tiny_config().vision_config
    config.quick_gelu, config.feature_layer = quick_gelu, feature_layer
    tower = OpenClipTower(config).eval()
    original = VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        act_layer=QuickGELU if quick_gelu else nn.GELU,
        norm_layer=LayerNorm,
        output_dim=8,
    ).eval()
    missing, unexpected = original.load_state_dict(tower.visual.state_dict(), strict=False)
    assert missing == ["proj"] and not unexpected
    outputs: list[torch.Tensor] = []
    original.transformer.resblocks[feature_layer].register_forward_hook(lambda *call: outputs.append(call[-1]))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        original(pixels())
        features = tower(pixels()).last_hidden_state
    tolerance = 2e-2 if is_autocast else 1e-5
    assert features.shape == (2, 16, 32) and features.dtype == outputs[0].dtype
    torch.testing.assert_close(features, outputs[0][:, 1:], atol=tolerance, rtol=tolerance)
    num_unused = config.num_hidden_layers - 1 - feature_layer % config.num_hidden_layers
    assert len(tower.visual.unused_modules(feature_layer)) == num_unused + 1  # and the final norm


def test_the_last_block_and_the_final_norm_unused_modules(tower: OpenClipTower) -> None:
    before = tower(pixels()).last_hidden_state
    for module in (tower.visual.transformer.resblocks[-1], tower.visual.ln_post):
        for parameter in module.parameters():
            nn.init.constant_(parameter, torch.nan)
    assert torch.equal(tower(pixels()).last_hidden_state, before)


def test_a_stem_keeps_the_grid() -> None:
    config = tiny_config(stem_widths=[8, 16]).vision_config
    tower = OpenClipTower(config).eval()
    assert tower(pixels()).last_hidden_state.shape == (2, config.num_patches, 32) == (2, 4, 32)
    with pytest.raises(ValueError, match="not divisible by 8"):
        ConvStem(28, [8, 8, 8], 32)


@pytest.mark.parametrize("size", [(28, 28), (56, 28), (112, 112)])
def test_images_of_another_size_are_refused(tower: OpenClipTower, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"takes 56x56 images, these are \({size[0]}, {size[1]}\)"):
        tower(torch.zeros(1, 3, *size))


def test_resizing_keeps_the_class_row_and_an_equal_grid() -> None:
    positions = torch.randn(17, 32, dtype=torch.bfloat16)
    assert resize_position_grid(positions, 4) is positions
    larger = resize_position_grid(positions, 8)
    assert larger.shape == (65, 32) and larger.dtype == torch.bfloat16
    assert torch.equal(larger[0], positions[0])
    with pytest.raises(ValueError, match="18 position embeddings are not a square grid"):
        resize_position_grid(torch.randn(18, 32), 8)


def test_resizing_keeps_a_slope() -> None:
    """A position embedding that grows to the right still does, evenly, on a finer grid."""
    columns = torch.arange(4.0).expand(4, 4).reshape(16, 1)
    finer = resize_position_grid(torch.cat([torch.zeros(1, 1), columns]), 8)[1:].reshape(8, 8)
    torch.testing.assert_close(finer, finer[:1].expand(8, 8))
    torch.testing.assert_close(finer[0, 2:6], torch.tensor([0.75, 1.25, 1.75, 2.25]), atol=0.05, rtol=0)


@pytest.mark.parametrize("grid", [2, 8])
def test_resizing_agrees_with_open_clip(grid: int) -> None:
    positions = torch.randn(17, 32)
    state = {"visual.positional_embedding": positions.clone()}
    target = VisionTransformer(14 * grid, 14, 32, 1, 2, 2.0)
    model = nn.Module()
    model.visual = target
    open_clip.model.resize_pos_embed(state, model)
    torch.testing.assert_close(resize_position_grid(positions, grid), state["visual.positional_embedding"])


def test_a_tower_is_resized_in_place(tower: OpenClipTower) -> None:
    tower.resize_grid_(112)
    assert tower(pixels(size_px=112)).last_hidden_state.shape == (2, 64, 32)
    assert tower.config.image_size == 112 and tower.config.num_patches == 64
    with pytest.raises(ValueError, match="100 is not a multiple"):
        tower.resize_grid_(100)
    with pytest.raises(ValueError, match="takes 112x112"):
        tower(pixels())


def test_a_frozen_position_grid_stays_frozen(tower: OpenClipTower) -> None:
    tower.visual.positional_embedding.requires_grad_(False)
    tower.resize_grid_(28)
    assert not tower.visual.positional_embedding.requires_grad


def test_quick_gelu_is_honoured() -> None:
    config = OpenClipVisionConfig(**tiny_config().vision_config.to_dict() | {"quick_gelu": True})
    torch.manual_seed(0)
    quick = OpenClipTower(config).eval()
    torch.manual_seed(0)
    exact = OpenClipTower(tiny_config().vision_config).eval()
    assert not torch.allclose(quick(pixels()).last_hidden_state, exact(pixels()).last_hidden_state, atol=1e-4)
