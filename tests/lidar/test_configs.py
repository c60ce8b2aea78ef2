"""Every recipe of configs/scalr trains a little, on tiny trees in the layout of the real data."""

import json
from pathlib import Path

import pytest
import torch
from lidar_trees import write_nuscenes, write_semantic_kitti

from ssl_distill.callbacks.metrics_file import read_metrics
from ssl_distill.cli import main
from ssl_distill.export import export_backbone, read_metadata
from ssl_distill.lidar.street import render_scene
from ssl_distill.lidar.waffleiron import WaffleIron

pytestmark = pytest.mark.filterwarnings("ignore:`learning_rate` warms up")  # runs of one step

CONFIGS = Path(__file__).parents[2] / "configs/scalr"
ONE_STEP = {"max_steps": 1, "accelerator": "cpu", "devices": 1, "sync_batchnorm": "false"}
QUIET = {"enable_progress_bar": "false", "enable_model_summary": "false", "log_every_n_steps": 1}
SMALL = {
    "teacher": "ssl_distill.lidar.teachers.PatchStats",
    "teacher.init_args.patch_size": 14,
    "backbone": "ssl_distill.lidar.waffleiron.WaffleIron",
    "backbone.init_args.channels": 8,
    "backbone.init_args.depth": 2,
    "evaluation": "ssl_distill.lidar.point_evaluation.PointEvaluation",
    "evaluation.init_args.steps": 5,
    "evaluation.init_args.points_per_step": 256,
    "evaluation.init_args.calibration_batches": 1,
}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    """A folder with `data/nuscenes` and `data/semantickitti`."""
    root = tmp_path_factory.mktemp("trees")
    frames = [render_scene(0, i, (0, 90)).frame for i in range(4)]
    write_nuscenes(root / "data/nuscenes", frames, scenes=("scene-0061", "scene-0103"))
    write_semantic_kitti(root / "data/semantickitti", frames[:2])
    write_semantic_kitti(root / "data/semantickitti", frames[2:], sequence="08")
    return root


def fit(names, run, model, data, **trainer):
    """Run the command; options of its sections by their names in the section."""
    args = [word for name in names for word in ("-c", str(CONFIGS / f"{name}.yaml"))]
    for section, values in (
        ("trainer", {**ONE_STEP, **QUIET, **trainer, "default_root_dir": run}),
        ("model.init_args", model),
        ("data.init_args", {"num_workers": 0, "batch_size": 1, **data}),
    ):
        args += [word for key, value in values.items() for word in (f"--{section}.{key}", str(value))]
    assert main(["fit", *args]) == 0


def members(trees):
    """Both data sets, as the command takes them."""
    nuscenes = {"root": str(trees / "data/nuscenes"), "version": "v1.0-mini"}
    kitti = {"root": str(trees / "data/semantickitti")}
    return json.dumps(
        [
            {"class_path": "ssl_distill.lidar.nuscenes_data.NuScenesData", "init_args": nuscenes},
            {"class_path": "ssl_distill.lidar.kitti_data.SemanticKITTIData", "init_args": kitti},
        ]
    )


@pytest.mark.parametrize(
    "names",
    [["nuscenes_vitl14"], ["semantickitti_vitl14"], ["mix"], ["nuscenes_vitl14", "scalr_plus"]],
    ids=lambda names: "+".join(names),
)
def test_pretraining(names, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))
    data = {"root": trees / "data" / names[0].split("_")[0]}
    if names[0] == "nuscenes_vitl14":
        data["version"] = "v1.0-mini"
    if names[0] == "mix":
        data = {"members": members(trees)}
    fit(names, tmp_path / "run", SMALL, data)
    (loss,) = [row["train/loss"] for row in read_metrics(tmp_path / "run/metrics.csv") if "train/loss" in row]
    assert 0 < loss < 2
    last = json.loads((tmp_path / "run/evaluation.json").read_text())[-1]
    assert last["step"] == 1
    assert 0 < last["scores"]["lidar"]["linear_miou"] < 1
    exported = read_metadata(tmp_path / "run/backbone.safetensors")["timm_kwargs"]
    assert exported["channels"] == 8
    assert exported["activation"].endswith("GELU" if "scalr_plus" in names else "ReLU")


@pytest.mark.parametrize(
    "name", sorted(path.stem for kind in ("probe", "finetune") for path in CONFIGS.glob(f"{kind}_*"))
)
def test_probing_and_finetuning(name, trees, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_DISTILL_CACHE", str(tmp_path / "cache"))
    torch.manual_seed(0)
    dataset = name.split("_")[1]
    grids, data = ((256, 256), (256, 32), (256, 32)), {"root": trees / "data" / dataset}
    if dataset == "nuscenes":
        data["version"] = "v1.0-mini"
    if dataset == "synthstreet":
        grids, data = ((64, 64), (64, 24), (64, 24)), {"num_scenes": 2, "query_size": 1}
    export_backbone(WaffleIron(grids, 8, 2), tmp_path / "backbone.safetensors")
    one_epoch = {"max_steps": -1, "max_epochs": 1, "check_val_every_n_epoch": 1}
    fit([name], tmp_path / "run", {"backbone": tmp_path / "backbone.safetensors"}, data, **one_epoch)
    scores = [row["val/miou"] for row in read_metrics(tmp_path / "run/metrics.csv") if "val/miou" in row]
    assert len(scores) == 1
    assert 0 < scores[0] < 1
