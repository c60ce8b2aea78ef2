"""Two networks that teach each other beat themselves before the first step; beside them, each trained alone."""

import math

import pytest
import yaml
from fit_runs import REPOSITORY, SEEDS

pytestmark = pytest.mark.slow

CONFIG = "mokd/fashion_mnist.yaml"
RECIPE = yaml.safe_load((REPOSITORY / "configs" / CONFIG).read_text())
MOKD = RECIPE["model"]["init_args"]
LEARNERS = {learner["name"]: learner for learner in (MOKD["first"], MOKD["second"])}
OF_LEARNER = ("backbone", "drop_path_rate", "head", "learning_rate", "weight_decay", "teacher_temperature")
OF_BOTH = ("num_prototypes", "augment", "reference_batch", "momentum", "freeze_last_layer_epochs")
LARGEST_ENTROPY = math.log(MOKD["num_prototypes"])


def collapsed(run, name):
    """Whether a teacher's head has one output for all images: few prototypes on average, or uniform for each image."""
    mean_output, of_image = (run.last(f"train/health/{name}_{of}_entropy") for of in ("mean_output", "teacher"))
    return mean_output < 0.5 * LARGEST_ENTROPY or not 0.1 * LARGEST_ENTROPY < of_image < 0.9 * LARGEST_ENTROPY


def alone(fit, name, seed):
    """DINO with one of the networks: same data, crops, head, optimiser and number of steps."""
    arguments = {key: LEARNERS[name][key] for key in OF_LEARNER} | {key: MOKD[key] for key in OF_BOTH}
    recipe = {
        "trainer": {key: value for key, value in RECIPE["trainer"].items() if key != "default_root_dir"},
        "model": {"class_path": "ssl_distill.methods.dino.DINO", "init_args": arguments},
        "data": RECIPE["data"],
    }
    path = fit.root / f"dino_{name}_alone.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return fit(f"dino_{name}_alone", "dino/fashion_mnist.yaml", seed, "-c", str(path))


@pytest.mark.parametrize("seed", SEEDS)
def test_fashion_mnist(fit, seed):
    run = fit("mokd_fashion_mnist", CONFIG, seed)
    for name in LEARNERS:
        assert not collapsed(run, name)
        assert run.gain("low_shot_top1", name) >= 5


@pytest.mark.parametrize("seed", SEEDS)
def test_beside_dino(fit, seed):
    """What the partner is worth is reported, not promised: neither falls far behind the same network alone."""
    run = fit("mokd_fashion_mnist", CONFIG, seed)
    for name in LEARNERS:
        single = alone(fit, name, seed)
        assert run.history[-1]["step"] == single.history[-1]["step"]
        for ours, theirs in ((name, "teacher"), (f"{name}_student", "student")):
            for score in ("low_shot_top1", "knn_top1", "linear_top1"):
                print(f"\n{ours} {score} {run.after(ours)[score]:.3f}, alone {single.after(theirs)[score]:.3f}", end="")
        assert run.after(name)["low_shot_top1"] >= single.after("teacher")["low_shot_top1"] - 0.05


def test_validate_gives_the_same_numbers(fit):
    run = fit("mokd_fashion_mnist", CONFIG, 0)
    again = run.validate("again", "last.ckpt")
    assert again == {name: run.after(name) for name in again}
    assert list(again) == ["cnn", "vit", "cnn_student", "vit_student"]


def test_collapse_is_seen(fit):
    """Negative control: with the centers off, the check above fails."""
    off = [
        "--model.init_args.targets",
        "ssl_distill.targets.center.Center",
        "--model.init_args.targets.momentum",
        "1.0",
    ]
    run = fit("mokd_without_centers", CONFIG, 0, "--trainer.max_steps", "200", *off)
    assert all(collapsed(run, name) for name in LEARNERS)
