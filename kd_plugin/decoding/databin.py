"""fairseq's data-bin folders: find, read and write what fairseq-preprocess would."""

import glob
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
from fairseq.data import Dictionary, data_utils, indexed_dataset

from ..checkpoints import dictionaries as vocabulary
from ..files import FileError, reading_binarised, refuse_unknown_numbers

_MUCH_UNKNOWN = 0.05

logger = logging.getLogger(__name__)


class DataBin:
    """A binarised parallel corpus in a folder.

    Args:
        folder: it, with ``dict.LANG.txt`` and ``SPLIT.SRC-TGT.LANG.{bin,idx}``.
        source_lang, target_lang: the languages; fairseq takes either order in file names.

    Raises:
        FileError: it has no dictionaries; VocabularyError: one cannot be read.
    """

    def __init__(self, folder: str, source_lang: str, target_lang: str) -> None:
        self.folder, self.langs = Path(folder), (source_lang, target_lang)
        missing = [str(path) for path in self.dictionary_files() if not path.is_file()]
        if missing:
            raise FileError(
                f"{folder}: expected a folder of fairseq-preprocess; missing: {', '.join(missing)}"
            )
        self.source, self.target = [vocabulary.read(str(f)) for f in self.dictionary_files()]

    def dictionary_files(self) -> List[Path]:
        return [self.folder / f"dict.{lang}.txt" for lang in self.langs]

    def side(self, split: str, lang: str) -> Optional[Any]:
        """A split's sentences on one side, or None.

        Raises:
            FileError: its files are damaged or cut short.
        """
        for pair in (self.langs, self.langs[::-1]):
            prefix = str(self.folder / "{}.{}-{}.{}".format(split, *pair, lang))
            if exists(prefix):
                with reading_binarised(prefix):
                    return read(prefix)
        return None

    def splits(self) -> Dict[str, List[Path]]:
        """The files of each split: train, valid, valid1, ..."""
        found: Dict[str, List[Path]] = {}
        for a, b in (self.langs, self.langs[::-1]):
            for path in sorted(glob.glob(str(self.folder / f"*.{a}-{b}.*"))):
                match = re.match(rf"(.+)\.{a}-{b}\.", os.path.basename(path))
                if match:
                    found.setdefault(match.group(1), []).append(Path(path))
        return found


def exists(prefix: str) -> bool:
    """Whether there are both files of a side."""
    return indexed_dataset.dataset_exists(prefix, impl="mmap")


def read(prefix: str) -> Any:
    """The sentences of one side, the last one looked at; to be called in ``reading_binarised``."""
    sentences = data_utils.load_indexed_dataset(prefix)
    if len(sentences) > 0:
        sentences[len(sentences) - 1]
    return sentences


class Writer:
    """Writes one side of a split, sentence by sentence."""

    def __init__(self, prefix: Path, vocabulary: int) -> None:
        self.prefix = str(prefix)
        self._builder = indexed_dataset.make_builder(
            self.prefix + ".bin", impl="mmap", vocab_size=vocabulary
        )
        self.sentences = self.tokens = 0

    def add(self, tokens: torch.Tensor) -> None:
        self._builder.add_item(tokens)
        self.sentences += 1
        self.tokens += len(tokens)

    def close(self) -> None:
        self._builder.finalize(self.prefix + ".idx")


def words(subwords: str) -> List[str]:
    """The symbols of a sentence; some may hold whitespace other than the space between them."""
    return [symbol for symbol in subwords.split(" ") if symbol]


def encode(dictionary: Dictionary, subwords: str) -> torch.Tensor:
    """Indices of symbols with spaces between, and the end of sentence: int32, as fairseq's."""
    ids = [dictionary.index(symbol) for symbol in words(subwords)]
    return torch.tensor([*ids, dictionary.eos()], dtype=torch.int32)


def decode(dictionary: Dictionary, tokens: Sequence[int], *, escape_unk: bool = False) -> str:
    """Symbols with spaces between, as ``encode`` reads them: without the last end of sentence.

    Args:
        escape_unk: write unknown symbols so that they equal nothing, as fairseq-generate does in
            references.

    Raises:
        FileError: the dictionary has no such symbol.
    """
    symbols, unk = dictionary.symbols, dictionary.unk()
    refuse_unknown_numbers(tokens, len(symbols))
    ids = [int(t) for t in tokens]
    if ids[-1:] == [dictionary.eos()]:
        ids.pop()
    return " ".join(
        dictionary.unk_string(True) if escape_unk and i == unk else symbols[i] for i in ids
    )


def symbols_seen(dictionary: Dictionary, tokens: Sequence[int]) -> List[str]:
    """Those of a source that fairseq's encoder sees, as CTranslate2 wants them.

    It passes over pads wherever they stand; CTranslate2 adds the end of sentence by itself.
    """
    pad = dictionary.pad()
    return words(decode(dictionary, [token for token in tokens if int(token) != pad]))


def warn_of_unknown(unknown: int, tokens: int, where: str) -> None:
    """If so many symbols are in no dictionary, the text is hardly what it was meant to be."""
    if unknown > _MUCH_UNKNOWN * tokens:
        logger.warning(
            f"{unknown / tokens:.0%} OF THE SYMBOLS OF {where} ARE UNKNOWN to its dictionary: "
            "they look like subwords of another model, or like words. Raw --source-text needs "
            "--bpe and the teacher's model; --student-spm must be the one that --student-data "
            "was encoded with."
        )


def carried_files(data: DataBin) -> List[Path]:
    """Dictionaries, and every split that is not for training."""
    kept = [files for split, files in data.splits().items() if not split.startswith("train")]
    return [*data.dictionary_files(), *(path for files in kept for path in files)]


def copy(paths: Sequence[Path], to: Path) -> None:
    for path in paths:
        shutil.copyfile(str(path), str(to / path.name))
