import pytest
import torch
from torch import nn

from ssl_distill.backbones.create import create_backbone
from ssl_distill.backbones.maps import feature_sizes, image_features


@pytest.mark.parametrize(
    ("name", "kwargs", "sizes"),
    [
        ("convnet_nano", {}, (128, 128, (4, 6))),
        ("resnet10_nano", {}, (128, 128, (2, 3))),
        ("vit_nano_patch8_32", {"reg_tokens": 2}, (64, 64, (4, 6))),
        ("convnext_atto", {"depths": (1, 1, 1, 1), "dims": (8, 8, 8, 16)}, (16, 16, (1, 1))),
        ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1)}, (24, 24, (4, 6))),
    ],
)
def test_shapes(name, kwargs, sizes):
    """The vector is what the backbone returns; the map has rows and columns in their places."""
    torch.manual_seed(0)
    kwargs = {**kwargs, **({"img_size": (32, 48), "window_size": 2} if "swin" in name else {})}
    backbone = create_backbone(name, **kwargs).eval()
    images = torch.randn(2, 3, 32, 48)
    features = image_features(backbone, images)
    vector_dim, map_dim, grid = sizes
    assert features.map.shape == (2, map_dim, *grid)
    assert features.summary.shape == (2, map_dim)
    torch.testing.assert_close(features.vector, backbone(images))
    assert features.vector.shape == (2, vector_dim)


def test_map_is_in_place():
    """Without attention and positions, a bright corner of the image is the corner of the map."""
    vit = create_backbone("vit_nano_patch8_32", depth=0)
    nn.init.zeros_(vit.pos_embed)
    images = torch.zeros(1, 3, 32, 32)
    images[..., :8, 24:] = 1
    feature_map = image_features(vit, images).map
    changed = (feature_map - feature_map[..., 2:3, 2:3]).abs().amax(1)[0] > 1e-5
    assert changed.nonzero().tolist() == [[0, 3]]


def test_trying_leaves_the_backbone_as_it_was():
    backbone = create_backbone("convnet_nano")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    assert feature_sizes(backbone, 32) == (128, 128, (4, 4), False)
    torch.testing.assert_close(backbone.state_dict(), before, rtol=0, atol=0)
    assert all(module.training for module in backbone.modules())


def test_errors():
    with pytest.raises(ValueError, match="`backbone` must have `forward_features`, as timm's models, got Linear"):
        feature_sizes(nn.Linear(3, 2), 32)
