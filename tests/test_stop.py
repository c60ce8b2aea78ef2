"""Runs of the real command that are stopped, finished or prolonged keep their exit codes, rows and evaluations."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from safetensors.torch import load_file
from test_cli import TINY

from ssl_distill.callbacks.metrics_file import read_metrics
from ssl_distill.cli import main
from ssl_distill.export import read_metadata
from ssl_distill.stopping import listen, stop_now, stopping_now

EVERY_STEP = {**TINY, "trainer": {**TINY["trainer"], "log_every_n_steps": 1}}


class AskIn(Callback):
    """A request to end that comes in a certain hook, from step `step` on."""

    def __init__(self, hook: str, number: int, step: int = 0) -> None:
        def ask(trainer, *args, **kwargs):
            if trainer.global_step == step:
                os.kill(os.getpid(), number)

        setattr(self, hook, ask)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run to its end; tests must not change it."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(EVERY_STEP))
    assert main(["fit", "-c", str(folder / "tiny.yaml"), "--trainer.default_root_dir", str(folder / "run")]) == 0
    return folder


@pytest.fixture
def command(whole):
    return ["fit", "-c", str(whole / "tiny.yaml"), "--trainer.default_root_dir", "run"]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def default_ctrl_c():
    """A shell that starts tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def asked_in(hook, number, step=0):
    return ["--trainer.callbacks+", json.dumps({"class_path": "test_stop.AskIn", "init_args": {
        "hook": hook, "number": int(number), "step": step}})]  # fmt: skip


def rows(folder):
    """What was logged, but for how fast it was."""
    return [{key: value for key, value in row.items() if "_per_s" not in key and "data_wait" not in key}
            for row in read_metrics(folder / "metrics.csv")]  # fmt: skip


def history(folder):
    return json.loads((folder / "evaluation.json").read_text())


def assert_same(run, whole):
    assert rows(run) == rows(whole)
    assert history(run) == history(whole)
    ours, theirs = (torch.load(each / "last.ckpt", weights_only=True)["state_dict"] for each in (run, whole))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    ours, theirs = (load_file(each / "backbone.safetensors") for each in (run, whole))
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    assert read_metadata(run / "backbone.safetensors") == read_metadata(whole / "backbone.safetensors")


@pytest.mark.parametrize(
    ("number", "hook", "step", "saved"),
    [
        (signal.SIGTERM, "setup", 0, None),
        (signal.SIGTERM, "on_validation_end", 0, None),  # of the baseline
        (signal.SIGTERM, "on_train_batch_start", 2, 3),
        (signal.SIGINT, "on_train_batch_start", 2, 3),
        (signal.SIGUSR1, "on_train_batch_start", 7, 8),  # the last one; its epoch's evaluation is to come
        (signal.SIGTERM, "on_train_end", 8, 8),
        (signal.SIGINT, "on_fit_end", 8, 8),  # before the export
    ],
)
def test_a_run_that_is_asked_to_stop_loses_nothing(command, whole, capsys, number, hook, step, saved):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as stopped:
        main([*command, *asked_in(hook, number, step)])
    assert stopped.value.code == (130 if number == signal.SIGINT else 75)
    assert signal.getsignal(number) == before
    printed = capsys.readouterr().out
    if saved is None:
        assert not Path("run/last.ckpt").exists()
        assert hook == "setup" or "The same command begins again." in printed
    else:
        assert torch.load("run/last.ckpt", weights_only=True)["global_step"] == saved
        assert "The same command with --ckpt_path last goes on from run/last.ckpt." in printed
        logged = rows(Path("run"))
        assert logged == rows(whole / "run")[: len(logged)]
        assert logged[-1]["step"] == saved - 1
    assert main([*command, *(["--ckpt_path", "last"] if saved else [])]) == 0
    assert_same(Path("run"), whole / "run")
    assert not Path("run-2").exists()


def test_a_request_while_the_command_is_imported():
    """As soon as there is a handler, which is before anything slow."""
    process = subprocess.Popen([sys.executable, "-m", "ssl_distill.cli", "methods"], stdout=subprocess.DEVNULL)
    process.wait()
    process = subprocess.Popen([sys.executable, "-m", "ssl_distill.cli", "fit", "-c", "none.yaml"])
    status = Path(f"/proc/{process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc")
    deadline = time.monotonic() + 60
    while not int(status.read_text().partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75


def test_a_second_ctrl_c_does_not_wait(command):
    twice = [*asked_in("on_train_batch_start", signal.SIGINT), *asked_in("on_before_optimizer_step", signal.SIGINT)]
    with pytest.raises(SystemExit) as stopped:
        main([*command, *twice])
    assert stopped.value.code == 130
    assert not Path("run/last.ckpt").exists()


def test_ignored_requests_stay_ignored(command):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert main([*command, "--trainer.max_steps", "1", *asked_in("on_train_batch_start", signal.SIGINT)]) == 0


def lose():
    """What Python does in a destructor."""
    with suppress(SystemExit):
        os.kill(os.getpid(), signal.SIGTERM)


def lose_and_go_on():
    lose()
    listen(stop_now)
    pytest.fail("went on")


def fail_on_the_way_out():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        raise RuntimeError("tidying up failed")


@pytest.mark.parametrize("act", [lose, lose_and_go_on, fail_on_the_way_out])
def test_a_request_outlives_its_exception(act):
    with pytest.raises(SystemExit) as stopped, stopping_now():
        act()
    assert stopped.value.code == 75
    with stopping_now():
        pass  # and it is over with that


def test_a_finished_run_stays_as_it_is(command, whole):
    shutil.copytree(whole / "run", "run")
    assert main([*command, "--ckpt_path", "last"]) == 0
    assert_same(Path("run"), whole / "run")


def test_a_run_is_prolonged(command, whole, capsys):
    """After `max_steps` ended it within an epoch, which is over with that; what `validate` added is kept."""
    assert main([*command, "--trainer.max_steps", "6"]) == 0
    last = ["--ckpt_path", "last"]
    assert main(["validate", "-c", "run/config.yaml", *last]) == 0
    before, rows_before = history(Path("run")), rows(Path("run"))
    assert [(row["stage"], row.get("step")) for row in before] == [
        ("baseline", 0), ("fit", 4), ("fit", 6), ("validate", None)
    ]  # fmt: skip
    assert [row["step"] for row in rows_before if "val/score" in row] == [0, 3, 5]
    capsys.readouterr()
    assert main([*command, *last, "--trainer.max_epochs", "3"]) == 0
    after = history(Path("run"))
    assert after[:4] == before
    assert [(row["stage"], row["step"]) for row in after[4:]] == [("fit", 10)]
    assert rows(Path("run"))[: len(rows_before)] == rows_before
    assert [row["step"] for row in rows(Path("run")) if "val/score" in row] == [0, 3, 5, 9]
    printed = capsys.readouterr().out
    assert "Before the first step" not in printed
    for encoder in ("teacher", "student"):
        now, baseline = (100 * entry["scores"][encoder]["knn_top1"] for entry in (after[-1], before[0]))
        assert f"{encoder} knn_top1 {now:.1f} % (baseline {baseline:.1f} %)" in printed


def test_a_run_that_is_under_way_is_left_alone_until_it_is_killed(command, capsys):
    """Its loader processes outlive it by some seconds; the next start does not wait for them."""
    long = [*command, "--trainer.max_epochs", "100000", "--trainer.limit_val_batches", "0", "--data.num_workers", "2"]
    long += ["--last_checkpoint.every_n_train_steps", "1"]
    process = subprocess.Popen([sys.executable, "-m", "ssl_distill.cli", *long], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not Path("run/last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        again = [*long, "--ckpt_path", "last"]
        assert main(again) == 2
        assert f"error: run is in use by process {process.pid} on " in capsys.readouterr().err
        loaders = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        assert len(loaders) >= 2
    finally:
        process.kill()
    process.wait()
    assert any(Path(f"/proc/{pid}").exists() for pid in loaders)
    step = torch.load("run/last.ckpt", weights_only=True)["global_step"]
    absolute = [*long, "--ckpt_path", str(Path("run/last.ckpt").absolute()), "--trainer.max_steps", str(step + 1)]
    assert main(absolute) == 0
    assert torch.load("run/last.ckpt", weights_only=True)["global_step"] == step + 1
    assert {path.name for path in Path().iterdir()} == {"run"}
