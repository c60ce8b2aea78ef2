"""The log of a run as one table."""

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from ssl_distill.callbacks.atomic import replacing
from ssl_distill.callbacks.metrics_table import read_metrics


class MetricsFile(Logger):
    """Logger that writes `metrics.csv` into a folder, each row at once, so that a killed run keeps what it logged.

    What is logged again for the same step, as an evaluation that a resumed run repeats, is dropped.

    Deviation: Lightning's CSVLogger deletes the file of the run that is resumed, and writes only every 100th step.

    Args:
        folder: Where to write.
        from_step: Rows at and after this step are dropped: 0 for a new run, the checkpoint's step for a resumed one,
            which logs the later steps again.
    """

    def __init__(self, folder: str | Path, from_step: int = 0) -> None:
        super().__init__()
        self.path = Path(folder) / "metrics.csv"
        self.from_step = from_step
        self._columns: list[str] | None = None
        self._latest: tuple[int, list[set[str]]] = (-1, [])  # step, and the keys of each of its rows

    @property
    def name(self) -> None:
        """None: the folder is the run's own."""

    @property
    def version(self) -> None:
        """None, as `name`."""

    @property
    def save_dir(self) -> str:
        """The folder."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder has a `config.yaml`."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        if self._columns is None:
            kept = [row for row in read_metrics(self.path) if row["step"] < self.from_step]
            self._rewrite(kept, ["step", *metrics])
            for each in kept:
                self._is_new(each)
        row: dict[str, float] = {"step": -1 if step is None else step, **metrics}
        if not self._is_new(row):
            return
        assert self._columns is not None
        if not row.keys() <= set(self._columns):
            self._rewrite(read_metrics(self.path), [*self._columns, *metrics])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    def _is_new(self, row: dict[str, float]) -> bool:
        """Whether its step has no row of the same keys yet."""
        step, keys = int(row["step"]), set(row)
        if step != self._latest[0]:
            self._latest = (step, [])
        if keys in self._latest[1]:
            return False
        self._latest[1].append(keys)
        return True

    def _rewrite(self, rows: list[dict[str, float]], columns: list[str]) -> None:
        self._columns = list(dict.fromkeys([*columns, *(key for row in rows for key in row)]))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns)
            writer.writeheader()
            writer.writerows(rows)
