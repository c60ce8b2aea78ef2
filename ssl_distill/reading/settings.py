"""YAML files as plain values."""

from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: Path) -> Any:
    """What a file says.

    Raises:
        ValueError: As in `parse_yaml`.
    """
    return parse_yaml(path.read_bytes(), path)


def parse_yaml(text: str | bytes, where: str | Path) -> Any:
    """Lists, dicts, text, numbers and dates; nothing is made of a tag that names a class of Python.

    Args:
        text: Of a file.
        where: The file, for messages.

    Raises:
        ValueError: If it is no YAML, or holds anything else.
    """
    try:
        return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where} is no YAML of plain values: {error.problem}{line}.") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is no YAML of plain values: {' '.join(str(error).split())}.") from error
