import pickle

import pytest
import torch
import torchvision
from torch import nn

from ssl_distill.backbones.create import create_backbone
from ssl_distill.detection.keys import detectron2_keys, detectron2_settings, save_detectron2, save_torchvision


def trained(name):
    """A backbone with batch norm statistics of its own."""
    backbone = create_backbone(name)
    backbone.train()(torch.randn(4, 3, 64, 64))
    return backbone.eval()


def test_golden(golden):
    for name in golden.cases("pcd/detectron2_keys_*"):
        expected = golden(name).params["map"]
        counters = {name.replace("running_mean", "num_batches_tracked") for name in expected if "running_mean" in name}
        assert detectron2_keys([*expected, *counters]) == expected


def test_golden_names_are_those_of_timm(golden):
    expected = golden("pcd/detectron2_keys_resnet18").params["map"]
    assert detectron2_keys(create_backbone("resnet18").state_dict()) == expected


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvision(tmp_path, name):
    """Its own network computes the same, and only `fc` is missing."""
    backbone = trained(name)
    assert save_torchvision(backbone, tmp_path / "backbone.pth") == name
    theirs = torchvision.models.get_model(name)
    missing = theirs.load_state_dict(torch.load(tmp_path / "backbone.pth", weights_only=True), strict=False)
    assert missing == (["fc.weight", "fc.bias"], [])
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(theirs.eval()(images), backbone(images), rtol=1e-4, atol=1e-4)


def test_golden_detectron2(tmp_path, golden):
    backbone = trained("resnet18").bfloat16()
    assert save_detectron2(backbone, tmp_path / "backbone.pkl") == "resnet18"
    content = pickle.loads((tmp_path / "backbone.pkl").read_bytes())
    assert content.keys() == {"model", "__author__", "matching_heuristics"}
    assert content["matching_heuristics"] is True
    state = backbone.state_dict()
    expected = {key: state[ours].float() for ours, key in detectron2_keys(state).items()}
    found = {key: torch.from_numpy(value) for key, value in content["model"].items()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_settings_of_detectron2():
    settings = detectron2_settings("resnet18", (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    assert settings["MODEL.RESNETS.DEPTH"] == 18
    assert settings["MODEL.RESNETS.RES2_OUT_CHANNELS"] == 64
    assert settings["MODEL.PIXEL_MEAN"] == [102.0, 127.5, 153.0]
    settings = detectron2_settings("resnext50_32x4d", (0.4, 0.5, 0.6), (0.2, 0.2, 0.2))
    assert (settings["MODEL.RESNETS.NUM_GROUPS"], settings["MODEL.RESNETS.WIDTH_PER_GROUP"]) == (32, 4)
    assert "MODEL.RESNETS.RES2_OUT_CHANNELS" not in settings


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("convnet_nano", r"`encoder` must be one of resnet101, .* got convnet_nano, which has stages\.0"),
        ("vit_nano_patch8_32", "got vit_nano_patch8_32, which has cls_token"),
        ("resnet10_nano", r"got resnet10_nano\.$"),
        ("resnetaa50", "what torchvision's resnet50 does for this format; resnetaa50 has the same weights"),
    ],
)
def test_errors(tmp_path, name, message):
    backbone = create_backbone(name)
    for save, path in ((save_torchvision, tmp_path / "backbone.pth"), (save_detectron2, tmp_path / "backbone.pkl")):
        with pytest.raises(ValueError, match=message):
            save(backbone, path)
        assert not path.exists()


def test_errors_of_names(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.pkl"):
        save_detectron2(create_backbone("resnet18"), tmp_path / "backbone.pth")
    with pytest.raises(ValueError, match=r"`names` must be those of torchvision's ResNets, got stages\.0"):
        detectron2_keys(["stages.0.0.weight"])
