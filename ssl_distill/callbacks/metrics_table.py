"""The table of what was logged, read without importing anything heavy."""

import csv
from pathlib import Path


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """Rows of a `metrics.csv`, each with the numbers it has; none if there is no such file."""
    if not Path(path).exists():
        return []
    with Path(path).open(newline="") as file:
        rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]
    return [{**row, "step": int(row["step"])} for row in rows]
