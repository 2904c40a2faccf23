"""Whom the data is for: the student's dictionaries, and how its text is cut into subwords.

Whatever a hypothesis holds, subwords of the data's dictionary or running text, ``Student`` knows
its text and its subwords; nothing else asks which of the two it is.
"""

from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch

from ..checkpoints import lacking
from ..decoding.databin import DataBin, decode, words
from ..decoding.engines import Hypothesis, TextHypothesis
from ..decoding.sentencepieces import open_sentencepiece
from ..decoding.text import split_tags
from ..files import FileError

AnyHypothesis = Union[Hypothesis, TextHypothesis]
SUBWORDS, TEXT = "subwords", "text"  # what hypotheses may be; as the header of their store has it


class Sentence(NamedTuple):
    """One side of a pair, as the data holds it.

    Attributes:
        text: running text.
        subwords: the student's, with spaces between.
        tags: of languages, which are no text and stand before or behind it.
        indices: of the subwords in the student's dictionary, where they are known already.
    """

    text: str
    subwords: str
    tags: List[str]
    indices: Optional[List[int]] = None


class Student(NamedTuple):
    """What the data is written for.

    Attributes:
        data: its dictionaries, and what is carried over.
        to_text: from subwords of the data that is read (the teacher's) to running text.
        recode: from running text to its own subwords; None if they are that data's.
        encode: the same for hypotheses that are text; None if ``recode`` does it, or none are.
        own_text: from the student's subwords to running text; None if ``to_text`` does it.
    """

    data: DataBin
    to_text: Callable[[str], str]
    recode: Optional[Callable[[str], str]]
    encode: Optional[Callable[[str], str]] = None
    own_text: Optional[Callable[[str], str]] = None

    def text(self, hypothesis: AnyHypothesis) -> str:
        """Running text."""
        if isinstance(hypothesis, TextHypothesis):
            return hypothesis.text
        return self.to_text(hypothesis.subwords)

    def symbols(self, hypothesis: AnyHypothesis) -> List[str]:
        """Subwords to be counted: the teacher's own, or the student's of text."""
        if isinstance(hypothesis, TextHypothesis):
            return words(self._encode(hypothesis.text))
        return words(hypothesis.subwords)

    def cannot_read(self, unknown: str, source: Sequence[str], hypothesis: AnyHypothesis) -> bool:
        """Whether a pair holds a symbol whose text nobody knows, and needs that text.

        Args:
            unknown: how such a symbol is written.
            source: subwords.
        """
        if self.recode is not None and unknown in source:
            return True
        if isinstance(hypothesis, TextHypothesis):
            return unknown in hypothesis.text
        return self.recode is not None and unknown in words(hypothesis.subwords)

    def hypothesis(self, hypothesis: AnyHypothesis) -> Sentence:
        """A hypothesis as the target side holds it."""
        if isinstance(hypothesis, TextHypothesis):
            return Sentence(hypothesis.text, self._encode(hypothesis.text), [])
        return self.sentence(hypothesis.subwords, target=True)

    def sentence(self, subwords: str, *, target: bool = False) -> Sentence:
        """A sentence of the data that is read, as the source or the target side holds it."""
        text = self.to_text(subwords)
        if self.recode is None:
            return Sentence(text, subwords, [])
        before, _, after = split_tags(words(subwords))
        # those that the student knows stay what they are
        known = (self.data.target if target else self.data.source).indices
        recoded = [
            *(tag for tag in before if tag in known),
            *words(self.recode(text)),
            *(tag for tag in after if tag in known),
        ]
        return Sentence(text, " ".join(recoded), [*before, *after])

    def own(self, tokens: torch.Tensor, *, target: bool = False) -> Sentence:
        """A sentence of a data-bin in the student's dictionaries: it stays as it is."""
        indices = tokens.tolist()
        subwords = decode(self.data.target if target else self.data.source, indices)
        return Sentence((self.own_text or self.to_text)(subwords), subwords, [], indices)

    def _encode(self, text: str) -> str:
        encode = self.recode or self.encode
        assert encode is not None
        return encode(text)


def open_student(
    teachers: DataBin,
    to_text: Callable[[str], str],
    folder: Optional[str] = None,
    subword_model: Optional[str] = None,
    langs: Optional[Tuple[str, str]] = None,
    *,
    encode: Optional[Callable[[str], str]] = None,
    written: str = SUBWORDS,
) -> Student:
    """A student of its own data-bin, or one that shares the teacher's.

    Args:
        teachers: the data-bin that the teacher reads.
        to_text: from the teacher's subwords to running text.
        folder: the student's data-bin, if it has other dictionaries.
        subword_model: the student's SentencePiece model.
        langs: what that data-bin calls the languages, if not as the teacher's does.
        encode: from running text to subwords of ``teachers``, if --bpe says how.
        written: what hypotheses are, ``SUBWORDS`` of ``teachers`` or ``TEXT``.

    Raises:
        FileError: one of these cannot be read, the dictionaries do not go together, or nothing
            says how text becomes subwords.
    """
    if written == TEXT and subword_model is None and encode is None:
        raise FileError(
            "the translations are text, and nothing says how the student cuts it into subwords: "
            "give --bpe sentencepiece --sentencepiece-model MODEL, or for a student of its own "
            "--student-data DIR --student-spm MODEL"
        )
    if folder is None:
        return Student(teachers, to_text, None, encode)
    own = DataBin(folder, *(langs or teachers.langs), renamed="--student-langs {}")
    if "valid" not in own.splits():
        raise FileError(
            f"--student-data {folder}: expected a folder of fairseq-preprocess with a valid "
            "subset; it is carried over"
        )
    if subword_model is not None:
        model = open_sentencepiece(subword_model, "--student-spm")
        return Student(
            *(own, to_text, lambda text: " ".join(model.encode(text, out_type=str))),
            own_text=lambda subwords: model.decode(words(subwords)),
        )
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
    return Student(own, to_text, None, encode)
