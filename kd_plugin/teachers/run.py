"""Load, check, freeze, place and run a teacher: one model of fairseq's or an ensemble."""

import contextlib
import logging
import math
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq.models import FairseqLanguageModel
from fairseq.models.bart import BARTModel
from fairseq.models.lstm import LSTMEncoder
from fairseq.models.transformer import TransformerDecoderBase, TransformerModelBase
from torch import Tensor

from ..checkpoints import (
    DTYPES,
    EACH_DIRECTION,
    TRANSCRIPT,
    AskedTags,
    Checkpoint,
    Dictionaries,
    Kind,
    Role,
    Tags,
    digest,
    family_tags,
    import_user_dir,
    is_autoregressive,
    translates_otherwise,
)
from ..errors import UserError
from ..objective import Member, Place, RunningAnswer
from .states import looking_inside
from .view import Student, TeacherView, decoder_inputs, read_of

logger = logging.getLogger(__name__)

TRAINING = Role(
    "teacher",
    "--teacher-trust-checkpoint",
    "--teacher-data",
    "--teacher-overrides",
    "--teacher-task",
    languages="--teacher-langs",
)


class TeacherError(UserError):
    """A teacher that cannot teach this student; the message says why and what to do."""


class TeacherSettings(NamedTuple):
    """Which teacher, and how it is run.

    Attributes:
        paths: one checkpoint, or those of an ensemble.
        data: folders with the teachers' ``dict.*.txt``: none, one for all, or one each.
        weights: positive weights of the ensemble's probability average, one for each path; None is
            uniform.
        overrides: model arguments to override, as fairseq's ``--model-overrides``.
        dtype: "same" as the run's, or one of ``DTYPES``.
        on_cpu: whether it runs on the CPU wherever the student does.
        trust: open the checkpoints with the full pickle machinery.
        role: what messages call it, and the flags that they name.
        task: what it was trained for, whatever its checkpoint says; None is what that says.
        tags: what it reads beside the sentences, where its task does not say so.
        user_dir: a folder to import for architectures and tasks that are not fairseq's.
    """

    paths: Sequence[str]
    data: Sequence[str] = ()
    weights: Optional[Sequence[float]] = None
    overrides: Mapping[str, Any] = {}
    dtype: str = "same"
    on_cpu: bool = False
    trust: bool = False
    role: Role = TRAINING
    task: Optional[str] = None
    tags: AskedTags = AskedTags()
    user_dir: Optional[str] = None

    def placement(
        self, device: torch.device, dtype: torch.dtype
    ) -> Tuple[torch.device, torch.dtype]:
        """Where, and in which precision, the teacher runs beside a student placed so."""
        return (
            torch.device("cpu") if self.on_cpu else device,
            dtype if self.dtype == "same" else DTYPES[self.dtype],
        )


class Teacher:
    """A frozen teacher. It is in no module tree, so fairseq neither optimises, wraps nor saves it.

    Build it with ``Teacher.open``.
    """

    def __init__(self, members: Sequence["_Model"], weights: Sequence[float]) -> None:
        self.members = list(members)
        total = math.fsum(weights)
        self.log_weights = [math.log(weight / total) for weight in weights]

    @classmethod
    def open(
        cls, settings: TeacherSettings, student: Student, other: Optional["Teacher"] = None
    ) -> "Teacher":
        """Read, check and build every member.

        Args:
            student: the student's vocabularies and languages, which it must fit.
            other: one of the same settings, opened for other languages; its models are used.

        Raises:
            UserError: a file cannot be used, or does not fit.
        """
        if settings.user_dir:
            import_user_dir(settings.user_dir, "--teacher-user-dir")
        paths, data = settings.paths, settings.data
        if len(data) not in (0, 1, len(paths)):
            raise TeacherError(
                f"{settings.role.data} needs one folder for all teachers or one for each of the "
                f"{len(paths)}, got {len(data)}"
            )
        folders: List[Optional[str]] = [None] * len(paths)
        if data:
            folders = [*data] * len(paths) if len(data) == 1 else [*data]
        others = [None] * len(paths) if other is None else other.members
        members = [_Model(*one, student, settings) for one in zip(paths, folders, others)]
        return cls(members, settings.weights or [1.0] * len(paths))

    def place(self, device: torch.device, dtype: torch.dtype) -> "Teacher":
        """Move every member to a device and a floating dtype."""
        for member in self.members:
            member.place(device, dtype)
        return self

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def describe(self) -> Dict[str, Any]:
        """What its distributions depend on, beside the data, as plain types."""
        return {
            "teachers": [
                {
                    "path": os.path.abspath(member.path),
                    "bytes": os.path.getsize(member.path),
                    "modified_ns": os.stat(member.path).st_mtime_ns,
                    "sha256": digest(member.path),
                    "weight": math.exp(log_weight),
                    "overrides": {str(k): repr(v) for k, v in member.overrides.items()},
                    **_said(member.view.tags),
                }
                for member, log_weight in zip(self.members, self.log_weights)
            ],
            "teacher_dtype": str(next(self.members[0].model.parameters()).dtype),
        }

    def max_positions(self) -> Tuple[int, int]:
        """Longest source and target, in tokens, that every member can read."""
        source, target = zip(*(member.max_positions() for member in self.members))
        return int(min(source)), int(min(target))

    @property
    def longer(self) -> Tuple[int, int]:
        """By how many tokens any member's source and target are longer than the student's."""
        source, target = zip(*(member.view.longer for member in self.members))
        return max(source), max(target)

    @property
    def reads(self) -> Tuple[Any, ...]:
        """Sentences of two teachers for which this is equal can be asked about in one batch."""
        return tuple((id(member.model), member.view.changes) for member in self.members)

    @torch.no_grad()
    def __call__(
        self,
        batch: Mapping[str, Any],
        amp: bool = False,
        places: Sequence[Place] = (),
        first: int = 0,
    ) -> RunningAnswer:
        """Run the teacher on a batch given in the student's indices.

        Args:
            batch: its ``net_input`` has ``src_tokens`` (B, S), or sound (B, S, features),
                ``src_lengths`` (B,) and, where the student has an encoder, ``prev_output_tokens``
                (B, T); its ``transcript``, if it has one, is read in the place of the sound.
            amp: run under CUDA autocast.
            places: in each of its models, what is found there is part of the answer.
            first: the number of its first model among all models of the training's teachers.
        """
        members = [member.run(batch, amp, places) for member in self.members]
        return RunningAnswer(members, self.log_weights, first)


def hidden_widths(
    settings: TeacherSettings, kinds: Sequence[str]
) -> List[Dict[str, Optional[int]]]:
    """How wide the hidden states of each checkpoint are, by kind: encoder, decoder.

    No model is built for it: their configurations say so; None where they do not.

    Raises:
        UserError: a file cannot be used.
    """
    if settings.user_dir:
        import_user_dir(settings.user_dir, "--teacher-user-dir")
    found = []
    for path in settings.paths:
        checkpoint = Checkpoint.open(path, settings.role, settings.trust)
        found.append({kind: checkpoint.hidden_width(kind) for kind in kinds})
    return found


class _Model:
    """The model of one checkpoint, with its view of the student's batches.

    Args:
        data: folder with its dictionaries, if it is told.
        other: the same for other languages, whose model is taken.
    """

    checkpoint: Checkpoint  # what else the file says; its weights are the model's
    model: Any
    view: TeacherView

    def __init__(
        self,
        path: str,
        data: Optional[str],
        other: Optional["_Model"],
        student: Student,
        settings: TeacherSettings,
    ) -> None:
        self.path, self.overrides, built = path, settings.overrides, None
        if other is None or other.checkpoint.task == EACH_DIRECTION:  # whose models are many
            checkpoint = Checkpoint.open(path, settings.role, settings.trust)
            checkpoint = checkpoint.as_task(settings.task)
        else:
            checkpoint, built = other.checkpoint, other.model
        self.checkpoint = checkpoint.without_content()
        languages, kind = student.languages, student.kind
        named = settings.tags.languages or languages
        _check_task(checkpoint, student, settings.tags, self.overrides)
        checkpoint = checkpoint.for_direction(named, data)
        found = checkpoint.dictionaries(
            languages,
            data,
            otherwise=("student", student.source, student.target),
        )
        assert found is not None  # there are the student's
        checkpoint.check_sizes(found, kind)
        tags = _tags(checkpoint, settings.tags, named, found)
        self.view = TeacherView(student, found, checkpoint, tags)
        own_task = kind.new_task(found, checkpoint.max_positions)
        if built is None:
            built = checkpoint.build(own_task, self.overrides, kind)
        self.model = built
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        if not is_autoregressive(self.model):
            raise TeacherError(
                f"{checkpoint} is a {type(self.model).__name__}: {_what_teaches(kind)}{_SEQUENCES}"
            )
        if getattr(self.model.decoder, "adaptive_softmax", None) is not None:
            raise TeacherError(
                f"{checkpoint} has an adaptive softmax, which gives no distribution over the whole "
                "vocabulary to distil; train it without --adaptive-softmax-cutoff"
            )
        if kind is TRANSCRIPT and isinstance(getattr(self.model, "encoder", None), LSTMEncoder):
            raise TeacherError(
                f"{checkpoint} is a {type(self.model).__name__}, which reads sentences sorted by "
                "length, and transcripts come in the order of the sound: take a transformer or a "
                "convolutional model"
            )
        logger.info(
            f"{checkpoint}: {type(self.model).__name__}, dictionaries {found.origin}; "
            f"{self.view.description}"
        )

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device=device, dtype=dtype)
        self.view.to(device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def max_positions(self) -> Tuple[int, int]:
        """Longest source and target of the student's data, in tokens, that it can read."""
        found, longer = self.model.max_positions(), self.view.longer
        source, target = found if isinstance(found, tuple) else (found, found)
        return source - longer[0], target - longer[1]

    def inputs(self, batch: Mapping[str, Any]) -> Dict[str, Tensor]:
        """A batch as the model's forward pass takes it."""
        inputs = self.view.inputs(read_of(batch), self.device)
        dtype = next(self.model.parameters()).dtype  # sound comes in the run's
        return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}

    def run(self, batch: Mapping[str, Any], amp: bool, places: Sequence[Place]) -> Member:
        model, view = self.model, self.view
        amp = amp and self.device.type == "cuda"
        lazy, inputs, net_input = _is_lazy(model), self.inputs(batch), read_of(batch)
        with _autocast(amp), looking_inside(model, places) as found:
            output = model(**inputs, **({"features_only": True} if lazy else {}))
        inside = view.inside(found, net_input, inputs) if places else None
        output = output[0].flatten(0, 1)  # features or logits, one row for each target position
        width = decoder_inputs(net_input).size(1)

        def logits(rows: Tensor) -> Tensor:
            some = output[view.rows(rows.to(output.device), width)]
            if not lazy:
                return view.logits(some)
            # projected when, and for the rows that, somebody asks
            with torch.no_grad(), _autocast(amp):
                return view.project(model.decoder.output_projection, some)

        return Member(self.path, logits, inside)


def _what_teaches(kind: Kind) -> str:
    return (
        "word-level distillation learns from distributions over the next symbol, and asks "
        f"autoregressive models of the task{'s' if len(kind.tasks) > 1 else ''} "
        f"{', '.join(kind.tasks)} for them."
    )


_SEQUENCES = " Sequence-level distillation (fairseq-kd-sequences) takes it."


def _tags(
    checkpoint: Checkpoint, asked: AskedTags, languages: Tuple[str, str], found: Dictionaries
) -> Tags:
    """What a teacher reads: as flags say, or else as its task says.

    Raises:
        UserError: the family of the flags has no tags of these languages.
    """
    if asked.family is None:
        return asked.instead_of(checkpoint.tags(languages))
    try:
        symbols = found.source.symbols, found.target.symbols
        return asked.instead_of(family_tags(asked.family, languages, *symbols))
    except UserError as error:
        flag = checkpoint.role.languages
        advice = f" ({flag} SOURCE,TARGET names both)" if flag else ""
        raise TeacherError(f"{checkpoint}: {error}{advice}") from None


def _said(tags: Tags) -> Dict[str, Any]:
    """What a description says of tags: nothing where there are none, as before there were any."""
    return {} if tags == Tags() else {"tags": {k: list(v) for k, v in tags._asdict().items()}}


def _check_task(
    checkpoint: Checkpoint, student: Student, asked: AskedTags, overrides: Mapping[str, Any]
) -> None:
    """Refuse what cannot teach at word level, was trained for something else than the student is,
    or translates between other languages."""
    kind, found = student.kind, checkpoint.kind
    if found is not None and found.model != kind.model:
        raise TeacherError(
            f"{checkpoint} is {found.model} ({checkpoint.architecture}); a student of the task "
            f"{kind.task} needs {kind.model} for a teacher{kind.otherwise}"
        )
    if found is None:
        raise TeacherError(
            f"{checkpoint} was trained for the task {checkpoint.task!r}: {_what_teaches(kind)}"
            f"{_SEQUENCES if translates_otherwise(checkpoint.task) else ''}"
            f"{checkpoint.advise_task()}"
        )
    for name, ours in student.options.items():
        theirs = {**checkpoint.options, **checkpoint.task_options}.get(name) or False
        if theirs != ours:
            raise TeacherError(
                f"{checkpoint} was trained with {_option(name, theirs)}, and the student with "
                f"{_option(name, ours)}: both must read and predict the same"
            )
    ours = student.languages
    if not any(ours):
        if asked != AskedTags():
            raise TeacherError(
                f"{checkpoint} reads text in no particular language: leave out --teacher-tags, "
                "--teacher-langs, --teacher-source-prefix, --teacher-source-suffix and "
                "--teacher-target-prefix"
            )
        return
    named = asked.languages or ours
    theirs = checkpoint.languages_with(overrides)
    if all(theirs) and theirs not in (ours, named):
        advice = ""
        if checkpoint.role.overrides:
            names = dict(zip(("source_lang", "target_lang"), ours))
            advice = (
                " If these are only other names for the same languages, say so: "
                f'{checkpoint.role.overrides} "{names}"'
            )
        raise TeacherError(
            f"{checkpoint} translates {'-'.join(map(str, theirs))}, expected was "
            f"{'-'.join(ours)}.{advice}"
        )


def _option(name: str, value: Any) -> str:
    flag = "--" + name.replace("_", "-")
    return f"{flag} {value}" if value not in (True, False) else flag if value else f"no {flag}"


def _autocast(enabled: bool) -> Any:
    """CUDA autocast on or off for a while, whatever the student's forward pass runs under."""
    if enabled == torch.is_autocast_enabled():
        return contextlib.nullcontext()
    return torch.autocast("cuda", enabled=enabled)


def _is_lazy(model: Any) -> bool:
    """Whether features and their projection can be had apart, as in fairseq's own transformer."""
    return (
        type(model).forward
        in (TransformerModelBase.forward, BARTModel.forward, FairseqLanguageModel.forward)
        and type(model.decoder).output_layer is TransformerDecoderBase.output_layer
    )
