import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from ssl_distill.commands.folders import find_checkpoint, run_folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("LOCAL_RANK", "SLURM_PROCID"):  # which a Trainer of another test may have set
        monkeypatch.delenv(name, raising=False)


def finished(*names):
    for name in names:
        Path(name).mkdir(parents=True)
        Path(name, "last.ckpt").touch()


def chosen(root, checkpoint=None):
    with run_folder(Path(root), checkpoint and Path(checkpoint)) as folder:
        return str(folder)


def test_a_new_run_never_enters_the_folder_of_another():
    assert chosen("runs/a") == "runs/a"
    assert chosen("runs/a") == "runs/a"  # a run that left no checkpoint left nothing to lose
    finished("runs/b", "runs/b-2", "runs/b-3")
    assert chosen("runs/b") == "runs/b-4"


def test_runs_at_the_same_time_get_folders_of_their_own():
    with ExitStack() as stack:
        first = stack.enter_context(run_folder(Path("a"), None))
        os.environ.pop("SSL_DISTILL_RUN_FOLDER")  # as in a process of its own
        second = stack.enter_context(run_folder(Path("a"), None))
        assert (str(first), str(second)) == ("a", "a-2")
    assert chosen("a") == "a"
    assert "SSL_DISTILL_RUN_FOLDER" not in os.environ


def test_ranks_that_lightning_starts_are_told(monkeypatch):
    finished("a")
    with run_folder(Path("a"), None) as folder:
        assert str(folder) == "a-2"
        finished("a-2-by-now")
        assert chosen("a") == "a-2"
        assert str(find_checkpoint("last", Path("a"))) == "a-2/last.ckpt"


def test_ranks_that_torchrun_starts_agree(monkeypatch):
    finished("a")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with ExitStack() as stack:
        folders = []
        for _ in range(2):
            folders.append(str(stack.enter_context(run_folder(Path("a"), None))))
            os.environ.pop("SSL_DISTILL_RUN_FOLDER")
        assert folders == ["a-2", "a-2"]


def test_resuming():
    finished("a", "a-2", "a-10", "elsewhere")
    Path("a-11").mkdir()
    assert str(find_checkpoint("last", Path("a"))) == "a-10/last.ckpt"
    assert chosen("a", "a-2/last.ckpt") == "a-2"
    assert chosen("a", "elsewhere/last.ckpt") == "a-3"
    assert str(find_checkpoint("elsewhere/last.ckpt", Path("a"))) == "elsewhere/last.ckpt"


def test_errors():
    Path("a").mkdir()
    for name, message in [
        ("best", "`ckpt_path` is best, but a holds no best.ckpt"),
        ("x.ckpt", "x.ckpt does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_checkpoint(name, Path("a"))
