"""Real runs of the real command, for `tests/numbers`."""

import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssl_distill.callbacks.metrics_file import read_metrics

SEEDS = (0, 1, 2)
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True)
class Run:
    """A finished `ssl-distill fit`: its folder and what it cost."""

    folder: Path
    cpu_seconds: float

    @property
    def history(self) -> list[dict[str, Any]]:
        """Entries of `evaluation.json`."""
        return json.loads((self.folder / "evaluation.json").read_text())

    def before(self, encoder: str) -> dict[str, float]:
        """Scores before the first step."""
        return self.history[0]["scores"][encoder]

    def after(self, encoder: str) -> dict[str, float]:
        """Scores after the last step."""
        return [entry for entry in self.history if entry["stage"] == "fit"][-1]["scores"][encoder]

    def better(self, name: str = "knn_top1", encoders: tuple[str, ...] = ("student", "teacher")) -> str:
        """The encoder with the higher score."""
        return max(encoders, key=lambda encoder: self.after(encoder)[name])

    def gain(self, name: str, encoder: str) -> float:
        """Points, of a hundred, above the same network before the first step."""
        return 100 * (self.after(encoder)[name] - self.before(encoder)[name])

    def validate(self, name: str, checkpoint: str | None, *arguments: str) -> dict[str, dict[str, float]]:
        """Scores by encoder of `ssl-distill validate` on a checkpoint of the run, or on the model before training."""
        folder = self.folder / name
        if not (folder / "evaluation.json").exists():
            command = ["ssl-distill", "validate", "-c", str(self.folder / "config.yaml")]
            command += ["--trainer.default_root_dir", str(folder), *arguments]
            _call(command + (["--ckpt_path", str(self.folder / checkpoint)] if checkpoint else []), folder)
        return json.loads((folder / "evaluation.json").read_text())[-1]["scores"]

    def last(self, key: str) -> float:
        """The last value of a column of `metrics.csv`."""
        return [row[key] for row in read_metrics(self.folder / "metrics.csv") if key in row][-1]


class Fit:
    """`fit(name, config, seed, *arguments)` runs `ssl-distill fit -c configs/<config>`.

    Args:
        root: Where run folders `<name>_<seed>` are made. A run that is finished there is not repeated.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def __call__(self, name: str, config: str, seed: int, *arguments: str) -> Run:
        folder = self.root / f"{name}_{seed}"
        cost = folder / "cpu_seconds.json"
        if not cost.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped: ours would go elsewhere
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            command = ["ssl-distill", "fit", "-c", f"configs/{config}", "--seed_everything", str(seed)]
            command += [*arguments, "--trainer.default_root_dir", str(folder)]  # after a further recipe's own
            _call(command, folder)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            cost.write_text(json.dumps(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime))
        return Run(folder, json.loads(cost.read_text()))


def _call(command: list[str], folder: Path) -> None:
    """Run in the repository, as a user does; what it prints goes to `<folder>.log`."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with folder.with_name(f"{folder.name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, cwd=REPOSITORY, env=environment)
