"""Which of a teacher's layers a student is made of."""

import re
from typing import List, Optional, Sequence, Tuple

from ..errors import UserError


def parse_layers(text: str, flag: str) -> List[int]:
    """Layers that a flag lists, the first one being 0: ``0,2,5``.

    Raises:
        UserError: it is no such list.
    """
    if not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise UserError(
            f"{flag} {text}: expected the teacher's layers, counted from 0, with commas between: "
            "0,2,5 say"
        )
    return [int(part) for part in text.split(",")]


def parse_counts(text: str, sides: Sequence[str]) -> Tuple[int, ...]:
    """How many layers each side of a student has: ``6:3``, or ``3`` of a decoder alone.

    Raises:
        UserError: they are no such numbers, or not one for each side.
    """
    counts = text.split(":")
    if not all(re.fullmatch(r"[0-9]{1,6}", one) for one in counts) or len(counts) != len(sides):
        expected = "6:3 say" if len(sides) > 1 else "3 say, for there is no encoder"
        raise UserError(
            f"--layers {text}: expected how many layers the student's {' and '.join(sides)} "
            f"{'have' if len(sides) > 1 else 'has'}: {expected}"
        )
    return tuple(map(int, counts))


def evenly(count: int, layers: int) -> List[int]:
    """``count`` of so many layers, spread evenly; the first and the last are among them, and of two
    as near to an even step the lower one is taken. A single one is the first.

    Shleifer & Rush 2020, "Pre-trained Summarization Distillation", section 3: students made of a
    teacher's layers start best when these are spread over its whole depth.
    """
    if count == 1:
        return [0]
    gaps = count - 1
    # nearest to i (layers - 1) / gaps, halves down
    return [(2 * i * (layers - 1) + gaps - 1) // (2 * gaps) for i in range(count)]


def choose(
    side: str, layers: int, listed: Optional[Sequence[int]], count: Optional[int]
) -> List[int]:
    """A student's layers of one side; all of the teacher's where nothing is asked for.

    Args:
        side: "encoder" or "decoder".
        layers: that the teacher has.
        listed: which ones; ``count``: how many, instead.

    Raises:
        UserError: the teacher has no such layers.
    """
    has = f"the teacher's {side} has {layers} layer{'s' * (layers != 1)}"
    if count is not None:
        if not 1 <= count <= layers:
            raise UserError(f"--layers: expected 1 to {layers} for the {side}, got {count}; {has}")
        return evenly(count, layers)
    if listed is None:
        return [*range(layers)]
    unknown = [str(layer) for layer in listed if layer >= layers]
    if unknown:
        raise UserError(
            f"--{side}-layers: there is no layer {', '.join(unknown)}; {has}, 0 to {layers - 1}"
        )
    return [*listed]
