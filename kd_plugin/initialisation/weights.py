"""A student's weights out of its teacher's."""

import re
from typing import Dict, List, Mapping, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from ..checkpoints import (
    MISSING,
    SECOND_COPIES,
    VocabularyError,
    index_map,
    lacking,
    name_of,
    some,
)

_LAYER = re.compile(r"(encoder|decoder)\.layers\.(\d+)\.(.+)")


class Rows(NamedTuple):
    """Where the symbols of one side of a student stand among its teacher's.

    Attributes:
        places: int64 of shape (student's symbols,), ``MISSING`` for those that the teacher lacks;
            None where the two dictionaries are the same.
        new: symbols that the teacher lacks, padding symbols aside.
        symbols, teachers: how many there are.
    """

    places: Optional[Tensor]
    new: List[str]
    symbols: int
    teachers: int

    @classmethod
    def of(cls, side: str, mine: Sequence[str], theirs: Sequence[str], allowed: bool) -> "Rows":
        """Args:
            side: as of ``name_of``.
            mine, theirs: the student's and the teacher's symbols.
            allowed: whether the teacher may lack some.

        Raises:
            VocabularyError: it lacks some and may not, or one of two differing dictionaries holds a
                symbol twice.
        """
        new = lacking(mine, set(theirs))
        if new and not allowed:
            raise VocabularyError(
                f"the teacher's {name_of(side)} ({len(theirs)} symbols) lacks {len(new)} of the "
                f"student's {len(mine)}: {some(new)}. --new-symbols random starts their embeddings "
                "as fairseq would"
            )
        places = index_map(mine, theirs, side, needless=set(new))
        return cls(places, new, len(mine), len(theirs))

    @property
    def random(self) -> int:
        """How many rows are not the teacher's."""
        return 0 if self.places is None else int((self.places == MISSING).sum())

    def taken(self, teacher: Tensor, start: Optional[Tensor]) -> Tensor:
        """The student's table.

        Args:
            teacher: (teacher's symbols, ...).
            start: (student's symbols, ...): what rows of symbols are that the teacher lacks.
        """
        if self.places is None:
            return teacher
        rows = teacher[self.places.clamp(min=0)]
        absent = self.places == MISSING
        if start is not None:
            rows[absent] = start[absent].to(rows.dtype)
        return rows


def chosen(
    teacher: Mapping[str, Tensor],
    layers: Mapping[str, Sequence[int]],
    tables: Mapping[str, Rows],
    start: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> Dict[str, Tensor]:
    """The weights of a student that is made of some of its teacher's layers.

    Args:
        teacher: its weights, as its model names them.
        layers: of "encoder" and "decoder", those to take, in the student's order.
        tables: by weight's name, the rows of those that have one for each symbol.
        start: an untrained student's weights; only needed where tables have rows of their own.
    """
    found: Dict[str, Tensor] = {}
    for name, weight in teacher.items():
        if SECOND_COPIES.search(name):
            continue
        if weight.is_floating_point():
            weight = weight.to(dtype)
        part = _LAYER.fullmatch(name)
        if part:
            for i, layer in enumerate(layers[part[1]]):
                if layer == int(part[2]):
                    found[f"{part[1]}.layers.{i}.{part[3]}"] = weight
        elif name in tables:
            found[name] = tables[name].taken(weight, start.get(name))
        else:
            found[name] = weight
    return found


def describe(side: str, rows: Rows) -> str:
    """For the user, what became of a dictionary; "source", "target" or, of the only one, ""."""
    named = name_of(side)
    if rows.places is None:
        return f"{named}: the teacher's {rows.symbols:,} symbols"
    line = f"{named}: {rows.symbols:,} symbols; the teacher has {rows.teachers:,}"
    padding = rows.random - len(rows.new)
    if rows.new:
        line += f", lacks {len(rows.new):,} of them, which start at random: {some(rows.new)}"
    if padding:
        line += f"; {padding:,} that are padding (madeupword...) start at random"
    return line
