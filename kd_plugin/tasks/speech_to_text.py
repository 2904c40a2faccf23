"""The task ``kd_speech_to_text``: fairseq's ``speech_to_text`` with a teacher."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional

import numpy as np
from fairseq.data import Dictionary
from fairseq.data.audio.speech_to_text_joint_dataset import S2TJointDataConfig
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import FairseqTask, register_task
from fairseq.tasks.speech_to_text import SpeechToTextTask

from ..checkpoints import SPEECH, TRANSCRIPT
from ..errors import UserError
from ..plan import choice_value, two_languages
from ..teachers import Student
from .distillation import Distillation, DistillationConfig
from .speech import (
    Seeding,
    SpeechDataset,
    as_student,
    digest_of_audio,
    encoder,
    naming_columns,
    refuse_changing,
    settings,
    transforms,
)


@dataclass
class KDSpeechToTextConfig(DistillationConfig):
    # fairseq's own flags of its task, which has no dataclass
    data: str = ""
    config_yaml: str = "config.yaml"
    max_source_positions: int = 6000
    max_target_positions: int = 1024
    teacher_reads: ChoiceEnum(["speech", "transcript"]) = field(  # type: ignore
        default="speech",
        metadata={
            "help": f"what the teacher of {SPEECH.taught} reads: the speech that the student "
            "hears, or, as a model that translates text, its transcript (src_text in the TSV files)"
        },
    )


@register_task(SPEECH.taught, dataclass=KDSpeechToTextConfig)
class KDSpeechToTextTask(Distillation, SpeechToTextTask):
    """Write down what is said, in its language or another, taught by a bigger model."""

    kind = SPEECH
    repair = "Make its TSV files and what they name again"
    # those of the dataclass, and not of the parent, which has none
    add_args = classmethod(FairseqTask.add_args.__func__)  # type: ignore

    def __init__(self, cfg: KDSpeechToTextConfig, tgt_dict: Dictionary) -> None:
        super().__init__(cfg, tgt_dict)
        self.cfg: KDSpeechToTextConfig = cfg  # fairseq's has it as args alone
        self.transcripts: Optional[Dictionary] = None
        if choice_value(cfg.teacher_reads) == "transcript":
            self.data_cfg = S2TJointDataConfig(Path(cfg.data) / cfg.config_yaml)
            path = os.path.join(cfg.data, self.data_cfg.src_vocab_filename)
            if not os.path.isfile(path):
                raise UserError(
                    f"--teacher-reads transcript: expected the dictionary of the transcripts in "
                    f"{path}, or that {cfg.config_yaml} names another file as src_vocab_filename"
                )
            self.transcripts = Dictionary.load(path)

    def student(self) -> Student:
        if self.transcripts is not None:
            languages = two_languages(self.cfg.teacher_langs) or ("", "")
            return Student(self.transcripts, self.tgt_dict, *languages, kind=TRANSCRIPT)
        return as_student(self)

    def load_dataset(self, split: str, *args: Any, **kwargs: Any) -> None:
        with naming_columns(self.cfg.data, split):
            super().load_dataset(split, *args, **kwargs)

    def prepared(self, dataset: Any, split: str) -> SpeechDataset:
        if self.transcripts is None:
            return SpeechDataset(dataset, self.cfg.seed)
        joined = transforms(self.data_cfg, split, ["dataset"])
        if joined:
            raise UserError(
                f"--teacher-reads transcript: {', '.join(joined)} joins utterances, and not their "
                f"transcripts: take it out of {self.cfg.config_yaml}"
            )
        return SpeechDataset(
            dataset, self.cfg.seed, encoder(self.data_cfg, self.transcripts), self.transcripts
        )

    def get_batch_iterator(self, *args: Any, **kwargs: Any) -> Any:
        with Seeding.lock:
            return super().get_batch_iterator(*args, **kwargs)

    def lengths(self, dataset: Any) -> np.ndarray:
        return np.array([dataset.size(i) for i in range(len(dataset))])

    def lengths_read(self, dataset: Any) -> np.ndarray:
        return self.lengths(dataset) if self.transcripts is None else dataset.lengths_read

    def data_paths(self, folder: str, subset: str, combine: bool) -> List[str]:
        return [os.path.join(folder, f"{split}.tsv") for split in subset.split(",")]

    def data_settings(self) -> Dict[str, Any]:
        return {"teacher_reads": choice_value(self.cfg.teacher_reads)}

    def describe_data(self, folder: str, subset: str, combine: bool, whole: bool) -> Dict[str, Any]:
        hears = self.transcripts is None
        refuse_changing(self.data_cfg, subset, hears)
        described = super().describe_data(folder, subset, combine, whole)
        described["settings"].update(settings(self.data_cfg, subset, hears))
        if hears:
            audio = folder, self.data_cfg.audio_root, subset
            described["data"]["audio"] = digest_of_audio(*audio, whole=False)
            if whole:
                described["files"]["audio"] = digest_of_audio(*audio, whole=True)
        return described
