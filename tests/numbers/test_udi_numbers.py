"""UDI beats the same network before its first step, beside DINO with as many steps."""

import math

import pytest
from fit_runs import SEEDS

pytestmark = pytest.mark.slow

EPOCHS = 1
NUM_PROTOTYPES = 256


@pytest.mark.parametrize("seed", SEEDS)
def test_moved_fashion_mnist(fit, seed):
    runs = {
        method: fit(
            f"{method}_fashion_mnist_vit_{EPOCHS}_epoch",
            f"{method}/fashion_mnist_vit.yaml",
            seed,
            "--trainer.max_epochs",
            str(EPOCHS),
        )
        for method in ("udi", "dino")
    }
    for method, run in runs.items():
        encoder = run.better()
        before, after = run.before(encoder), run.after(encoder)
        scores = ", ".join(f"{name} {before[name]:.3f} -> {after[name]:.3f}" for name in ("knn_top1", "low_shot_top1"))
        entropy = run.last("train/health/mean_output_entropy")
        print(f"\n{method} {seed} {encoder}: {scores}, mean output {entropy:.2f} nats, {run.cpu_seconds:.0f} CPU-s")
        assert entropy > 0.5 * math.log(NUM_PROTOTYPES)  # k-NN alone does not tell a collapse (docs/evaluation.md)
    assert runs["udi"].gain("knn_top1", runs["udi"].better()) >= 8
