"""ScaLR's lidar network tells classes better than before its first step, and than one that learnt mixed-up pairs."""

import pytest
from fit_runs import SEEDS

pytestmark = pytest.mark.slow

CONFIG = "scalr/synthstreet.yaml"
MIXED_UP = ("--model.init_args.distance", "ssl_distill.losses.point_distance.shuffled_point_distance")
FASTER = ("--model.init_args.learning_rate", "{start: 5.0e-3, end: 1.0e-5, warmup_epochs: 1}")


def not_collapsed(run):
    """Points still differ from each other: 0 is one feature for all, 1 is spread over the sphere."""
    return run.last("train/health/feature_std") > 0.3


@pytest.mark.parametrize("seed", SEEDS)
def test_synthstreet(fit, seed):
    run = fit("scalr_synthstreet", CONFIG, seed)
    assert not_collapsed(run)
    assert run.gain("linear_miou", "lidar") >= 12

    control = fit("scalr_synthstreet_shuffled", CONFIG, seed, *MIXED_UP)
    assert control.before("lidar") == run.before("lidar")
    assert 100 * (run.after("lidar")["linear_miou"] - control.after("lidar")["linear_miou"]) >= 10


@pytest.mark.parametrize("seed", SEEDS)
def test_synthstreet_in_200_steps(fit, seed):
    run = fit("scalr_synthstreet_short", CONFIG, seed, "--trainer.max_steps", "200", *FASTER)
    assert not_collapsed(run)
    assert run.gain("linear_miou", "lidar") >= 5
