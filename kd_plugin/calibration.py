"""Whether probabilities come true: the expected calibration error (Guo et al. 2017, eq. 3)."""

import numpy as np

BINS = 10


def gaps(expected: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Sums, by bins of what was expected, of how much it is above what was found.

    Those of several parts of the data can be added.

    Args:
        expected: probabilities, (n,).
        found: what came of them, (n,): whether it was so, or a probability, too.

    Returns:
        (10,); the error is ``error(gaps, n)``.
    """
    which = np.minimum(expected * BINS, BINS - 1).astype(int)
    return np.bincount(which, expected - found, minlength=BINS)


def error(found: np.ndarray, n: int) -> float:
    """The expected calibration error of n values, of whose ``gaps`` this is the sum."""
    return float(np.abs(found).sum() * (1 / max(n, 1)))
