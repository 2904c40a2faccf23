"""Load, check, freeze, place and run a teacher: one fairseq encoder-decoder or an ensemble."""

import contextlib
import logging
import math
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from fairseq.data import Dictionary
from fairseq.models.transformer import TransformerDecoderBase, TransformerModelBase
from torch import Tensor

from ..checkpoints import (
    MISSING,
    TRANSLATION_TASKS,
    Checkpoint,
    Role,
    VocabularyError,
    digest,
    index_map,
)
from ..errors import UserError
from ..objective.answer import Member, RunningAnswer

logger = logging.getLogger(__name__)

# the flags of training
TRAINING = Role("teacher", "--teacher-trust-checkpoint", "--teacher-data", "--teacher-overrides")


class TeacherError(UserError):
    """A teacher that cannot teach this student; the message says why and what to do."""


class Student(NamedTuple):
    """What a teacher must fit."""

    source: Dictionary
    target: Dictionary
    source_lang: str
    target_lang: str


class Teacher:
    """A frozen teacher. It is in no module tree, so fairseq neither optimises, wraps nor saves it.

    Build it with ``Teacher.open``.
    """

    def __init__(self, members: Sequence["_Member"], weights: Sequence[float]) -> None:
        self.members = list(members)
        total = math.fsum(weights)
        self.log_weights = [math.log(weight / total) for weight in weights]

    @classmethod
    def open(
        cls,
        paths: Sequence[str],
        student: Student,
        data: Sequence[str] = (),
        weights: Optional[Sequence[float]] = None,
        overrides: Optional[Dict[str, Any]] = None,
        trust: bool = False,
        role: Role = TRAINING,
    ) -> "Teacher":
        """Read, check and build every member.

        Args:
            paths: one checkpoint, or those of an ensemble.
            student: the student's dictionaries and languages.
            data: folders with the teachers' ``dict.*.txt``: none, one for all, or one each.
            weights: positive weights of the ensemble's probability average, one for each path;
                None is uniform.
            overrides: model arguments to override, as fairseq's ``--model-overrides``.
            trust: open the checkpoints with the full pickle machinery.
            role: what they are, for messages.

        Raises:
            TeacherError: any of these does not fit; CheckpointError or VocabularyError likewise.
        """
        if len(data) not in (0, 1, len(paths)):
            raise TeacherError(
                "--teacher-data needs one folder for all teachers or one for each of the "
                f"{len(paths)}, got {len(data)}"
            )
        folders: List[Optional[str]] = [None] * len(paths)
        if data:
            folders = [*data] * len(paths) if len(data) == 1 else [*data]
        return cls(
            [
                _Member(path, student, folder, overrides or {}, trust, role)
                for path, folder in zip(paths, folders)
            ],
            weights or [1.0] * len(paths),
        )

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
                    "path": os.path.abspath(member.name),
                    "bytes": os.path.getsize(member.name),
                    "sha256": digest(member.name),
                    "weight": math.exp(log_weight),
                    "overrides": {str(k): repr(v) for k, v in member.overrides.items()},
                }
                for member, log_weight in zip(self.members, self.log_weights)
            ],
            "teacher_dtype": str(next(self.members[0].model.parameters()).dtype),
        }

    def max_positions(self) -> Tuple[int, int]:
        """Longest source and target, in tokens, that every member can read."""
        limits = [member.model.max_positions() for member in self.members]
        source, target = zip(*limits)
        return int(min(source)), int(min(target))

    @torch.no_grad()
    def __call__(
        self, net_input: Dict[str, Tensor], amp: bool = False, **about: Any
    ) -> RunningAnswer:
        """Run the teacher on a batch given in the student's indices.

        Args:
            net_input: ``src_tokens`` (B, S), ``src_lengths`` (B,), ``prev_output_tokens`` (B, T).
            amp: run under CUDA autocast.
            about: ``num_updates`` and ``is_dummy`` of the signal.
        """
        return RunningAnswer(
            [member.run(net_input, amp) for member in self.members], self.log_weights, **about
        )


class _Member:
    """One checkpoint of a teacher, with the maps between its vocabulary and the student's."""

    def __init__(
        self,
        path: str,
        student: Student,
        data: Optional[str],
        overrides: Dict[str, Any],
        trust: bool,
        role: Role,
    ) -> None:
        self.name, self.overrides = path, overrides
        opened = Checkpoint.open(path, role, trust)
        self._check_task(opened, student, overrides)
        found = opened.dictionaries(
            *((student.source_lang, student.target_lang), data, overrides),
            otherwise=("student", student.source, student.target),
        )
        assert found is not None  # there are the student's
        opened.check_sizes(found)
        source, target = found.source, found.target
        try:
            source_map = index_map(student.source.symbols, source.symbols, "source", role)
            target_map = index_map(student.target.symbols, target.symbols, "target", role)
        except VocabularyError as error:
            raise VocabularyError(f"{opened}: {error}") from None
        # what the teacher reads; a padding symbol that it lacks never occurs in data
        self.read_source = _readable(source_map, source)
        self.read_target = _readable(target_map, target)
        self.target_map = target_map
        self.missing = None if target_map is None else target_map.eq(MISSING)
        if self.missing is not None and not self.missing.any():
            self.missing = None
        self.model = opened.build(opened.translation_task(found), overrides)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        if getattr(self.model.decoder, "adaptive_softmax", None) is not None:
            raise TeacherError(
                f"{opened} has an adaptive softmax, which gives no distribution over the "
                "whole vocabulary to distil; train it without --adaptive-softmax-cutoff"
            )
        self._projection: Optional[Tuple[Tensor, Optional[Tensor]]] = None
        logger.info(
            f"{opened}: {type(self.model).__name__}, dictionaries {found.origin}; source "
            f"vocabulary {_fit(source_map, student.source, source)}, target vocabulary "
            f"{_fit(target_map, student.target, target)}"
        )

    def _check_task(self, opened: Checkpoint, student: Student, overrides: Dict[str, Any]) -> None:
        arch = str(opened.architecture)
        if opened.task == "language_modeling" or arch.endswith("_lm") or "_lm_" in arch:
            raise TeacherError(
                f"{opened} is a decoder-only language model ({arch}); a translation student needs "
                "an encoder-decoder teacher"
            )
        if opened.task is not None and opened.task not in TRANSLATION_TASKS:
            raise TeacherError(
                f"{opened} was trained for the task {opened.task!r}; word-level distillation "
                "reads teachers of the task 'translation'. Sequence-level distillation takes any "
                "task."
            )
        langs = opened.languages_with(overrides)
        ours = (student.source_lang, student.target_lang)
        if all(langs) and langs != ours:
            advice = ""
            if opened.role.overrides:
                names = dict(zip(("source_lang", "target_lang"), ours))
                advice = (
                    " If these are only other names for the same languages, say so: "
                    f'{opened.role.overrides} "{names}"'
                )
            raise TeacherError(
                f"{opened} translates {'-'.join(map(str, langs))}, the student "
                f"{'-'.join(ours)}.{advice}"
            )

    def place(self, device: torch.device, dtype: torch.dtype) -> None:
        self.model.to(device=device, dtype=dtype)
        for name in ("read_source", "read_target", "target_map", "missing"):
            index = getattr(self, name)
            setattr(self, name, None if index is None else index.to(device))
        self._projection = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def inputs(self, net_input: Dict[str, Tensor]) -> Tuple[Tensor, Tensor, Tensor]:
        """A batch as the model's forward pass takes it, in the teacher's indices."""
        return (
            _look_up(self.read_source, net_input["src_tokens"].to(self.device)),
            net_input["src_lengths"].to(self.device),
            _look_up(self.read_target, net_input["prev_output_tokens"].to(self.device)),
        )

    def run(self, net_input: Dict[str, Tensor], amp: bool) -> Member:
        model, device = self.model, self.device
        amp = amp and device.type == "cuda"
        inputs = self.inputs(net_input)
        with _autocast(amp):
            if _is_lazy(model):
                features = model(*inputs, features_only=True)[0]
                return Member(self.name, self._lazy_logits(features.flatten(0, 1), amp))
            logits = model(*inputs)[0].flatten(0, 1)
        return Member(self.name, lambda rows: self._in_student_order(logits[rows.to(device)]))

    def _lazy_logits(self, features: Tensor, amp: bool) -> Any:
        """Project a transformer's features when, and for the rows that, somebody asks."""
        layer = self.model.decoder.output_projection
        if self.target_map is None:

            def project(x: Tensor) -> Tensor:
                return layer(x)

        else:
            # the projection's rows in the student's order: nothing to reorder in each batch
            weight, bias = self._reordered_projection(layer, self.target_map)

            def project(x: Tensor) -> Tensor:
                return self._without_missing(F.linear(x, weight, bias))

        def logits(rows: Tensor) -> Tensor:
            with torch.no_grad(), _autocast(amp):
                return project(features[rows.to(features.device)])

        return logits

    def _reordered_projection(
        self, layer: Any, target_map: Tensor
    ) -> Tuple[Tensor, Optional[Tensor]]:
        if self._projection is None:
            index, bias = target_map.clamp(min=0), getattr(layer, "bias", None)
            self._projection = (
                layer.weight.detach()[index],
                None if bias is None else bias.detach()[index],
            )
        return self._projection

    def _in_student_order(self, logits: Tensor) -> Tensor:
        if self.target_map is None:
            return logits
        return self._without_missing(logits.index_select(-1, self.target_map.clamp(min=0)))

    def _without_missing(self, logits: Tensor) -> Tensor:
        if self.missing is None:
            return logits
        return logits.masked_fill(self.missing, -math.inf)


def _autocast(enabled: bool) -> Any:
    """CUDA autocast on or off for a while, whatever the student's forward pass runs under."""
    if enabled == torch.is_autocast_enabled():
        return contextlib.nullcontext()
    return torch.autocast("cuda", enabled=enabled)


def _is_lazy(model: Any) -> bool:
    """Whether features and their projection can be had apart, as in fairseq's own transformer."""
    return (
        type(model).forward is TransformerModelBase.forward
        and type(model.decoder).output_layer is TransformerDecoderBase.output_layer
    )


def _readable(index: Optional[Tensor], dictionary: Dictionary) -> Optional[Tensor]:
    return None if index is None else index.masked_fill(index.eq(MISSING), dictionary.unk())


def _look_up(index: Optional[Tensor], tokens: Tensor) -> Tensor:
    return tokens if index is None else index[tokens]


def _fit(index: Optional[Tensor], student: Dictionary, teacher: Dictionary) -> str:
    if index is None:
        return f"the same ({len(student)} symbols)"
    return f"mapped (student {len(student)} symbols, teacher {len(teacher)})"


def parse_weights(text: Optional[str], teachers: int) -> Optional[List[float]]:
    """``--teacher-weights``: a positive number for each teacher, commas between them, or None.

    Raises:
        TeacherError: it is something else.
    """
    try:
        weights = [float(weight) for weight in text.split(",")] if text else None
    except ValueError:
        raise TeacherError(f"--teacher-weights needs numbers as in 2,1,1; got {text!r}") from None
    if weights and (len(weights) != teachers or not all(0 < w < math.inf for w in weights)):
        raise TeacherError(
            f"--teacher-weights needs one positive number for each of the {teachers} teachers in "
            f"--teacher-checkpoint-path, got {weights}"
        )
    return weights
