import pytest
import timm
import torch
from torch import nn

from ssl_distill.backbones.create import check_crop_size, create_backbone, embed_dim_of
from ssl_distill.heads.network import Network
from ssl_distill.heads.prototype import PrototypeHead


def test_golden_multicrop(golden):
    case = golden("dino/vit_multicrop")
    params = case.params
    sizes = {name: params[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    backbone = create_backbone("vit_small_patch16_224", position_mode="dino_v1", **sizes)
    head = PrototypeHead(
        params["embed_dim"], params["out_dim"], hidden_dim=params["head_hidden"], bottleneck_dim=params["bottleneck"]
    )
    network = Network(backbone, head).eval()
    network.load_state_dict(case.under("state."))

    crops = [case.tensors[f"crop_{i}"] for i in range(len(params["crop_sizes"]))]
    stacks = [torch.stack([crop for crop in crops if crop.shape[-1] == size]) for size in
              dict.fromkeys(params["crop_sizes"])]  # fmt: skip
    features = network.features(stacks)
    torch.testing.assert_close(features.flatten(0, 1), case.tensors["backbone_features"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(network(stacks).flatten(0, 1), case.tensors["out"], rtol=1e-4, atol=1e-5)
    single = network([crops[0][None]])[0]
    torch.testing.assert_close(single, case.tensors["out_single_tensor_crop_0"], rtol=1e-4, atol=1e-5)


WIDTHS = {"vit_nano_patch8_32": 64, "convnet_nano": 128, "resnet10_nano": 128, "convnext_atto": 320}


@pytest.mark.parametrize(("name", "width"), WIDTHS.items())
def test_shapes(name, width):
    backbone = create_backbone(name, drop_path_rate=0.1).eval()
    assert embed_dim_of(backbone) == width
    for size in (64, 32) if name == "convnext_atto" else (32, 16):
        assert backbone(torch.randn(2, 3, size, size)).shape == (2, width)


def test_class_token_starts_as_the_papers_do():
    assert create_backbone("vit_nano_patch8_32").cls_token.std() > 0.01


def test_register_tokens_and_stochastic_depth():
    backbone = create_backbone("vit_small_patch14_reg4_dinov2", drop_path_rate=0.2, img_size=28, depth=2)
    assert backbone.blocks[1].drop_path1.drop_prob == pytest.approx(0.2)
    assert backbone(torch.randn(2, 3, 42, 28)).shape == (2, 384)


@pytest.mark.parametrize(
    "name", ["convnet_nano", "resnet10_nano", "vit_nano_patch4_32", "vit_nano_patch8_32", "vit_micro_patch4_32"]
)
def test_presets_give_maps(name):
    """What timm's `feature_info` says of the maps is true, and the whole network is small."""
    extractor = timm.create_model(name, features_only=True)
    maps = extractor(torch.randn(2, 3, 32, 32))
    told = zip(extractor.feature_info.channels(), extractor.feature_info.reduction(), strict=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(width, 32 // r, 32 // r) for width, r in told]
    model = timm.create_model(name)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.num_features)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1.3e6
    assert timm.create_model(name, num_classes=7)(torch.randn(2, 3, 32, 32)).shape == (2, 7)


def test_sizes_of_the_documented_presets():
    sizes = {name: sum(p.numel() for p in timm.create_model(name).parameters()) for name in (
        "vit_nano_patch8_32", "convnet_nano", "resnet10_nano")}  # fmt: skip
    assert sizes == {"vit_nano_patch8_32": 163_584, "convnet_nano": 106_960, "resnet10_nano": 324_576}


def test_a_users_module_is_copied():
    module = nn.Linear(2, 3)
    assert create_backbone(module).weight is not module.weight
    assert create_backbone(module).timm_name is None
    assert not hasattr(module, "timm_name")


def test_errors():
    table = [
        (lambda: create_backbone("vit_smal_patch16_224"), "is not a timm model; did you mean vit_small_patch16_224"),
        (lambda: create_backbone("vit_tiny_patch16_224.dino9"), "vit_tiny_patch16_224 has weights augreg_in21k"),
        (lambda: create_backbone("convnet_nano", foo=1), "has 'foo', which convnet_nano does not take"),
        (lambda: create_backbone("convnet_nano", num_classes=3), "has 'num_classes', which convnet_nano does not take"),
        (lambda: create_backbone("convnet_nano", num_class_tokens=2), "must be 1 for convnet_nano, which is no plain"),
        (lambda: embed_dim_of(nn.Linear(2, 2)), "must have an integer attribute `num_features`"),
        (
            lambda: check_crop_size(create_backbone("vit_nano_patch8_32"), 20, "local_size"),
            "`local_size` must be a multiple of the patch size 8, got 20; try 16 or 24",
        ),
        (
            lambda: check_crop_size(create_backbone("cait_xxs24_224"), 96, "local_size"),
            "`local_size` must be 224 x 224, all that this backbone takes, got 96",
        ),
    ]
    for call, message in table:
        with pytest.raises(ValueError, match=message):
            call()
    for name, size in {
        "convnet_nano": 17,
        "xcit_nano_12_p16_224": 96,
        "pvt_v2_b0": 96,
        "vit_nano_patch8_32": 16,
    }.items():
        check_crop_size(create_backbone(name), size, "local_size")
