"""What the benches share: paired times and added peak memory."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


def paired_times(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every side, which take turns; a first turn of each is left out."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start = time.process_time()
            side()
            if turn:
                times[name].append(time.process_time() - start)
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the paired quotients."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def spread(seconds: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(seconds):10.4f}{min(seconds):10.4f}{max(seconds):10.4f}"


def added_peak_mib(make: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """MiB that calling what `make(*arguments)` returns adds to the peak of a process of its own (Linux only)."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_added_peak, args=(sender, make, *arguments))
    process.start()
    sender.close()  # so that a child that fails ends the waiting
    try:
        mebibytes: float = receiver.recv()
    finally:
        process.join()
    return mebibytes


def _added_peak(answer: Connection, make: Callable[..., Callable[[], object]], *arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    work = make(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of imports and of making the inputs
    before = _memory_kib("VmRSS")
    work()
    answer.send((_memory_kib("VmHWM") - before) / 1024)


def _memory_kib(entry: str) -> int:
    """Resident size (VmRSS) or its peak (VmHWM) of this process."""
    return next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith(entry))
