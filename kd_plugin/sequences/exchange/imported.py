"""Translations made elsewhere, as what a data-bin is made from."""

import logging
from typing import Any, Callable, Dict, Optional, Sequence

from ... import decoding
from ...decoding import Corpus
from ...files import FileError
from ..asked import Opened
from ..hypotheses import HypothesisStore
from ..origin import Origin
from .align import (
    CHECK,
    USE,
    Checked,
    Sources,
    TextSources,
    Translations,
    are_subwords,
    check,
    fill,
)
from .lines import FLAG, Lines

logger = logging.getLogger(__name__)


class Imported(Origin):
    """Files of translations.

    Args:
        files: what ``readable_twice`` gives.

    Raises:
        FileError: they are of no known format, or nothing says how their sources become subwords.
    """

    missing = "without_translation"

    def __init__(self, opened: Opened, files: Sequence[Lines]) -> None:
        super().__init__(opened)
        asked, data = opened.asked, opened.data
        encodes = bool(opened.cfg.bpe)
        self.translations = Translations(
            *(files, asked.import_format, asked.import_as),
            dictionary=data.target,
            encodes=encodes or bool(asked.student_spm),
        )
        self.written = self.translations.written
        source = asked.import_source
        if source is None:
            alone = not asked.source_text and data.side(opened.subset, data.langs[0]) is None
            source = USE if alone else CHECK
            if alone:
                logger.info(f"{data.folder} has no {opened.subset}: the source is that of {FLAG}")
        self.source = source  # what the files' own sources are for
        self._checked: Optional[Checked] = None
        if source != USE:
            return
        own = (item.source for item in self.translations if item.source)
        self._in_subwords = are_subwords(own, data.source, encodes)
        if not (self._in_subwords or encodes):
            raise FileError(
                f"{self.translations.names}: the sources are text, and nothing says how they "
                "become subwords: give --bpe sentencepiece --sentencepiece-model MODEL"
            )

    @property
    def of_subset(self) -> bool:
        return self.source != USE and super().of_subset

    def header(self) -> Dict[str, Any]:
        asked, cfg, own = self.opened.asked, self.opened.cfg, self.source == USE
        subset = self.opened.subset if self.of_subset else None
        return {
            **self.translations.describe(),
            **decoding.describe(self.opened.data, subset or "", asked.source_text, cfg.task),
            "subset": subset,
            "own_source": own,
            "source_text_encoding": None if self.of_subset else decoding.describe_text(cfg),
            # how the scores are normalised
            "generation": {name: cfg.generation[name] for name in ("lenpen", "unnormalized")},
        }

    def corpus(self, store: HypothesisStore) -> Corpus:
        opened = self.opened
        subset = (
            Corpus.of_subset(opened.task, opened.data, opened.subset) if self.of_subset else None
        )
        if not store.complete:
            self._checked = self._check(subset)
        if self.source != USE:
            return opened.corpus(store, subset)
        opened.refuse_without_references(self.translations.names)
        keys = "imported", "format", "files", "source_text_encoding", "truncate_source"
        return Corpus.of_text(
            *(opened.task, opened.data, self.translations.names),
            to_subwords=str if self._in_subwords else opened.to_subwords,
            prefix=store.beside("source", *keys),
            lines=(item.source or "" for item in self.translations),
        )

    def fill(self, store: HypothesisStore, corpus: Corpus, make_room: Callable[[], None]) -> bool:
        checked, self._checked = self._checked, None  # a number for each sentence
        assert checked is not None
        make_room()
        return fill(store, self.translations, checked)

    def _check(self, subset: Optional[Corpus]) -> Checked:
        """Compare the files with what they should be translations of; nothing is written.

        Args:
            subset: None if it is a text.
        """
        opened, asked = self.opened, self.opened.asked
        how = opened.to_text, opened.to_subwords
        sources: Optional[Sources] = None
        if asked.source_text:
            raw = opened.source_text_is_raw
            sources = TextSources(asked.source_text, opened.data.source, *how, raw=raw)
        elif subset is not None:
            name = f"{opened.data.folder}, {opened.subset}"
            sources = Sources(name, opened.data.source, subset.source, *how)
        checked = check(
            *(self.translations, sources),
            compare=self.source == CHECK,
            incomplete=asked.import_incomplete,
        )
        if asked.choice.min_score_quantile and not checked.scored:
            raise FileError(
                f"--min-score-quantile: some translations of {self.translations.names} have no "
                "score"
            )
        return checked
