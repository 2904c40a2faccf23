"""How a weight or a temperature moves with the updates of training."""

import math
from typing import Callable, NamedTuple, Optional

from ..errors import UserError


class Schedule(NamedTuple):
    """A value at every update: ``start`` before the first, ``end`` from update ``steps`` on."""

    shape: str
    start: float
    end: float
    steps: int

    def __call__(self, update: Optional[int]) -> float:
        """The value after ``update`` updates; None (outside training) is after all of them."""
        if update is None or update >= self.steps:
            return self.end
        return self.start + (self.end - self.start) * _PROGRESS[self.shape](update / self.steps)


_PROGRESS = {
    "linear": lambda x: x,
    "cosine": lambda x: (1 - math.cos(math.pi * x)) / 2,  # Loshchilov & Hutter 2017, eq. 5
}


def constant(value: float) -> Schedule:
    return Schedule("linear", value, value, 0)


def parse(text: str, flag: str, valid: Callable[[float], bool], expected: str) -> Schedule:
    """``linear:FROM:TO:STEPS`` or ``cosine:FROM:TO:STEPS``.

    Args:
        valid: whether the scheduled thing can have the value FROM or TO; ``expected`` says it.

    Raises:
        UserError: anything else; names ``flag``.
    """
    parts = text.split(":")
    try:
        if len(parts) != 4 or parts[0] not in _PROGRESS:
            raise ValueError
        schedule = Schedule(parts[0], float(parts[1]), float(parts[2]), int(parts[3]))
        if schedule.steps < 1 or not (valid(schedule.start) and valid(schedule.end)):
            raise ValueError
    except ValueError:
        raise UserError(
            f"{flag} must be constant, linear:FROM:TO:STEPS or cosine:FROM:TO:STEPS with FROM and "
            f"TO {expected} and STEPS >= 1, got {text!r}"
        ) from None
    return schedule
