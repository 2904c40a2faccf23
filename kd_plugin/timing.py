"""How numbers that are measured several times are told."""

from typing import NamedTuple, Sequence

import numpy as np


class Spread(NamedTuple):
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        low, median, high = np.percentile(values, (25, 50, 75))
        return cls(float(median), float(low), float(high))
