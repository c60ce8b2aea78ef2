"""ODIS and its parts against iBOT at equal steps: objects told apart by their features, with and without masks."""

import math

import pytest
from fit_runs import SEEDS

pytestmark = pytest.mark.slow

AUGMENT = "--model.init_args.augment.init_args"
VARIANTS = {
    "ibot": (),
    "mask_only": (f"{AUGMENT}.min_visible=0", f"{AUGMENT}.min_coverage=0"),
    "crop_only": (
        f"{AUGMENT}.objects=ssl_distill.augment.objects.MaskObjects",
        f"{AUGMENT}.objects.init_args.threshold=-1",
    ),
    "odis": (),
}


@pytest.fixture(scope="module")
def run_of(fit):
    """`run_of(data, variant, seed)`: a run that kept its outputs apart."""

    def run(data, variant, seed):
        method = "ibot" if variant == "ibot" else "odis"
        run = fit(f"{variant}_{data}", f"{method}/{data}.yaml", seed, *VARIANTS[variant])
        assert run.last("train/health/mean_output_entropy") > 0.5 * math.log(256)
        return run

    return run


def row(run):
    """Object k-NN in percent: the better encoder's, and the same network's before the first step."""
    encoder = run.better("knn_top1_masked")
    return {
        f"{name} {when}": 100 * scores[f"knn_top1_{name}"]
        for when, scores in (("before", run.before(encoder)), ("after", run.after(encoder)))
        for name in ("masked", "unmasked")
    }


def show(variant, seed, scores, run):
    values = ", ".join(f"{name} {value:.1f}" for name, value in scores.items())
    print(f"\n{variant} seed {seed}: {values}; {run.cpu_seconds:.0f} CPU-s")


@pytest.mark.parametrize("data", ["fashion_collages", "shapes"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_learns(run_of, data, variant, seed):
    run = run_of(data, variant, seed)
    scores = row(run)
    show(variant, seed, scores, run)
    if variant == "odis":
        assert scores["masked after"] > scores["masked before"]


@pytest.mark.parametrize("seed", SEEDS)
def test_odis_beats_ibot_on_collages(run_of, seed):
    odis, ibot = (row(run_of("fashion_collages", variant, seed)) for variant in ("odis", "ibot"))
    assert odis["masked after"] >= ibot["masked after"] + 3
