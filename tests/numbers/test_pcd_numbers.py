"""A student taught place by place is read, and fine-tuned, better than one taught by whole images or not at all."""

import pytest
from fit_runs import SEEDS
from lightning.pytorch import seed_everything

from ssl_distill.backbones.create import create_backbone
from ssl_distill.export import export_backbone, read_metadata

pytestmark = pytest.mark.slow


@pytest.fixture
def backbones(fit, request):
    """Exported students of one seed, by how they were taught: `places`, `images` (mean-pooled pairs), `nothing`."""
    seed = request.param
    teacher = fit("dino_fashion_mnist", "dino/fashion_mnist.yaml", seed).folder / "last.ckpt"
    given = ["--model.init_args.teacher", str(teacher)]
    places = fit("pcd_places", "pcd/fashion_collages.yaml", seed, *given)
    # On a grid of one place both maps are their means, and a pair is a pair of images.
    images = fit("pcd_images", "pcd/fashion_collages.yaml", seed, *given, "--model.init_args.grid", "1")
    files = {name: run.folder / "backbone.safetensors" for name, run in {"places": places, "images": images}.items()}
    assert places.last("train/health/feature_std") > 0.3  # 0 is one feature for all places, 1 is spread over the sphere

    known = read_metadata(files["places"])
    files["nothing"] = fit.root / f"pcd_nothing_{seed}.safetensors"
    seed_everything(seed)
    random = create_backbone(known["timm_name"], **known["timm_kwargs"])
    export_backbone(random, files["nothing"], {"mean": known["mean"], "std": known["std"]})
    return seed, files


@pytest.mark.parametrize("backbones", SEEDS, indirect=True)
def test_dense_probe(fit, backbones):
    seed, files = backbones
    miou = {}
    for name, file in files.items():
        run = fit(f"pcd_probe_{name}", "pcd/dense_probe_collages.yaml", seed, "--model.init_args.encoder", str(file))
        miou[name] = 100 * run.last("dense_probe/miou")
    print(f"\nseed {seed}: mIoU", {name: round(value, 1) for name, value in miou.items()})
    assert miou["places"] >= miou["nothing"] + 8
    assert miou["places"] > miou["images"]


@pytest.mark.parametrize("backbones", SEEDS, indirect=True)
def test_detector(fit, backbones):
    pytest.importorskip("pycocotools")
    seed, files = backbones
    runs = {}
    for name in ("places", "nothing"):
        given = ["--model.init_args.detector.init_args.path_or_name", str(files[name])]
        runs[name] = fit(f"pcd_detector_{name}", "pcd/detect_collages.yaml", seed, *given)
    for key in ("detection/ap", "detection/ap50"):
        print(f"\nseed {seed}: {key}", {name: round(100 * run.last(key), 1) for name, run in runs.items()})
    assert runs["places"].last("detection/ap") > runs["nothing"].last("detection/ap")
