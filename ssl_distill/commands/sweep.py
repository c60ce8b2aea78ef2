"""`ssl-distill sweep`: the trials of a wandb sweep file, without a server."""

import ctypes
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from argparse import RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from ssl_distill.callbacks.metrics_file import read_metrics
from ssl_distill.commands.arguments import OneLineParser
from ssl_distill.commands.lock import Writer, may_be_under_way, this_process, undisturbed
from ssl_distill.sweeps.boss import choose_elders
from ssl_distill.sweeps.file import Sweep, read_sweep
from ssl_distill.sweeps.search import (
    FrozenTrial,
    Study,
    Trial,
    TrialPruned,
    TrialState,
    draw_again,
    finished,
    grid_of,
    open_study,
    suggest,
)
from ssl_distill.sweeps.table import draw_parallel, write_table

_FIT = ["-m", "ssl_distill.cli", "fit"]
_POLL_S = 0.5
_GRACE_S = 300  # for a trial that is told to stop: it ends its step and saves
_DEFAULT_TRIALS = 20
_DESCRIPTION = """The trials of a wandb sweep file, one after another, without a server.

Every trial is `ssl-distill fit` as the file's `command` says, in a folder of its own. Options that `sweep` does not
know are given to every trial. The folder of the search gets trials.csv and parallel.png; the same command goes on with
a search that was stopped."""


class TrialFailed(Exception):
    """A trial ended with an error."""


def sweep(args: list[str]) -> None:
    """Search.

    Raises:
        ValueError: If the file cannot be run, or the first trial fails.
    """
    parser = OneLineParser(
        prog="ssl-distill sweep",
        description=_DESCRIPTION,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", metavar="FILE", help="such as one of configs/sweeps")
    parser.add_argument("--trials", type=int, help="how many in all; default: run_cap of the file, the grid, or 20")
    parser.add_argument("--output", type=Path, help="folder of the search; default: runs/sweep_<FILE>")
    parser.add_argument("--metric", help="judge by this key of metrics.csv instead of the file's")
    parser.add_argument("--seed", type=int, default=0, help="of the sampler")
    parser.add_argument("--boss", action="store_true", help="start from, and be distilled by, the best earlier trials")
    options, for_fit = parser.parse_known_args(args)
    search = read_sweep(options.file)
    if options.metric:
        search = Sweep(**{**vars(search), "metric": options.metric})
    total = options.trials or search.run_cap or _DEFAULT_TRIALS
    if total < 1:
        raise ValueError(f"`--trials` must be at least 1, got {total}.")
    if search.method == "grid":
        size = 1
        for choices in grid_of(search).values():
            size *= len(choices)
        total = min(total, size) if options.trials or search.run_cap else size
    folder = options.output or Path("runs") / f"sweep_{Path(options.file).stem}"
    folder.mkdir(parents=True, exist_ok=True)
    study = open_study(search, folder, options.seed)
    with undisturbed(folder):
        _give_up_orphans(study)
    if (left := total - _num_done(study)) > 0:
        runner = _Runner(search, study, folder, for_fit, total, options.seed if options.boss else None)
        study.optimize(runner.run, left, catch=(TrialFailed,), callbacks=[runner.tell])
    best = finished(study)
    if not best:
        raise ValueError(f"no trial came to its end; their logs are in {folder}.")
    print(f"{folder / 'trials.csv'}, {folder / 'parallel.png'}\nbest: trial {best[0].number}, {_told(best[0], search)}")
    words = [*search.fit_arguments(best[0].user_attrs["values"]), *for_fit]
    print(f"  ssl-distill fit {shlex.join(words)}")


class _Runner:
    """Runs trials in folders of their own and keeps the table.

    Args:
        search: The sweep.
        study: Optuna's.
        folder: Of the search.
        for_fit: Further options of every trial.
        total: Trials of all processes that search.
        boss_seed: Draws the earlier trials that a trial begins with; None for trials from scratch.
    """

    def __init__(
        self, search: Sweep, study: Study, folder: Path, for_fit: list[str], total: int, boss_seed: int | None
    ) -> None:
        self.search = search
        self.study = study
        self.folder = folder
        self.for_fit = for_fit
        self.total = total
        self.boss_seed = boss_seed

    def run(self, trial: Trial) -> float:
        """Train; the last value of the metric.

        Raises:
            TrialFailed: If `fit` ends with an error; `ValueError` if no trial did better before.
        """
        run = self.folder / f"trial_{trial.number:03d}"
        trial.set_user_attr("searcher", this_process()._asdict())
        values = suggest(trial, self.search.parameters)
        trial.set_user_attr("values", values)
        options = [*self.search.fit_arguments(values), "--trainer.default_root_dir", str(run), *self.for_fit]
        options += self._elders(trial)
        log = self.folder / f"trial_{trial.number:03d}.log"
        environment = {"WANDB_MODE": "offline", **os.environ}
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, *_FIT, *options],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=_end_with_parent,
            )
            try:
                self._watch(process, trial, run)
            except SystemExit:  # the search was asked to end
                draw_again(self.study, trial.number)
                raise
            finally:
                _stop(process)
        if process.returncode:
            error = _last_line(log)
            if not any(each.state.is_finished() and each.state != TrialState.FAIL for each in self.study.trials):
                raise ValueError(f"the first trial failed, {error.removeprefix('error: ')} (all of it: {log})")
            raise TrialFailed(error)
        reported = self._reported(run)
        if not reported:
            raise ValueError(f"`metric` {self.search.metric} was not logged by the trial; {_logged(run)}.")
        return reported[-1]

    def _watch(self, process: subprocess.Popen, trial: Trial, run: Path) -> None:
        """Wait for the end; stop a trial that falls behind."""
        seen = 0
        while process.poll() is None:
            time.sleep(_POLL_S)
            reported = self._reported(run)
            for step in range(seen, len(reported)):
                trial.report(reported[step], step + 1)
            if len(reported) > seen and trial.should_prune():
                raise TrialPruned
            seen = len(reported)

    def _reported(self, run: Path) -> list[float]:
        """Values of the metric so far, without that before the first step."""
        rows = read_metrics(run / "metrics.csv")
        return [row[self.search.metric] for row in rows if self.search.metric in row and row["step"] > 0]

    def _elders(self, trial: Trial) -> list[str]:
        """Options by which a trial begins with earlier weights."""
        if self.boss_seed is None:
            return []
        best_first = [each.number for each in finished(self.study)]
        elders = choose_elders(best_first, self.boss_seed + trial.number)
        if elders is None:
            return []
        for role, number in elders._asdict().items():
            trial.set_user_attr(f"{role}_of", number)
        student, teacher = (self.folder / f"trial_{number:03d}" / "last.ckpt" for number in elders)
        place = "--trainer.callbacks"
        return [
            f"{place}+=ssl_distill.callbacks.start_from.StartFrom", f"{place}.student={student}",
            f"{place}.teacher={teacher}",
        ]  # fmt: skip

    def tell(self, study: Study, trial: FrozenTrial) -> None:
        """Write the table again, and a line; stop when processes together have made all trials."""
        if _num_done(study) >= self.total:
            study.stop()
        trials = [each for each in study.get_trials(deepcopy=False) if each.state.is_finished()]
        rows = [self._row(each) for each in trials]
        write_table(rows, self.folder / "trials.csv")
        moving = {name: each.is_log for name, each in self.search.parameters.items() if each.distribution != "constant"}
        if elders := [key for key in ("student_of", "teacher_of") if any(row.get(key, "") != "" for row in rows)]:
            rows = [{**row, **{key: str(row.get(key, "")) or "scratch" for key in elders}} for row in rows]
        draw_parallel(rows, moving | dict.fromkeys(elders, False), self.search.metric, self.folder / "parallel.png")
        print(f"trial {trial.number}: {_told(trial, self.search)}", flush=True)

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        value = _value(trial)
        elders = {key: trial.user_attrs.get(key, "") for key in ("student_of", "teacher_of")}
        return {
            "trial": trial.number,
            "state": trial.state.name.lower(),
            "value": "" if value is None else value,
            "seconds": round(trial.duration.total_seconds(), 1) if trial.duration else "",
            "folder": str(self.folder / f"trial_{trial.number:03d}"),
            **(elders if self.boss_seed is not None else {}),
            **trial.user_attrs.get("values", {}),
        }


def _num_done(study: Study) -> int:
    return sum(
        trial.state.is_finished() and trial.state != TrialState.FAIL for trial in study.get_trials(deepcopy=False)
    )


def _give_up_orphans(study: Study) -> None:
    """Trials whose search was killed get another try."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        searcher = trial.user_attrs.get("searcher")
        if searcher is None or not may_be_under_way(Writer(**searcher)):
            draw_again(study, trial.number)


def _end_with_parent() -> None:
    """In a trial, before it begins: when the search is killed, the trial is asked to end."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _value(trial: FrozenTrial) -> float | None:
    """The value, or the last one that a trial reported before it was stopped."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else None


def _told(trial: FrozenTrial, search: Sweep) -> str:
    value = _value(trial)
    return f"{trial.state.name.lower()}, {search.metric} {'-' if value is None else f'{value:.4g}'}"


def _stop(process: subprocess.Popen) -> None:
    """Let a run that is still under way save and end."""
    if process.poll() is not None:
        return
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _last_line(log: Path) -> str:
    """What a run said last, without progress bars."""
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
    return lines[-1] if lines else ""


def _logged(run: Path) -> str:
    keys = sorted({key for row in read_metrics(run / "metrics.csv") for key in row if key.startswith("val/")})
    return f"what was logged of evaluations: {', '.join(keys)}" if keys else "nothing was evaluated"
