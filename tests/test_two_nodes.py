"""Two machines, here two network namespaces with a cable between them, train as one process does."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ssl_distill.cli import main

ROOT = Path(__file__).parent.parent
ADDRESSES = ("10.83.71.1", "10.83.71.2")
CONFIG = """
seed_everything: 3
trainer: {max_epochs: 1, limit_val_batches: 0, log_every_n_steps: 1, enable_progress_bar: false, precision: 64-true}
run_folder: {picture_rows: 0}
last_checkpoint: {every_n_train_steps: 1}
model:
  class_path: ssl_distill.methods.dino.DINO
  init_args:
    backbone: vit_nano_patch8_32
    drop_path_rate: 0.0
    num_prototypes: 64
    head: {class_path: ssl_distill.heads.prototype.PrototypeHead, init_args: {hidden_dim: 32, bottleneck_dim: 16}}
    augment:
      class_path: ssl_distill.augment.multi_crop.MultiCropAugment
      init_args: {global_size: 32, local_size: 16, num_local: 1}
    learning_rate: {start: 1.0e-3, end: 1.0e-5, warmup_epochs: 0}
    freeze_last_layer_epochs: 0
data:
  class_path: ssl_distill.data.shapes.ShapesData
  init_args: {num_images: 320, bank_size: 20, query_size: 10}
"""


def ip(*words):
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def nodes():
    """Names of two namespaces, joined by a pair of virtual network cards of the same names."""
    names = [f"sd{os.getpid()}{side}" for side in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", names[0], "netns", names[0], "type", "veth", "peer", "name", names[1], "netns", names[1])
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", name)
            for card in ("lo", name):
                ip("-n", name, "link", "set", card, "up")
        yield names
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', None) or error}")
    finally:
        for name in names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                kill(name)
                ip("netns", "delete", name)


def kill(node):
    """The power cable is pulled: all processes of a namespace end at once."""
    for process in ip("netns", "pids", node).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(process), signal.SIGKILL)


def start(nodes, config, folder, *more):
    """torchrun on each node, with static rendezvous on the first."""
    processes = []
    for rank, node in enumerate(nodes):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
        torchrun += ["--node-rank", str(rank), "--master-addr", ADDRESSES[0], "--master-port", "29517"]
        fit = ["-m", "ssl_distill.cli", "fit", "-c", str(config), "-c", str(ROOT / "configs/trainer/ddp_nodes.yaml")]
        options = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.precision", "64-true"]
        options += ["--trainer.sync_batchnorm", "false", "--trainer.default_root_dir", str(folder)]
        options += ["--data.init_args.batch_size", "4", *more]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": node}
        with (folder.parent / f"{node}.log").open("a") as log:
            command = ["ip", "netns", "exec", node, *torchrun, *fit, *options]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    return processes


@pytest.mark.ddp
def test_a_node_is_lost_and_the_job_started_again(nodes, tmp_path):
    config, folder = tmp_path / "config.yaml", tmp_path / "two"
    config.write_text(CONFIG)
    first, second = start(nodes, config, folder)
    deadline = time.monotonic() + 900
    while not (folder / "last.ckpt").exists() and time.monotonic() < deadline:
        assert first.poll() is None, (tmp_path / f"{nodes[0]}.log").read_text()[-3000:]
        time.sleep(0.05)
    kill(nodes[1])
    assert second.wait(300) != 0
    assert first.wait(300) != 0  # it notices
    step = torch.load(folder / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < step < 40

    codes = [process.wait(900) for process in start(nodes, config, folder, "--ckpt_path", "last")]
    assert codes == [0, 0], (tmp_path / f"{nodes[0]}.log").read_text()[-3000:]
    one = ["--trainer.default_root_dir", str(tmp_path / "one"), "--trainer.accelerator", "cpu"]
    assert main(["fit", "-c", str(config), *one, "--data.init_args.batch_size", "8"]) == 0
    expected, resumed = (
        torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (tmp_path / "one", folder)
    )
    for key, value in expected.items():
        torch.testing.assert_close(
            resumed[key], value, rtol=1e-5, atol=1e-7, msg=lambda text, key=key: f"{key}: {text}"
        )
