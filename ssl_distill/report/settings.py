"""How the runs were set up: configuration, command, machine."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from ssl_distill.report.names import DASH
from ssl_distill.report.recipe import Difference, differences_between, differences_from_recipe
from ssl_distill.report.runs import Run


class Recipe(NamedTuple):
    """What a run was started with.

    Attributes:
        paths: The recipe's files.
        differences: What the run had otherwise; None if the recipe was not recorded.
    """

    paths: list[str]
    differences: list[Difference] | None


class Configuration(NamedTuple):
    """What the section shows.

    Attributes:
        recipes: Of every run.
        between: Values of all runs by key, where they differ.
        whole: The resolved config of every run, as YAML.
    """

    recipes: list[Recipe]
    between: dict[str, list[Any]]
    whole: list[str]


class Environment(NamedTuple):
    """What the section shows.

    Attributes:
        commands: Of every run, one per start.
        names: Of the facts, in order.
        facts: Machine and versions by number of the run, of those that recorded them.
    """

    commands: list[list[str]]
    names: list[str]
    facts: dict[int, dict[str, Any]]


def configuration(runs: Sequence[Run]) -> Configuration:
    """What differs from the recipe, what differs between the runs, and the whole."""
    return Configuration(
        [Recipe([each["path"] for each in _first_configs(run)], differences_from_recipe(run)) for run in runs],
        differences_between(runs),
        [yaml.safe_dump(run.config, sort_keys=False) for run in runs],
    )


def environment(runs: Sequence[Run]) -> Environment:
    """The commands of every run, and a table of machines and versions."""
    commands = []
    for run in runs:
        again = f"ssl-distill fit -c {shlex.quote(str(run.folder / 'config.yaml'))}"
        commands.append([_an_option_a_line(start["command"]) for start in run.starts] or [_an_option_a_line(again)])
    recorded = {i: dict(_facts(run.starts[-1])) for i, run in enumerate(runs) if run.starts}
    names = list(dict.fromkeys(name for of_run in recorded.values() for name in of_run))
    return Environment(
        commands, names, {i: {name: of_run.get(name, DASH) for name in names} for i, of_run in recorded.items()}
    )


def _first_configs(run: Run) -> list[dict[str, str]]:
    return list(run.starts[0]["configs"]) if run.starts else []


def _an_option_a_line(command: str) -> str:
    """A command for a shell."""
    words = [shlex.quote(word) for word in shlex.split(command)]
    return " ".join(f"\\\n  {word}" if word.startswith("-") else word for word in words)


def _facts(start: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    commit = start["commit"] or ""
    yield "ssl-distill", start["version"] + (f", commit {commit.rstrip('+')}" if commit else "")
    if commit.endswith("+"):
        yield "sources", "changed since that commit"
    yield "machine", f"{start['processor']}; {start['platform']}"
    yield "accelerators", ", ".join(start["accelerators"]) or "none"
    yield "processes", start["processes"]
    yield "threads", start["threads"]
    yield "Python", start["python"]
    yield "packages", ", ".join(f"{name} {version}" for name, version in start["packages"].items())
