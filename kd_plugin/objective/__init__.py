"""What a student learns from a teacher, in torch alone: nothing here imports fairseq.

``distillation_objective`` is the way in: student logits, references, a teacher's ``Answer`` and
``Settings`` give ``Terms``, the differentiable loss among them.
"""

from .answer import (
    Answer,
    CachedAnswer,
    Dense,
    Member,
    MixedAnswer,
    NotFiniteTeacherError,
    RunningAnswer,
    Sparse,
    TeacherRows,
    rows_ahead,
    rows_at_once,
)
from .chunks import Settings, Terms, distillation_objective
from .divergences import Distribution, Divergence, distribution, divergence, forward_kl
from .parameters import Parameter
from .schedules import Schedule
from .selection import ScoreQueue, Selection, TokenStatistics
from .states import Found, Inside, LayerPair, Part, Place, StateTerm

__all__ = [
    "Answer",
    "CachedAnswer",
    "Dense",
    "Distribution",
    "Divergence",
    "Found",
    "Inside",
    "LayerPair",
    "Member",
    "MixedAnswer",
    "NotFiniteTeacherError",
    "Parameter",
    "Part",
    "Place",
    "RunningAnswer",
    "Schedule",
    "ScoreQueue",
    "Selection",
    "Settings",
    "Sparse",
    "StateTerm",
    "TeacherRows",
    "Terms",
    "TokenStatistics",
    "distillation_objective",
    "distribution",
    "divergence",
    "forward_kl",
    "rows_ahead",
    "rows_at_once",
]
