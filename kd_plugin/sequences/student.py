"""Whom the data is for: the student's dictionaries, and how its text is cut into subwords."""

from typing import Any, Callable, NamedTuple, Optional, Tuple

import sentencepiece

from ..checkpoints import lacking
from ..decoding.databin import DataBin
from ..files import FileError


class Student(NamedTuple):
    """What the data is written for.

    Attributes:
        data: its dictionaries, and what is carried over.
        to_text: from the teacher's subwords to running text.
        recode: from running text to its own subwords; None if they are the teacher's.
    """

    data: DataBin
    to_text: Callable[[str], str]
    recode: Optional[Callable[[str], str]]


def open_student(
    teachers: DataBin,
    to_text: Callable[[str], str],
    folder: Optional[str] = None,
    subword_model: Optional[str] = None,
    langs: Optional[Tuple[str, str]] = None,
) -> Student:
    """A student of its own data-bin, or one that shares the teacher's.

    Args:
        teachers: the data-bin that the teacher reads.
        to_text: from the teacher's subwords to running text.
        folder: the student's data-bin, if it has other dictionaries.
        subword_model: the student's SentencePiece model.
        langs: what that data-bin calls the languages, if not as the teacher's does.

    Raises:
        FileError: one of these cannot be read, or the dictionaries do not go together.
    """
    if folder is None:
        return Student(teachers, to_text, None)
    own = DataBin(folder, *(langs or teachers.langs), renamed="--student-langs {}")
    if "valid" not in own.splits():
        raise FileError(
            f"--student-data {folder}: expected a folder of fairseq-preprocess with a valid "
            "subset; it is carried over"
        )
    if subword_model is not None:
        return Student(own, to_text, _encoder(subword_model))
    for theirs, mine, side in (
        (teachers.source, own.source, "source"),
        (teachers.target, own.target, "target"),
    ):
        unknown = lacking(theirs.symbols, mine.indices)
        if unknown:
            raise FileError(
                f"the {side} dictionary of --student-data lacks {len(unknown)} of the teacher's "
                f"symbols ({', '.join(map(repr, unknown[:5]))}, ...): give the student's "
                "SentencePiece model with --student-spm, so that the text is encoded anew"
            )
    return Student(own, to_text, None)


def _encoder(path: str) -> Callable[[str], str]:
    try:
        model: Any = sentencepiece.SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise FileError(
            f"--student-spm {path}: cannot be read as a SentencePiece model ({error})"
        ) from None
    return lambda text: " ".join(model.encode(text, out_type=str))
