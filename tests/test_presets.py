"""Presets that name a paper have the numbers that the pages of their methods say."""

import json
import re
from contextlib import ExitStack
from typing import NamedTuple

import pytest
from parsed_only import ParsedOnly
from preset_numbers import ROOT, arguments, numbers_of, presets

from ssl_distill.commands.quiet import without_advice

PRESETS = {str(path.relative_to(ROOT)): path for path in presets()}
SECTION = re.compile(
    r"^### `(configs/\S+\.yaml)`\n\n(?:All else as `(\S+)`\.\n\n)?\| number .*\n\|[-|]+\n((?:\|.*\n?)*)", re.M
)


class Row(NamedTuple):
    """A number of a table."""

    number: str
    paper: str
    official: str
    ours: str
    where: str


def value(cell):
    """What a cell says before any reason: a number or list, or else its words."""
    words = cell.partition(";")[0].strip()
    try:
        return json.loads(words)
    except ValueError:
        return words


def tables():
    """Rows of every preset by their place in the config; a table may stand on another one."""
    own, bases = {}, {}
    for page in sorted(ROOT.glob("docs/methods/*.md")):
        for name, base, rows in SECTION.findall(page.read_text()):
            found = [Row(*(cell.strip() for cell in line.strip("|").split("|"))) for line in rows.splitlines()]
            assert name not in own, f"{name} has two tables"
            own[name] = {row.where.strip("`"): row for row in found}
            assert len(own[name]) == len(found), f"{page.name} says a number of {name} twice"
            bases[name] = base

    def whole(name):
        return {**(whole(bases[name]) if bases[name] else {}), **own[name]}

    return {name: {where: row for where, row in whole(name).items() if row.ours != "none"} for name in own}


TABLES = tables()


def equal(ours, theirs):
    if isinstance(ours, list) and isinstance(theirs, list):
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    if isinstance(ours, bool) or isinstance(theirs, bool) or isinstance(ours, str) or isinstance(theirs, str):
        return type(ours) is type(theirs) and ours == theirs
    return not isinstance(ours, list) and not isinstance(theirs, list) and ours == pytest.approx(theirs, rel=1e-4)


@pytest.fixture(scope="module")
def resolved():
    with without_advice(), ExitStack() as stack:
        command_line = ParsedOnly(["fit", "--model", "DINO", "--data", "ShapesData"], stack)
        return {name: numbers_of(command_line.parse(*arguments(path))) for name, path in PRESETS.items()}


def test_every_preset_has_a_table():
    assert len(PRESETS) > 20
    assert TABLES.keys() == PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_numbers_are_those_of_the_table(name, resolved):
    """All of them, defaults and parts inside of parts included, and no others."""
    said, found = TABLES[name], resolved[name]
    assert not found.keys() - said.keys(), "numbers without a row"
    assert not said.keys() - found.keys(), "rows without a number"
    different = {
        where: (found[where], row.ours) for where, row in said.items() if not equal(found[where], value(row.ours))
    }
    assert not different, "resolved config, and what the table says"


@pytest.mark.parametrize("name", PRESETS)
def test_deviations_have_a_reason(name):
    """A number that the official code has otherwise is no accident."""
    for row in TABLES[name].values():
        official, ours = value(row.official), value(row.ours)
        if row.official not in ("-", "same") and isinstance(official, str) == isinstance(ours, str):
            assert equal(official, ours) or ";" in row.ours, row
