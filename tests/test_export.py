import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ssl_distill
from ssl_distill.augment.multi_crop import MultiCropAugment
from ssl_distill.backbones.create import create_backbone
from ssl_distill.export import better_encoder, export_backbone, export_method, load_backbone, loading_lines
from ssl_distill.heads.prototype import PrototypeHead
from ssl_distill.methods.dino import DINO

SMALL_VIT = {"img_size": 32, "patch_size": 8, "depth": 3}


class UsersNetwork(nn.Module):
    num_features = 4

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(3, 4)
        self.tied = self.project

    def forward(self, images):
        return self.project(images.mean((2, 3)))


def trained(name, **kwargs):
    """A backbone that differs from a fresh one in everything, batch-norm statistics included."""
    backbone = create_backbone(name, **kwargs)
    for parameter in backbone.parameters():
        nn.init.normal_(parameter, std=0.1)
    backbone.train()(torch.randn(8, 3, 32, 32))
    return backbone.eval()


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("convnet_nano", {}),
        ("resnet10_nano", {}),
        ("vit_nano_patch8_32", {}),
        ("vit_tiny_patch16_224", SMALL_VIT),
        ("vit_tiny_patch16_224", {**SMALL_VIT, "num_class_tokens": 2, "position_mode": "dino_v1"}),
        ("resnet18", {}),
    ],
)
def test_outputs_are_equal_before_and_after(tmp_path, name, kwargs):
    backbone = trained(name, **kwargs)
    path = tmp_path / "backbone.safetensors"
    config = export_backbone(backbone, path)
    images = torch.randn(2, 3, 32, 32)

    ours = load_backbone(path)
    assert not ours.training
    assert ours.backbone_config["timm_name"] == name
    torch.testing.assert_close(ours(images), backbone(images), rtol=0, atol=1e-6)

    theirs = timm.create_model(name, num_classes=0, checkpoint_path=path, **config["timm_kwargs"]).eval()
    torch.testing.assert_close(theirs(images), backbone(images), rtol=0, atol=1e-6)

    maps = load_backbone(path, features_only=True)(images)
    last = maps[-1] if "vit" not in name else None
    if last is not None:  # a ConvNet's features are the mean of its last map
        torch.testing.assert_close(last.mean((2, 3)), backbone(images), rtol=0, atol=1e-5)
    assert all(each.ndim == 4 for each in maps)


def test_other_sizes_are_resized_as_in_training(tmp_path):
    backbone = trained("vit_tiny_patch16_224", **SMALL_VIT, position_mode="dino_v1")
    export_backbone(backbone, tmp_path / "backbone.safetensors")
    images = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(load_backbone(tmp_path / "backbone.safetensors")(images), backbone(images))
    maps = load_backbone(tmp_path / "backbone.safetensors", features_only=True)(images)
    assert maps[-1].shape == (2, 192, 6, 6)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("convnet_nano", {}), ("resnet18", {}), ("vit_tiny_patch16_224", SMALL_VIT), ("convnext_atto", {"dims": [8] * 4})],
)
def test_the_printed_lines_work(tmp_path, name, kwargs):
    backbone, images = trained(name, **kwargs), torch.randn(2, 3, 32, 32)
    path = tmp_path / 'a "quoted" folder' / "backbone.safetensors"
    export_backbone(backbone, path)
    lines = loading_lines(path)
    assert len(lines) == 2
    for line in lines:
        names = {}
        exec(line, names)
        torch.testing.assert_close(names["backbone"].eval()(images), backbone(images), rtol=0, atol=1e-6)


def test_the_package_loads_it_by_itself(tmp_path):
    backbone, images = trained("convnet_nano"), torch.randn(2, 3, 32, 32)
    export_backbone(backbone, tmp_path / "backbone.safetensors")
    loaded = ssl_distill.load_backbone(tmp_path / "backbone.safetensors")
    torch.testing.assert_close(loaded(images), backbone.eval()(images))


def test_a_users_module(tmp_path):
    module, path = UsersNetwork(), tmp_path / "backbone.safetensors"
    config = export_backbone(create_backbone(module), path)
    assert config["timm_name"] is None
    with pytest.raises(
        ValueError, match=r"holds a test_export.UsersNetwork, which timm cannot make; pass one as `module`"
    ):
        load_backbone(path)
    images = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(load_backbone(path, module=UsersNetwork())(images), module(images))
    assert loading_lines(path) == [f'import ssl_distill; backbone = ssl_distill.load_backbone("{path}", module=...)']


def small_dino(**kwargs):
    return DINO("convnet_nano", num_prototypes=8, head=lambda d, k: PrototypeHead(d, k, 8, 8), **kwargs)


def test_method(tmp_path):
    augment = MultiCropAugment(global_size=32, local_size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    method = small_dino(augment=augment)
    path = tmp_path / "backbone.safetensors"
    scores = {"val/teacher/knn_top1": 0.3, "val/student/knn_top1": 0.4, "val/score": 0.4}
    config = export_method(method, path, scores=scores)
    assert config["method"] == "ssl_distill.methods.dino.DINO"
    assert (config["encoder"], config["scores"]) == ("student", {"val/student/knn_top1": 0.4})
    assert load_backbone(path).backbone_config == config
    assert (config["mean"], config["std"], config["input_size"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [3, 32, 32])
    state = load_file(path)
    assert state.keys() == method.encoders()["student"].state_dict().keys()
    assert export_method(method, path)["encoder"] == "teacher"  # the headline, where nothing was measured
    assert export_method(method, path, "student")["encoder"] == "student"


def test_a_checkpoint_in_place_of_the_method(tmp_path):
    """The weights of another moment, without touching those that the method has now."""
    method, other = small_dino(), small_dino()
    now = {name: value.clone() for name, value in method.state_dict().items()}
    export_method(method, tmp_path / "backbone.safetensors", "student", weights=other.state_dict())
    torch.testing.assert_close(load_file(tmp_path / "backbone.safetensors"), dict(other.student.backbone.state_dict()))
    torch.testing.assert_close(dict(method.state_dict()), now, rtol=0, atol=0)


def test_better_encoder():
    names = ["teacher", "student"]
    assert better_encoder(names, {}) == "teacher"
    assert better_encoder(names, {"val/teacher/rankme": 3, "val/student/rankme": 9}) == "teacher"
    assert better_encoder(names, {"val/teacher/linear_top1": 0.3, "val/student/linear_top1": 0.4}) == "student"
    assert better_encoder(names, {"val/student/knn_top1": 0.4}) == "teacher"  # the teacher's is not known
    masked = {"val/teacher/knn_top1_masked": 0.3, "val/student/knn_top1_masked": 0.4}
    assert better_encoder(names, masked) == "student"


def test_errors(tmp_path):
    stranger, cut = tmp_path / "stranger.safetensors", tmp_path / "cut.safetensors"
    save_file({"weight": torch.zeros(2)}, stranger)
    export_backbone(trained("convnet_nano"), cut)
    whole = cut.read_bytes()
    cut.write_bytes(whole[: len(whole) // 2])
    method = small_dino()
    table = [
        (lambda: load_backbone(tmp_path / "none.safetensors"), "none.safetensors does not exist"),
        (lambda: load_backbone(stranger), "was not exported by ssl-distill"),
        (lambda: load_backbone(cut), "is no safetensors file, or was cut off"),
        (lambda: export_backbone(UsersNetwork(), tmp_path / "backbone.pt"), "must end in .safetensors"),
        (
            lambda: export_method(method, tmp_path / "b.safetensors", "techer"),
            "must be one of teacher, student, got techer",
        ),
    ]
    for call, message in table:
        with pytest.raises(ValueError, match=message):
            call()
    assert not (tmp_path / "b.safetensors").exists()
