"""What a CTranslate2 teacher reads and writes: symbols of the data, or tokens of its own."""

from collections import Counter
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple

from ..errors import Faults
from ..files import FileError
from . import databin
from .converted import Converted, lacking_tokens
from .engines import Hypothesis, TextHypothesis


class SymbolReading:
    """Batches of fairseq's, for a teacher with the data's dictionaries.

    Args:
        task: a translation task with them.
    """

    target_prefix: Sequence[str] = ()

    def __init__(self, task: Any) -> None:
        self._source, target = task.source_dictionary, task.target_dictionary
        self.end = target[target.eos()]
        self._special = {target[target.bos()], self.end}

    def sources(self, batch: Dict[str, Any]) -> Tuple[List[List[str]], int]:
        """The tokens of each sentence as CTranslate2 wants them; the length of the longest, with
        its end."""
        src_tokens = batch["net_input"]["src_tokens"]
        found = [databin.symbols_seen(self._source, row) for row in src_tokens.tolist()]
        return found, src_tokens.size(1)

    def hypothesis(self, tokens: Sequence[str], score: float, finished: bool) -> Hypothesis:
        """What the model has written behind ``target_prefix``."""
        subwords = " ".join(token for token in tokens if token not in self._special)
        return Hypothesis(subwords, score, finished)


class Around(NamedTuple):
    """Tokens of the teacher's that stand around a sentence's own; None is the model's habit.

    Attributes:
        before_source, after_source: around a source; the latter in the place of its end.
        before_target: what every translation begins with.
    """

    before_source: Optional[Tuple[str, ...]] = None
    after_source: Optional[Tuple[str, ...]] = None
    before_target: Optional[Tuple[str, ...]] = None

    def faults(self, source: Set[str], target: Set[str]) -> List[str]:
        """Tokens that a teacher with these vocabularies does not know."""
        return [
            fault
            for tokens, known, flag in (
                (self.before_source, source, "--source-prefix"),
                (self.after_source, source, "--source-suffix"),
                (self.before_target, target, "--target-prefix"),
            )
            for fault in lacking_tokens(tokens or (), known, flag)
        ]


class TextReading:
    """Batches of ``TextDataset``, for a teacher with tokens of its own.

    Args:
        pieces: from text to tokens and back: see ``tokens``.
        model: the teacher.
        around: what is put around sentences.

    Raises:
        FileError: the teacher has no such tokens, or something is missing.
    """

    def __init__(self, pieces: Any, model: Converted, around: Around) -> None:
        self.pieces, self.end, self._known = pieces, model.end, model.source
        self._special = model.special
        self._added = sum(model.adds)
        faults = Faults()
        own = [token for token in pieces.around if token != model.end]
        if own and around.before_source is None and around.after_source is None:
            faults.add(
                f"the teacher's tokenizer puts {' '.join(own)} around every sentence, which marks "
                "its language, perhaps not yours: say with --source-prefix or --source-suffix what "
                "stands around a source, and with --target-prefix what a translation begins with"
            )
        end = (model.end,) if model.ends_source else ()
        self.source_prefix = around.before_source or ()
        self.source_suffix = end if around.after_source is None else around.after_source
        self.target_prefix = around.before_target or ()
        faults.messages += around.faults(model.source, model.target)
        if model.start is None and not self.target_prefix:
            faults.add(
                "--target-prefix: the teacher's decoder begins with the language of the "
                "translation: give its token"
            )
        longest = model.positions[1]
        if longest is not None and len(self.target_prefix) >= longest - 1:
            faults.add(f"--target-prefix: expected fewer than the teacher's {longest} positions")
        faults.raise_if_any(FileError)

    def tokens(self, text: str) -> List[str]:
        """What the teacher reads; nothing of nothing."""
        own = self.pieces.encode(text)
        return [*self.source_prefix, *own, *self.source_suffix] if own else []

    def warn_of_unknown(self, texts: Iterable[str]) -> None:
        """If the teacher knows few of the tokens of these sentences: nothing else would tell."""
        tokens = [token for text in texts for token in self.pieces.encode(text)]
        unknown = Counter(token for token in tokens if token not in self._known)
        some = ", ".join(token for token, _ in unknown.most_common(5))
        databin.warn_of_unknown(
            *(sum(unknown.values()), len(tokens), "THE SOURCE"),
            whose=f"the teacher ({some})",
            advice="these tokens are hardly those that it was trained with: --teacher-spm or "
            "--teacher-tokenizer is of another model, or the text is in another language or script",
        )

    def length(self, tokens: Sequence[str]) -> int:
        """Tokens of a source with what the model itself adds."""
        return len(tokens) + self._added

    def sources(self, batch: Dict[str, Any]) -> Tuple[List[List[str]], int]:
        """As ``SymbolReading.sources``."""
        return batch["tokens"], max(map(self.length, batch["tokens"]), default=0)

    def hypothesis(self, tokens: Sequence[str], score: float, finished: bool) -> TextHypothesis:
        """As ``SymbolReading.hypothesis``."""
        text = self.pieces.decode([token for token in tokens if token not in self._special])
        return TextHypothesis(" ".join(text.split()), score, finished)

    def example(self, text: str) -> str:
        """What the teacher reads of a sentence, for the log."""
        read = " ".join(self.tokens(text))
        begins = f", and writes after {' '.join(self.target_prefix)}" if self.target_prefix else ""
        return f"the teacher reads {read}{begins}"
