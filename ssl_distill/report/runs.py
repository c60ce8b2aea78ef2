"""What a run folder tells about its run."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from ssl_distill.callbacks.metrics_table import read_metrics
from ssl_distill.reading.settings import read_yaml

PICTURES = ("views", "pca", "attention", "neighbours", "pairs", "birdseye")


class Run(NamedTuple):
    """One run folder, read.

    Attributes:
        name: Short, and different from those of the other runs.
        folder: Where it lies.
        config: The resolved config.
        metrics: Rows of `metrics.csv`.
        evaluations: Entries of `evaluation.json`.
        starts: Entries of `environment.json`; none of runs made before there was that file.
        pictures: Files that are there, by name.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    evaluations: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    pictures: dict[str, Path]

    @property
    def method(self) -> str:
        """Name of the method's class."""
        return str(self.config.get("model", {}).get("class_path", "?")).rpartition(".")[2]

    @property
    def backbone(self) -> str:
        """The backbone's name, of several learners all names."""
        arguments = self.config.get("model", {}).get("init_args") or {}
        names = [value for key, value in arguments.items() if key.endswith("backbone") and isinstance(value, str)]
        return ", ".join(names)

    @property
    def num_steps(self) -> int:
        """Optimiser steps that were logged."""
        return int(max((row["step"] for row in self.metrics), default=0))

    @property
    def seconds(self) -> float | None:
        """How long the run took, all starts together; None if one of them did not end, or nobody knows."""
        if not self.starts or any(not start["ended"] for start in self.starts):
            return None
        spans = (datetime.fromisoformat(s["ended"]) - datetime.fromisoformat(s["started"]) for s in self.starts)
        return sum(span.total_seconds() for span in spans)

    @property
    def protocol(self) -> dict[str, Any]:
        """How the scores were made."""
        protocol: dict[str, Any] = self.evaluations[-1]["protocol"] if self.evaluations else {}
        return protocol

    def scores(self) -> dict[str, dict[str, tuple[float | None, float]]]:
        """By encoder and score: the value before the first step, where there is one, and the last."""
        found: dict[str, dict[str, tuple[float | None, float]]] = {}
        for row in self.metrics:
            for key, value in row.items():
                kind, _, rest = key.partition("/")
                encoder, _, score = rest.partition("/")
                if kind == "val" and score:
                    of_encoder = found.setdefault(encoder, {})
                    before = of_encoder[score][0] if score in of_encoder else value if row["step"] == 0 else None
                    of_encoder[score] = (before, value)
        return found


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, in the order given.

    Raises:
        ValueError: If one is no run folder.
    """
    return [_read_run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _read_run(folder: Path, name: str) -> Run:
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"`RUN` {folder} is no run folder of `ssl-distill fit`: it has no config.yaml.")
    config = read_yaml(folder / "config.yaml")
    if not isinstance(config, dict) or not isinstance(config.get("model", {}), dict):
        raise ValueError(f"`RUN` {folder} has a config.yaml that `fit` did not write: its `model` must be a mapping.")
    return Run(
        name,
        folder,
        config,
        read_metrics(folder / "metrics.csv"),
        _read_json(folder / "evaluation.json"),
        _read_json(folder / "environment.json"),
        {name: path for name in PICTURES if (path := folder / f"{name}.png").is_file()},
    )


def _read_json(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return entries


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many of their parents' as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(each[-depth:]) for each in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]
