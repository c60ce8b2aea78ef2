"""`ssl-distill export` of a method that trains two models, in every format."""

import pickle
import re
from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from safetensors.torch import load_file
from test_cli import SHAPES, TINY, error_of

from ssl_distill.cli import main
from ssl_distill.export import read_metadata

T_HEAD = {
    "class_path": "ssl_distill.heads.t_head.THead",
    "init_args": {"embed_dim": 16, "depth": 1, "num_heads": 2},
}
COMMON = {
    "head": TINY["model"]["init_args"]["head"],
    "token_head": T_HEAD,
    "learning_rate": {"start": 1e-3, "warmup_epochs": 0},
}
MOKD = {
    "class_path": "ssl_distill.methods.mokd.MOKD",
    "init_args": {
        "first": {"name": "cnn", "backbone": "resnet18", **COMMON},
        "second": {"name": "vit", "backbone": "vit_nano_patch8_32", **COMMON},
        "num_prototypes": 8,
        "augment": TINY["model"]["init_args"]["augment"],
        "reference_batch": None,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run folder of a step of MOKD; tests must not change it."""
    folder = tmp_path_factory.mktemp("mokd")
    trainer = {**TINY["trainer"], "max_epochs": 1, "num_sanity_val_steps": 0}
    data = {"class_path": TINY["data"]["class_path"], "init_args": {**SHAPES, "num_images": 8}}
    (folder / "mokd.yaml").write_text(yaml.safe_dump({**TINY, "trainer": trainer, "model": MOKD, "data": data}))
    assert main(["fit", "-c", str(folder / "mokd.yaml"), "--trainer.default_root_dir", str(folder / "run")]) == 0
    return folder / "run"


def export(run, folder, *options):
    return ["export", str(run / "best.ckpt"), "--output", str(folder), *options]


def test_fit_leaves_a_backbone_of_every_model(run):
    found = {read_metadata(path)["encoder"]: read_metadata(path)["timm_name"] for path in run.glob("*.safetensors")}
    assert [name.removesuffix("_student") for name in sorted(found)] == ["cnn", "vit"]
    assert sorted(found.values()) == ["resnet18", "vit_nano_patch8_32"]
    assert read_metadata(run / "backbone.safetensors")["timm_name"] == "resnet18"


@pytest.mark.parametrize("name", ["cnn", "vit", "cnn_student", "vit_student"])
def test_by_name(run, tmp_path, capsys, name):
    path = tmp_path / "backbone.safetensors"
    assert main(export(run, path, "--encoder", name)) == 0
    assert f"{path}: the {name} of {run / 'best.ckpt'}" in capsys.readouterr().out
    assert read_metadata(path)["encoder"] == name
    state = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    model, _, student = name.partition("_")
    prefix = f"{student or 'teacher'}.{model}.backbone."
    expected = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    torch.testing.assert_close(load_file(path), expected, rtol=0, atol=0)


def test_torchvision(run, tmp_path, capsys):
    path = tmp_path / "backbone.pth"
    assert main(export(run, path, "--encoder", "cnn", "--format", "torchvision")) == 0
    names = {}
    exec(next(line for line in capsys.readouterr().out.splitlines() if "; backbone = " in line), names)
    state = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    expected = state["teacher.cnn.backbone.layer4.1.conv2.weight"]
    torch.testing.assert_close(names["backbone"].layer4[1].conv2.weight.detach(), expected, rtol=0, atol=0)
    weights = torch.load(path, weights_only=True)
    assert torchvision.models.resnet18().load_state_dict(weights, strict=False) == (["fc.weight", "fc.bias"], [])


def test_detectron2(run, tmp_path, capsys):
    path = tmp_path / "backbone.pkl"
    assert main(export(run, path, "--encoder", "cnn", "--format", "detectron2")) == 0
    printed = capsys.readouterr().out
    assert f"MODEL.WEIGHTS: {path}" in printed
    assert "MODEL.RESNETS.RES2_OUT_CHANNELS: 64" in printed
    assert "res5.1.conv2.norm.running_var" in pickle.loads(path.read_bytes())["model"]


def test_the_name_follows_encoder_and_format(run, tmp_path, monkeypatch):
    for file in ("best.ckpt", "config.yaml"):
        (tmp_path / file).symlink_to(run / file)
    monkeypatch.chdir(tmp_path)
    assert main(["export", "best.ckpt", "--encoder", "cnn", "--format", "torchvision"]) == 0
    assert Path("backbone_cnn.pth").exists()


BAD_COMMANDS = [
    ("", "`encoder` must be named, since MOKD trains 2 models: cnn, vit, cnn_student, vit_student"),
    ("--encoder cn", "`encoder` must be one of cnn, vit, cnn_student, vit_student, got cn"),
    ("--encoder vit --format torchvision", r"`encoder` must be one of resnet101, .* got vit_nano_patch8_32, which has"),
    ("--encoder cnn --format detectron2", r"`path` must end in \.pkl"),
    ("--encoder cnn", r"`path` must end in \.safetensors"),
    ("--encoder cnn --format onnx", "argument --format: invalid choice: 'onnx'"),
    ("--config none.yaml", "`--config` none.yaml does not exist"),
]


@pytest.mark.parametrize(("options", "message"), BAD_COMMANDS)
def test_errors(run, tmp_path, capsys, options, message):
    assert re.search(message, error_of(export(run, tmp_path / "backbone.x", *options.split()), capsys))
    assert not list(tmp_path.iterdir())


def test_errors_of_checkpoints(run, tmp_path, capsys):
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    whole = (run / "best.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    assert "cut.ckpt is damaged, perhaps cut off" in error_of(["export", str(tmp_path / "cut.ckpt")], capsys)


def test_errors_of_names(run, capsys):
    """Two models by one name, through the command line."""
    same = ["--model.init_args.second.name", "cnn"]
    message = "`second.name` must differ from `first.name`, got 'cnn' twice"
    assert message in error_of(["fit", "-c", str(run / "config.yaml"), *same], capsys)
