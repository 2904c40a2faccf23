"""Utterances of a test set: what a report of speech models says of them."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

from fairseq import tasks

from .. import decoding
from ..checkpoints import SPEECH
from ..errors import UserError
from ..files import digest
from ..tasks.speech import SpeechDataset, as_student, digest_of_audio, naming_columns, settings
from .measured import Sample
from .systems import Model, configuration
from .translations import Translations


def read_speech(cfg: Any, subset: Optional[str] = None) -> Tuple[Any, SpeechDataset]:
    """fairseq's task of speech with its data, as fairseq-generate sets it up.

    Args:
        cfg: fairseq's configuration.
        subset: other than the one that is judged.

    Returns:
        the task and a subset's utterances.

    Raises:
        UserError: they cannot be read.
    """
    folder, subset = cfg.task.data, subset or cfg.dataset.gen_subset
    try:
        task = tasks.setup_task(cfg.task)
        with naming_columns(folder, subset):
            task.load_dataset(subset)
    except UserError:
        raise
    except Exception as error:  # of many kinds
        raise UserError(
            f"{folder}: the subset {subset!r} of fairseq's task speech_to_text cannot be read "
            f"({error or repr(error)})"
        ) from error
    return task, SpeechDataset(task.dataset(subset), cfg.common.seed)


class Utterances(Translations):
    """Sound as fairseq reads it, and the text that should be written of it: what is said, or its
    translation."""

    kind = SPEECH
    speed = "utterances_per_second"
    own = "the texts of the TSV file"

    def _read(self) -> Optional[List[str]]:
        self.task, self.dataset = read_speech(self.cfg)
        subwords = self.task.data_cfg.bpe_tokenizer.get("bpe")
        if subwords and self.cfg.common_eval.post_process:
            raise UserError(
                f"--remove-bpe: leave it out, as the bpe_tokenizer of {self.cfg.task.config_yaml}, "
                f"{subwords}, makes text of what a model writes, and takes the spaces out, too"
            )
        self.folder = Path(self.cfg.task.data)
        self.student = as_student(self.task)
        self.languages = self.dataset.languages
        self._to_text, _ = decoding.text_functions(self.task, self.cfg, None)
        self.source = self.dataset.transcripts
        self.binarised = True
        self._trained_on = (self.folder / "train.tsv").is_file()
        if not self._trained_on:  # and the dictionaries of such data count nothing
            self.kinds = tuple(kind for kind in self.kinds if kind != "frequency")
        return self._texts(self.dataset.tgt, self.student.target, escape_unk=True)

    def _sample(self) -> Optional[Sample]:
        return None

    def _describe_data(self) -> Dict[str, Any]:
        return _describe(self.task, self.cfg)

    def settings_of(self, model: Model) -> Dict[str, Any]:
        cfg = configuration(self.asked.options, model)
        return _describe(read_speech(cfg)[0], cfg)

    def training_set(self) -> Optional[Any]:
        return read_speech(self.cfg, "train")[1].tgt if self._trained_on else None


def _describe(task: Any, cfg: Any) -> Dict[str, Any]:
    """What transcripts depend on in the data: contents, not paths."""
    folder, subset, found = cfg.task.data, cfg.dataset.gen_subset, task.data_cfg
    names = [found.vocab_filename, *(f"{split}.tsv" for split in subset.split(","))]
    return {
        "subset": subset,
        "files": {Path(name).name: digest(str(Path(folder, name))) for name in names},
        "yaml": settings(found, subset, True),
        "audio": digest_of_audio(folder, found.audio_root, subset, whole=False),
    }
