"""DINO beats the same network before its first step, on real photographs and on generated shapes."""

import math

import pytest
import torch
from fit_runs import SEEDS
from PIL import Image

from ssl_distill.data.fashion_mnist import FashionMNISTData
from ssl_distill.evaluate.features import Features
from ssl_distill.evaluate.low_shot import LowShot

pytestmark = pytest.mark.slow


def not_collapsed(run, num_prototypes):
    """The teacher's mean output is spread over prototypes; k-NN alone does not tell (docs/evaluation.md)."""
    return run.last("train/health/mean_output_entropy") > 0.5 * math.log(num_prototypes)


@pytest.fixture(scope="module")
def raw_pixels():
    """Low-shot accuracy of raw pixels, on the bank and queries of the runs."""
    data = FashionMNISTData(batch_size=128)
    data.setup("validate")
    banks = []
    for loader in data.val_dataloader():
        batches = list(loader)
        pixels = torch.cat([batch.image[:, 0].flatten(1).float() / 255 for batch in batches])
        labels, index = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("label", "index"))
        banks.append(Features(pixels, labels, index))
    low_shot = LowShot()
    low_shot.update(*banks)
    return float(low_shot.compute()["low_shot_top1"])


@pytest.mark.parametrize("seed", SEEDS)
def test_fashion_mnist(fit, raw_pixels, seed):
    run = fit("dino_fashion_mnist", "dino/fashion_mnist.yaml", seed)
    encoder = run.better()
    assert not_collapsed(run, 1024)
    assert run.gain("knn_top1", encoder) >= 7
    assert run.gain("low_shot_top1", encoder) >= 10
    print(f"\nraw pixels {raw_pixels:.3f}")
    assert run.after(encoder)["low_shot_top1"] > raw_pixels

    before = run.validate("20000_labels_before", None, "--data.init_args.bank_size", "20000")
    after = run.validate("20000_labels_after", "last.ckpt", "--data.init_args.bank_size", "20000")
    gain = 100 * (after[encoder]["linear_top1"] - before[encoder]["linear_top1"])
    print(f"linear on 20,000: {before[encoder]['linear_top1']:.3f} -> {after[encoder]['linear_top1']:.3f}")
    assert gain >= 4


@pytest.mark.parametrize("seed", SEEDS)
def test_moved_fashion_mnist(fit, seed):
    run = fit("dino_fashion_mnist_vit", "dino/fashion_mnist_vit.yaml", seed)
    assert not_collapsed(run, 256)
    assert run.gain("knn_top1", run.better()) >= 12


@pytest.mark.parametrize("seed", SEEDS)
def test_quickstart(fit, seed):
    run = fit("quickstart", "quickstart.yaml", seed)
    encoder = run.better()
    assert not_collapsed(run, 1024)
    assert run.gain("knn_top1", encoder) >= 10
    assert run.gain("linear_top1", encoder) >= 18


@pytest.fixture(scope="module")
def garment_files(tmp_path_factory):
    """Options that name folders with 10,000 photographs and 1,000 others, a folder per class, as they are on disks."""
    root = tmp_path_factory.mktemp("garments")
    data = FashionMNISTData(batch_size=128)
    for name, part, count in (("root", data.parts.bank, 10_000), ("val_root", data.parts.queries, 1000)):
        batch = part.read(range(count))
        for number, (image, label) in enumerate(zip(batch.image, batch.label.tolist(), strict=True)):
            folder = root / name / data.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image[0, 2:30, 2:30].numpy()).save(folder / f"{number:05}.png")  # without the padding
    return [f"--data.init_args.{name}={root / name}" for name in ("root", "val_root")]


@pytest.mark.parametrize("seed", SEEDS)
def test_folder_on_a_cpu(fit, garment_files, seed):
    epochs = ["--trainer.max_epochs", "2", "--trainer.check_val_every_n_epoch", "2"]
    run = fit("dino_folder_cpu", "dino/folder_cpu.yaml", seed, *garment_files, *epochs)
    encoder = run.better()
    assert not_collapsed(run, 1024)
    assert run.gain("knn_top1", encoder) >= 10
    assert run.gain("linear_top1", encoder) >= 10


def test_collapse_is_seen(fit):
    """Negative control: with the center off, the check above fails."""
    center = "ssl_distill.targets.center.Center"
    off = ["--model.init_args.targets", center, "--model.init_args.targets.init_args.momentum", "1.0"]
    run = fit("dino_without_center", "dino/fashion_mnist.yaml", 0, "--trainer.max_epochs", "1", *off)
    assert not not_collapsed(run, 1024)
