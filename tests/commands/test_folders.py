import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from ssl_distill.commands.folders import find_checkpoint, run_folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):  # which a Trainer of another test may have set
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
    with ExitStack() as stack:
        folders = []
        for rank in range(2):
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            folders.append(str(stack.enter_context(run_folder(Path("a"), None))))
            os.environ.pop("SSL_DISTILL_RUN_FOLDER")
        assert folders == ["a-2", "a-2"]
        monkeypatch.setenv("LOCAL_RANK", "0")
        with pytest.raises(ValueError, match=f"a-2 is in use by process {os.getpid()} on"):
            stack.enter_context(run_folder(Path("a"), None))


def test_resuming():
    finished("a", "a-2", "a-10", "elsewhere")
    Path("a-11").mkdir()
    assert str(find_checkpoint("last", Path("a"))) == "a-10/last.ckpt"
    assert chosen("a", "a-2/last.ckpt") == "a-2"
    assert chosen("a", "elsewhere/last.ckpt") == "a-3"
    assert str(find_checkpoint("elsewhere/last.ckpt", Path("a"))) == "elsewhere/last.ckpt"
    assert chosen("a", Path("a-2/last.ckpt").absolute()) == "a-2"  # however it is written
    assert chosen(Path("a").absolute(), "a/last.ckpt") == str(Path("a").absolute())
    Path("link").symlink_to("a-10")
    assert chosen("a", "link/last.ckpt") == "a-10"


def test_names_that_are_patterns():
    finished("g[1]", "g[1]-2", "g1-3", "*", "a-2")
    assert str(find_checkpoint("last", Path("g[1]"))) == "g[1]-2/last.ckpt"
    assert chosen("g[1]", "g[1]-2/last.ckpt") == "g[1]-2"
    assert str(find_checkpoint("last", Path("*"))) == "*/last.ckpt"


def lock_of(**changed):
    """A lock as this very process would hold it, but for what is changed."""
    with run_folder(Path("probe"), None):
        return json.dumps({**json.loads(Path("probe/run.lock").read_text()), **changed})


def test_a_run_that_is_gone_on_with_while_it_is_under_way():
    finished("a")
    with run_folder(Path("a"), Path("a/last.ckpt")):
        os.environ.pop("SSL_DISTILL_RUN_FOLDER")
        with pytest.raises(ValueError, match=rf"a is in use by process {os.getpid()} on .* stop it by `kill"):
            chosen("a", "a/last.ckpt")
        assert Path("a/run.lock").exists()
    assert chosen("a", "a/last.ckpt") == "a"
    assert not Path("a/run.lock").exists()


def ended():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("changed", [{"pid": ended}, {"started": lambda: "1"}])
def test_a_writer_that_has_ended_is_replaced(changed):
    """Also where its number is another process's by now."""
    finished("a")
    Path("a/run.lock").write_text(lock_of(**{key: value() for key, value in changed.items()}))
    assert chosen("a", "a/last.ckpt") == "a"
    Path("a/run.lock").write_text("{")
    assert chosen("a", "a/last.ckpt") == "a"


def test_a_zombie_has_ended():
    finished("a")
    process = subprocess.Popen([sys.executable, "-c", "import os, sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    started = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    Path("a/run.lock").write_text(lock_of(pid=process.pid, started=started))
    with pytest.raises(ValueError, match=f"a is in use by process {process.pid}"):
        chosen("a", "a/last.ckpt")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert chosen("a", "a/last.ckpt") == "a"
    process.communicate()


def test_a_writer_on_another_machine():
    finished("a")
    Path("a/run.lock").write_text(lock_of(host="node7"))
    with pytest.raises(ValueError, match=r"on node7 since .*; if it has ended, remove a/run\.lock"):
        chosen("a", "a/last.ckpt")
    Path("b").mkdir()
    Path("b/run.lock").write_text(lock_of(host="node7"))
    assert chosen("b") == "b-2"


def test_errors():
    Path("a").mkdir()
    for name, message in [
        ("best", "`ckpt_path` is best, but a holds no best.ckpt"),
        ("x.ckpt", "x.ckpt does not exist"),
    ]:
        with pytest.raises(ValueError, match=message):
            find_checkpoint(name, Path("a"))
