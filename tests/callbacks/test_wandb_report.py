"""What a wandb run knows in the end, read from the folder that an offline run leaves."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from lightning.pytorch.loggers import WandbLogger

from ssl_distill.callbacks.metrics_file import read_metrics
from ssl_distill.commands.wandb_runs import open_runs, without_missing_wandb

CONFIG = """
trainer: {accelerator: cpu, max_epochs: 2, log_every_n_steps: 1, enable_progress_bar: false, logger: WandbLogger}
evaluation: {evaluators: [{class_path: ssl_distill.evaluate.quality.Quality}]}
model:
  class_path: ssl_distill.methods.dino.DINO
  init_args:
    backbone: vit_nano_patch8_32
    num_prototypes: 16
    head: {class_path: ssl_distill.heads.prototype.PrototypeHead, init_args: {hidden_dim: 16, bottleneck_dim: 8}}
    augment: {class_path: ssl_distill.augment.multi_crop.MultiCropAugment, init_args: {global_size: 32, num_local: 0}}
data:
  class_path: ssl_distill.data.shapes.ShapesData
  init_args: {num_images: 16, batch_size: 8, bank_size: 16, query_size: 8}
"""


def fit(folder, code="", **environment):
    """`ssl-distill fit` in a process of its own, after some lines of Python; its output."""
    (folder / "config.yaml").write_text(CONFIG)
    run = f"import sys; {code}\nfrom ssl_distill.cli import main; sys.exit(main(['fit', '-c', 'config.yaml']))"
    finished = subprocess.run(
        [sys.executable, "-c", run], cwd=folder, capture_output=True, text=True, timeout=600,
        env={**os.environ, "WANDB_SILENT": "true", **environment},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert any("val/teacher/rankme" in row for row in read_metrics(folder / "runs/dino/metrics.csv"))
    return finished.stderr


def test_everything_is_sent(tmp_path):
    fit(tmp_path, WANDB_MODE="offline")
    (run,) = tmp_path.glob("runs/dino/wandb/offline-run-*")
    (records,) = (path.read_bytes() for path in run.glob("run-*.wandb"))  # texts in it are not compressed
    config = yaml.safe_load((tmp_path / "runs/dino/config.yaml").read_text())
    for sent in (
        json.dumps(config["data"], separators=(",", ":")),
        "train/loss",
        "schedule/momentum",
        "val/teacher/rankme",
        "backbone-",
    ):
        assert sent.encode() in records, sent
    pictures = [path.name.partition("_")[0] for path in run.glob("files/media/images/pictures/*.png")]
    assert set(pictures) == {path.stem for path in (tmp_path / "runs/dino").glob("*.png")} >= {"views", "curves", "pca"}
    tables = sorted((json.loads(path.read_text()) for path in run.glob("files/media/table/evaluation*")), key=str)
    rows = max((table["data"] for table in tables), key=len)
    assert len(rows) == 2 * 3  # two encoders, before the first step and after two epochs
    assert {"epoch", "step", "encoder", "rankme"} <= set(tables[0]["columns"])


@pytest.mark.parametrize("key", ["", "0" * 40], ids=["account", "network"])
def test_without_account_or_network_it_is_offline(key, tmp_path):
    """The same flag: what cannot be sent now can be later."""
    nowhere = {
        "WANDB_BASE_URL": "http://127.0.0.1:9",
        "WANDB_API_KEY": key,
        "NETRC": os.devnull,
        "WANDB_INIT_TIMEOUT": "5",
    }
    printed = fit(tmp_path, **nowhere, HOME=str(tmp_path))
    assert "logging offline; `wandb sync` sends it later" in printed
    assert len(list(tmp_path.glob("runs/dino/wandb/offline-run-*"))) == 1


def test_without_wandb_the_run_goes_on(tmp_path):
    code = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'wandb' else f(n, *a)"
    assert "wandb is not installed: logging to the run folder only" in fit(tmp_path, code)
    assert not (tmp_path / "runs/dino/wandb").exists()


def test_other_loggers_are_left_alone():
    assert without_missing_wandb(["a", None]) == ["a", None]
    assert open_runs([1, "b"]) == [1, "b"]


@pytest.mark.filterwarnings("ignore:wandb cannot be used")
def test_a_logger_that_never_opens_is_left_out(monkeypatch):
    class Full(WandbLogger):
        @property
        def experiment(self):
            raise OSError("no space left")

    monkeypatch.setenv("WANDB_MODE", "online")
    assert open_runs([Full(), "other"]) == ["other"]
