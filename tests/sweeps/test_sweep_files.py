"""Every file of configs/sweeps is one of wandb's, and every command line that it makes is one of ours.

wandb_schema.json is the schema of wandb's own package `sweeps` 0.3.0, under its licence beside it.
"""

import json
import re
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from parsed_only import ParsedOnly

from ssl_distill.commands.methods import list_methods
from ssl_distill.commands.quiet import without_advice
from ssl_distill.sweeps.file import read_sweep

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("configs/sweeps/*.yaml"))


@pytest.fixture(scope="module")
def command_line():
    with without_advice(), ExitStack() as stack:
        yield ParsedOnly(["fit", "--model", "DINO", "--data", "ShapesData"], stack)


def named(value):
    """A function by the name that sweep files call it by; anything else as it is."""
    return f"{value.__module__}.{value.__qualname__}" if callable(value) else value


def corners(sweep):
    """One set of values for every choice, and for both ends of every range, the others at their first."""
    ends = {name: each.values or (each.low, each.high) for name, each in sweep.parameters.items()}
    first = {name: values[0] for name, values in ends.items()}
    yield first
    for name, values in ends.items():
        for value in values[1:]:
            yield {**first, name: value}


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_wandb_takes_the_file(file):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(
        yaml.safe_load(file.read_text()), json.loads(Path(__file__).with_name("wandb_schema.json").read_text())
    )


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_our_cli_takes_every_command_line(file, command_line, monkeypatch):
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(file)
    for values in corners(sweep):
        section = command_line.parse(*sweep.fit_arguments(values))
        assert {name: named(section[name]) for name in values} == values


def test_every_method_has_one():
    swept = {
        Path(next(word for word in read_sweep(file).command if word.startswith("configs/"))).parent.name
        for file in FILES
    }
    assert {method.class_path.split(".")[-2] for method in list_methods()} <= swept


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_objectives(file):
    """Without labels unless the file says that its data have some; always one that is ended early."""
    sweep = read_sweep(file)
    assert sweep.maximize
    assert sweep.min_iter
    encoder, metric = sweep.metric.split("/")[1:]
    assert encoder in ("teacher", "student", "cnn", "lidar")
    assert (metric == "rankme") == ("labels, so" not in file.read_text() and "have labels" not in file.read_text())


GOOD = {
    "method": "random",
    "metric": {"name": "val/score", "goal": "maximize"},
    "parameters": {"a.b": {"values": [1, 2]}},
    "command": ["${env}", "ssl-distill", "fit", "${args}"],
}


def test_defaults_are_those_of_wandb(tmp_path):
    config = {**GOOD, "metric": {"name": "train/loss"}, "parameters": {
        "whole": {"min": 1, "max": 3}, "real": {"min": 0.1, "max": 3}, "fixed": {"value": [1, 2]},
        "coarse": {"min": 0.0, "max": 1.0, "distribution": "q_uniform", "q": 0.25},
    }}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config))
    sweep = read_sweep(tmp_path / "sweep.yaml")
    assert not sweep.maximize
    assert sweep.min_iter is None
    assert {name: each.distribution for name, each in sweep.parameters.items()} == {
        "whole": "int_uniform", "real": "uniform", "fixed": "constant", "coarse": "q_uniform",
    }  # fmt: skip
    assert sweep.parameters["coarse"].step == 0.25
    assert sweep.fit_arguments({"whole": 2, "fixed": [1, 2], "name": "x y", "on": True, "none": None}) == [
        "--whole=2", "--fixed=[1, 2]", "--name=x y", "--on=true", "--none=null",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "custom"}, "`method` must be one of bayes, random, grid, got custom"),
        ({"metric": {"goal": "maximize"}}, "`metric` must have a `name`"),
        ({"metric": {"name": "x", "goal": "up"}}, "`metric.goal` must be maximize or minimize, got up"),
        ({"parameters": {}}, "`parameters` is missing"),
        ({"parameters": {"a": {"min": 1}}}, "`parameters.a` must have `value`, `values`, or `min` and `max`"),
        ({"parameters": {"a": {"min": 2, "max": 1}}}, "`parameters.a` must have min < max"),
        ({"parameters": {"a": {"distribution": "normal", "mu": 0}}}, "`parameters.a` must have"),
        (
            {"parameters": {"a": {"distribution": "log_uniform_values", "min": 0, "max": 1}}},
            "both positive for logarithms",
        ),
        ({"command": ["python", "train.py", "${args}"]}, "`command` must be `ssl-distill`, `fit`, options and"),
        ({"command": ["ssl-distill", "fit", "${args_json}"]}, "`command` must be `ssl-distill`, `fit`, options and"),
    ],
)
def test_errors(change, message, tmp_path):
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**GOOD, **change}))
    with pytest.raises(ValueError, match=re.escape(message)):
        read_sweep(tmp_path / "sweep.yaml")


def test_errors_of_files(tmp_path):
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "no.yaml").write_text("a: {")
    for name, message in {"list": "must be a mapping", "no": "is no YAML", "none": "does not exist"}.items():
        with pytest.raises(ValueError, match=message):
            read_sweep(tmp_path / f"{name}.yaml")
