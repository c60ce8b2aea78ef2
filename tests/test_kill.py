"""A run whose process is killed goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

CONFIG = """
seed_everything: 3
trainer: {accelerator: cpu, max_epochs: 2, limit_val_batches: 0, log_every_n_steps: 1, enable_progress_bar: false}
run_folder: {picture_rows: 0}
model:
  class_path: ssl_distill.methods.dino.DINO
  init_args:
    backbone: vit_nano_patch8_32
    num_prototypes: 64
    head:
      class_path: ssl_distill.heads.prototype.PrototypeHead
      init_args: {hidden_dim: 32, bottleneck_dim: 16, norm: {class_path: torch.nn.BatchNorm1d}}
    augment:
      class_path: ssl_distill.augment.multi_crop.MultiCropAugment
      init_args: {global_size: 32, local_size: 16, num_local: 2}
    learning_rate: {start: 1.0e-3, end: 1.0e-5, warmup_epochs: 1}
data:
  class_path: ssl_distill.data.shapes.ShapesData
  init_args: {num_images: 640, batch_size: 16, bank_size: 20, query_size: 10}
last_checkpoint: {every_n_train_steps: 1}
"""


# Twice 12 batches of the recipes' own size, with a checkpoint after each.
SHORT = ["--trainer.max_epochs", "2", "--trainer.limit_train_batches", "12", "--trainer.limit_val_batches", "0"]
SHORT += ["--trainer.enable_progress_bar", "false", "--run_folder.picture_rows", "0"]
SHORT += ["--last_checkpoint.every_n_train_steps", "1"]


def fit(folder, *arguments):
    """The command and how it is run."""
    command = [sys.executable, "-m", "ssl_distill.cli", "fit", *arguments, "--trainer.default_root_dir", str(folder)]
    return command, {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "stderr": subprocess.DEVNULL}


def run(folder, *arguments):
    command, options = fit(folder, *arguments)
    subprocess.run(command, check=True, timeout=300, **options)


def weights(folder):
    return torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]


def assert_killed_run_ends_bit_equal(tmp_path, arguments):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, *arguments)

    command, options = fit(killed, *arguments)
    process = subprocess.Popen(command, **options)
    deadline = time.monotonic() + 200
    while not (killed / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # some steps on, perhaps in the middle of a checkpoint
    assert process.poll() is None, "the run ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = torch.load(killed / "last.ckpt", weights_only=True)["global_step"]
    last = torch.load(whole / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < last

    run(killed, *arguments, "--ckpt_path", "last")
    expected, resumed = weights(whole), weights(killed)
    different = [name for name, value in expected.items() if not torch.equal(value, resumed[name])]
    assert not different, f"killed after step {step} of {last}: {different[:3]}"
    assert not list(tmp_path.glob("killed-*"))


@pytest.mark.parametrize("workers", ["0", "2"])
def test_killed_run_ends_bit_equal(workers, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    assert_killed_run_ends_bit_equal(tmp_path, ["-c", str(config), "--data.init_args.num_workers", workers])


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe",
    [
        "dino/fashion_mnist_vit",
        "random_teacher/fashion_mnist",
        "ibot/fashion_collages",
        "odis/fashion_collages",
        "udi/fashion_mnist_vit",
        "dbot/fashion_mnist",
        "mokd/fashion_mnist",
        "pcd/fashion_collages",
        "scalr/synthstreet",
    ],
)
def test_killed_recipe_ends_bit_equal(recipe, tmp_path):
    """Every method, with two workers."""
    given = ["-c", f"configs/{recipe}.yaml", "--data.init_args.num_workers", "2", *SHORT]
    if recipe.startswith("pcd"):
        teacher = tmp_path / "teacher"
        run(teacher, "-c", "configs/dino/fashion_mnist.yaml", *SHORT)
        given += ["--model.init_args.teacher", str(teacher / "last.ckpt")]
    assert_killed_run_ends_bit_equal(tmp_path, given)
