"""How the config of a run differs from its recipe, and from those of other runs."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ssl_distill.reading.settings import parse_yaml
from ssl_distill.report.names import DASH
from ssl_distill.report.runs import Run

_WHERE = ("trainer.default_root_dir",)  # two runs always differ in it, and it changes nothing


class Difference(NamedTuple):
    """One argument that a run was given otherwise.

    Attributes:
        key: Dotted, without `init_args`.
        recipe: What the recipe's files say; None where they say nothing and the default was overridden.
        run: What the run had.
    """

    key: str
    recipe: Any
    run: Any


def differences_from_recipe(run: Run) -> list[Difference] | None:
    """Arguments that differ from the files that the run was started with; None if these were not recorded."""
    if not run.starts or not run.starts[0]["configs"]:
        return None
    recipe: dict[str, Any] = {}
    for config in run.starts[0]["configs"]:
        recipe |= dict(_flat(parse_yaml(config["text"], run.folder / "environment.json") or {}))
    resolved = dict(_flat(run.config))
    given = set(_given(run.starts[0]["command"]))
    keys = [key for key in resolved if key in recipe or any(key == g or key == f"{g}.class_path" for g in given)]
    return [
        Difference(key, recipe.get(key), resolved[key])
        for key in keys
        if key not in _WHERE and (key not in recipe or not _same(recipe[key], resolved[key]))
    ]


def differences_between(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """By key the values of all runs, where they are not the same; a dash where a run has no such argument."""
    configs = [dict(_flat(run.config)) for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [config.get(key, DASH) for config in configs] for key in keys if key not in _WHERE}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def _flat(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, without the level `init_args`."""
    if isinstance(config, dict) and config:
        for key, value in config.items():
            inner = prefix if key == "init_args" and prefix else f"{prefix}.{key}" if prefix else str(key)
            yield from _flat(value, inner)
    else:
        yield prefix, config


def _given(command: str) -> Iterator[str]:
    """Keys of the options of a command line."""
    for word in shlex.split(command):
        if word.startswith("--"):
            yield word[2:].partition("=")[0].replace(".init_args.", ".")


def _same(recipe: Any, resolved: Any) -> bool:
    """Whether a value is what a file says: YAML takes 1e-3 for a word, and class names may be short."""
    if isinstance(recipe, str) and isinstance(resolved, str):
        return recipe == resolved or resolved.endswith(f".{recipe}")
    if isinstance(recipe, str) and isinstance(resolved, (int, float)):
        try:
            return float(recipe) == resolved
        except ValueError:
            return False
    if isinstance(recipe, list) and isinstance(resolved, list):
        return len(recipe) == len(resolved) and all(map(_same, recipe, resolved))
    return bool(recipe == resolved)
