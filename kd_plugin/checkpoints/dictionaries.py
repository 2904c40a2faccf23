"""Dictionaries of checkpoints: read them, compare them, map one to another symbol by symbol."""

import os
import re
from collections import Counter
from typing import Container, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import yaml  # type: ignore
from fairseq.data import Dictionary

from ..errors import UserError
from .roles import Role

MISSING = -1
_TEACHER = Role("teacher")
_LONGEST_YAML = 1 << 16  # bytes
_PADDING_SYMBOL = re.compile(r"madeupword\d{4,}$")


class VocabularyError(UserError):
    """A vocabulary that cannot be read, or two that cannot be mapped onto each other."""


class Dictionaries(NamedTuple):
    """What a model was trained with, and where that was found: "from DIR", say."""

    source: Dictionary
    target: Dictionary
    origin: str


def read(path: str) -> Dictionary:
    """Read a ``dict.LANG.txt``.

    Raises:
        VocabularyError: it is not one.
    """
    try:
        return Dictionary.load(path)
    except Exception as error:  # fairseq's is a bare one for what is not UTF-8
        raise VocabularyError(
            f"{path}: cannot be read as a dictionary of fairseq-preprocess "
            f"({' '.join(str(error).split())[:300]})"
        ) from error


def name_of(side: str) -> str:
    """What messages call a dictionary.

    Args:
        side: what tells it from others, "source" say; "" where there are no others.
    """
    return f"{side} dictionary".lstrip()


def file_of(language: Optional[str]) -> str:
    """The file with the dictionary of a language; "" is text in no named language."""
    return "dict.txt" if language == "" else f"dict.{language}.txt"


def files(languages: Sequence[Optional[str]]) -> str:
    """The files with the dictionaries of a source and a target language, for messages."""
    return " and ".join(dict.fromkeys(map(file_of, languages)))


def named(folder: str) -> List[str]:
    """The names of all dictionaries' files in a folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if re.fullmatch(r"dict\..+\.txt", name))


def read_folder(
    folder: str, *names: Sequence[Optional[str]]
) -> Optional[Tuple[Dictionary, Dictionary]]:
    """The source and target ``dict.LANG.txt`` of a folder; None if there are none.

    Args:
        names: of both languages, and other ones that the files may have instead.

    Raises:
        VocabularyError: one cannot be read.
    """
    for languages in names:
        source, target = [os.path.join(folder, file_of(language)) for language in languages]
        if os.path.isfile(source) and os.path.isfile(target):
            return read(source), read(target)
    return None


def read_speech_folder(folder: str, configuration: str) -> Optional[Dictionary]:
    """The dictionary that a data folder's configuration of fairseq's speech tasks names; None if
    there is none.

    Args:
        configuration: the name of the YAML file, ``config.yaml`` mostly.

    Raises:
        VocabularyError: either cannot be read.
    """
    path, name = os.path.join(folder, os.path.basename(configuration)), file_of("")
    if os.path.isfile(path):
        try:
            with open(path, encoding="utf-8") as file:
                found = yaml.safe_load(file.read(_LONGEST_YAML)) or {}
            name = os.path.basename(found.get("vocab_filename", name))
        except Exception as error:  # of several kinds, on a file that is something else
            raise VocabularyError(
                f"{path}: cannot be read as the configuration of a speech task "
                f"({' '.join(str(error).split())[:300]})"
            ) from error
    path = os.path.join(folder, name)
    return read(path) if os.path.isfile(path) else None


def of_symbols(symbols: Sequence[str]) -> Dictionary:
    """A dictionary from its list of symbols, special symbols first; one may occur twice.

    Raises:
        VocabularyError: the list does not begin with fairseq's special symbols.
    """
    dictionary = Dictionary()
    if list(symbols[: dictionary.nspecial]) != dictionary.symbols:
        raise VocabularyError(
            "expected a list of symbols that begins with fairseq's special symbols "
            f"{', '.join(dictionary.symbols)}; it begins with {some(symbols, 4)}"
        )
    for symbol in symbols[dictionary.nspecial :]:
        dictionary.add_symbol(symbol, overwrite=True)
    return dictionary


def first(dictionary: Dictionary, size: int) -> Dictionary:
    """The first symbols of a dictionary, as one of its own.

    Raises:
        VocabularyError: they lack some of fairseq's special symbols.
    """
    return of_symbols(dictionary.symbols[:size])


def is_padding(symbol: str) -> bool:
    """Whether fairseq-preprocess added a symbol to round up a dictionary's size.

    Such symbols (``madeupword0000``, ...) never occur in data, so no other vocabulary needs them.
    """
    return _PADDING_SYMBOL.match(symbol) is not None


def lacking(symbols: Iterable[str], known: Container[str]) -> List[str]:
    """The symbols that are not known, padding symbols aside."""
    return [symbol for symbol in symbols if symbol not in known and not is_padding(symbol)]


def difference(mine: Dictionary, other: Dictionary) -> str:
    """Where another dictionary first differs from the data's; empty if it is the same."""
    if mine.symbols == other.symbols:
        return ""
    for i, (a, b) in enumerate(zip(mine.symbols, other.symbols)):
        if a != b:
            return f"symbol {i} is {a!r} in the data and {b!r} there"
    return f"it has {len(other)} symbols and the data's {len(mine)}; as far as both go, they agree"


def index_map(
    student: Sequence[str],
    teacher: Sequence[str],
    side: str = "target",
    role: Role = _TEACHER,
    needless: Container[str] = (),
    share: str = "",
) -> Optional[torch.Tensor]:
    """Where each student symbol stands in the teacher's vocabulary.

    Args:
        student: symbols by student index, special symbols included.
        teacher: symbols by teacher index. It may hold more symbols than the student.
        side: what tells them from other vocabularies, for messages; "" where there are no others.
        role: of the checkpoint with the second vocabulary, for messages.
        needless: symbols of the student's that the teacher may lack.
        share: how the student gets only symbols that the teacher knows, for messages.

    Returns:
        None when the two are the same in the same order; otherwise int64 of shape
        (len(student),): the teacher's index of each student symbol, ``MISSING`` for a padding or
        needless symbol that the teacher lacks.

    Raises:
        VocabularyError: the teacher lacks a student symbol, or one of two differing vocabularies
            holds a symbol twice.
    """
    if list(student) == list(teacher):
        return None
    for owner, symbols in (("student", student), (role.name, teacher)):
        twice = [symbol for symbol, n in Counter(symbols).items() if n > 1]
        if twice:
            raise VocabularyError(
                f"the {owner}'s {name_of(side)} holds {len(twice)} symbols more than once "
                f"({some(twice)}), so it cannot be mapped to the other one, which differs from it"
            )
    position = {symbol: i for i, symbol in enumerate(teacher)}
    unknown = [symbol for symbol in lacking(student, position) if symbol not in needless]
    if unknown:
        elsewhere = ""
        if role.data:
            elsewhere = f" If that is not its own, {role.data} names the folder of the right one."
        raise VocabularyError(
            f"the {role.name}'s {name_of(side)} ({len(teacher)} symbols) lacks {len(unknown)} of "
            f"the student's {len(student)}: {some(unknown)}.{elsewhere} Word-level distillation "
            f"needs a teacher that knows every symbol of the student. {share}".rstrip()
        )
    return torch.tensor([position.get(symbol, MISSING) for symbol in student], dtype=torch.long)


def some(symbols: Sequence[str], n: int = 8) -> str:
    shown = ", ".join(repr(symbol) for symbol in symbols[:n])
    return shown + (", ..." if len(symbols) > n else "")
