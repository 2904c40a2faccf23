"""Works timed in turns, and how numbers that were measured several times are summed up.

All that is compared is timed round after round, one work after the other, so that a machine that
slows down slows all of them down.
"""

import time
from typing import Any, Callable, Dict, List, NamedTuple, Sequence

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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
