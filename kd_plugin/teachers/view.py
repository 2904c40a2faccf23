"""How a student's batch looks to a teacher, and the teacher's rows to the student."""

import math
from typing import Any, Dict, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from torch import Tensor

from ..checkpoints import MISSING, Checkpoint, Dictionaries, Tags, VocabularyError, index_map


class Student(NamedTuple):
    """What a teacher must fit: the vocabularies and languages of the student's data."""

    source: Dictionary
    target: Dictionary
    source_lang: str
    target_lang: str


class TeacherView:
    """One teacher's view of a student's batches: the same sentences in its own vocabulary, with the
    tags that it was trained to read.

    A teacher that reads anything else than the student's sentence differs here, and nowhere else:
    in its ``inputs``, and in which of its ``rows`` answer for the student's.

    Args:
        student: the student's dictionaries.
        own: the teacher's.
        checkpoint: its, for messages.

    Raises:
        VocabularyError: the teacher lacks a symbol of the student.
    """

    def __init__(self, student: Student, own: Dictionaries, checkpoint: Checkpoint) -> None:
        source, target, role = own.source, own.target, checkpoint.role
        try:
            source_map = index_map(student.source.symbols, source.symbols, "source", role)
            target_map = index_map(student.target.symbols, target.symbols, "target", role)
        except VocabularyError as error:
            raise VocabularyError(f"{checkpoint}: {error}") from None
        self._target_map = target_map
        # a padding symbol that the teacher lacks never occurs in data
        self._read_source = _readable(source_map, source)
        self._read_target = _readable(target_map, target)
        self._missing = None if target_map is None else target_map.eq(MISSING)
        if self._missing is not None and not self._missing.any():
            self._missing = None
        self._projection: Optional[Tuple[Tensor, Optional[Tensor]]] = None
        tags = checkpoint.tags((student.source_lang, student.target_lang))
        self._pad = source.pad()
        self._before_source = [source.index(symbol) for symbol in tags.before_source]
        self._after_source = [source.index(symbol) for symbol in tags.after_source]
        self._before_target = [target.index(symbol) for symbol in tags.before_target]
        self._tagged, self.longer = tags != Tags(), tags.longer
        self.description = (
            f"source vocabulary {_fit(source_map, student.source, source)}, "
            f"target vocabulary {_fit(target_map, student.target, target)}"
        )
        if self._tagged:
            self.description += (
                f"; reads {' '.join((*tags.before_source, '...', *tags.after_source))}, "
                f"writes after {' '.join(tags.before_target)}"
            )

    def to(self, device: torch.device) -> "TeacherView":
        for name in ("_read_source", "_read_target", "_target_map", "_missing"):
            index = getattr(self, name)
            setattr(self, name, None if index is None else index.to(device))
        self._projection = None
        return self

    def inputs(self, net_input: Dict[str, Tensor], device: torch.device) -> Dict[str, Tensor]:
        """The student's ``net_input`` as the teacher's forward pass takes it."""
        source = _look_up(self._read_source, net_input["src_tokens"].to(device))
        target = _look_up(self._read_target, net_input["prev_output_tokens"].to(device))
        if self._tagged:
            source = _around(source, self._before_source, self._after_source, self._pad)
            # the student's begins with the end of sentence
            target = _around(target, self._before_target, [], self._pad, replaced=1)
        return {
            "src_tokens": source,
            "src_lengths": net_input["src_lengths"].to(device) + self.longer[0],
            "prev_output_tokens": target,
        }

    def rows(self, rows: Tensor, width: int) -> Tensor:
        """Which of the teacher's flat target rows answer for these of the student's.

        Args:
            width: of the student's targets.
        """
        more = self.longer[1]
        return rows + more * (rows // width + 1) if more else rows

    def logits(self, logits: Tensor) -> Tensor:
        """The teacher's logits (n, its V) in the order of the student's symbols (n, V)."""
        if self._target_map is None:
            return logits
        return self._without_missing(logits.index_select(-1, self._target_map.clamp(min=0)))

    def project(self, layer: Any, features: Tensor) -> Tensor:
        """Logits in the order of the student's symbols, by the teacher's output projection."""
        if self._target_map is None:
            return layer(features)
        if self._projection is None:
            # the projection's rows in the student's order: nothing to reorder in each batch
            index, bias = self._target_map.clamp(min=0), getattr(layer, "bias", None)
            self._projection = (
                layer.weight.detach()[index],
                None if bias is None else bias.detach()[index],
            )
        return self._without_missing(F.linear(features, *self._projection))

    def _without_missing(self, logits: Tensor) -> Tensor:
        if self._missing is None:
            return logits
        return logits.masked_fill(self._missing, -math.inf)


def _readable(index: Optional[Tensor], dictionary: Dictionary) -> Optional[Tensor]:
    return None if index is None else index.masked_fill(index.eq(MISSING), dictionary.unk())


def _look_up(index: Optional[Tensor], tokens: Tensor) -> Tensor:
    return tokens if index is None else index[tokens]


def _around(
    tokens: Tensor, before: Sequence[int], after: Sequence[int], pad: int, replaced: int = 0
) -> Tensor:
    """Sentences (B, T), padded on either side, with symbols before and after each.

    Args:
        replaced: how many of a sentence's own first tokens those before it replace.
    """
    (sentences, width), more = tokens.shape, len(before) - replaced
    found = tokens.new_full((sentences, width + more + len(after)), pad)
    found[:, more : more + width] = tokens
    real, each = tokens.ne(pad).int(), torch.arange(sentences, device=tokens.device)
    first, end = real.argmax(1), more + width - real.flip(1).argmax(1)
    for i, symbol in enumerate(before):
        found[each, first + i] = symbol
    for i, symbol in enumerate(after):
        found[each, end + i] = symbol
    return found


def _fit(index: Optional[Tensor], student: Dictionary, teacher: Dictionary) -> str:
    if index is None:
        return f"the same ({len(student)} symbols)"
    return f"mapped (student {len(student)} symbols, teacher {len(teacher)})"
