"""DINO at batch 16 with a fast teacher collapses; with an entropy term it does not."""

import math

import pytest
from fit_runs import SEEDS

pytestmark = pytest.mark.slow

COLLAPSED_BELOW = 0.5 * math.log(256)  # nats of the teacher's mean output, as for all recipes


@pytest.mark.parametrize("seed", SEEDS)
def test_small_batch(fit, seed):
    config = "dino/fashion_mnist_batch16.yaml"
    without = fit("dino_batch16", config, seed)
    with_entropy = fit("dino_batch16_entropy", config, seed, "-c", "configs/dino/entropy.yaml")
    spreads = [run.last("train/health/mean_output_entropy") for run in (without, with_entropy)]
    print()
    for name, run, spread in zip(("without", "with"), (without, with_entropy), spreads, strict=True):
        knn = [100 * scores("student")["knn_top1"] for scores in (run.before, run.after)]
        print(f"{name}: k-NN of the student {knn[0]:.1f} -> {knn[1]:.1f}, mean output entropy {spread:.2f} nats")
    assert spreads[0] < COLLAPSED_BELOW < spreads[1]
    assert with_entropy.after("student")["knn_top1"] > without.after("student")["knn_top1"]
