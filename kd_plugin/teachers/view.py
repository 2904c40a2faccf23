"""How a student's batch looks to a teacher, and the teacher's rows to the student."""

import math
from typing import Any, Container, Dict, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from torch import Tensor

from ..cache import are_words
from ..checkpoints import (
    MISSING,
    TRANSLATION,
    Checkpoint,
    Dictionaries,
    Kind,
    Tags,
    VocabularyError,
    index_map,
)
from ..objective import Inside, Place
from ..objective.states import SIDES


class Student(NamedTuple):
    """What a teacher must fit: the student's data.

    Attributes:
        source, target: the vocabularies of what is read and of what is predicted; where sound is
            read, both are the latter.
        source_lang, target_lang: the languages, which name the files of the dictionaries; "" is no
            particular one.
        kind: of model.
        options: of task or model, by name, that a teacher must have been trained with as well;
            False is a teacher's that has none of the name.
        tags: what is read beside the sentences, which a teacher does not see: it has its own.
        needless: symbols of no text in its vocabularies, which a teacher may lack.
    """

    source: Dictionary
    target: Dictionary
    source_lang: str
    target_lang: str
    kind: Kind = TRANSLATION
    options: Mapping[str, Any] = {}
    tags: Tags = Tags()
    needless: Container[str] = ()

    @property
    def languages(self) -> Tuple[str, str]:
        return self.source_lang, self.target_lang

    def words(self, target: Tensor) -> Tensor:
        """Which symbols of targets (B, T) are neither padding nor tags, bool (B, T)."""
        return are_words(target, self.target.pad(), self.tags.longer[1])


def read_of(batch: Mapping[str, Any]) -> Dict[str, Tensor]:
    """What a teacher reads of a batch: the student's ``net_input``, or with what is said where the
    student hears it."""
    return {**batch["net_input"], **batch.get("transcript", {})}


def decoder_inputs(net_input: Mapping[str, Tensor]) -> Tensor:
    """What the decoder of a batch reads, (B, T); a language model reads nothing else."""
    return net_input["prev_output_tokens" if "prev_output_tokens" in net_input else "src_tokens"]


class TeacherView:
    """One teacher's view of a student's batches: the same sentences in its own vocabulary, with the
    tags that it was trained to read.

    A teacher that reads anything else than the student's sentence differs here, and nowhere else:
    in its ``inputs``, and in which of its ``rows`` answer for the student's. The tags that a
    multilingual student reads are taken out, unless they are the teacher's, too.

    Args:
        student: the student's dictionaries.
        own: the teacher's.
        checkpoint: its, for messages.
        tags: what it reads beside the sentences.

    Raises:
        VocabularyError: the teacher lacks a symbol of the student, or one of the tags.
    """

    def __init__(
        self, student: Student, own: Dictionaries, checkpoint: Checkpoint, tags: Tags
    ) -> None:
        source, target, kind = own.source, own.target, student.kind
        try:
            source_map, target_map = (
                index_map(
                    *(ours.symbols, theirs.symbols, side, checkpoint.role, student.needless),
                    share=kind.share,
                )
                for ours, theirs, side in zip(
                    (student.source, student.target), (source, target), kind.vocabularies
                )
            )
        except VocabularyError as error:
            raise VocabularyError(f"{checkpoint}: {error}") from None
        self._target_map = target_map
        # a padding symbol that the teacher lacks never occurs in data; sound has no symbols
        self._read_source = None if kind.reads_frames else _readable(source_map, source)
        self._read_target = _readable(target_map, target)
        self._missing = None if target_map is None else target_map.eq(MISSING)
        if self._missing is not None and not self._missing.any():
            self._missing = None
        self._projection: Optional[Tuple[Tensor, Optional[Tensor]]] = None
        tags.refuse_lacking(source.symbols, target.symbols, str(checkpoint))
        self.tags, self._of_student = tags, student.tags
        ours, theirs = student.tags.longer, tags.longer
        # by how many tokens what it reads is longer than what the student reads
        self.longer = theirs[0] - ours[0], theirs[1] - ours[1]
        # how many symbols each target begins with that are the student's tags, and none to it
        self.unknown = 0 if tags.before_target == student.tags.before_target else ours[1]
        self._pad = source.pad()
        self._before_source = [source.index(symbol) for symbol in tags.before_source]
        self._after_source = [source.index(symbol) for symbol in tags.after_source]
        self._before_target = [target.index(symbol) for symbol in tags.before_target]
        fits = [_fit(target_map, student.target, target)]
        if not kind.reads_frames:
            fits.insert(0, _fit(source_map, student.source, source))
        names = [f"{side} vocabulary".lstrip() for side in kind.vocabularies]
        said = [f"{name} {fit}" for name, fit in zip(names[-len(fits) :], fits)]
        self.description = ", ".join(dict.fromkeys(said))
        if tags != Tags() or student.tags != Tags():
            self.description += f"; {tags}"

    @property
    def changes(self) -> Tuple[Tags, ...]:
        """The tags that it takes out and puts in; none where both read the same."""
        return () if self.tags == self._of_student else (self._of_student, self.tags)

    def to(self, device: torch.device) -> "TeacherView":
        for name in ("_read_source", "_read_target", "_target_map", "_missing"):
            index = getattr(self, name)
            setattr(self, name, None if index is None else index.to(device))
        self._projection = None
        return self

    def inputs(self, net_input: Dict[str, Tensor], device: torch.device) -> Dict[str, Tensor]:
        """The student's ``net_input`` as the teacher's forward pass takes it."""
        source = _look_up(self._read_source, net_input["src_tokens"].to(device))
        lengths = net_input["src_lengths"].to(device) + self.longer[0]
        if "prev_output_tokens" not in net_input:
            return {"src_tokens": source, "src_lengths": lengths}
        target = _look_up(self._read_target, net_input["prev_output_tokens"].to(device))
        if self.changes:
            before, after, begin = map(len, self._of_student)
            own = self._before_source, self._after_source, self._pad
            source = _around(source, *own, first=before, last=after)
            target = _around(target, self._before_target, [], self._pad, first=begin)
        return {
            "src_tokens": source,
            "src_lengths": lengths,
            "prev_output_tokens": target,
        }

    def rows(self, rows: Tensor, width: int) -> Tensor:
        """Which of the teacher's flat target rows answer for these of the student's.

        Args:
            width: of the student's targets.
        """
        more = self.longer[1]
        return rows + more * (rows // width + 1) if more else rows

    def inside(
        self,
        found: Mapping[Place, Tensor],
        net_input: Dict[str, Tensor],
        inputs: Dict[str, Tensor],
    ) -> Inside:
        """What was found inside the teacher, at the student's positions.

        Where one of them reads tags that the other does not, only positions that have the same
        symbols count: of the source those at which the teacher reads the student's (its end of
        sentence may be a tag), of the target those that predict the same one. Attention maps lose
        the keys of tags, and their rows no longer sum to 1.

        Args:
            found: states (B, L, d) and maps (B, queries, keys) by place, of the teacher's batch.
            net_input: the student's batch; ``inputs``: the same as the teacher reads it.
        """
        if not self.changes:
            return Inside(found)
        before = len(self._before_source) - len(self._of_student.before_source)
        first = {"encoder": before, "decoder": self.longer[1]}
        source = net_input["src_tokens"].to(inputs["src_tokens"].device)
        target = net_input["prev_output_tokens"]
        width = {"encoder": source.size(1), "decoder": target.size(1)}
        states = {}
        for place, state in found.items():
            for at, side in enumerate(SIDES[place.kind], start=1):
                state = _moved(state, at, first[side], width[side])
            states[place] = state
        read = _moved(inputs["src_tokens"], 1, before, width["encoder"])
        shared = {"encoder": read.eq(_look_up(self._read_source, source))}
        if self.longer[1] < 0:
            own = torch.arange(width["decoder"], device=source.device) + self.longer[1] >= 0
            shared["decoder"] = own.expand(len(target), -1)
        return Inside(states, shared=shared)

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
            same = torch.equal(index, torch.arange(len(index), device=index.device))
            rows: Any = slice(len(index)) if same else index  # those of tags lie behind: no copy
            self._projection = (
                layer.weight.detach()[rows],
                None if bias is None else bias.detach()[rows],
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


def _moved(tensor: Tensor, dim: int, first: int, width: int) -> Tensor:
    """So many positions from the first one; 0 at those before the beginning."""
    if first >= 0:
        return tensor.narrow(dim, first, width)
    shape = [*tensor.shape]
    shape[dim] = -first
    return torch.cat([tensor.new_zeros(shape), tensor.narrow(dim, 0, width + first)], dim)


def _around(
    tokens: Tensor,
    before: Sequence[int],
    after: Sequence[int],
    pad: int,
    first: int = 0,
    last: int = 0,
) -> Tensor:
    """Sentences (B, T), padded on either side, with symbols before and after each.

    Args:
        first, last: how many of a sentence's own tokens, on either side, these replace.
    """
    (sentences, width), more = tokens.shape, max(len(before) - first, 0)
    found = tokens.new_full((sentences, width + more + max(len(after) - last, 0)), pad)
    found[:, more : more + width] = tokens
    real, each = tokens.ne(pad).int(), torch.arange(sentences, device=tokens.device)
    start, end = real.argmax(1), more + width - real.flip(1).argmax(1) - last
    fewer = max(first - len(before), 0)
    for i, symbol in enumerate([*[pad] * fewer, *before]):
        found[each, start + i] = symbol
    for i in range(max(len(after), last)):
        found[each, end + i] = after[i] if i < len(after) else pad
    return found[:, fewer:]


def _fit(index: Optional[Tensor], student: Dictionary, teacher: Dictionary) -> str:
    if index is None:
        return f"the same ({len(student)} symbols)"
    return f"mapped (student {len(student)} symbols, teacher {len(teacher)})"
