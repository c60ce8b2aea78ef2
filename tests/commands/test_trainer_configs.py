"""Files of configs/trainer, chained after recipes."""

from contextlib import ExitStack
from pathlib import Path

import pytest
from parsed_only import ParsedOnly

from ssl_distill.commands.quiet import without_advice

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("configs/trainer/*.yaml"))


@pytest.fixture(scope="module")
def command_line():
    with without_advice(), ExitStack() as stack:
        yield ParsedOnly(["fit", "--model", "DINO", "--data", "ShapesData"], stack)


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", ["dino/fashion_mnist", "dbot/fashion_mnist"])
def test_they_say_where_and_nothing_else(recipe, file, command_line):
    """Whatever machine a recipe was written for; what is learned stays as it was."""
    recipe_file = str(ROOT / f"configs/{recipe}.yaml")
    written = command_line.parse("-c", recipe_file)
    chained = command_line.parse("-c", recipe_file, "-c", str(file))
    where = ("accelerator", "devices", "num_nodes", "strategy", "precision", "sync_batchnorm")
    assert all(chained.trainer[key] is not None for key in where)
    for key in where:
        written.trainer.pop(key)
        chained.trainer.pop(key)
    assert {**written, "config": None} == {**chained, "config": None}


def test_strategies(command_line):
    parts = ("--model", "DINO", "--data", "ShapesData")
    strategies = {file.stem: command_line.parse(*parts, "-c", str(file)).trainer.strategy for file in FILES}
    assert strategies.pop("fsdp").class_path == "ssl_distill.sharded_strategy.ShardedStrategy"
    assert strategies == {"cpu": "auto", "gpu1": "auto", "ddp": "ddp", "ddp_nodes": "ddp"}
