"""A run of ours in the layout of the official code, and on from there."""

import argparse

import pytest
import torch
import yaml

from ssl_distill.cli import main

CROPS = {
    "class_path": "ssl_distill.augment.multi_crop.MultiCropAugment",
    "init_args": {"global_size": 32, "local_size": 16, "num_local": 1},
}
PARTS = {
    "dino": ("ssl_distill.heads.prototype.PrototypeHead", CROPS),
    "ibot": (
        "ssl_distill.heads.token.TokenHead",
        {
            "class_path": "ssl_distill.augment.masked_crop.MaskedCropAugment",
            "init_args": {"patch_size": 8, "crops": CROPS},
        },
    ),
}


def config_of(layout):
    head, augment = PARTS[layout]
    return {
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "limit_val_batches": 0,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {
            "class_path": f"ssl_distill.methods.{layout}.{layout.upper()}",
            "init_args": {
                "backbone": "vit_nano_patch8_32",
                "backbone_kwargs": {"depth": 1},
                "num_prototypes": 16,
                "head": {"class_path": head, "init_args": {"hidden_dim": 16, "bottleneck_dim": 8}},
                "augment": augment,
                "learning_rate": {"start": 1e-3, "end": 1e-5, "warmup_epochs": 0},
                "freeze_last_layer_epochs": 0,
            },
        },
        "data": {"class_path": "ssl_distill.data.shapes.ShapesData", "init_args": {"num_images": 16, "batch_size": 4}},
        "best_checkpoint": {"monitor": None},
        "run_folder": {"picture_rows": 0},
    }


def official(checkpoint, layout):
    """What the official code would have saved: names, wrapper, options, the shared head twice."""
    branches = {"student": {}, "teacher": {}}
    for name, value in checkpoint["state_dict"].items():
        branch, _, rest = name.partition(".")
        if branch in branches:
            rest = rest.replace("last_layer.weight_g", "last_layer.parametrizations.weight.original0")
            rest = rest.replace("last_layer.weight_v", "last_layer.parametrizations.weight.original1")
            branches[branch][f"module.{rest}" if branch == "student" else rest] = value
    content = {
        **branches,
        "epoch": checkpoint["epoch"],
        "optimizer": {**checkpoint["optimizer_states"][0]},
        "args": argparse.Namespace(arch="vit_nano"),
    }
    state = checkpoint["state_dict"]
    if layout == "dino":
        return content | {"dino_loss": {"center": state["targets.value"]}}
    content["student"]["module.backbone.masked_embed"] = state["mask_token"]
    content["student"] |= {
        name.replace("last_layer.", "last_layer2."): value
        for name, value in content["student"].items()
        if "last_layer." in name
    }
    return content | {
        "ibot_loss": {"center": state["class_center.value"], "center2": state["patch_center.value"][:, None]}
    }


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Makes a run of one epoch, its official form and that one converted."""
    monkeypatch.chdir(tmp_path)

    def make(layout):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config_of(layout)))
        assert main(["fit", "-c", "c.yaml", "--trainer.default_root_dir", "run"]) == 0
        ours = torch.load("run/last.ckpt", weights_only=True)
        torch.save(official(ours, layout), "official.pth")
        arguments = ["official.pth", "--from", layout, "--config", "c.yaml", "--output", "converted.ckpt"]
        assert main(["convert", *arguments]) == 0
        return ours, torch.load("converted.ckpt", weights_only=True)

    return make


def continued(checkpoint, folder):
    arguments = ["--ckpt_path", checkpoint, "--trainer.max_epochs", "2", "--trainer.default_root_dir", folder]
    assert main(["fit", "-c", "c.yaml", *arguments]) == 0
    return torch.load(f"{folder}/last.ckpt", weights_only=True)["state_dict"]


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_dino_run_goes_on_bit_equal(finished):
    ours, converted = finished("dino")
    assert_equal(ours["state_dict"], converted["state_dict"])
    assert (converted["epoch"], converted["global_step"]) == (ours["epoch"], ours["global_step"]) == (1, 4)
    for number, moments in ours["optimizer_states"][0]["state"].items():
        assert_equal(moments, converted["optimizer_states"][0]["state"][number])
    assert_equal(continued("run/last.ckpt", "on"), continued("converted.ckpt", "from_official"))


def test_ibot(finished):
    """Weights, both centers and the mask token; the official order of parameters is another, so moments are not."""
    ours, converted = finished("ibot")
    assert_equal(ours["state_dict"], converted["state_dict"])
    assert converted["epoch"] == 1


def test_another_config_is_refused(finished, capsys):
    finished("dino")
    config = config_of("dino")
    config["model"]["init_args"]["num_prototypes"] = 8
    other = config_of("ibot")
    table = [(config, "has another shape of student.head.last_layer"), (other, "must be of DINO, as the file is, got")]
    for wrong, message in table:
        with open("wrong.yaml", "w") as file:
            yaml.safe_dump(wrong, file)
        arguments = ["official.pth", "--from", "dino", "--config", "wrong.yaml", "--output", "wrong.ckpt"]
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
