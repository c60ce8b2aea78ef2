"""State dicts in the official layouts, with random weights, and what `ssl-distill convert` makes of them."""

import argparse
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ssl_distill.backbones.create import create_backbone
from ssl_distill.cli import main
from ssl_distill.commands.convert import _LAYOUTS
from ssl_distill.convert_layouts import LAYOUTS, read_official
from ssl_distill.export import load_backbone, read_metadata
from ssl_distill.lidar.official import load_waffleiron
from ssl_distill.lidar.waffleiron import WaffleIron

HEAD = {"mlp.0.weight": torch.randn(4, 4), "last_layer.weight_g": torch.ones(8, 1)}


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


def randomised(network):
    """Weights and statistics that differ from fresh ones everywhere."""
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.5)
    return network.eval()


def vit(**kwargs):
    return randomised(create_backbone("vit_tiny_patch16_224", "dino_v1", img_size=32, **kwargs))


def pooled_vit():
    """As dBOT's classifiers read it."""
    return randomised(create_backbone("vit_tiny_patch16_224", "size", img_size=32, global_pool="avg", fc_norm=False))


def resnet(name="resnet18"):
    return randomised(create_backbone(name))


def two_token_state(network):
    """UDI keeps both class tokens in one parameter."""
    state = dict(network.state_dict())
    state["cls_token"] = torch.cat([state["cls_token"], state.pop("reg_token")], dim=1)
    return state


def dino(teacher, student):
    heads = prefixed("head.", HEAD)
    return {
        "student": prefixed("module.", prefixed("backbone.", student) | heads),
        "teacher": prefixed("backbone.", teacher) | heads,
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=16, local_crops_scale=(0.05, 0.4)),
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def ibot(teacher, student):
    content = dino(teacher, student)
    content["student"]["module.backbone.masked_embed"] = torch.zeros(1, 192)
    return content


def udi(teacher, student):
    srs = {"srs.norm1.weight": torch.ones(192), "srs.attn.qkv.weight": torch.ones(576, 192)}
    return {
        name: prefixed("module.vit.", state) | prefixed("module.", srs) | prefixed("module.head.", HEAD)
        for name, state in {"teacher": teacher, "student": student}.items()
    }


def dbot(teacher, student):
    decoder = {"mask_token": torch.zeros(1, 1, 8), "decoder_pos_embed": torch.zeros(1, 5, 8)}
    return {"model": student | decoder | {"decoder_blocks.0.norm1.weight": torch.ones(8)}, "epoch": 7}


def pcd(teacher, student):
    attention = prefixed("module.student.1.", {"attention.weight": torch.ones(2, 2)})
    teacher = prefixed("module.teacher.0.", teacher) | {"module.queue": torch.zeros(4, 8)}
    return {"epoch": 1, "state_dict": prefixed("module.student.0.", student) | attention | teacher}


CASES = {
    "dino": (dino, vit, vit),
    "ibot": (ibot, vit, vit),
    "udi": (udi, lambda: vit(num_class_tokens=2), lambda: vit(num_class_tokens=2)),
    "dbot": (dbot, pooled_vit, pooled_vit),
    "pcd": (pcd, lambda: resnet("resnet34"), resnet),
}
STUDENTS = ("dbot", "pcd")  # whose headline is the student


def official_file(folder, layout, teacher, student):
    states = [
        two_token_state(network) if layout == "udi" else dict(network.state_dict()) for network in (teacher, student)
    ]
    path = folder / f"{layout}.pth"
    torch.save(CASES[layout][0](*states), path)
    return path


def converted(path, layout, *arguments):
    output = path.with_name("backbone.safetensors")
    assert main(["convert", str(path), "--from", layout, *arguments]) == 0
    return output


def assert_same(backbone, network, size=32):
    for name, value in network.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    images = torch.randn(2, 3, size, size)
    assert torch.equal(backbone(images), network(images))


@pytest.mark.parametrize("layout", CASES)
def test_round_trip_is_exact(tmp_path, capsys, layout):
    teacher, student = (make() for make in CASES[layout][1:])
    path = official_file(tmp_path, layout, teacher, student)
    output = converted(path, layout)
    headline = "student" if layout in STUDENTS else "teacher"
    assert_same(load_backbone(output), student if layout in STUDENTS else teacher)
    metadata = read_metadata(output)
    assert metadata["encoder"] == headline
    assert metadata["method"].rpartition(".")[2].lower() == layout
    assert metadata["converted_from"] == {"file": path.name, "layout": layout}
    assert f"the {headline} of {path}" in capsys.readouterr().out
    if layout not in STUDENTS:
        assert_same(load_backbone(converted(path, layout, "--encoder", "student")), student)


def test_two_models_of_mokd(tmp_path):
    networks = {"cnn": resnet("resnet50"), "vit": vit(), "cnn_student": resnet("resnet50"), "vit_student": vit()}
    entries = {"teacher_a": "cnn", "teacher_b": "vit", "student_a": "cnn_student", "student_b": "vit_student"}
    heads = prefixed("module.head.", HEAD) | {"module.transhead.pos_embed": torch.zeros(1, 4, 192)}
    path = tmp_path / "mokd.pth"
    content = {
        entry: prefixed("module.backbone.", networks[name].state_dict()) | heads for entry, name in entries.items()
    }
    torch.save(content, path)
    assert_same(load_backbone(converted(path, "mokd")), networks["cnn"])
    for name in ("vit", "cnn_student", "vit_student"):
        assert_same(load_backbone(converted(path, "mokd", "--encoder", name)), networks[name])


@pytest.mark.parametrize("entry", ["model_point", "model_points", "net"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d])
def test_scalr(tmp_path, entry, norm):
    network = randomised(WaffleIron(channels=8, depth=2, norm=norm, activation=nn.GELU))
    state = prefixed("module.", {their_name(name): value for name, value in network.state_dict().items()})
    state |= {"module.classif.0.weight": torch.zeros(4, 8), "module.classif.2.weight": torch.zeros(4, 4)}
    path = tmp_path / "scalr.pth"
    torch.save({entry: state, "optim": {}, "epoch": 2}, path)
    backbone = load_waffleiron(converted(path, "scalr"))
    for name, value in network.state_dict().items():
        assert torch.equal(backbone.state_dict()[name], value), name
    assert backbone.timm_kwargs == {**network.timm_kwargs, "grids": [list(grid) for grid in network.grids]} or (
        backbone.timm_kwargs == network.timm_kwargs
    )


def their_name(name):
    """WaffleIron's published names."""
    for ours, theirs in {
        "embedding.norm.": "embed.norm.",
        "embedding.point.": "embed.conv1.",
        "embedding.neighbor.": "embed.conv2.",
        "embedding.merge.": "embed.final.",
    }.items():
        name = name.replace(ours, theirs)
    if name.startswith("layers."):
        _, depth, mixer, rest = name.split(".", 3)
        rest = f"ffn.{rest.removeprefix('convs.')}" if rest.startswith("convs.") else rest
        name = f"waffleiron.{mixer}_mix.{depth}.{'scale.weight' if rest == 'scale' else rest}"
    return name


def test_published_backbones_alone(tmp_path):
    """What most authors publish: the backbone's weights and nothing else."""
    network = vit()
    path = tmp_path / "pretrain.pth"
    torch.save(network.state_dict(), path)
    for layout in ("dino", "ibot"):
        assert_same(load_backbone(converted(path, layout)), network)
    convnet = resnet("resnet50")
    torch.save({f"module.{name}": value for name, value in convnet.state_dict().items() if "num_b" not in name}, path)
    assert_same(load_backbone(converted(path, "dino")), convnet)  # old files have no counters
    save_file(network.state_dict(), tmp_path / "pretrain.safetensors")
    assert_same(load_backbone(converted(tmp_path / "pretrain.safetensors", "dino")), network)


def test_other_image_and_patch_sizes_are_seen(tmp_path):
    network = randomised(create_backbone("vit_tiny_patch16_224", "dino_v1", patch_size=8))
    path = official_file(tmp_path, "dino", network, network)
    output = converted(path, "dino")
    assert read_metadata(output)["timm_kwargs"] == {"patch_size": 8}
    assert read_metadata(output)["position_mode"] == "dino_v1"
    assert_same(load_backbone(output), network, size=48)


def test_unknown_architectures_are_named_by_the_user(tmp_path, capsys):
    network = randomised(create_backbone("vit_nano_patch8_32", "dino_v1"))
    path = official_file(tmp_path, "dino", network, network)
    assert main(["convert", str(path), "--from", "dino"]) == 2
    assert "`--backbone` must be given: no known ViT has width 64, depth 3 and patches of 8" in capsys.readouterr().err
    assert_same(load_backbone(converted(path, "dino", "--backbone", "vit_nano_patch8_32")), network)
    by_kwargs = converted(
        path,
        "dino",
        "--backbone",
        "vit_micro_patch4_32",
        "--backbone_kwargs",
        '{"embed_dim": 64, "depth": 3, "patch_size": 8}',
    )
    assert_same(load_backbone(by_kwargs), network)


class Harmless:
    """Any class that is not on the list."""


def test_nothing_but_options_is_unpickled(tmp_path):
    content = {"args": argparse.Namespace(lr=1.0), "model": {"w": torch.ones(1)}}
    torch.save(content, tmp_path / "options.pth")
    assert read_official(tmp_path / "options.pth")["args"].lr == 1.0
    assert argparse.Namespace not in torch.serialization.get_safe_globals()  # allowed for this file, not for all
    torch.save({"model": {}, "args": Harmless()}, tmp_path / "class.pth")
    with pytest.raises(ValueError, match=r"holds a \S*Harmless, which is not loaded because it might run code"):
        read_official(tmp_path / "class.pth")


def test_errors(tmp_path, capsys):
    network, convnet = vit(), resnet()
    good = official_file(tmp_path, "dino", network, network)
    masked = official_file(tmp_path, "ibot", network, network)
    pixels = official_file(tmp_path, "pcd", convnet, convnet)
    cut, lacking, empty, bare = (tmp_path / f"{name}.pth" for name in ("cut", "lacking", "empty", "bare"))
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    state = dict(network.state_dict())
    del state["blocks.3.attn.qkv.weight"], state["norm.bias"]
    torch.save({"teacher": state}, lacking)
    torch.save({"epoch": 3}, empty)
    torch.save(convnet.state_dict(), bare)
    config = tmp_path / "c.yaml"
    table = [
        (
            [masked, "--from", "dino"],
            "but .* looks like ibot, for it has module.backbone.masked_embed; try --from ibot",
        ),
        ([pixels, "--from", "udi"], r"looks like pcd, for it has module.student.0.\S+; try --from pcd"),
        ([good, "--from", "scalr"], r"looks like dino, for it has module.head\S+; try --from dino"),
        ([bare, "--from", "udi"], "it has a ResNet and nothing of udi; try --from dino or mokd or pcd"),
        ([cut, "--from", "dino"], "cut.pth is damaged, perhaps cut off"),
        ([tmp_path / "none.pth", "--from", "dino"], "none.pth does not exist"),
        ([lacking, "--from", "dino"], "it lacks blocks.3.attn.qkv.weight, norm.bias"),
        ([empty, "--from", "dino"], "holds no network that is known: no weight is named patch_embed.proj.weight"),
        ([good, "--from", "dino", "--encoder", "cnn"], "`--encoder` must be one of teacher, student for dino, got cnn"),
        ([lacking, "--from", "dino", "--encoder", "student"], "must hold one student, found 0 among: ViT at teacher: "),
        ([good, "--from", "dino", "--backbone", "vit_tini_patch16_224"], "did you mean vit_tiny_patch16_224"),
        ([good, "--from", "dino", "--backbone_kwargs", "{"], "`--backbone_kwargs` must be JSON"),
        ([good, "--from", "dino", "--backbone_kwargs", "[1]"], "must be a JSON object"),
        ([good, "--from", "dion"], "invalid choice: 'dion'"),
        ([good], "the following arguments are required: --from"),
        ([good, "--from", "dino", "--output", "b.pt"], "`--output` must end in .safetensors or .ckpt, got b.pt"),
        ([good, "--from", "dino", "--output", "b.ckpt"], "must be given together"),
        ([good, "--from", "dino", "--config", config], "must be given together"),
        ([pixels, "--from", "pcd", "--output", "b.ckpt", "--config", config], "must end in .safetensors for pcd"),
        ([lacking, "--from", "dino", "--output", "b.ckpt", "--config", config], "has no entry student"),
    ]
    for arguments, message in table:
        assert main(["convert", *map(str, arguments)]) == 2, arguments
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(error)


def test_every_layout_can_be_chosen():
    assert set(_LAYOUTS) == set(LAYOUTS)


def test_help_imports_nothing_heavy():
    code = "import sys; from ssl_distill.cli import main\ntry: main(['convert', '--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'timm', 'lightning'} & set(sys.modules), 'heavy'"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "--from {dino,ibot,udi,dbot,mokd,pcd,scalr}" in shown
