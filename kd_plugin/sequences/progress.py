"""Progress of what takes long."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, what: str, done: int = 0) -> Any:
    """In sentences; often on a terminal, seldom in a log file."""
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit="sentences",
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
