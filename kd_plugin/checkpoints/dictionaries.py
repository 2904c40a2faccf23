"""Compare a teacher's vocabulary with a student's, symbol by symbol."""

import re
from collections import Counter
from typing import List, Optional, Sequence

import torch
from fairseq.data import Dictionary

from ..errors import UserError

# fairseq pads a dictionary to a multiple of 8 with these; they never occur in data
_PADDING_SYMBOL = re.compile(r"madeupword\d{4,}$")
MISSING = -1


class VocabularyError(UserError):
    """A vocabulary that cannot be read, or two that cannot be mapped onto each other."""


def read(path: str) -> Dictionary:
    """A ``dict.LANG.txt``.

    Raises:
        VocabularyError: it is none.
    """
    try:
        return Dictionary.load(path)
    except Exception as error:  # fairseq's is a bare one for what is not UTF-8
        raise VocabularyError(
            f"{path}: cannot be read as a dictionary of fairseq-preprocess "
            f"({' '.join(str(error).split())[:300]})"
        ) from error


def index_map(
    student: Sequence[str], teacher: Sequence[str], side: str = "target"
) -> Optional[torch.Tensor]:
    """Where each student symbol stands in the teacher's vocabulary.

    Args:
        student: symbols by student index, special symbols included.
        teacher: symbols by teacher index. It may hold more symbols than the student.
        side: "source" or "target", for messages.

    Returns:
        None when the two are the same in the same order; otherwise int64 of shape
        (len(student),): the teacher's index of each student symbol, ``MISSING`` for one of
        fairseq's padding symbols (``madeupword0000``, ...) that the teacher lacks.

    Raises:
        VocabularyError: the teacher lacks a student symbol, or a symbol stands in one of two
            differing vocabularies twice.
    """
    if list(student) == list(teacher):
        return None
    for owner, symbols in (("student", student), ("teacher", teacher)):
        twice = [symbol for symbol, n in Counter(symbols).items() if n > 1]
        if twice:
            raise VocabularyError(
                f"the {owner}'s {side} dictionary holds {len(twice)} symbols more than once "
                f"({_some(twice)}), so it cannot be mapped to the other one, which differs from it"
            )
    position = {symbol: i for i, symbol in enumerate(teacher)}
    lacking = [s for s in student if s not in position and not _PADDING_SYMBOL.match(s)]
    if lacking:
        raise VocabularyError(
            "the teacher's {side} dictionary ({theirs} symbols) lacks {n} of the student's {ours}: "
            "{some}. Word-level distillation needs a teacher that knows every {side} symbol of the "
            "student: binarise the student's data with the teacher's dictionary "
            "(fairseq-preprocess --srcdict/--tgtdict) and its subword model, or point "
            "--teacher-data at the teacher's own dictionaries if these are not they. "
            "Sequence-level distillation needs no shared vocabulary.".format(
                side=side,
                theirs=len(teacher),
                n=len(lacking),
                ours=len(student),
                some=_some(lacking),
            )
        )
    return torch.tensor([position.get(symbol, MISSING) for symbol in student], dtype=torch.long)


def _some(symbols: List[str], n: int = 8) -> str:
    shown = ", ".join(repr(symbol) for symbol in symbols[:n])
    return shown + (", ..." if len(symbols) > n else "")
