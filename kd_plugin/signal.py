"""What a teacher says about a batch, in the student's vocabulary.

A signal travels from the task to the criterion as ``sample["teacher"]``. Its rows are the target
positions of the batch, flattened: row ``b * T + t`` is position ``t`` of sentence ``b``.
"""

from typing import Callable, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor


class Member(NamedTuple):
    """One model's say: ``logits(rows)`` gives (len(rows), V) in the student's vocabulary."""

    name: str
    logits: Callable[[Tensor], Tensor]


class TeacherSignal:
    """A teacher's distributions for one batch, computed row by row when they are asked for.

    Nothing of size tokens x vocabulary is held when the members are lazy.

    Args:
        members: one model, or those of an ensemble.
        log_weights: natural log of the ensemble's normalised weights.
        num_updates: updates that training has done; None outside training.
        is_dummy: whether the batch only keeps a rank busy and must leave no trace.
    """

    def __init__(
        self,
        members: Sequence[Member],
        log_weights: Sequence[float] = (0.0,),
        num_updates: Optional[int] = None,
        is_dummy: bool = False,
    ) -> None:
        self.members = list(members)
        self.log_weights = list(log_weights)
        self.num_updates = num_updates
        self.is_dummy = is_dummy

    def logits(self, rows: Tensor) -> Tensor:
        """Teacher logits of the given rows, (len(rows), V), float32 or wider.

        An ensemble's are the logs of the weighted average of its members' probabilities at
        temperature 1.
        """
        if len(self.members) == 1:
            return _at_least_float32(self.members[0].logits(rows))
        parts = [
            torch.log_softmax(_at_least_float32(member.logits(rows)), dim=-1) + log_weight
            for member, log_weight in zip(self.members, self.log_weights)
        ]
        return torch.logsumexp(torch.stack(parts), dim=0)

    def not_finite(self, rows: Tensor) -> List[str]:
        """Names of the members whose logits hold NaN, +inf or only -inf in one of these rows."""
        return [
            member.name
            for member in self.members
            if not torch.isfinite(torch.logsumexp(member.logits(rows).float(), dim=-1)).all()
        ]


def not_finite_teacher(names: str, sample_ids: Sequence[int]) -> RuntimeError:
    """The error that stops a run whose teacher gave no distribution."""
    return RuntimeError(
        "teacher {} gave NaN, +inf or no probability at all for the samples with ids {}. Check its "
        "weights, or run it in a wider precision (--teacher-dtype fp32)".format(
            names, list(sample_ids)
        )
    )


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
