"""How likely a source is, given its translation: what a model of the other direction says.

A hallucination tells little of its source. Such scores filter and rerank translations in
production (Junczys-Dowmunt 2018, section 3, has both directions).
"""

import math
import os
import sys
from pathlib import Path
from typing import Any, Callable, List, NamedTuple, Sequence, Tuple

import torch
from fairseq import utils
from fairseq.data import LanguagePairDataset

from ..checkpoints import Role
from ..decoding import Converted, DataBin, databin, open_translator
from ..errors import UserError
from ..files import FileError, digest
from ..teachers import Student as Reader
from ..teachers import Teacher, TeacherSettings, token_losses
from .translators import positions
from .values import Block

FLAG = "--backward-path"
ROLE = Role(f"model of {FLAG}", "--trust-checkpoint")
TOO_LONG = -1e9  # the score of a pair that is longer than the model reads
_TOKENS = 4096  # of a batch

# From sentences and their translations, as symbols, to each one's mean log-probability per symbol
# of the second given the first, end of sentence included, in nats
Score = Callable[[List[List[str]], List[List[str]]], Sequence[float]]


class Direction(NamedTuple):
    """A model of the other direction.

    Attributes:
        path: for messages.
        langs: from which language to which it translates.
        score: what it says.
        longest: most tokens of its source and target.
        guess: mean log-probability of a uniform guess over its target's symbols.
    """

    path: str
    langs: Tuple[str, str]
    score: Score
    longest: Tuple[int, int]
    guess: float


def files(path: str) -> List[Any]:
    """Checksums of a model of the other direction.

    Raises:
        FileError: it cannot be read.
    """
    if os.path.isdir(path):
        return [Converted.open(Path(path)).files()]
    return [digest(one) for one in utils.split_paths(path)]


def open_direction(
    path: str, data: DataBin, device: torch.device, dtype: torch.dtype, trust: bool = False
) -> Direction:
    """A model of the other direction: a checkpoint, an ensemble, or a folder of CTranslate2's.

    Args:
        data: whose symbols its two sides are made of, in the other order.

    Raises:
        UserError: it cannot be used, or has other symbols than the data.
    """
    reader = Reader(data.target, data.source, data.langs[1], data.langs[0])
    if os.path.isdir(path):
        score, longest = _open_ctranslate2(path, reader, device, dtype)
    else:
        score, longest = _open_fairseq(path, reader, device, dtype, trust)
    return Direction(path, reader.languages, score, longest, -math.log(len(reader.target)))


def _open_fairseq(
    path: str, reader: Reader, device: torch.device, dtype: torch.dtype, trust: bool
) -> Tuple[Score, Tuple[int, int]]:
    source, target = reader.source, reader.target
    settings = TeacherSettings(utils.split_paths(path), trust=trust, role=ROLE)
    model = Teacher.open(settings, reader).place(device, dtype)

    def score(sources: List[List[str]], targets: List[List[str]]) -> List[float]:
        sides = [
            [databin.encode(dictionary, " ".join(one)).long() for one in sentences]
            for dictionary, sentences in ((source, sources), (target, targets))
        ]
        sizes = [[len(tokens) for tokens in side] for side in sides]
        dataset = LanguagePairDataset(
            *(sides[0], sizes[0], source, sides[1], sizes[1], target), shuffle=False
        )
        found = [0.0] * len(sources)
        for batch in _batches([max(pair) for pair in zip(*sizes)]):
            sample = dataset.collater([dataset[i] for i in batch])
            real = sample["target"].ne(target.pad())
            losses = torch.zeros(real.shape, dtype=torch.float64)
            losses[real] = token_losses(model, sample, reader)
            for i, mean in zip(sample["id"].tolist(), (losses.sum(1) / real.sum(1)).tolist()):
                found[i] = -mean
        return found

    return score, model.max_positions()


def _open_ctranslate2(
    path: str, reader: Reader, device: torch.device, dtype: torch.dtype
) -> Tuple[Score, Tuple[int, int]]:
    model = Converted.open(Path(path))
    if not model.has_symbols_of(reader.source, reader.target):
        raise FileError(
            f"{FLAG} {path}: its vocabularies are not the data's dictionaries, in the other order. "
            "Score the lists of --write-nbest with it, and give the numbers to --select scores"
        )
    precision = "float16" if dtype == torch.float16 else "default"
    translator = open_translator(model.folder, device.type, device.index or 0, precision)

    def score(sources: List[List[str]], targets: List[List[str]]) -> List[float]:
        found = translator.score_batch(
            *(sources, targets), max_batch_size=_TOKENS, batch_type="tokens", max_input_length=0
        )
        return [sum(one.log_probs) / len(one.log_probs) for one in found]

    source, target = [sys.maxsize if most is None else most for most in positions(model)]
    return score, (source, target)


class Backward:
    """Scores of sources, given each hypothesis; one block at a time.

    Args:
        direction: what scores.
    """

    def __init__(self, direction: Direction) -> None:
        self.direction, self._probed = direction, False

    def __call__(self, block: Block) -> List[List[float]]:
        """Mean log-probability of the source's symbols, end of sentence included, in nats.

        Raises:
            UserError: the model is worse than a guess on the first block: it is of another
                direction, or of other data.
        """
        found = [[TOO_LONG] * len(candidates) for candidates in block]
        places, sources, targets = [], [], []
        for i, candidates in enumerate(block):
            for j in range(len(candidates)):
                pair = candidates.symbols(j), [*candidates.source]
                if all(len(s) < most for s, most in zip(pair, self.direction.longest)):
                    places.append((i, j))
                    sources.append(pair[0])
                    targets.append(pair[1])
        scores = self.direction.score(sources, targets) if places else []
        if scores and not self._probed:
            self._probed = True
            probe(self.direction, scores, "the first translations")
        for (i, j), value in zip(places, scores):
            found[i][j] = value
        return found


def probe(direction: Direction, scores: Sequence[float], of: str) -> None:
    """Refuse a model that finds sources less likely than a guess would.

    Args:
        of: the translations that the scores are given.

    Raises:
        UserError: it does.
    """
    mean = sum(scores) / len(scores)
    if not mean > direction.guess:
        raise UserError(
            f"{FLAG} {direction.path}: given {of}, it finds their sources less likely than a guess "
            f"would ({mean:.2f} nats per token, a guess has {direction.guess:.2f}): expected a "
            f"model that translates from {direction.langs[0]} to {direction.langs[1]}, and reads "
            "these subwords"
        )


def _batches(lengths: Sequence[int]) -> Any:
    """Numbers of sentences of similar length, so many that a batch has ``_TOKENS``."""
    batch: List[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > _TOKENS:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
