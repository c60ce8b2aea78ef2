"""wandb's sweep files, as far as they can be run without wandb."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

_METHODS = ("bayes", "random", "grid")
_INFERRED: dict[str, tuple[type, ...]] = {"int_uniform": (int,), "uniform": (int, float)}
_RANGES = ("int_uniform", "uniform", "q_uniform", "log_uniform_values", "q_log_uniform_values")


@dataclass(frozen=True)
class Parameter:
    """What one argument of `ssl-distill fit` may be.

    Attributes:
        distribution: wandb's name: categorical, constant, or one of a range.
        values: Choices; one for a constant, none for a range.
        low: Least value of a range.
        high: Greatest value.
        step: Distance between values; None for any number.
    """

    distribution: str
    values: tuple[Any, ...] = ()
    low: float = math.nan
    high: float = math.nan
    step: float | None = None

    @property
    def is_log(self) -> bool:
        """Whether its logarithm is drawn uniformly."""
        return "log_" in self.distribution

    @property
    def is_whole(self) -> bool:
        """Whether only whole numbers are drawn."""
        return self.distribution == "int_uniform"


@dataclass(frozen=True)
class Sweep:
    """A sweep file.

    Attributes:
        method: bayes, random or grid.
        metric: Key of `metrics.csv` to be judged by, such as `val/teacher/rankme`.
        maximize: Whether more is better.
        parameters: By dotted key.
        command: Words of the command line; `${args}` stands for all parameters.
        min_iter: Evaluations before a trial may be ended early; None for never.
        eta: One of so many trials goes on at each such point.
        run_cap: Number of trials; None where the file says none.
    """

    method: str
    metric: str
    maximize: bool
    parameters: dict[str, Parameter]
    command: tuple[str, ...]
    min_iter: int | None
    eta: int
    run_cap: int | None

    def fit_arguments(self, values: Mapping[str, Any]) -> list[str]:
        """What follows `ssl-distill fit` for these values, as an agent of wandb would write it."""
        words = [f"--{name}={_word(value)}" for name, value in values.items()]
        replaced = [part for word in self.command for part in (words if word == "${args}" else [word])]
        return replaced[replaced.index("fit") + 1 :]


def read_sweep(path: str | Path) -> Sweep:
    """A sweep file.

    Raises:
        ValueError: If it is none, or asks for what only wandb can do.
    """
    if not Path(path).is_file():
        raise ValueError(f"`FILE` {path} does not exist; configs/sweeps holds one per method.")
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"`FILE` {path} is no YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"`FILE` {path} must be a mapping with the keys method, metric, parameters and command.")
    for key in ("method", "metric", "parameters", "command"):
        if not config.get(key):
            raise ValueError(f"`{key}` is missing in {path}.")
    if config["method"] not in _METHODS:
        raise ValueError(f"`method` must be one of {', '.join(_METHODS)}, got {config['method']}.")
    if not isinstance(config["metric"], dict) or "name" not in config["metric"]:
        raise ValueError(f"`metric` must have a `name`, such as val/teacher/rankme, got {config['metric']}.")
    goal = config["metric"].get("goal", "minimize")  # wandb's default
    if goal not in ("maximize", "minimize"):
        raise ValueError(f"`metric.goal` must be maximize or minimize, got {goal}.")
    command = tuple(str(word) for word in config["command"] if word not in ("${env}", "${interpreter}"))
    command = tuple(str(config.get("program", "ssl-distill")) if word == "${program}" else word for word in command)
    if command[:2] != ("ssl-distill", "fit") or "${args}" not in command:
        raise ValueError(
            f"`command` must be `ssl-distill`, `fit`, options and ${{args}}, got {' '.join(command)};"
            " other macros of wandb are not known."
        )
    early = config.get("early_terminate") or {}
    return Sweep(
        config["method"],
        config["metric"]["name"],
        goal == "maximize",
        {name: _parameter(name, given) for name, given in config["parameters"].items()},
        command,
        early.get("min_iter"),
        early.get("eta", 3),
        config.get("run_cap"),
    )


def _parameter(name: str, given: Any) -> Parameter:
    """One entry of `parameters`, its distribution inferred as wandb does."""
    if not isinstance(given, dict):
        raise ValueError(f"`parameters.{name}` must have `value`, `values`, or `min` and `max`, got {given}.")
    if "values" in given or "value" in given:
        values = tuple(given["values"]) if "values" in given else (given["value"],)
        return Parameter("categorical" if "values" in given else "constant", values)
    low, high = given.get("min"), given.get("max")
    inferred = next((kind for kind, types in _INFERRED.items() if all(isinstance(v, types) for v in (low, high))), None)
    distribution = given.get("distribution", inferred)
    if low is None or high is None or distribution not in _RANGES:
        raise ValueError(
            f"`parameters.{name}` must have `value`, `values`, or `min` and `max` with one of the distributions"
            f" {', '.join(_RANGES)}, got {given}."
        )
    if not low < high or ("log_" in distribution and low <= 0):
        raise ValueError(f"`parameters.{name}` must have min < max, and both positive for logarithms, got {given}.")
    step = given.get("q", 1.0) if distribution.startswith("q_") else None
    return Parameter(distribution, (), low, high, step)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
