"""Where translations come from, as ``make`` sees it: a model that decodes, or files."""

from abc import ABC, abstractmethod
from typing import Any, Callable, Dict

from ..decoding import Corpus
from .asked import Opened
from .hypotheses import HypothesisStore
from .student import SUBWORDS


class Origin(ABC):
    """What translations come from.

    Attributes:
        opened: what is asked for, with its data; the task is the one that decodes.
        written: ``SUBWORDS`` of the data's target dictionary, or ``TEXT``.
        reads_spelled: whether what is translated is the text that the source's symbols spell.
        missing: the reason, one of ``REASONS``, why a sentence has no translation.
        of_subset: whether what is translated is the subset, and not a text.
    """

    written = SUBWORDS
    reads_spelled = False
    missing = "longer_than_the_teacher_reads"

    def __init__(self, opened: Opened) -> None:
        self.opened = opened

    @property
    def of_subset(self) -> bool:
        return not self.opened.asked.source_text

    @abstractmethod
    def header(self) -> Dict[str, Any]:
        """All that hypotheses depend on, as plain types."""

    def corpus(self, store: HypothesisStore) -> Corpus:
        """What is translated; what is cheap to find wrong with translations is found first.

        Args:
            store: of the hypotheses, which this does not change.

        Raises:
            UserError: it cannot be read, or is not what has been translated.
        """
        return self.opened.corpus(store)

    @abstractmethod
    def fill(self, store: HypothesisStore, corpus: Corpus, make_room: Callable[[], None]) -> bool:
        """Write this process's shard of the hypotheses, from where it stopped.

        Args:
            corpus: what ``corpus`` has returned.
            make_room: removes what is in the way; to be called once all has been checked.

        Returns:
            whether the hypotheses of all shards are complete.

        Raises:
            UserError: there is a reason why they cannot be made.
        """
