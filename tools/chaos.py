"""Disturb runs in every way, let each go on, and compare it with the undisturbed one.

Run: python tools/chaos.py [--trials 200] [--methods dino ibot ...] [--seed 0] [--folder DIR]
A trial is (method, 0 or 2 loader processes, disturbance). Disturbances, in turn:
- kill: SIGKILL at a moment drawn uniformly from the undisturbed run's whole length, start and export included;
- write: SIGKILL at a drawn one of the run's writes of files, before the file takes its place, or after;
- term, int: SIGTERM or SIGINT at a drawn moment; the exit code must be 75 or 130, or 0 if the run was over;
- full: the disk is full at a drawn byte (a tmpfs of that size; needs root); it is enlarged before the run goes on.
After it the same command runs with `--ckpt_path last`, or without where there is no checkpoint yet, until it is over.
Compared: every tensor of last.ckpt (weights, teachers, memories, optimiser), best checkpoint's weights and scores, the
exported backbone, evaluation.json, and metrics.csv row by row, all to the bit but for times.
Processes are forked from one that has imported everything, so that a trial takes seconds.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from ssl_distill.cli import main as ssl_distill

RECIPES = {
    "dino": "dino/fashion_mnist_vit",
    "ibot": "ibot/fashion_collages",
    "odis": "odis/fashion_collages",
    "udi": "udi/fashion_mnist_vit",
    "dbot": "dbot/fashion_mnist",
    "mokd": "mokd/fashion_mnist",
    "pcd": "pcd/fashion_collages",
    "scalr": "scalr/synthstreet",
}
SMALL = """
trainer: {max_epochs: 2, limit_train_batches: 5, log_every_n_steps: 1, enable_progress_bar: false}
run_folder: {picture_rows: 0}
last_checkpoint: {every_n_train_steps: 1}
"""
IMAGES = {"batch_size": 8, "bank_size": 60, "query_size": 20}
DISTURBANCES = ("kill", "write", "term", "int", "full")
TIMES = ("time", "throughput", "images_per_s", "data_wait", "seconds")  # parts of names of columns and entries
TIMEOUT = 300


class Trial(NamedTuple):
    """What is tried."""

    method: str
    workers: int
    disturbance: str
    seed: int


class Ended(NamedTuple):
    """How a process ended: its exit code, negative for a signal, what it printed, and how long it took."""

    code: int
    printed: str
    seconds: float


def run(arguments: list[str], log: Path, before: Callable[[], None] | None = None, watch: Any = None) -> Ended:
    """The command in a process of its own.

    Args:
        arguments: Of `ssl-distill`.
        log: File for what it prints.
        before: Done in the process first.
        watch: Called with the process's number while it runs.
    """
    start = time.monotonic()
    process = os.fork()
    if process == 0:
        os.setpgid(0, 0)
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        code = 1
        try:
            if before:
                before()
            code = ssl_distill(arguments) or 0
        except SystemExit as ending:
            code = ending.code if isinstance(ending.code, int) else 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    if watch:
        watch(process)
    deadline = start + TIMEOUT
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            break
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return Ended(124, f"hung: {log.read_text()}", TIMEOUT)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # loader processes of a killed run
    return Ended(os.waitstatus_to_exitcode(status), log.read_text(), time.monotonic() - start)


def arguments_of(method: str, workers: int, scratch: Path, folder: Path) -> list[str]:
    """Of a small run of a recipe."""
    small = scratch / "small.yaml"
    small.write_text(SMALL)
    given = ["fit", "-c", f"configs/{RECIPES[method]}.yaml", "-c", str(small)]
    given += [f"--data.init_args.num_workers={workers}", f"--trainer.default_root_dir={folder}"]
    if method != "scalr":
        given += [f"--data.init_args.{name}={value}" for name, value in IMAGES.items()]
    if method == "pcd":
        given += [f"--model.init_args.teacher={scratch / 'teacher' / 'last.ckpt'}"]
    return given


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without times."""
    found: dict[str, Any] = {}
    for name in ("last.ckpt", "best.ckpt"):
        if (folder / name).exists():
            checkpoint = torch.load(folder / name, map_location="cpu", weights_only=True)
            found |= tensors(checkpoint["state_dict"], f"{name}: state_dict")
            if name == "last.ckpt":
                found |= tensors(checkpoint["optimizer_states"], f"{name}: optimizer")
                found[f"{name}: global_step"] = checkpoint["global_step"]
    for exported in folder.glob("*.safetensors"):
        found |= tensors(load_file(exported), exported.name)
    if (folder / "evaluation.json").exists():
        found |= entries(json.loads((folder / "evaluation.json").read_text()), "evaluation.json")
    with (folder / "metrics.csv").open(newline="") as file:
        for number, row in enumerate(csv.DictReader(file)):
            found |= entries(row, f"metrics.csv row {number}")
    return found


def tensors(value: Any, name: str) -> dict[str, Any]:
    """All tensors of nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {key: each for part, inner in pairs for key, each in tensors(inner, f"{name}.{part}").items()}


def entries(value: Any, name: str) -> dict[str, Any]:
    """All values of nested dicts and lists, but times."""
    if any(part in name for part in TIMES):
        return {}
    if not isinstance(value, (dict, list)):
        with contextlib.suppress(ValueError, TypeError):
            value = float(value)
        return {name: str(value)}
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: each for part, inner in pairs for key, each in entries(inner, f"{name}: {part}").items()}


def differences(folder: Path, expected: Path) -> list[str]:
    """Names of what differs, or is there in one of them only."""
    ours, theirs = contents(folder), contents(expected)
    wrong = list(ours.keys() ^ theirs.keys())
    for name in ours.keys() & theirs.keys():
        same = (
            torch.equal(ours[name], theirs[name])
            if isinstance(ours[name], torch.Tensor)
            else ours[name] == theirs[name]
        )
        wrong += [] if same else [name]
    return sorted(wrong)


def signals_at(number: int, delay: float) -> Callable[[int], None]:
    """Sends a signal after some seconds."""

    def watch(process: int) -> None:
        end = time.monotonic() + delay
        while time.monotonic() < end:
            if os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.005)
        os.kill(process, number)

    return watch


def dies_at_write(number: int, after: bool) -> Callable[[], None]:
    """Kills the process at its so-and-so-many-th replacement of a file."""

    def before() -> None:
        count = iter(range(1, 10**9))
        for owner, name in ((os, "replace"), (os, "rename"), (Path, "replace"), (Path, "rename")):
            original = getattr(owner, name)

            def disturbed(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                last = next(count) == number
                if last and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                result = original(*args, **kwargs)
                if last:
                    os.kill(os.getpid(), signal.SIGKILL)
                return result

            setattr(owner, name, disturbed)

    return before


def counted_writes(into: Path) -> Callable[[], None]:
    """Notes every replacement of a file."""

    def before() -> None:
        for owner, name in ((os, "replace"), (os, "rename"), (Path, "replace"), (Path, "rename")):
            original = getattr(owner, name)

            def noted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                descriptor = os.open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.write(descriptor, b".")
                os.close(descriptor)
                return original(*args, **kwargs)

            setattr(owner, name, noted)

    return before


class Undisturbed(NamedTuple):
    """The run that others are compared with."""

    folder: Path
    seconds: float
    writes: int
    num_bytes: int


def undisturbed(method: str, workers: int, scratch: Path) -> Undisturbed:
    """Run it, and see how long it takes, how often it writes and how much it leaves."""
    folder, writes = scratch / f"{method}{workers}", scratch / f"{method}{workers}.writes"
    ended = run(arguments_of(method, workers, scratch, folder), scratch / "log", counted_writes(writes))
    if ended.code != 0:
        raise RuntimeError(f"{method} fails undisturbed ({ended.code}): {ended.printed[-2000:]}")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Undisturbed(folder, ended.seconds, writes.stat().st_size, size)


def attempt(trial: Trial, whole: Undisturbed, scratch: Path) -> list[str]:
    """What went wrong in a trial; nothing if all is well."""
    draw = random.Random(str(trial))
    folder = scratch / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    full = trial.disturbance == "full"
    if full:
        size = draw.randrange(1 << 16, int(1.1 * whole.num_bytes))
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        place = folder / "run"
        arguments = arguments_of(trial.method, trial.workers, scratch, place)
        log, before, watch = scratch / "log", None, None
        allowed = {0}
        moment = draw.uniform(0, 1.05 * whole.seconds)
        if trial.disturbance == "kill":
            watch, allowed = signals_at(signal.SIGKILL, moment), {0, -9}
        elif trial.disturbance == "write":
            before, allowed = dies_at_write(draw.randint(1, whole.writes), draw.random() < 0.5), {-9, 0}
        elif trial.disturbance == "term":
            watch, allowed = signals_at(signal.SIGTERM, moment), {0, 75}
        elif trial.disturbance == "int":
            watch, allowed = signals_at(signal.SIGINT, moment), {0, 130}
        elif full:
            allowed = {0, 1, 2}
        ended = run(arguments, log, before, watch)
        wrong = [] if ended.code in allowed else [f"exit code {ended.code}: {ended.printed[-600:]}"]
        if "Traceback" in ended.printed and trial.disturbance != "kill":
            wrong.append(f"traceback: {ended.printed[-600:]}")
        if full:
            subprocess.run(["mount", "-o", "remount,size=4g", str(folder)], check=True)
            if ended.code and "no space" not in ended.printed.lower():
                wrong.append(f"a full disk is not called so: {ended.printed[-400:]}")
        if ended.code != 0:
            again = ["--ckpt_path", "last"] if (place / "last.ckpt").exists() else []
            resumed = run([*arguments, *again], log)
            if resumed.code != 0:
                return [*wrong, f"going on fails ({resumed.code}): {resumed.printed[-600:]}"]
        others = [each.name for each in folder.iterdir() if each.name != "run"]
        wrong += [f"another folder: {others}"] if others else []
        left = [each.name for each in place.iterdir() if "writing" in each.name]
        wrong += [f"left behind: {left}"] if left and trial.disturbance not in ("kill", "write") else []
        return wrong + differences(place, whole.folder)
    finally:
        if full:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def main() -> int:
    """Print a line for each failure, and the table of counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--methods", nargs="*", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--disturbances", nargs="*", default=list(DISTURBANCES), choices=DISTURBANCES)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="scratch folder; a temporary one if left out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    import ssl_distill.commands.train  # noqa: F401  # once, before processes are forked

    with contextlib.ExitStack() as stack:
        scratch = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scratch.mkdir(parents=True, exist_ok=True)
        if "pcd" in options.methods:
            teacher = scratch / "teacher"
            given = [*arguments_of("dino", 0, scratch, teacher), "-c", "configs/dino/fashion_mnist.yaml"]
            ended = run(given, scratch / "log")
            assert ended.code == 0, ended.printed
        wholes: dict[tuple[str, int], Undisturbed] = {}
        tried: Counter[tuple[str, str]] = Counter()
        lost: Counter[tuple[str, str]] = Counter()
        for number in range(options.trials):
            method = options.methods[number % len(options.methods)]
            kind = options.disturbances[number // len(options.methods) % len(options.disturbances)]
            workers = 2 * (number // (len(options.methods) * len(options.disturbances)) % 2)
            if (method, workers) not in wholes:
                wholes[method, workers] = undisturbed(method, workers, scratch)
            trial = Trial(method, workers, kind, options.seed + number)
            wrong = attempt(trial, wholes[method, workers], scratch)
            tried[method, kind] += 1
            lost[method, kind] += bool(wrong)
            print(f"{number + 1}/{options.trials} {trial}: {wrong[:4] if wrong else 'as undisturbed'}", flush=True)
    kinds = options.disturbances
    print("\n| method | " + " | ".join(kinds) + " |\n" + "|---" * (len(kinds) + 1) + "|")
    for method in options.methods:
        cells = [f"{tried[method, kind] - lost[method, kind]} of {tried[method, kind]}" for kind in kinds]
        print(f"| {method} | " + " | ".join(cells) + " |")
    return int(sum(lost.values()) > 0)


if __name__ == "__main__":
    sys.exit(main())
