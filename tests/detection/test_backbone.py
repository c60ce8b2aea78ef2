import pytest
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops.misc import FrozenBatchNorm2d

from ssl_distill.backbones.create import create_backbone
from ssl_distill.detection.backbone import backbone_with_fpn
from ssl_distill.export import export_backbone

FILE_STATISTICS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


@pytest.mark.parametrize(
    ("name", "kwargs", "reductions"),
    [
        ("resnet18", {}, [4, 8, 16, 32]),
        ("convnet_nano", {}, [2, 4, 8]),
        ("resnet10_nano", {}, [2, 4, 8, 16]),
        ("resnet18", {"levels": (8, 32)}, [8, 32]),
        ("vit_nano_patch8_32", {}, [2, 4, 8, 16]),
        ("vit_nano_patch8_32", {"levels": [8, 16]}, [8, 16]),
    ],
)
def test_shapes(name, kwargs, reductions):
    backbone = backbone_with_fpn(name, 24, **kwargs)
    maps = backbone(torch.randn(2, 3, 64, 96))
    assert list(maps) == [*(str(i) for i in range(len(reductions))), "pool"]
    coarsest = reductions[-1] * 2
    for level, feature_map in zip([*reductions, coarsest], maps.values(), strict=True):
        assert feature_map.shape == (2, 24, -(-64 // level), -(-96 // level))


@pytest.mark.parametrize("name", ["resnet10_nano", "vit_nano_patch8_32"])
def test_exported_weights_arrive(name, tmp_path):
    encoder = create_backbone(name).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.01)
    export_backbone(encoder, tmp_path / "backbone.safetensors", FILE_STATISTICS)
    backbone = backbone_with_fpn(tmp_path / "backbone.safetensors", 8, norm="train").eval()
    assert (backbone.image_mean, backbone.image_std) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    images = torch.randn(1, 3, 32, 32)
    found = backbone.body(images)[-1]
    if name == "resnet10_nano":
        expected = encoder.forward_features(images)
    else:
        last = encoder.block_tokens(images)[0].patch_tokens
        expected = last.transpose(1, 2).unflatten(2, (4, 4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_norms():
    kinds = {
        norm: {type(module) for module in backbone_with_fpn("convnet_nano", 8, norm=norm).body.modules()}
        for norm in ("frozen", "sync", "train")
    }
    assert FrozenBatchNorm2d in kinds["frozen"]
    assert nn.BatchNorm2d not in kinds["frozen"]
    assert nn.SyncBatchNorm in kinds["sync"]
    assert nn.BatchNorm2d in kinds["train"]


def trainable(backbone):
    return {name.split(".")[1] for name, value in backbone.body.named_parameters() if value.requires_grad}


def test_trainable_layers():
    assert trainable(backbone_with_fpn("resnet18", 8, trainable_layers=2, norm="train")) == {"layer3", "layer4"}
    assert trainable(backbone_with_fpn("resnet18", 8, trainable_layers=0, norm="train")) == set()
    assert trainable(backbone_with_fpn("resnet18", 8, norm="train")) >= {"conv1", "bn1", "layer1"}
    vit = backbone_with_fpn("vit_nano_patch8_32", 8, trainable_layers=1)
    moving = {name for name, value in vit.body.named_parameters() if value.requires_grad}
    assert moving
    assert all(".blocks.2." in name for name in moving)
    assert all(value.requires_grad for value in vit.pyramid.parameters())


@pytest.mark.parametrize("name", ["resnet10_nano", "vit_nano_patch8_32"])
def test_torchvision_takes_it(name):
    torch.manual_seed(0)
    backbone = backbone_with_fpn(name, 16)
    num_maps = len(backbone(torch.randn(1, 3, 64, 64)))
    statistics = {"image_mean": backbone.image_mean, "image_std": backbone.image_std, "min_size": 64, "max_size": 64}
    anchors = AnchorGenerator(tuple((8 * 2**i,) for i in range(num_maps)), ((0.5, 1.0, 2.0),) * num_maps)
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    images = [torch.rand(3, 64, 64)]
    seen = []
    backbone.register_forward_hook(lambda module, inputs, maps: seen.append(inputs[0].detach()))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (backbone.image_mean, backbone.image_std))
    detectors = [
        FasterRCNN(backbone, 3, rpn_anchor_generator=anchors, box_score_thresh=0.0, **statistics),
        RetinaNet(backbone, 3, anchor_generator=anchors, score_thresh=0.0, **statistics),
    ]
    for detector in detectors:
        backbone.zero_grad()
        losses = detector(images, [target])
        sum(losses.values()).backward()
        torch.testing.assert_close(seen[-1], ((images[0] - mean) / std)[None])  # as the backbone was trained
        assert next(backbone.parameters()).grad.any()  # the stem's: through all that lies above it
        found = detector.eval()(images)[0]["boxes"]
        assert len(found)
        assert (found[:, 2:] > found[:, :2]).all()
        assert found.min() >= 0
        assert found.max() <= 64


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {"levels": [4, 64]}, r"`levels` must be among the backbone's reductions \[2, 4, .*\], got 64"),
        ("vit_nano_patch8_32", {"levels": [3]}, "`levels` must be 8 times or over a power of two .*, got 3"),
        ("resnet18", {"trainable_layers": 6}, "`trainable_layers` must lie in 0 to 5, the backbone's stages, got 6"),
        ("vit_nano_patch8_32", {"trainable_layers": 4}, "must lie in 0 to 3, the backbone's blocks, got 4"),
        ("resnet18", {"norm": "none"}, "`norm` must be one of frozen, sync, train, got 'none'"),
        ("resnet19", {}, "`backbone` 'resnet19' is not a timm model"),
    ],
)
def test_errors(name, arguments, message, unchecked):
    with pytest.raises(ValueError, match=message):
        backbone_with_fpn(name, 8, **arguments)
