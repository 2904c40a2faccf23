"""Every flag that training adds to fairseq's: name, default and help.

``plan`` reads them into one ``Plan``, or refuses them.
"""

import math
from dataclasses import dataclass, field
from typing import Any, Optional

from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from .checkpoints import FAMILIES
from .objective import Parameter, divergences, ranking, selection, states, topk

CRITERION = "kd_label_smoothed_cross_entropy"
WEIGHT, TEMPERATURE = 0.5, 1.0  # defaults, which a schedule replaces
HIDDEN_WEIGHT = 1.0
HIDDEN_LAYERS = "encoder:-1=-1,decoder:-1=-1"
ATTENTION_LAYERS = "encoder-self:-1=-1,decoder-self:-1=-1,cross:-1=-1"

# Among which tokens a share is selected
SCOPES = ("all", "pair")

# Who writes what the decoder reads in training
INPUTS = ("reference", "argmax", "sample")
INPUTS_RATE = 0.5
INPUTS_TEMPERATURE = Parameter(
    flag="--kd-inputs-temperature",
    keyword="temperature",
    default=1.0,
    valid=lambda x: 0 < x < math.inf,
    expected="above 0",
    meaning="temperature of the student's distribution that --kd-inputs sample draws from",
)
INPUTS_EXTRA = Parameter(
    flag="--kd-inputs-extra-length",
    keyword="extra_length",
    default=5,
    valid=lambda x: x >= 0,
    expected="at least 0",
    meaning="how many tokens a translation of --kd-inputs sample may have more than the longest "
    "reference of its batch",
)


@dataclass
class TeacherConfig(FairseqDataclass):
    """The flags of every task that has a teacher."""

    teacher_checkpoint_path: Optional[str] = field(
        default=None,
        metadata={
            "help": "the teacher's checkpoint, or several with ':' between them for an ensemble; "
            "of a multilingual student one for all pairs of languages or one for each, as in "
            "de-en=A,fr-en=B, and so are the teacher's other flags that take text"
        },
    )
    teacher_data: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder with the teacher's dict.*.txt, under its names of the languages or the "
            "student's: one for all teachers, or one for each "
            "with ':' between them (default: found in the checkpoint, beside it, or in the data "
            "folder that it names; failing that the student's, with a warning)"
        },
    )
    teacher_weights: Optional[str] = field(
        default=None,
        metadata={
            "help": "weights of the teachers in the average of their probabilities, positive, as "
            "in 2,1,1 (default: uniform)"
        },
    )
    teacher_overrides: str = field(
        default="{}",
        metadata={
            "help": "dictionary of arguments that override those of the teacher's training; "
            "source_lang and target_lang say what the student's data call its languages"
        },
    )
    teacher_task: Optional[str] = field(
        default=None,
        metadata={
            "help": "task that the teacher was trained for: 'translation' where a fork of fairseq "
            "has another name for it (default: what its checkpoint says)"
        },
    )
    teacher_tags: Optional[ChoiceEnum(FAMILIES)] = field(  # type: ignore
        default=None,
        metadata={
            "help": "family of multilingual models whose tags of languages the teacher reads, for "
            "a checkpoint whose task does not say it: M2M-100, NLLB-200, mBART-50. All have the "
            "source's tag before the source and the target's behind the decoder's </s>"
        },
    )
    teacher_langs: Optional[str] = field(
        default=None,
        metadata={
            "help": "what a multilingual teacher calls the source and the target language, as in "
            "deu_Latn,eng_Latn (default: as the data do, or by its only name that begins so, de_DE "
            "for de)"
        },
    )
    teacher_source_prefix: Optional[str] = field(
        default=None,
        metadata={
            "help": "symbols of the teacher's dictionary that it reads before each source, spaces "
            "or commas between; instead of what its task or --teacher-tags say. M2M-100's from "
            "German: __de__"
        },
    )
    teacher_source_suffix: Optional[str] = field(
        default=None,
        metadata={
            "help": "likewise those that it reads behind each source, the end of sentence included "
            "where it is read. M2M-100's: </s>"
        },
    )
    teacher_target_prefix: Optional[str] = field(
        default=None,
        metadata={
            "help": "likewise those that its decoder begins with, before each target, the end of "
            "sentence included where it is the first. M2M-100's into English: '</s> __en__'"
        },
    )
    teacher_user_dir: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder whose Python code is imported, and so executed, before the teacher is "
            "opened, for architectures or tasks that it registers; beside --user-dir, of which "
            "fairseq takes one"
        },
    )
    teacher_dtype: ChoiceEnum(["same", "fp32", "fp16", "bf16"]) = field(  # type: ignore
        default="same",
        metadata={
            "help": "precision of the teacher's forward pass; 'same' is the run's, and under --amp "
            "fp32 weights under autocast"
        },
    )
    teacher_device: ChoiceEnum(["same", "cpu"]) = field(  # type: ignore
        default="same",
        metadata={"help": "where the teacher runs: with the student, or on the CPU (in fp32)"},
    )
    teacher_trust_checkpoint: bool = field(
        default=False,
        metadata={
            "help": "open the teacher's checkpoint with the full pickle machinery, which runs "
            "whatever code the file asks for; only for files you trust"
        },
    )
    teacher_cache: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder that fairseq-kd-cache wrote: the teacher is read from it instead of "
            "being run; with several data folders one for each, with ':' between them; of a "
            "multilingual student for each pair of languages its own, as in de-en=A,fr-en=B"
        },
    )


# The flags of a teacher that is run, as opposed to one that is read from a cache
RUN_TEACHER = tuple(
    name
    for name in TeacherConfig.__dataclass_fields__
    if name.startswith("teacher_") and name != "teacher_cache"
)


def _described(parameter: Parameter) -> Any:
    """The field of a number that its divergence or selection describes."""
    return field(default=None, metadata={"help": parameter.help})


@dataclass
class KDLabelSmoothedCrossEntropyCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    kd_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "weight of the distillation term, from 0 (plain training) to 1 (default: "
            f"{WEIGHT})"
        },
    )
    ce_weight: Optional[float] = field(
        default=None,
        metadata={
            "help": "constant weight of the label-smoothed cross-entropy, >= 0 (default: 1 minus "
            "the weight of the token's distillation term)"
        },
    )
    kd_temperature: Optional[float] = field(
        default=None,
        metadata={
            "help": "temperature of both distributions in the distillation term, > 0; its "
            "gradient's size does not depend on it (Hinton et al. 2015) (default: "
            f"{TEMPERATURE})"
        },
    )
    kd_divergence: ChoiceEnum(divergences.NAMES) = field(  # type: ignore
        default="forward-kl", metadata={"help": divergences.HELP}
    )
    kd_js_beta: Optional[float] = _described(divergences.BETA)
    kd_skew: Optional[float] = _described(divergences.SKEW)
    kd_top_k: int = field(
        default=0,
        metadata={
            "help": "distil only the teacher's K likeliest symbols, from 0 to all of the "
            "vocabulary (0: all that the teacher gives; Tan et al. 2019)"
        },
    )
    kd_tail: Optional[ChoiceEnum(topk.TAILS)] = field(  # type: ignore
        default=None,
        metadata={
            "help": "what happens to the other symbols under --kd-top-k or --teacher-cache: bucket "
            "keeps their mass as one more outcome, renormalise leaves them out, sample lets "
            "symbols that the cache drew from them stand for them (forward-kl; Anshumann et al. "
            "2025) (default: bucket)"
        },
    )
    kd_selection: ChoiceEnum(selection.NAMES) = field(  # type: ignore
        default="all", metadata={"help": selection.HELP}
    )
    kd_selection_rate: Optional[float] = _described(selection.RATE)
    kd_queue_size: Optional[int] = _described(selection.QUEUE_SIZE)
    kd_selection_scope: ChoiceEnum(SCOPES) = field(  # type: ignore
        default="all",
        metadata={
            "help": "among which tokens of a multilingual student the share is taken: all, or "
            "those of the same pair of languages, with a queue for each pair"
        },
    )
    kd_ranking_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight, beside the divergence, of the term that ranks the teacher's likeliest "
            "symbols above the student's own (TIE: Zhang et al. 2023, whose weight is 1); 0 is off"
        },
    )
    kd_ranking_top_k: Optional[int] = _described(ranking.TOP_K)
    kd_weight_schedule: str = field(
        default="constant",
        metadata={
            "help": "how the weight moves: constant, linear:FROM:TO:STEPS or cosine:FROM:TO:STEPS "
            "(Loshchilov & Hutter 2017) over updates (instead of --kd-weight), or adaptive, token "
            "by token: kd_weight * sigmoid(student's nll - teacher's nll), introduced here"
        },
    )
    kd_temperature_schedule: str = field(
        default="constant",
        metadata={
            "help": "how the temperature moves over updates: constant, linear:FROM:TO:STEPS or "
            "cosine:FROM:TO:STEPS (Loshchilov & Hutter 2017) (instead of --kd-temperature)"
        },
    )
    kd_hidden: Optional[ChoiceEnum(states.OF_HIDDEN)] = field(  # type: ignore
        default=None,
        metadata={
            "help": "learn from the teacher's hidden states, too: relations between the positions "
            "of a sentence, of layers of any width (after Wang et al. 2021), or mse, the squared "
            "distance behind a linear map that is trained along (Romero et al. 2015)"
        },
    )
    kd_hidden_weight: Optional[float] = field(
        default=None,
        metadata={"help": f"weight of --kd-hidden, above 0 (default: {HIDDEN_WEIGHT})"},
    )
    kd_hidden_layers: Optional[str] = field(
        default=None,
        metadata={
            "help": "which layers learn from which with --kd-hidden, as STUDENT=TEACHER, counted "
            "from 0 or backwards from -1; a language model has no encoder (default: "
            f"{HIDDEN_LAYERS})"
        },
    )
    kd_attention_weight: float = field(
        default=0.0,
        metadata={
            "help": "weight of learning from the teacher's attention, too: divergence of its maps, "
            "averaged over heads (after Zagoruyko & Komodakis 2017); 0 is off"
        },
    )
    kd_attention_layers: Optional[str] = field(
        default=None,
        metadata={
            "help": "which layers learn from which with --kd-attention-weight, as STUDENT=TEACHER, "
            "counted from 0 or backwards from -1; a language model has decoder-self (default: "
            f"{ATTENTION_LAYERS})"
        },
    )
    # fairseq's own, which criterions are not told otherwise
    ddp_backend: str = II("distributed_training.ddp_backend")
    kd_inputs: ChoiceEnum(INPUTS) = field(  # type: ignore
        default="reference",
        metadata={
            "help": "what the decoder reads in training, and the teacher is asked about, in a "
            "share of the batches: reference; argmax, the student's likeliest symbol at each "
            "position of the reference (Zhang et al. 2023); sample, translations drawn from the "
            "student (Agarwal et al. 2024). In these batches only the teacher teaches, with weight "
            "1 and every token"
        },
    )
    kd_inputs_rate: Optional[float] = field(
        default=None,
        metadata={
            "help": "share of the batches whose inputs the student writes, from 0 to 1 (default: "
            f"{INPUTS_RATE})"
        },
    )
    kd_inputs_rate_schedule: str = field(
        default="constant",
        metadata={
            "help": "how that share moves over updates: constant, linear:FROM:TO:STEPS or "
            "cosine:FROM:TO:STEPS (instead of --kd-inputs-rate)"
        },
    )
    kd_inputs_temperature: Optional[float] = _described(INPUTS_TEMPERATURE)
    kd_inputs_extra_length: Optional[int] = _described(INPUTS_EXTRA)


# The flags of what is learnt beside the distributions of the reference's symbols
BEYOND_OUTPUTS = tuple(
    name
    for name in KDLabelSmoothedCrossEntropyCriterionConfig.__dataclass_fields__
    if name.startswith(("kd_ranking", "kd_hidden", "kd_attention", "kd_inputs"))
)
