"""Teachers that are folders and no checkpoints: CTranslate2's models, and those that become one.

Such a folder has the tokens of its own training, so it reads text and writes text, unless its
vocabularies are the data's.
"""

import logging
import os
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, Sequence, Tuple

from ..decoding import (
    Around,
    Converted,
    Corpus,
    SentencePieceTokens,
    SymbolReading,
    TextReading,
    TransformersTokens,
    databin,
    huggingface,
)
from ..decoding.corpus import SourceLines, TextDataset
from ..errors import Faults
from ..export import read_record
from ..files import FileError
from .asked import Opened
from .decoded import Decoded, Engine, keep
from .hypotheses import HypothesisStore
from .student import SUBWORDS, TEXT

logger = logging.getLogger(__name__)

_LOOKED_AT = 500  # sentences, before they are translated


class Translator(NamedTuple):
    """A folder that translates.

    Attributes:
        folder: it.
        model: None of a model of transformers that is to be converted first.
        pieces: its tokens of text; None if it reads the data's symbols.
        around: what stands around its sentences.
    """

    folder: Path
    model: Optional[Converted]
    pieces: Any = None
    around: Around = Around()

    @classmethod
    def open(
        cls,
        folder: str,
        task: Any,
        *,
        spm: Sequence[str] = (),
        tokenizer: Optional[str] = None,
        around: Optional[Around] = None,
    ) -> "Translator":
        """Look at all that is small; nothing is converted, and no weights are read.

        Args:
            task: a translation task with the data's dictionaries.
            spm, tokenizer: what cuts text into the teacher's tokens, if not what lies there.

        Raises:
            FileError: it cannot be used; every reason that is known before a conversion.
        """
        path, faults = Path(folder), Faults()
        of_transformers = huggingface.is_model(path)
        model: Optional[Converted] = None
        pieces: Any = None
        if of_transformers:
            faults.messages += huggingface.model_faults(path)
        else:
            with faults.collecting():
                model = Converted.open(path)
        with faults.collecting():
            if spm:
                pieces = SentencePieceTokens(spm, "--teacher-spm")
            elif tokenizer:
                pieces = TransformersTokens(tokenizer, "--teacher-tokenizer")
            elif of_transformers and not faults:
                pieces = TransformersTokens(folder, "--path")
            elif model is not None and not model.has_symbols_of(
                task.source_dictionary, task.target_dictionary
            ):
                pieces = _own_pieces(path)
        faults.raise_if_any(FileError)
        found = cls(path, model, pieces, around or Around())
        if model is not None:
            found.reading(task)  # which refuses what the teacher does not know
        elif isinstance(pieces, TransformersTokens):
            faults.messages += pieces.lacking(found.around)
            faults.raise_if_any(FileError)
        return found

    @property
    def reads_text(self) -> bool:
        return self.pieces is not None

    def describe(self) -> Dict[str, Any]:
        """All that translations depend on, by contents: for the header of hypotheses."""
        files = huggingface.files(self.folder) if self.model is None else self.model.files()
        found: Dict[str, Any] = {"teachers": [{"files": files}]}
        if self.reads_text:
            given = {k: v and list(v) for k, v in self.around._asdict().items()}
            found["reading"] = {"tokens": self.pieces.files(), **given}
        return found

    def converted(self, kept: Path) -> "Translator":
        """The same as CTranslate2 reads it, kept in a folder for the next time.

        Raises:
            FileError: it cannot be converted.
        """
        if self.model is not None:
            return self
        keep(kept, lambda new: huggingface.convert(self.folder, new))
        return self._replace(model=Converted.open(kept))

    def reading(self, task: Any) -> Any:
        """What it reads and writes.

        Raises:
            FileError: it does not know what is to stand around its sentences.
        """
        assert self.model is not None
        if self.pieces is None:
            if any(self.around):
                raise FileError(
                    "--source-prefix, --source-suffix and --target-prefix need --teacher-spm or "
                    "--teacher-tokenizer: this teacher reads the data's symbols as they are"
                )
            return SymbolReading(task)
        return TextReading(self.pieces, self.model, self.around)

    @property
    def positions(self) -> Tuple[Optional[int], Optional[int]]:
        """Tokens of its longest source and target."""
        assert self.model is not None
        return positions(self.model)


def positions(model: Converted) -> Tuple[Optional[int], Optional[int]]:
    """Tokens of a model's longest source and target, as its checkpoint had them or as it has."""
    record, (source, target) = read_record(model.folder), model.positions
    return record.get("max_source_positions", source), record.get("max_target_positions", target)


def _own_pieces(folder: Path) -> Any:
    """The SentencePiece model that ``fairseq-kd-export`` has put beside a model."""
    name = read_record(folder).get("sentencepiece")
    if isinstance(name, str) and (folder / os.path.basename(name)).is_file():
        return SentencePieceTokens([str(folder / os.path.basename(name))], "--path")
    raise FileError(
        f"--path {folder}: its vocabularies are not the data's dictionaries, and nothing says how "
        "text becomes its tokens: give --teacher-spm SOURCE[:TARGET] or --teacher-tokenizer DIR"
    )


class DecodedByTranslator(Decoded):
    """Translations of such a folder."""

    def __init__(self, opened: Opened) -> None:
        super().__init__(opened)
        asked = opened.asked
        self.translator = Translator.open(
            *(opened.cfg.common_eval.path, opened.task),
            spm=asked.teacher_spm,
            tokenizer=asked.teacher_tokenizer,
            around=asked.around,
        )
        reads_text = self.translator.reads_text
        self.written = TEXT if reads_text else SUBWORDS
        self.reads_spelled = reads_text and not opened.source_text_is_raw

    def teachers(self) -> Dict[str, Any]:
        written = {"written": TEXT} if self.written == TEXT else {}
        return {**self.translator.describe(), **written, "overrides": {}}

    def engine(self, store: HypothesisStore, corpus: Corpus) -> Engine:
        task = self.opened.task
        translator = self.translator.converted(store.beside("ctranslate2", "teachers"))
        assert translator.model is not None
        reading, positions = translator.reading(task), translator.positions
        if translator.reads_text:
            text = self._text_of(corpus)
            corpus = corpus._replace(dataset=TextDataset(reading, text, len(corpus.source)))
            logger.info(f"of the first sentence {reading.example(text(0))}")
            some = range(0, len(corpus.source), max(len(corpus.source) // _LOOKED_AT, 1))
            reading.warn_of_unknown(map(text, some))
            if not store.planned:
                _refuse_prefix(reading, corpus, task.max_positions()[0], positions[0])
        longest = positions[1] or task.max_positions()[1]
        engine = self.ctranslate2(reading, translator.model.folder, longest)
        return Engine(engine.decode, [positions], corpus)

    def _text_of(self, corpus: Corpus) -> Callable[[int], str]:
        """The running text of each sentence."""
        opened = self.opened
        if opened.source_text_is_raw:
            return SourceLines(str(opened.asked.source_text)).__getitem__
        dictionary, sentences = corpus.data.source, corpus.source
        return lambda i: opened.to_text(databin.decode(dictionary, sentences[i].tolist()))


def _refuse_prefix(
    reading: Any, corpus: Corpus, asked: Optional[int], longest: Optional[int]
) -> None:
    """Refuse tokens around a source that make it too long, unless that limit is asked for."""
    if longest is None or (asked is not None and asked <= longest):
        return
    sizes, more = corpus.dataset.sizes, len(reading.source_prefix) + len(reading.source_suffix)
    too_long = int(((sizes > longest) & (sizes - more <= longest)).sum())
    if too_long:
        raise FileError(
            f"--source-prefix and --source-suffix: with these {more} tokens, {too_long} sentences "
            f"have more than the {longest} tokens that the teacher reads; "
            f"--max-source-positions {longest} leaves out all that are longer"
        )
