"""From a teacher's subwords and a student's text to the student's own vocabulary."""

import logging
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set

import numpy as np
from fairseq.data import Dictionary

from ..checkpoints import dictionaries as vocabulary
from ..errors import Faults
from ..files import FileError, differences, digest, naming, read_json, replacing, write_json
from .measure import Compared, Reading, compare, count
from .subwords import BYTE, NORMAL, USER_DEFINED, SubwordModel

logger = logging.getLogger(__name__)

MODEL, DICTIONARY, _RECORD = "spm.model", "dict.txt", "record.json"
_FEW_PIECES = 0.5  # of a dictionary's symbols, in the model that it is said to belong to
_MUCH_UNKNOWN = 0.05  # of a text's tokens
_NAMED = 8  # symbols in a message


class Asked(NamedTuple):
    """What is to be cut, and for which text.

    Attributes:
        spm: the teacher's SentencePiece model.
        dictionary: the teacher's dictionary, of fairseq; it knows pieces by their text.
        text: files that the student is trained on, a sentence in each line, both languages'.
        output: the folder to write.
        size: symbols that the student's dictionary may have, fairseq's own included; None for all
            that the text needs.
        min_count: how often the text must have a piece. Characters are kept in any case.
        all_characters: keep all characters that the model knows, not only those of the text.
        valid: files of other sentences, to measure on.
        overwrite: replace what this function made before with other settings.
    """

    spm: str
    dictionary: str
    text: Sequence[str]
    output: str
    size: Optional[int] = None
    min_count: int = 1
    all_characters: bool = False
    valid: Sequence[str] = ()
    overwrite: bool = False


def make(asked: Asked) -> Dict[str, Any]:
    """Write a SentencePiece model and a dictionary of the pieces that a text needs.

    All of them are pieces that the teacher's dictionary has, so that it can read whatever the new
    model writes, but for characters that were unknown before and bytes that its dictionary lacks.

    Returns:
        the record that stands beside them: ``summary_lines`` tells it to users.

    Raises:
        UserError: something does not fit. Nothing is written then, and what was there stays.
    """
    output = Path(asked.output)
    _refuse(asked)
    settings = _settings(asked)
    if _is_finished(output, settings, asked.overwrite):
        logger.info(f"{output} was made with these settings before: nothing is left to do")
        return read_record(output)
    model = SubwordModel.open(asked.spm, "--spm")
    teacher = vocabulary.read(asked.dictionary)
    symbols = _readable(model, teacher, asked)
    # What it is counted with writes no piece that the teacher lacks
    readable = _cut(model, symbols) if symbols < _writable(model) else model
    counts = count(readable, asked.text, "--text")
    written = {
        piece.text: int(n)
        for piece, n in zip(readable.pieces, counts)
        if n and piece.type in (NORMAL, USER_DEFINED)
    }
    bytes_known = symbols_of_bytes(model, teacher)
    keep = _choose(asked, model, symbols, written, len(bytes_known))
    cut = _cut(model, keep)
    whole = Reading.of(model, {*symbols, *bytes_known})
    other = Reading.of(cut, {*keep, *bytes_known})
    on_text, after = compare(whole, other, asked.text, "--text")
    measured = {"text": on_text._asdict()}
    if asked.valid:
        measured["valid"] = compare(whole, other, asked.valid, "--valid")[0]._asdict()
    student = _dictionary(cut, after, {*keep, *bytes_known}, teacher)
    with replacing(output, overwrite=True) as new:
        new.mkdir(parents=True)
        with naming(new):
            (new / MODEL).write_bytes(cut.content)
            student.save(str(new / DICTIONARY))
        vocabulary.index_map(
            vocabulary.read(str(new / DICTIONARY)).symbols, teacher.symbols, "joined"
        )
        record = {
            "settings": settings,
            "symbols": len(student),
            "teacher_symbols": len(teacher),
            "pieces": len(cut.pieces),
            "teacher_pieces": len(model.pieces),
            "characters_left_out": sum(len(piece) == 1 for piece in symbols - keep),
            "bytes_unknown": len(model.texts(BYTE)) - len(bytes_known),
            "measured": measured,
            "files": {name: digest(str(new / name)) for name in (MODEL, DICTIONARY)},
        }
        write_json(new / _RECORD, record)
    return record


def summary_lines(record: Dict[str, Any], folder: Path) -> List[str]:
    """What a user wants to know of a vocabulary that was made."""
    lines = [
        f"{folder}: {record['symbols']:,} of the teacher's {record['teacher_symbols']:,} symbols "
        f"in {DICTIONARY}, {record['pieces']:,} of {record['teacher_pieces']:,} pieces in {MODEL}"
    ]
    for name, values in sorted(record["measured"].items()):
        found = Compared(**values)
        examples = ""
        if found.examples:
            examples = f": {', '.join(map(repr, found.examples))}"
        lines.append(
            f"| {name}: {found.tokens:,} tokens, {found.differently / found.tokens:.2%} of them "
            f"cut differently now ({found.tokens_after:,} tokens); {found.unknown:,} unknown to "
            f"the dictionary, {found.unknown_before:,} before{examples}"
        )
    if record["characters_left_out"]:
        lines.append(
            f"| {record['characters_left_out']:,} characters that the teacher knows are not in the "
            "text, and left out: --all-characters keeps them"
        )
    if record["bytes_unknown"]:
        lines.append(
            f"| {record['bytes_unknown']:,} bytes, with which the model spells what it has no "
            "piece for, are not in the teacher's dictionary"
        )
    return lines


# What is asked


def _refuse(asked: Asked) -> None:
    """Raises:
    FileError: all that is wrong with the flags and the files.
    """
    faults = Faults()
    for flag, paths in (
        ("--spm", [asked.spm]),
        ("--dict", [asked.dictionary]),
        ("--text", asked.text),
        ("--valid", asked.valid),
    ):
        for path in paths:
            faults.check(os.path.isfile(path), f"{flag} {path}: no such file")
    faults.check(asked.text, "--text: expected at least one file")
    faults.check(
        asked.size is None or asked.size >= 1, f"--size must be 1 or more, got {asked.size}"
    )
    faults.check(asked.min_count >= 1, f"--min-count must be 1 or more, got {asked.min_count}")
    parent = Path(asked.output).resolve().parent
    faults.check(parent.is_dir(), f"--output {asked.output}: there is no folder {parent}")
    faults.raise_if_any(FileError)


def _settings(asked: Asked) -> Dict[str, Any]:
    """All that the result depends on: contents, not paths."""
    return {
        "spm": digest(asked.spm),
        "dict": digest(asked.dictionary),
        "text": [digest(path) for path in asked.text],
        "valid": [digest(path) for path in asked.valid],
        "size": asked.size,
        "min_count": asked.min_count,
        "all_characters": asked.all_characters,
    }


# What is there


def read_record(folder: Path) -> Dict[str, Any]:
    """Raises:
    FileError: it is not one of this command.
    """
    record = read_json(folder / _RECORD)
    try:
        summary_lines(record, folder)
        known = isinstance(record["settings"], dict) and isinstance(record["files"], dict)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        known = False
    if not known:
        raise FileError(f"{folder / _RECORD} is not a record of this command")
    return record


def _is_finished(output: Path, settings: Dict[str, Any], overwrite: bool) -> bool:
    """Whether what is asked for is there already.

    Raises:
        FileError: something else is there, which this command did not make or may not replace.
    """
    if not output.exists():
        return False
    if not output.is_dir():
        raise FileError(f"--output {output}: expected a folder, found a file")
    there = set(os.listdir(output))
    if not there:
        return False
    more = sorted(there - {MODEL, DICTIONARY, _RECORD})
    if more or _RECORD not in there:
        raise FileError(
            f"--output {output} holds files that this command did not write "
            f"({', '.join((more or sorted(there))[:_NAMED])}): choose another folder"
        )
    record = read_record(output)
    found = differences(settings, record["settings"], settings)
    for name in (MODEL, DICTIONARY):
        path = output / name
        if not path.is_file() or digest(str(path)) != record["files"].get(name):
            found.append(f"{name} is no longer what this command wrote")
    if found and not overwrite:
        raise FileError(
            f"--output {output} was made with other settings: {'; '.join(found)}. Choose another "
            "folder, or --overwrite"
        )
    return not found


# What is kept


def _writable(model: SubwordModel) -> Set[str]:
    return set(model.texts(NORMAL, USER_DEFINED))


def symbols_of_bytes(model: SubwordModel, teacher: Dictionary) -> Set[str]:
    """Of the pieces that stand for bytes, those that the teacher knows.

    SentencePiece wants all 256 or none, so all stay in the model.
    """
    return {text for text in model.texts(BYTE) if text in teacher.indices}


def _readable(model: SubwordModel, teacher: Dictionary, asked: Asked) -> Set[str]:
    """The pieces that the model may write and the teacher's dictionary has.

    Raises:
        FileError: the two do not belong together.
    """
    theirs = set(teacher.symbols) - set(Dictionary().symbols)  # which stand for something else
    theirs = {symbol for symbol in theirs if not vocabulary.is_padding(symbol)}
    found = _writable(model) & theirs
    strange = sorted(theirs - {piece.text for piece in model.pieces})
    if len(found) <= _FEW_PIECES * len(theirs):
        raise FileError(
            f"--dict {asked.dictionary} does not belong to --spm {asked.spm}: of its "
            f"{len(theirs):,} symbols only {len(found):,} are pieces of the model (not "
            f"{', '.join(map(repr, strange[:_NAMED]))}); expected the dictionary of a teacher "
            "whose text this model has cut"
        )
    logger.info(
        f"{model.type} model of {len(model.pieces):,} pieces; the dictionary knows "
        f"{len(found):,} of the {len(_writable(model)):,} that it writes"
    )
    if strange:
        names = ", ".join(map(repr, strange[:_NAMED]))
        logger.info(
            f"{len(strange):,} symbols of the dictionary are no pieces, and are left out: {names}"
            + (", ..." if len(strange) > _NAMED else "")
        )
    return found


def _choose(
    asked: Asked,
    model: SubwordModel,
    symbols: Set[str],
    written: Dict[str, int],
    others: int,
) -> Set[str]:
    """The pieces to keep: those that must be, and the most frequent ones.

    Args:
        symbols: pieces that the teacher knows.
        written: how often the text has each.
        others: symbols of the student's dictionary beside its pieces and fairseq's own.

    Raises:
        FileError: there is not enough room for those that must be.
    """
    characters = set() if asked.all_characters else set().union(*written)
    must = {
        piece
        for piece in symbols
        if len(piece) == 1 and (asked.all_characters or piece in characters)
    }
    must |= symbols.intersection(model.texts(USER_DEFINED))
    # without these, a character that the teacher knows within pieces alone would be unknown
    must |= {piece for piece in written if not symbols.issuperset(piece)}
    free = None
    if asked.size is not None:
        needed = len(must) + others + Dictionary().nspecial
        if asked.size < needed:
            raise FileError(
                f"--size {asked.size}: the characters, bytes and symbols that must be kept are "
                f"{needed:,} symbols, so give that or more"
            )
        free = asked.size - needed
    scores = {piece.text: piece.score for piece in model.pieces}
    rest = [piece for piece, n in written.items() if n >= asked.min_count and piece not in must]
    # of equally frequent ones the shorter, which more of the words to come are made of
    rest.sort(key=lambda piece: (-written[piece], len(piece), -scores[piece], piece))
    return must.union(rest[:free])


def _cut(model: SubwordModel, keep: Set[str]) -> SubwordModel:
    return SubwordModel(model.cut(keep), model.name)


def _dictionary(
    model: SubwordModel, counts: np.ndarray, symbols: Set[str], teacher: Dictionary
) -> Dictionary:
    """The student's dictionary: the most frequent symbol first, as fairseq-preprocess has it."""
    found = {piece.text: int(n) for piece, n in zip(model.pieces, counts) if piece.text in symbols}
    dictionary = Dictionary()
    for symbol in sorted(found, key=lambda symbol: (-found[symbol], teacher.index(symbol))):
        dictionary.add_symbol(symbol, found[symbol])
    return dictionary
