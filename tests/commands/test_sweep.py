"""Searches of a few tiny trials, by the command."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image

from ssl_distill.cli import main
from ssl_distill.commands.lock import this_process
from ssl_distill.sweeps.file import read_sweep

pytest.importorskip("optuna")
from ssl_distill.sweeps.search import open_study

CONFIG = {
    "seed_everything": 1,
    "trainer": {"accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1, "enable_progress_bar": False},
    "run_folder": {"picture_rows": 0},
    "feature_maps": {"picture_rows": 0},
    "evaluation": {"evaluators": [{"class_path": "ssl_distill.evaluate.quality.Quality"}]},
    "model": {
        "class_path": "ssl_distill.methods.dino.DINO",
        "init_args": {
            "backbone": "vit_nano_patch8_32",
            "num_prototypes": 16,
            "head": {
                "class_path": "ssl_distill.heads.prototype.PrototypeHead",
                "init_args": {"hidden_dim": 16, "bottleneck_dim": 8},
            },
            "augment": {
                "class_path": "ssl_distill.augment.multi_crop.MultiCropAugment",
                "init_args": {"global_size": 32, "num_local": 0},
            },
            "learning_rate": {"start": 1e-3, "end": 1e-5, "warmup_epochs": 0},
        },
    },
    "data": {
        "class_path": "ssl_distill.data.shapes.ShapesData",
        "init_args": {"num_images": 16, "batch_size": 8, "bank_size": 16, "query_size": 8},
    },
}
SWEEP = {
    "method": "bayes",
    "metric": {"name": "val/teacher/rankme", "goal": "maximize"},
    "command": ["ssl-distill", "fit", "-c", "tiny.yaml", "${args}"],
    "parameters": {
        "model.init_args.learning_rate.start": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
        "model.init_args.momentum.start": {"values": [0.9, 0.99]},
    },
}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    return tmp_path


def table(folder):
    with (folder / "trials.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_boss(desk, capsys):
    """Three trials; the third starts from the other two. One more by the same command."""
    assert main(["sweep", "sweep.yaml", "--trials", "3", "--boss", "--trainer.logger", "false"]) == 2
    assert "`metric` val/teacher/rankme was not logged by the trial; nothing was evaluated" in capsys.readouterr().err
    assert main(["sweep", "sweep.yaml", "--trials", "3", "--boss", "--output", "boss"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("complete, val/teacher/rankme") == 4  # each trial, and the best
    trials = table(desk / "boss")
    assert [row["state"] for row in trials] == ["complete"] * 3
    assert [{row["student_of"], row["teacher_of"]} for row in trials] == [{""}, {""}, {"0", "1"}]
    assert len({row["model.init_args.learning_rate.start"] for row in trials}) == 3
    for row in trials:
        scores = json.loads((desk / row["folder"] / "evaluation.json").read_text())[-1]["scores"]
        assert float(row["value"]) == pytest.approx(scores["teacher"]["rankme"])
    assert "started from" in (desk / "boss/trial_002.log").read_text()
    with Image.open(desk / "boss/parallel.png") as picture:
        assert min(picture.size) > 300
    assert main(["sweep", "sweep.yaml", "--trials", "4", "--boss", "--output", "boss"]) == 0
    assert len(table(desk / "boss")) == 4


def test_a_trial_that_falls_behind_is_stopped(desk, monkeypatch):
    """The second one is told to end as soon as it reports less; it saves, and is in the table with what it had."""
    (desk / "sweep.yaml").write_text(yaml.safe_dump({**SWEEP, "method": "grid", "parameters": {
        "model.init_args.learning_rate.end": {"values": [1e-5, 1e-6]}},
        "early_terminate": {"type": "hyperband", "min_iter": 1, "eta": 2}}))  # fmt: skip
    (desk / "fit.py").write_text(FIT)
    monkeypatch.setattr("ssl_distill.commands.sweep._FIT", ["fit.py"])
    monkeypatch.setattr("ssl_distill.commands.sweep._POLL_S", 0.05)
    assert main(["sweep", "sweep.yaml", "--seed", "0"]) == 0
    first, second = table(desk / "runs/sweep_sweep")
    assert (first["state"], second["state"]) == ("complete", "pruned")
    assert (float(first["value"]), float(second["value"])) == (13.0, 1.0)
    assert (desk / second["folder"] / "asked").read_text() == str(int(signal.SIGTERM))


FIT = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--trainer.default_root_dir") + 1])
folder.mkdir()
def stop(number, frame):
    (folder / "asked").write_text(str(int(number)))
    raise SystemExit(75)
signal.signal(signal.SIGTERM, stop)
first = folder.name.endswith("0")
lines = ["step,val/teacher/rankme", "0,99"]
for i, value in enumerate([10.0, 13.0] if first else [1.0, 2.0]):
    lines.append(f"{i + 1},{value}")
    (folder / "new").write_text("\\n".join(lines) + "\\n")
    (folder / "new").rename(folder / "metrics.csv")
    time.sleep(0.2 if first else 20)
"""


SLOW_FIT = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--trainer.default_root_dir") + 1])
folder.mkdir()
def stop(number, frame):
    (folder / "asked").write_text(str(int(number)))
    raise SystemExit(75)
signal.signal(signal.SIGTERM, stop)
(folder / "pid.new").write_text(str(os.getpid()))
(folder / "pid.new").rename(folder / "pid")
if folder.parent.joinpath("go on").exists():
    (folder / "metrics.csv").write_text("step,val/teacher/rankme\\n1,2.0\\n")
    raise SystemExit(0)
time.sleep(200)
"""
SEARCH = """
import signal, sys
import ssl_distill.commands.sweep as sweep
from ssl_distill.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sweep._FIT = ["fit.py"]
sys.exit(main(["sweep", "sweep.yaml", "--trials", "2", "--output", "found"]))
"""


def wait_for(condition):
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells processes that their parent has ended")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)]
)
def test_a_search_that_is_ended_takes_its_trial_along_and_makes_it_again(desk, capsys, monkeypatch, number, code):
    (desk / "fit.py").write_text(SLOW_FIT)
    process = subprocess.Popen([sys.executable, "-c", SEARCH])
    first = desk / "found/trial_000"
    wait_for((first / "pid").exists)
    pid = int((first / "pid").read_text())
    process.send_signal(number)
    assert process.wait(100) == code
    wait_for(lambda: not Path(f"/proc/{pid}").exists())
    assert (first / "asked").read_text() == str(int(signal.SIGTERM))

    (desk / "found/go on").touch()
    monkeypatch.setattr("ssl_distill.commands.sweep._FIT", ["fit.py"])
    assert main(["sweep", "sweep.yaml", "--trials", "2", "--output", "found"]) == 0
    given_up, again, other = open_study(read_sweep("sweep.yaml"), desk / "found", 0).trials
    assert [trial.state.name for trial in (given_up, again, other)] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert given_up.params == again.params != other.params


def test_a_trial_of_another_process_is_left_to_it(desk, monkeypatch):
    (desk / "fit.py").write_text(SLOW_FIT)
    (desk / "found").mkdir()
    (desk / "found/go on").touch()
    study = open_study(read_sweep("sweep.yaml"), desk / "found", 0)
    study.ask().set_user_attr("searcher", this_process()._asdict())
    monkeypatch.setattr("ssl_distill.commands.sweep._FIT", ["fit.py"])
    assert main(["sweep", "sweep.yaml", "--trials", "2", "--output", "found"]) == 0
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "COMPLETE", "COMPLETE"]


def test_errors(desk, capsys):
    assert main(["sweep", "sweep.yaml", "--trials", "2", "--model.init_args.num_prototype", "3"]) == 2
    error = capsys.readouterr().err
    assert "error: the first trial failed, `model.init_args.num_prototype` is no argument" in error
    assert "did you mean `num_prototypes`?" in error
    for args, message in (
        (["sweep"], "the following arguments are required: FILE"),
        (["sweep", "none.yaml"], "`FILE` none.yaml does not exist"),
        (["sweep", "sweep.yaml", "--trials", "-1"], "`--trials` must be at least 1, got -1"),
    ):
        assert main(args) == 2
        assert message in capsys.readouterr().err


def test_without_optuna(desk, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for name in ("ssl_distill.sweeps.search", "ssl_distill.commands.sweep"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert main(["sweep", "sweep.yaml"]) == 2
    assert "needs Optuna: pip install 'ssl-distill[sweep]'" in capsys.readouterr().err
