import pytest
import timm
import torch
from torch import nn

from ssl_distill.backbones.create import create_backbone
from ssl_distill.evaluate.image_maps import image_maps, pca_colors


def images(size, count=2):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("vit_nano_patch4_32", 32, 8),
        ("convnet_nano", 32, 8),  # its last map has 4 x 4 cells: the one before is taken
        ("convnet_nano", 64, 8),
        ("resnet10_nano", 32, 8),
        ("resnet18", 224, 7),
        ("swin_tiny_patch4_window7_224", 224, 7),  # channels last
    ],
)
def test_shapes(name, size, grid):
    backbone = create_backbone(name)
    backbone.train()
    maps = image_maps(backbone, images(size))
    assert maps.features.shape[2:] == (grid, grid)
    assert (maps.attention is None) == (not name.startswith("vit"))
    assert backbone.training
    assert not any(module._forward_hooks for module in backbone.modules())


def test_tokens_and_attention_are_those_of_the_network():
    vit = create_backbone("vit_nano_patch4_32").eval()
    maps = image_maps(vit, images(32))
    tokens = vit.tokens(images(32)).patch_tokens
    torch.testing.assert_close(maps.features.flatten(2).transpose(1, 2), tokens)
    # timm's own attention weights, by its unfused path
    attend, rows = vit.blocks[-1].attn, []
    attend.fused_attn = False
    attend.attn_drop.register_forward_hook(lambda module, args, output: rows.append(output[:, :, 0, 1:].mean(1)))
    vit(images(32))
    torch.testing.assert_close(maps.attention.flatten(1), rows[0])


def test_registers_are_no_places():
    vit = create_backbone("vit_nano_patch4_32", reg_tokens=3)
    maps = image_maps(vit, images(32))
    assert maps.features.shape[2:] == maps.attention.shape[1:] == (8, 8)


def test_other_networks_are_skipped():
    assert image_maps(nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4)), images(16)) is None
    no_class_token = timm.create_model("vit_tiny_patch16_224", num_classes=0, class_token=False, global_pool="avg")
    maps = image_maps(no_class_token, images(224, 1))
    assert maps.features.shape[2:] == (14, 14)
    assert maps.attention is None


def test_colors_tell_places_apart():
    features = torch.zeros(2, 8, 4, 4)
    features[:, 0, :2] = 1.0
    features += 0.01 * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    colors = pca_colors(features).float()
    top, bottom = colors[:, :, :2].mean((0, 2, 3)), colors[:, :, 2:].mean((0, 2, 3))
    assert (top - bottom).abs().max() > 80
    assert colors[:, :, :2].std((0, 2, 3)).min() < 60


def test_colors_follow_those_before():
    features = torch.randn(3, 16, 5, 5, generator=torch.Generator().manual_seed(1))
    features *= torch.linspace(3, 0.1, 16).view(1, -1, 1, 1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(2))).Q
    before = pca_colors(features)
    turned = torch.einsum("bdhw,de->behw", features, rotation)
    assert (pca_colors(turned, before).int() - before.int()).abs().max() <= 2
    flipped = 255 - before.int()
    assert (pca_colors(turned, flipped.byte()).int() - flipped).abs().max() <= 3


def test_constant_features_are_grey():
    colors = pca_colors(torch.full((2, 8, 4, 4), 3.0))
    assert (colors.int() - 127).abs().max() <= 1
    assert pca_colors(torch.randn(1, 2, 3, 3)).shape == (1, 3, 3, 3)  # fewer channels than colours
