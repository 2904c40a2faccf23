"""Time and memory: works timed in turns, progress of what takes long, memory of this process.

All that is compared is timed round after round, one work after the other, so that a machine that
slows down slows all of them down.
"""

import contextlib
import resource
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
from tqdm import tqdm


class Quartiles(NamedTuple):
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Quartiles":
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))


class Timings:
    """Seconds of several works, one of each per round."""

    def __init__(self, works: Dict[str, Callable[[], Any]], rounds: int, progress: str) -> None:
        self.seconds: Dict[str, List[float]] = {name: [] for name in works}
        # the first round warms up caches and allocators
        for measured in tqdm([False] + [True] * rounds, desc=progress, unit="round"):
            for name, work in works.items():
                start = _now()
                work()
                if measured:
                    self.seconds[name].append(_now() - start)

    def quartiles(self, name: str) -> Quartiles:
        return Quartiles.of(self.seconds[name])

    def ratio(self, name: str, *to: str) -> Quartiles:
        """Of the seconds to the sum of the others', round by round."""
        sums = [sum(parts) for parts in zip(*(self.seconds[other] for other in to))]
        return Quartiles.of([x / y for x, y in zip(self.seconds[name], sums)])


def progress_bar(
    total: Optional[int], description: str, unit: str, initial: int = 0, *, unit_scale: bool = False
) -> Any:
    """tqdm's, to be used as a context: updated often on a terminal, seldom in a log file.

    Args:
        total: None if nobody knows.
        unit: what is counted, in the plural.
        initial: how many are done already.
        unit_scale: write large numbers as 1.23M.
    """
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )


def memory(name: str) -> Optional[int]:
    """Bytes of this process's memory, by the name in Linux's ``/proc/self/status``: ``VmRSS``, say.

    None where the system does not count it.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name + ":"):
                return int(line.split()[1]) * 1024
    return None


def peak_memory() -> int:
    """The most bytes of memory that this process has had at one time."""
    peak = memory("VmHWM")  # Linux's getrusage also counts what the process was forked from
    if peak is None:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return peak


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
