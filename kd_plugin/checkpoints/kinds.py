"""Kinds of models that teach and learn: all that differs between them before a batch is read."""

from typing import Any, Callable, NamedTuple, Optional, Tuple, Type

import torch
from fairseq.models import (
    ARCH_MODEL_REGISTRY,
    FairseqEncoderDecoderModel,
    FairseqLanguageModel,
    FairseqMultiModel,
)
from fairseq.tasks import TASK_REGISTRY
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

from .build import translation_task
from .dictionaries import Dictionaries
from .tags import MULTILINGUAL, SIMPLE_EPOCH
from .tasks import is_translation, taught


class Kind(NamedTuple):
    """What all tasks of one kind have in common.

    Attributes:
        task: fairseq's own, without a teacher.
        tasks: those whose models teach, for messages.
        model: what these are, for messages.
        classes: of models.
        sides: encoder, decoder, or both: what a model is made of.
        tables: of its symbols, as (what it is, the parameter's name): the inputs' and the outputs'.
        new_task: one with a model's dictionaries, to build it with; the numbers are tokens of the
            longest source and target.
        samples: what its data consist of, with the lengths of one for ``str.format``.
        shorten: what to do where samples are too long for a teacher that reads ``{0}`` source and
            ``{1}`` target tokens.
        vocabularies: what tells those of its inputs and outputs apart in messages: "source
            dictionary" and "target dictionary" say; "" is a dictionary that needs no name.
        share: how a student gets only symbols that its teacher knows.
        reads_frames: whether the source is sound, (B, frames, features), and not symbols: then only
            the targets' dictionary is a model's own, and stands for both.
        otherwise: what to do about a teacher of another kind.
    """

    task: str
    tasks: Tuple[str, ...]
    model: str
    classes: Tuple[Type[torch.nn.Module], ...]
    sides: Tuple[str, ...]
    tables: Tuple[Tuple[str, str], Tuple[str, str]]
    new_task: Callable[[Dictionaries, Tuple[int, int]], Any]
    samples: Tuple[str, str]
    shorten: str
    vocabularies: Tuple[str, str]
    share: str
    reads_frames: bool = False
    otherwise: str = ""

    @property
    def taught(self) -> str:
        """The task with a teacher."""
        return taught(self.task)

    def lengths(self, source: Any, target: Any) -> str:
        return self.samples[1].format(source, target)


def _language_modeling_task(found: Dictionaries, _: Tuple[int, int]) -> LanguageModelingTask:
    return LanguageModelingTask(LanguageModelingConfig(), found.source, found.target)


TRANSLATION = Kind(
    task="translation",
    tasks=("translation", *MULTILINGUAL),
    model="an encoder-decoder translation model",
    classes=(FairseqEncoderDecoderModel, FairseqMultiModel),
    sides=("encoder", "decoder"),
    tables=(
        ("source embeddings", "encoder.embed_tokens.weight"),
        ("target embeddings", "decoder.embed_tokens.weight"),
    ),
    new_task=lambda found, longest: translation_task(found.source, found.target, longest),
    samples=("sentences", "{} source and {} target tokens"),
    shorten="Leave the longer ones out with --max-source-positions {0} --max-target-positions {1} "
    "(for validation data also --skip-invalid-size-inputs-valid-test), or cut sources with "
    "--truncate-source.",
    vocabularies=("source", "target"),
    share="Binarise the student's data with the teacher's dictionaries (fairseq-preprocess "
    "--srcdict --tgtdict) and its subword model. Sequence-level distillation needs no shared "
    "vocabulary.",
)
MULTILINGUAL_TRANSLATION = TRANSLATION._replace(task=SIMPLE_EPOCH)
LANGUAGE_MODEL = Kind(
    task="language_modeling",
    tasks=("language_modeling",),
    model="a decoder-only language model",
    classes=(FairseqLanguageModel,),
    sides=("decoder",),
    tables=(
        ("embeddings", "decoder.embed_tokens.weight"),
        ("outputs", "decoder.output_projection.weight"),
    ),
    new_task=_language_modeling_task,
    samples=("blocks", "{1} tokens"),
    shorten="Cut the text into shorter ones with --tokens-per-sample {0}; where blocks are whole "
    "sentences, also --shorten-method truncate.",
    vocabularies=("", ""),
    share="Binarise the student's text with the teacher's dictionary (fairseq-preprocess "
    "--only-source --srcdict) and its subword model.",
)

# Of a frame: options of speech models, and fields of the YAML files of their data
FEATURES = ("input_feat_per_channel", "input_channels")
SPEECH = Kind(
    task="speech_to_text",
    tasks=("speech_to_text",),
    model="a speech-to-text model",
    classes=(FairseqEncoderDecoderModel,),
    # encoders shorten the sound, each in its own way: their positions are not the same
    sides=("decoder",),
    tables=(
        ("embeddings", "decoder.embed_tokens.weight"),
        ("outputs", "decoder.output_projection.weight"),
    ),
    new_task=TRANSLATION.new_task,  # models ask it for the target dictionary alone
    samples=("utterances", "{} frames and {} target tokens"),
    shorten="Leave the longer ones out with --max-source-positions {0} --max-target-positions {1} "
    "(for validation data also --skip-invalid-size-inputs-valid-test).",
    vocabularies=("", ""),
    share="Name the teacher's dictionary and subword model in the student's YAML file "
    "(vocab_filename, bpe_tokenizer).",
    reads_frames=True,
    otherwise="; --teacher-reads transcript takes one that translates text",
)
# What a translation model is asked that reads what is said
TRANSCRIPT = TRANSLATION._replace(
    task=f"{SPEECH.taught} with --teacher-reads transcript",
    samples=("utterances", "{} tokens of the transcript and {} target tokens"),
    shorten="Leave the longer ones out of the TSV files.",
    vocabularies=("transcript", "target"),
    share="Name the teacher's dictionaries and subword models in the student's YAML file "
    "(src_vocab_filename, src_bpe_tokenizer; vocab_filename, bpe_tokenizer).",
)

# The tasks that have a teacher
TAUGHT = tuple(
    kind.taught for kind in (TRANSLATION, MULTILINGUAL_TRANSLATION, LANGUAGE_MODEL, SPEECH)
)


def kind_of(task: Optional[str], architecture: Optional[str]) -> Optional[Kind]:
    """The kind of model that a checkpoint holds, by its task and architecture; None of others."""
    model = ARCH_MODEL_REGISTRY.get(architecture or "")
    decodes = model is not None and issubclass(model, FairseqLanguageModel)
    unknown_lm = model is None and str(architecture).startswith("transformer_lm")
    own = TASK_REGISTRY.get(task or "")
    if decodes or unknown_lm or (own is not None and issubclass(own, LanguageModelingTask)):
        return LANGUAGE_MODEL
    if task in (SPEECH.task, SPEECH.taught):
        return SPEECH
    if task in (None, *MULTILINGUAL) or is_translation(task):
        return TRANSLATION
    return None
