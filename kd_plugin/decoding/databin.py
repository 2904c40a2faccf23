"""fairseq's data-bin folders: find, read and write what fairseq-preprocess would."""

import logging
import os
import shutil
import struct
from array import array
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary, data_utils, indexed_dataset

from ..checkpoints import dictionaries as vocabulary
from ..files import FileError, read_whole, reading_binarised, refuse_unknown_numbers

_MUCH_UNKNOWN = 0.05
_OLDER = ("raw", "cached")  # cached: what --dataset-impl lazy writes

logger = logging.getLogger(__name__)


class DataBin:
    """A binarised parallel corpus in a folder, or a text of language models.

    Args:
        folder: it, with ``dict.LANG.txt`` and ``SPLIT.SRC-TGT.LANG.{bin,idx}``, or text in
            subwords, ``SPLIT.SRC-TGT.LANG`` (of ``--dataset-impl raw``).
        source_lang, target_lang: the languages; fairseq takes either order in file names. Both are
            "" for ``dict.txt`` and ``SPLIT.{bin,idx}``, of --only-source.
        renamed: the flag that says what the folder calls them, "--student-langs {}", for messages.

    Raises:
        FileError: it has no dictionaries; VocabularyError: one cannot be read.
    """

    def __init__(
        self, folder: str, source_lang: str, target_lang: str, renamed: Optional[str] = None
    ) -> None:
        self.folder, self.langs = Path(folder), (source_lang, target_lang)
        missing = sorted({str(path) for path in self.dictionary_files() if not path.is_file()})
        if missing:
            raise FileError(
                f"{folder}: expected a folder of fairseq-preprocess; missing: {', '.join(missing)}"
                f"{_advise_names(folder, renamed)}"
            )
        self.source, self.target = [vocabulary.read(str(f)) for f in self.dictionary_files()]

    def dictionary_files(self) -> List[Path]:
        return [self.folder / vocabulary.file_of(lang) for lang in self.langs]

    def side(self, split: str, lang: str) -> Optional[Any]:
        """A split's sentences on one side, or None.

        Raises:
            FileError: its files are damaged or cut short.
        """
        prefix = self._prefix(split) + lang
        if not exists(prefix):
            return None
        dictionary = self.source if lang == self.langs[0] else self.target
        with reading_binarised(prefix):
            return read(prefix, dictionary)

    def is_raw(self, split: str) -> bool:
        """Whether fairseq finds it with ``--dataset-impl raw`` alone."""
        prefix = self._prefix(split) + self.langs[0]
        return exists(prefix) and not _is_indexed(prefix)

    def _prefix(self, split: str) -> str:
        """Where fairseq reads a split, but for the language: in the order that has the source."""
        if not any(self.langs):
            return str(self.folder / split)
        asked, reversed_ = [
            str(self.folder / "{}.{}-{}.".format(split, *pair))
            for pair in (self.langs, self.langs[::-1])
        ]
        found = exists(reversed_ + self.langs[0]) and not exists(asked + self.langs[0])
        return reversed_ if found else asked

    def splits(self) -> Dict[str, List[Path]]:
        """The files of each split: train, valid, valid1, ..., in either order of the languages."""
        found: Dict[str, List[Path]] = {}
        for a, b in (self.langs, self.langs[::-1]):
            for path in sorted(self.folder.iterdir()):
                split, between, _ = path.name.rpartition(f".{a}-{b}.")
                if between and split and not split.startswith("."):
                    found.setdefault(split, []).append(path)
        return found

    def carried_files(self) -> Dict[str, Path]:
        """Dictionaries, and every split that is not for training, by the names that they get.

        These name the asked direction alone: without ``--source-lang`` fairseq takes the direction
        from the first file that it happens to see.
        """
        found = {path.name: path for path in self.dictionary_files()}
        for split, paths in self.splits().items():
            if not split.startswith("train"):
                read = os.path.basename(self._prefix(split))
                named = "{}.{}-{}.".format(split, *self.langs)
                for path in paths:
                    if path.name.startswith(read):
                        found[named + path.name[len(read) :]] = path
        return found


def _advise_names(folder: str, renamed: Optional[str]) -> str:
    """What to do about a folder that has dictionaries of languages with other names."""
    there = vocabulary.named(folder)
    if not (there and renamed):
        return ""
    pairs = _pairs(folder)
    flag = renamed.format(",".join(pairs[0]) if len(pairs) == 1 else "SRC,TGT")
    return (
        f"; there are {', '.join(there)}: if these are other names for the same languages, say so "
        f"with {flag}, the source's first"
    )


def parse_languages(text: str, flag: str) -> Tuple[str, str]:
    """Names of a source and a target language, "de,en".

    Raises:
        FileError: it is something else.
    """
    source, comma, target = text.partition(",")
    if not (source and target) or "," in target:
        raise FileError(f"{flag}: expected a source and a target language as in de,en; got {text}")
    return source, target


def infer_languages(folder: str) -> Tuple[Optional[str], Optional[str]]:
    """Source and target of a folder, as its file names say it to fairseq; None if they do not.

    Raises:
        FileError: they say several.
    """
    pairs = _pairs(folder)
    if len(pairs) > 1:
        raise FileError(
            f"{folder} holds {' and '.join(map('-'.join, pairs))}: say which is meant with "
            "--source-lang and --target-lang"
        )
    return pairs[0] if pairs else (None, None)


def _pairs(folder: str) -> List[Tuple[str, str]]:
    """The directions that file names tell, read as fairseq reads them."""
    names = [name.split(".") for name in os.listdir(folder)]
    found = {tuple(name[1].split("-")) for name in names if len(name) > 2 and name[0] != "dict"}
    return sorted((pair[0], pair[1]) for pair in found if len(pair) == 2)


def exists(prefix: str) -> bool:
    """Whether there are the files of a side."""
    return _is_indexed(prefix) or os.path.isfile(prefix)


def _is_indexed(prefix: str) -> bool:
    return indexed_dataset.dataset_exists(prefix, impl="mmap")


def read(prefix: str, dictionary: Optional[Dictionary] = None) -> Any:
    """The sentences of one side, whole; to be called in ``reading_binarised``.

    Args:
        dictionary: of text in subwords.
    """
    sentences = data_utils.load_indexed_dataset(prefix, dictionary)
    read_whole(sentences)
    return sentences


class Writer:
    """Writes one side of a split, sentence by sentence, byte for byte as fairseq's builder does.

    That one ends with two Python lists of a number for each sentence: half a gigabyte for 10
    million.

    Args:
        prefix: of the two files' names.
        vocabulary: size of the dictionary, which says how wide a number is.
    """

    def __init__(self, prefix: Path, vocabulary: int) -> None:
        self.prefix = str(prefix)
        self._type = indexed_dataset.best_fitting_int_dtype(vocabulary)
        self._file = open(self.prefix + ".bin", "wb")
        self._lengths = array("i")
        self.tokens = 0

    @property
    def sentences(self) -> int:
        return len(self._lengths)

    def add(self, tokens: Any) -> None:
        """The numbers of one sentence, as a tensor or an array."""
        numbers = np.asarray(tokens, dtype=self._type)
        self._file.write(numbers.tobytes())
        self._lengths.append(len(numbers))
        self.tokens += len(numbers)

    def close(self) -> None:
        self._file.close()
        lengths = np.asarray(self._lengths, dtype=np.int32)
        begins = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], out=begins[1:])
        begins *= np.dtype(self._type).itemsize
        path = self.prefix + ".idx"
        with indexed_dataset.MMapIndexedDataset.Index.writer(path, self._type) as header:
            header.write(())  # of no sentences: ends with their number
        with open(path, "r+b") as index:
            index.seek(-8, os.SEEK_END)
            index.write(struct.pack("<Q", len(lengths)))
            index.write(lengths.data)
            index.write(begins.data)


def write(prefix: Path, dictionary: Dictionary, sentences: Iterable[torch.Tensor]) -> None:
    """Write one side of a split."""
    writer = Writer(prefix, len(dictionary))
    for tokens in sentences:
        writer.add(tokens)
    writer.close()


def words(subwords: str) -> List[str]:
    """The symbols of a sentence; some may hold whitespace other than the space between them."""
    if "  " in subwords or subwords[:1] in ("", " ") or subwords[-1] == " ":
        return [symbol for symbol in subwords.split(" ") if symbol]
    return subwords.split(" ")


def indices(dictionary: Dictionary, subwords: str) -> List[int]:
    """Of symbols with spaces between, and of the end of sentence."""
    index, unknown = dictionary.indices.get, dictionary.unk()
    found = [index(symbol, unknown) for symbol in words(subwords)]
    found.append(dictionary.eos())
    return found


def encode(dictionary: Dictionary, subwords: str) -> torch.Tensor:
    """The same as a tensor: int32, as fairseq's."""
    return torch.from_numpy(np.array(indices(dictionary, subwords), dtype=np.int32))


def decode(dictionary: Dictionary, tokens: Sequence[int], *, escape_unk: bool = False) -> str:
    """Symbols with spaces between, as ``encode`` reads them: without the last end of sentence.

    Args:
        escape_unk: write unknown symbols so that they equal nothing, as fairseq-generate does in
            references.

    Raises:
        FileError: the dictionary has no such symbol.
    """
    symbols, unk = dictionary.symbols, dictionary.unk()
    ids = tokens if type(tokens) is list else [int(t) for t in tokens]
    if ids[-1:] == [dictionary.eos()]:
        ids = ids[:-1]
    try:
        if not escape_unk:
            return " ".join([symbols[i] for i in ids])
        return " ".join(dictionary.unk_string(True) if i == unk else symbols[i] for i in ids)
    except IndexError:
        refuse_unknown_numbers(tokens, len(symbols))
        raise


def symbols_seen(dictionary: Dictionary, tokens: Sequence[int]) -> List[str]:
    """Those of a source that fairseq's encoder sees, as CTranslate2 wants them.

    It passes over pads wherever they stand; CTranslate2 adds the end of sentence by itself.
    """
    pad = dictionary.pad()
    return words(decode(dictionary, [token for token in tokens if int(token) != pad]))


def warn_of_unknown(
    unknown: int,
    tokens: int,
    where: str,
    *,
    whose: str = "its dictionary",
    advice: str = "they look like subwords of another model, or like words. Raw --source-text "
    "needs --bpe and the teacher's model; --student-spm must be the one that --student-data was "
    "encoded with",
) -> None:
    """If so many symbols are in no dictionary, the text is hardly what it was meant to be."""
    if unknown > _MUCH_UNKNOWN * tokens:
        logger.warning(
            f"{unknown / tokens:.0%} OF THE SYMBOLS OF {where} ARE UNKNOWN to {whose}: {advice}."
        )


def carry(data: DataBin, to: Path) -> None:
    """Copy ``carried_files``; what is in an older format, in the one that ``Writer`` has.

    For fairseq-train takes training and validation in one ``--dataset-impl``.
    """
    files = data.carried_files()
    for name, path in files.items():
        shutil.copyfile(str(path), str(to / name))
    copied = DataBin(str(to), *data.langs)
    for split in copied.splits():
        for lang, dictionary in zip(data.langs, (data.source, data.target)):
            prefix = to / "{}.{}-{}.{}".format(split, *data.langs, lang)
            if indexed_dataset.infer_dataset_impl(str(prefix)) in _OLDER:
                sentences = copied.side(split, lang)
                assert sentences is not None
                write(prefix, dictionary, (sentences[i] for i in range(len(sentences))))
                if prefix.name in files:  # the text
                    prefix.unlink()
