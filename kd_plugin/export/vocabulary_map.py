"""Which target symbols each source symbol needs: CTranslate2's vocabulary map.

A translator that computes the probabilities of these symbols alone is faster, the more so the
larger its vocabulary. The map is made of the data that the model was trained on, read in chunks:

1. The most frequent target symbols are always there.
2. Of the others, pairs of a source and a target symbol are counted that occur in one sentence
   pair, each once a pair.
3. Each target symbol of a sentence pair is shared out among its source symbols, in proportion to
   how often they occur with it for each time that they occur: one step of IBM's Model 1 (Brown et
   al. 1993). A source symbol keeps the target symbols of its largest shares.

A source symbol also keeps the target symbol that is spelled like it, for what is copied.
"""

import logging
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Sequence, Tuple

import numpy as np

from ..decoding import DataBin
from ..files import FileError, reading_binarised, refuse_unknown_numbers
from ..timing import progress_bar

logger = logging.getLogger(__name__)

ALWAYS = 100  # target symbols, the most frequent ones
_MOST_COUNTED = 1 << 23  # different pairs of symbols
_CHUNK = 1 << 22  # pairs of symbols that are looked at together
_PASSES = 3
_SEPARATORS = frozenset(" \t\r\n")  # in the file


class VocabularyMap(NamedTuple):
    """A map by symbols.

    Attributes:
        always: target symbols that any sentence may need.
        candidates: target symbols by source symbol, the likeliest first.
    """

    always: List[str]
    candidates: Dict[str, List[str]]

    def write(self, path: Path) -> None:
        """As CTranslate2 reads it: a source symbol, a tab, target symbols with spaces between.

        Symbols that hold what separates them there are left out.
        """
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            for source, targets in [("", self.always), *self.candidates.items()]:
                targets = [target for target in targets if not _SEPARATORS & set(target)]
                if targets and not _SEPARATORS & set(source):
                    file.write(f"{source}\t{' '.join(targets)}\n")


def vocabulary_map(data: Sequence[DataBin], candidates: int) -> VocabularyMap:
    """The map of parallel data.

    Memory is bounded, whatever the size of the data: where there are too many different pairs of
    symbols, the rarest so far are forgotten (Misra and Gries 1982).

    Args:
        data: binarised with the model's dictionaries; their training sets are read.
        candidates: target symbols that a source symbol keeps, beside those that are always there.

    Raises:
        FileError: a training set is not there, is damaged, has no text, or sides of different
            lengths.
    """
    corpus = _Corpus(data)
    source, target = data[0].source, data[0].target
    with progress_bar(_PASSES * corpus.sentences, "vocabulary map", "sentences") as progress:
        frequent = corpus.frequent_targets(progress)
        if not frequent:
            raise FileError(f"{data[0].folder}: train has no text to make a vocabulary map of")
        counts = _Counts()
        seen: Any = np.zeros(len(source), np.int64)  # sentence pairs of each source symbol
        for pairs in corpus.pairs(frequent, progress):
            seen += np.bincount(pairs.sources, minlength=len(source))
            counts.add(pairs.keys)
        keys = counts.keys
        of_source, of_target = np.divmod(keys, len(target))
        likely, shares = counts.numbers / seen[of_source], np.zeros(len(keys))
        for pairs in corpus.pairs(frequent, progress):
            place: Any = np.searchsorted(keys, pairs.keys)
            place[place == len(keys)] = 0
            known = np.flatnonzero(keys[place] == pairs.keys) if len(keys) else place[:0]
            place, group = place[known], pairs.groups[known]
            total = np.bincount(group, likely[place])
            shares += np.bincount(place, likely[place] / total[group], minlength=len(keys))
    found: Dict[str, List[str]] = {}
    order = np.lexsort((of_target, -shares, of_source))
    place = np.arange(len(keys)) - np.searchsorted(of_source, of_source)  # of one source symbol
    for i in order[place < candidates]:
        found.setdefault(source[of_source[i]], []).append(target[of_target[i]])
    bare = np.count_nonzero(seen) - len(np.unique(of_source))
    if counts.forgotten and bare:
        logger.warning(
            f"the training data have more pairs of symbols than are counted at once: {bare} rare "
            "source symbols keep no candidates of their own"
        )
    for symbol in source.symbols[source.nspecial :]:
        if symbol in target and symbol not in found.get(symbol, ()):
            found.setdefault(symbol, []).append(symbol)
    return VocabularyMap([target[t] for t in frequent], found)


class _Pairs(NamedTuple):
    """Pairs of a source and a target symbol in some sentence pairs, each once a sentence pair.

    Attributes:
        keys: number of the source symbol times the number of target symbols, plus that of the
            target symbol.
        groups: numbers the target symbols of all these sentence pairs; equal for pairs of one.
        sources: the source symbols of all these sentence pairs.
    """

    keys: Any
    groups: Any
    sources: Any


class _Corpus:
    """Training sets, read in chunks of sentence pairs; special symbols are left out."""

    def __init__(self, data: Sequence[DataBin]) -> None:
        self._parts: List[Tuple[DataBin, List[Any]]] = []
        for bins in data:
            sides: List[Any] = [bins.side("train", lang) for lang in bins.langs]
            if None in sides or not len(sides[0]):
                raise FileError(
                    f"{bins.folder}: the vocabulary map is made of train in "
                    f"{' and '.join(bins.langs)}, which is not there"
                )
            if len(sides[0]) != len(sides[1]):
                raise FileError(
                    f"{bins.folder}: train has {len(sides[0])} sentences in {bins.langs[0]} and "
                    f"{len(sides[1])} in {bins.langs[1]}"
                )
            self._parts.append((bins, sides))
        self._dictionaries = (data[0].source, data[0].target)
        self.sentences = sum(len(sides[0]) for _, sides in self._parts)

    def frequent_targets(self, progress: Any) -> List[int]:
        """Those that are always there, the most frequent first."""
        number: Any = np.zeros(len(self._dictionaries[1]), np.int64)
        for _, (_, symbols) in self._chunks(progress):
            number += np.bincount(symbols, minlength=len(number))
        order = np.argsort(-number, kind="stable")[:ALWAYS]
        return [int(t) for t in order if number[t]]

    def pairs(self, frequent: Sequence[int], progress: Any) -> Iterator[_Pairs]:
        """Those without frequent target symbols."""
        sizes = [len(dictionary) for dictionary in self._dictionaries]
        is_rare: Any = np.ones(sizes[1], bool)
        is_rare[list(frequent)] = False
        for (in_source, source), (in_target, target) in self._chunks(progress):
            rare = is_rare[target]
            in_source, source = _once(in_source, source, sizes[0])
            in_target, target = _once(in_target[rare], target[rare], sizes[1])
            begin: Any = np.searchsorted(in_source, in_target)
            number = np.searchsorted(in_source, in_target, side="right") - begin
            groups: Any = np.repeat(np.arange(len(target)), number)
            within = np.arange(len(groups)) - np.repeat(np.cumsum(number) - number, number)
            keys = source[begin[groups] + within] * sizes[1] + target[groups]
            yield _Pairs(keys, groups, source)

    def _chunks(self, progress: Any) -> Iterator[List[Tuple[Any, Any]]]:
        """Of each side: numbers of sentences, counted from 0 in each chunk, and their symbols."""
        for bins, sides in self._parts:
            chunk: List[Tuple[Any, Any]] = []
            pairs = 0
            for i in range(len(sides[0])):
                with reading_binarised(f"{bins.folder}, train"):
                    sentence = (np.asarray(sides[0][i]), np.asarray(sides[1][i]))
                more = len(sentence[0]) * len(sentence[1])
                if chunk and pairs + more > _CHUNK:
                    yield self._numbered(chunk)
                    chunk, pairs = [], 0
                if more <= _CHUNK:  # longer ones, 2,048 by 2,048 symbols, say little
                    chunk.append(sentence)
                    pairs += more
                progress.update()
            if chunk:
                yield self._numbered(chunk)

    def _numbered(self, chunk: Sequence[Tuple[Any, Any]]) -> List[Tuple[Any, Any]]:
        found = []
        for sentences, dictionary in zip(zip(*chunk), self._dictionaries):
            symbols = np.concatenate(sentences).astype(np.int64)
            refuse_unknown_numbers([symbols.max(initial=0)], len(dictionary))
            numbers: Any = np.repeat(np.arange(len(sentences)), [len(one) for one in sentences])
            text = symbols >= dictionary.nspecial
            found.append((numbers[text], symbols[text]))
        return found


def _once(sentences: Any, symbols: Any, size: int) -> Tuple[Any, Any]:
    """Each symbol of each sentence once, sentence by sentence.

    Args:
        size: how many symbols there are.
    """
    return np.divmod(np.unique(sentences * size + symbols), size)


class _Counts:
    """How often pairs of symbols occur.

    Attributes:
        keys: of pairs, as in ``_Pairs``, in their order.
        numbers: how often each has occurred; once there were more pairs than ``_MOST_COUNTED``, too
            few by at most what has been taken off all since, to make room for what comes.
        forgotten: whether there were more.
    """

    def __init__(self) -> None:
        self.keys: Any = np.zeros(0, np.int64)
        self.numbers: Any = np.zeros(0, np.int64)
        self.forgotten = False

    def add(self, keys: Any) -> None:
        more, numbers = np.unique(keys, return_counts=True)
        keys = np.concatenate([self.keys, more])
        numbers = np.concatenate([self.numbers, numbers])
        order = np.argsort(keys, kind="stable")  # which merges what is sorted
        keys, numbers = keys[order], numbers[order]
        first = np.flatnonzero(np.diff(keys, prepend=-1))
        self.keys = keys[first]
        self.numbers = np.add.reduceat(numbers, first) if len(first) else numbers
        if len(self.keys) > _MOST_COUNTED:
            self.forgotten = True
            last = len(self.keys) - _MOST_COUNTED - 1
            numbers = self.numbers - np.partition(self.numbers, last)[last]
            self.keys, self.numbers = self.keys[numbers > 0], numbers[numbers > 0]
