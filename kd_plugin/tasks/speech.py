"""Data of fairseq's speech tasks, as the plugin's other data are.

``SpeechDataset`` wraps what fairseq loads from TSV files; the functions say what a cached answer
about it depends on.
"""

import contextlib
import copy
import hashlib
import json
import os
import threading
from argparse import Namespace
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
from fairseq.data import (
    BaseWrapperDataset,
    ConcatDataset,
    Dictionary,
    ResamplingDataset,
    data_utils,
    encoders,
)
from fairseq.data.audio.audio_utils import parse_path
from fairseq.data.audio.speech_to_text_dataset import (
    SpeechToTextDataset,
    SpeechToTextDatasetCreator,
)
from torch import Tensor

from ..cache import CacheError
from ..checkpoints import FEATURES, SPEECH
from ..errors import UserError
from ..files import digest, digest_of_sample
from ..teachers import Student

# Transforms that do the same to a sample whenever it is read; all others have chance in them
_CERTAIN = ("utterance_cmvn", "global_cmvn", "delta_deltas")
# Fields of the configuration that say nothing of features and targets, or that are looked at apart
_ASIDE = ("audio_root", "vocab_filename", "shuffle", "sampling_alpha", "hub", "vocoder")
_SAMPLED = 64  # audio files whose content is compared, unless all are

KINDS = ("feature", "waveform", "dataset")  # of transforms

Encode = Callable[[str], Tensor]


class Seeding:
    """One at a time seeds numpy's only generator: fairseq reads training data ahead in a thread,
    and validates meanwhile."""

    lock = threading.RLock()


def _unlock() -> None:
    Seeding.lock = threading.RLock()


os.register_at_fork(after_in_child=_unlock)  # the thread that held it stays behind


class SpeechDataset(BaseWrapperDataset):
    """Utterances of one TSV file or several.

    What chance does to a sample (SpecAugment, say) depends on the seed, the epoch and the sample
    alone: a resumed training hears what it would have heard, and processes that read ahead do not
    repeat one another.

    Args:
        dataset: fairseq's.
        seed: of the training.
        encode: gives the symbols of a transcript, to be read by a teacher of text; None reads none.
        source: their dictionary.

    Raises:
        UserError: transcripts are to be read, and some are missing.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        encode: Optional[Encode] = None,
        source: Optional[Dictionary] = None,
    ) -> None:
        super().__init__(dataset)
        self.seed, self.source, self.epoch = seed, source, 1
        self._transcripts: Dict[str, List[Tensor]] = {}
        if encode is not None:
            for part in _parts(dataset):
                _refuse_missing(part)
                self._transcripts[part.split] = [encode(text) for text in part.src_texts]

    def __getitem__(self, index: int) -> Dict[str, Any]:
        with Seeding.lock, data_utils.numpy_seed(self.seed, self.epoch, int(index)):
            item = self.dataset[index]
        item.index = index  # which several files count from 0 each
        sample = {"id": int(index), "item": item}
        return {**sample, "transcript": self._transcript(index)} if self.source else sample

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        ids = [sample["id"] for sample in samples]
        with Seeding.lock, data_utils.numpy_seed(self.seed, self.epoch, *ids):
            batch = self.dataset.collater([sample["item"] for sample in samples])
        if not batch or self.source is None:
            return batch
        transcripts = {sample["id"]: sample["transcript"] for sample in samples}
        ordered = [transcripts[i] for i in batch["id"].tolist()]  # by length of the sound
        pad, eos = self.source.pad(), self.source.eos()
        batch["transcript"] = {
            "src_tokens": data_utils.collate_tokens(ordered, pad, eos, left_pad=True),
            "src_lengths": torch.tensor([len(transcript) for transcript in ordered]),
        }
        return batch

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.epoch = epoch

    # What the other datasets have

    @property
    def lengths(self) -> np.ndarray:
        """Frames and target tokens, (n, 2), as fairseq's length filter counts them."""
        return np.array([self.dataset.size(i) for i in range(len(self))])

    @property
    def lengths_read(self) -> np.ndarray:
        """Tokens of the transcript and of the target, (n, 2)."""
        read = [len(self._transcript(i)) for i in range(len(self))]
        return np.stack([read, self.lengths[:, 1]], axis=1)

    @property
    def src_sizes(self) -> np.ndarray:
        return self.lengths[:, 0]

    @property
    def tgt_sizes(self) -> np.ndarray:
        """Target tokens, with those at either end that fairseq's filter does not count."""
        sizes = self.lengths[:, 1]
        return sizes + len(self.tgt[0]) - sizes[0]

    @property
    def tgt(self) -> Sequence[Tensor]:
        return _Targets(self.dataset)

    @property
    def transcripts(self) -> List[str]:
        """What is said in each utterance; empty where the TSV file does not tell."""
        return [text or "" for part in _parts(self.dataset) for text in part.src_texts]

    @property
    def languages(self) -> Tuple[str, str]:
        """What is spoken and what is written; "" where TSV files do not tell, or name several."""
        parts = list(_parts(self.dataset))
        spoken, written = (
            {one for p in parts for one in getattr(p, f"{side}_langs")} for side in ("src", "tgt")
        )
        return _only(spoken), _only(written)

    def _transcript(self, index: int) -> Tensor:
        part, index = _find(self.dataset, index)
        return self._transcripts[part.split][index]


def _only(found: Set[str]) -> str:
    return next(iter(found)) if len(found) == 1 else ""


class _Targets(Sequence[Tensor]):
    """The targets of a dataset, of which no sound is read."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        part, index = _find(self.dataset, int(index))
        silent = copy.copy(part)
        silent.__class__ = _Silent
        return silent[index].target


class _Silent(SpeechToTextDataset):
    def _get_source_audio(self, index: Any) -> Tensor:
        return torch.zeros(1, 1)


def _parts(dataset: Any) -> Iterator[Any]:
    """A dataset for each TSV file."""
    for part in getattr(dataset, "datasets", (dataset,)):
        yield part.dataset if isinstance(part, ResamplingDataset) else part


def _find(dataset: Any, index: int) -> Tuple[Any, int]:
    """Where a sample is: the dataset of its TSV file, and the number in it."""
    if isinstance(dataset, ConcatDataset):
        number, index = dataset._get_dataset_and_sample_index(int(index))
        dataset = dataset.datasets[number]
    if isinstance(dataset, ResamplingDataset):
        dataset, index = dataset.dataset, dataset._cur_indices.array[index]
    return dataset, int(index)


def as_student(task: Any) -> Student:
    """What models must fit to hear what a speech task reads."""
    features = {name: getattr(task.data_cfg, name) for name in FEATURES}
    return Student(task.target_dictionary, task.target_dictionary, "", "", SPEECH, features)


@contextlib.contextmanager
def naming_columns(folder: str, split: str) -> Iterator[None]:
    """While fairseq reads a TSV file.

    Raises:
        UserError: it lacks a column.
    """
    try:
        yield
    except KeyError as error:
        if error.args[0] not in ("id", "audio", "n_frames", "tgt_text"):
            raise
        raise UserError(f"{folder}: {split}.tsv has no column {error}") from error


def encoder(configuration: Any, source: Dictionary) -> Encode:
    """Makes symbols of transcripts, (n,): by src_pre_tokenizer and src_bpe_tokenizer of the YAML
    file, as fairseq's task of speech and text has them.

    Raises:
        UserError: transforms join utterances, and would not join their transcripts.
    """
    both = configuration.src_pre_tokenizer, configuration.src_bpe_tokenizer
    told = [Namespace(**configuration._auto_convert_to_abs_path(one)) for one in both]
    tools: List[Any] = [encoders.build_tokenizer(told[0]), encoders.build_bpe(told[1])]

    def encode(text: str) -> Tensor:
        for tool in tools:
            text = text if tool is None else tool.encode(text)
        return source.encode_line(text, add_if_not_exist=False).long()

    return encode


def _refuse_missing(part: Any) -> None:
    rows = [i for i, text in enumerate(part.src_texts) if not (text or "").strip()]
    if rows:
        shown = ", ".join(f"{part.ids[i]} (line {i + 2})" for i in rows[:5])
        raise UserError(
            f"{part.split}.tsv: {len(rows)} of {len(part)} utterances have no transcript in the "
            f"column src_text, which --teacher-reads transcript needs: {shown}"
            f"{', ...' if len(rows) > 5 else ''}"
        )


# What a cached answer depends on


def transforms(configuration: Any, subset: str, kinds: Sequence[str] = KINDS) -> List[str]:
    """The transforms of a subset that its YAML file asks for, by name.

    Args:
        kinds: of transforms; 0.12.2 has those of features alone.
    """
    found: List[str] = []
    for split in subset.split(","):
        for kind in kinds:
            get = getattr(configuration, f"get_{kind}_transforms", None)
            told = get(split, subset.startswith("train")) if get else {}
            # the fields of others hold those of all splits
            for names in (told.get("transforms"), told.get(f"{kind}_transforms")):
                found += names if isinstance(names, list) else []
    return list(dict.fromkeys(found))


def refuse_changing(configuration: Any, subset: str, of_sound: bool) -> None:
    """Refuse a cache of a subset that is another one in each epoch.

    Raises:
        CacheError: it is, by its YAML file.
    """
    chances = [name for name in transforms(configuration, subset) if name not in _CERTAIN]
    if of_sound and chances:
        raise CacheError(
            f"a teacher cache cannot be used with {', '.join(chances)}, which changes the sound of "
            f"{subset} in each epoch: take it out of the YAML file for this subset, or let the "
            "teacher run (--teacher-checkpoint-path)"
        )
    if "," in subset and subset.startswith("train") and configuration.sampling_alpha != 1:
        raise CacheError(
            "a teacher cache cannot be used with sampling_alpha, which draws other utterances of "
            "several training subsets in each epoch"
        )


def settings(configuration: Any, subset: str, of_sound: bool) -> Dict[str, Any]:
    """What samples depend on beside TSV and audio files: fields of the YAML file, as plain types.
    A file that one names stands there as the digest of its content.

    Args:
        of_sound: those of features, too, and not of text alone.
    """
    asked = transforms(configuration, subset) if of_sound else []

    def matters(name: str, value: Any) -> bool:
        if name.endswith("tokenizer"):
            return not of_sound or not name.startswith("src_")
        if not of_sound:
            return name.endswith("lang_tag")
        if name.startswith("src_") or name.endswith("transforms") or name in _ASIDE:
            return False
        return name in asked or not isinstance(value, dict)

    fields = configuration.config.items()
    found = {name: value for name, value in fields if matters(str(name), value)}
    return {**_plain(configuration, found), "transforms": asked}


def _plain(configuration: Any, value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(configuration, part) for name, part in value.items()}
    path = configuration._auto_convert_to_abs_path(value)
    if isinstance(path, str) and os.path.isfile(path):
        return digest(path)
    return json.loads(json.dumps(value, default=str))


def digest_of_audio(folder: str, root: str, subset: str, whole: bool) -> str:
    """SHA-256 of the audio files that a subset names: of archives, or of single files.

    Args:
        root: that their names are relative to.
        whole: look at all files, and the whole of them; otherwise at some, and samples of these.
    """
    names = {
        parse_path(os.path.join(root, row["audio"]))[0]
        for split in subset.split(",")
        for row in SpeechToTextDatasetCreator._load_samples_from_tsv(folder, split)
    }
    every = sorted(names)
    chosen = every if whole else every[:: -(-len(every) // _SAMPLED)]
    found = hashlib.sha256()
    for path in chosen:
        content = (digest if whole else digest_of_sample)(path)
        found.update(f"{os.path.basename(path)} {content} ".encode())
    return found.hexdigest()
