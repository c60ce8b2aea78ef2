"""dBOT beats the same encoder before its first step, frozen and fine-tuned."""

import pytest
from fit_runs import SEEDS

from ssl_distill.callbacks.metrics_table import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture
def pretrained(fit, seed):
    return fit("dbot_fashion_mnist", "dbot/fashion_mnist.yaml", seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_two_stages(pretrained, seed):
    """Mean patch token: the encoder's output in this recipe."""
    run = pretrained
    before = run.before("student")
    stages = [entry["scores"]["student"] for entry in run.history if entry["stage"] == "fit"]
    rows = [row for row in read_metrics(run.folder / "metrics.csv") if "train/health/zero_loss" in row]
    last = [[row for row in rows if row["epoch"] == epoch][-1] for epoch in range(len(stages))]
    print(f"\n{seed}: {run.cpu_seconds:.0f} CPU-s")
    for name in ("knn_top1", "low_shot_top1"):
        print(name, *(f"{scores[name]:.3f}" for scores in (before, *stages)))
    print("loss", *(f"{row['train/loss']:.3f} of {row['train/health/zero_loss']:.3f}" for row in last))

    assert len(stages) == 2
    assert all(row["train/loss"] < row["train/health/zero_loss"] for row in last)
    assert all(row["train/health/feature_std"] > 0.1 for row in last)  # predictions differ between tokens
    assert stages[1]["knn_top1"] >= stages[0]["knn_top1"]
    assert run.gain("knn_top1", "student") >= 12
    assert run.gain("low_shot_top1", "student") >= 15


@pytest.mark.parametrize("seed", SEEDS)
def test_fine_tuning(fit, pretrained, seed):
    weights = ["--model.init_args.checkpoint", str(pretrained.folder / "backbone.safetensors")]
    top1 = {}
    for start, arguments in {"pretrained": weights, "random": []}.items():
        run = fit(f"dbot_fine_tune_{start}", "dbot/fine_tune_fashion_mnist.yaml", seed, *arguments)
        top1[start] = run.last("val/top1")
        print(f"\n{seed} fine-tuned from {start} weights: {top1[start]:.3f}, {run.cpu_seconds:.0f} CPU-s", end="")
    print()
    assert 100 * (top1["pretrained"] - top1["random"]) >= 3
