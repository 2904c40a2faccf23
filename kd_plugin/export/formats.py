"""What a format of exported models is.

A new one is a file with a subclass of ``Format``, and a line in ``pipeline.FORMATS``.
"""

import abc
import contextlib
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

from ..checkpoints import LANGUAGE_MODEL, Checkpoint, count_parameters, dictionaries, digest
from ..decoding import DataBin, Tokenizer, open_sentencepiece
from ..errors import UserError
from ..files import FileError, read_json
from .verify import Blocks, Text

RECORD = "kd_export.json"  # in a folder: what it was made of

# Of formats that are folders
SPM = {
    "--spm": dict(
        metavar="MODEL",
        help="SentencePiece model to put into the folder; implies --remove-bpe sentencepiece",
    )
}


class ExportError(UserError):
    """A model that cannot be exported; the message says why and what to do."""


class Model(NamedTuple):
    """What is exported.

    Attributes:
        checkpoint: what it is made of; of several, their average.
        stock: the same as a checkpoint of plain types for stock fairseq: ``fairseq.stock_state``.
    """

    checkpoint: Checkpoint
    stock: Dict[str, Any]

    @property
    def languages(self) -> Tuple[str, str]:
        task = self.stock["cfg"]["task"]
        return task.get("source_lang", ""), task.get("target_lang", "")

    @property
    def max_positions(self) -> Tuple[int, int]:
        """Tokens of the longest source and target that it takes; of a language model, twice those
        of the longest block."""
        options = self.stock["cfg"]["model"]
        if not self.models_language:
            return options["max_source_positions"], options["max_target_positions"]
        longest = options.get("max_target_positions") or options.get("tokens_per_sample") or 1024
        return longest, longest

    @property
    def models_language(self) -> bool:
        return self.checkpoint.kind is LANGUAGE_MODEL

    def parameters(self) -> Tuple[int, int]:
        return count_parameters(self.stock["model"])

    def origin(self, paths: Sequence[str]) -> Dict[str, Any]:
        """What it is and what it was made of, for the record in a folder.

        Args:
            paths: the checkpoint's, or of those whose average it is.
        """
        total, rest = self.parameters()
        return {
            **dict(zip(("source_lang", "target_lang"), self.languages)),
            "checkpoints": [{"path": os.path.abspath(p), "sha256": digest(p)} for p in paths],
            "parameters": total,
            "parameters_without_embeddings": rest,
            **dict(zip(("max_source_positions", "max_target_positions"), self.max_positions)),
        }


class Proof(NamedTuple):
    """What an export is compared on.

    Attributes:
        text: the sentences, or blocks of a language model's.
        beam: of the translations that are compared.
        post_process: what BLEU is scored without, as fairseq's ``--post-process``.
        tokenizer: BLEU's.
        user_dir: folder that was imported for architectures that are not fairseq's.
    """

    text: Union[Text, Blocks]
    beam: int
    post_process: Optional[str]
    tokenizer: Tokenizer = Tokenizer()
    user_dir: Optional[str] = None


class Verdict(NamedTuple):
    """How an export compares: in lines for the user, and in figures for the export's record."""

    lines: List[str]
    figures: Dict[str, Any]


class Format(abc.ABC):
    """One format. Options are its own flags' values, by name; absent where not given.

    Attributes:
        name: of ``--format``.
        is_folder: whether the output is a folder; else it is a file.
        sentences: how many to verify on unless told otherwise; 0 for all.
        needs_references: whether those must have references.
        scores_symbols: whether BLEU is scored on symbols that may have to be made text of.
        flags: its own flags, with what argparse is told of each.
        required: those of them that it cannot do without.
    """

    name: str
    is_folder = False
    sentences = 200
    needs_references = False
    scores_symbols = False
    flags: Mapping[str, Mapping[str, Any]] = {}
    required: Sequence[str] = ()

    def faults(self, options: Mapping[str, Any]) -> List[str]:
        """What is wrong with options, before any file of a model is opened."""
        return []

    def refuse(self, checkpoint: Checkpoint) -> None:  # noqa: B027
        """Refuse models that the format does not take, before any work.

        Raises:
            ExportError: it is one, or what writes the format is not installed.
        """

    def adapt(self, model: Model, options: Mapping[str, Any]) -> Model:
        """The model as its options ask for it."""
        return model

    @abc.abstractmethod
    def write(self, model: Model, output: Path, options: Mapping[str, Any]) -> None:
        """Write it as a new file or folder.

        Raises:
            ExportError: it cannot be written in this format.
        """

    @abc.abstractmethod
    def verify(
        self, model: Model, output: Path, options: Mapping[str, Any], proof: Proof
    ) -> Verdict:
        """Compare what was written with the checkpoint.

        Raises:
            ExportError: they are not the same.
        """

    def record(  # noqa: B027
        self,
        model: Model,
        output: Path,
        options: Mapping[str, Any],
        paths: Sequence[str],
        *,
        figures: Optional[Dict[str, Any]],
    ) -> None:
        """Write down what it was made of, and how it compares; None is unverified."""

    def made(self, output: Path) -> bool:
        """Whether an existing output is one of this format, so that another may replace it.

        A folder is one if it is empty, or holds a ``RECORD`` that says so.
        """
        if not output.is_dir():
            return not self.is_folder
        if not any(output.iterdir()):
            return True
        record = output / RECORD
        # CTranslate2's did not say so at first
        return record.is_file() and read_json(record).get("format", "ctranslate2") == self.name


def spm_faults(options: Mapping[str, Any]) -> List[str]:
    """What is wrong with the SentencePiece model of ``--spm``, if one is given."""
    if options.get("spm"):
        try:
            open_sentencepiece(options["spm"], "--spm")
        except FileError as error:
            return [str(error)]
    return []


def flag_name(flag: str) -> str:
    """The name by which the value of a flag is kept: ``max_positions`` of ``--max-positions``."""
    return flag.lstrip("-").replace("-", "_")


def data_bin(folder: str, checkpoint: Checkpoint, langs: Tuple[str, str]) -> DataBin:
    """A data-bin of the model's languages, under its own names for them or those of the flags."""
    own = checkpoint.languages_or(langs)
    if own != langs:
        with contextlib.suppress(FileError):
            return DataBin(folder, *own)
    return DataBin(folder, *langs)


def refuse_other_dictionaries(
    checkpoint: Checkpoint,
    data: DataBin,
    symbols: Sequence[Sequence[str]],
    flag: str,
    origin: str = "",
) -> None:
    """Refuse data that were not binarised with the model's dictionaries.

    Args:
        symbols: of the model's sides; of a language model's, of one.
        flag: that names such data.
        origin: where the symbols were found, for the message.

    Raises:
        ExportError: they were not.
    """
    for lang, mine, dictionary in zip(data.langs, symbols, (data.source, data.target)):
        if list(mine) != dictionary.symbols:
            found = f", {origin}" if origin else ""
            raise ExportError(
                f"{checkpoint}: {dictionaries.file_of(lang)} in {data.folder} ({len(dictionary)} "
                f"symbols) is not the model's{found} ({len(mine)} symbols); {flag} names a "
                "data-bin that was made with the model's dictionaries"
            )
