"""Which tokens are distilled.

A selection decides about each real target token from a few numbers per token; it never sees the
vocabulary. All but ``batch`` decide about a token without looking at its micro-batch.
"""

from typing import Any, Dict, List, NamedTuple, Optional

import torch
import torch.distributed as dist
from torch import Tensor

NAMES = ("all", "batch", "global", "teacher-entropy", "teacher-correct", "teacher-better")
# Those that take a share of the tokens, and those that compare with the tokens seen last
WITH_RATE = ("batch", "global", "teacher-entropy")
WITH_QUEUE = ("global", "teacher-entropy")
DEFAULT_RATE = 0.5
DEFAULT_QUEUE_SIZE = 30000  # Wang et al. 2021


class TokenStatistics(NamedTuple):
    """What a selection may ask about tokens, each (n,), None where it was not asked for."""

    student_nll: Tensor  # nats at T = 1
    teacher_nll: Optional[Tensor] = None  # nats at T = 1
    teacher_entropy: Optional[Tensor] = None  # nats at T = 1
    teacher_correct: Optional[Tensor] = None  # the teacher's argmax is the reference


class Selection:
    """One of ``NAMES``, with its share ``rate`` and, where it compares, its queue."""

    def __init__(self, name: str, rate: float = DEFAULT_RATE, queue_size: int = DEFAULT_QUEUE_SIZE):
        self.name, self.rate = name, rate
        self.queue = ScoreQueue(queue_size) if name in WITH_QUEUE else None
        self.asks_teacher = name.startswith("teacher-")
        self.looks_at_batch = name == "batch"

    def __call__(self, tokens: TokenStatistics) -> Optional[Tensor]:
        """Which of the tokens are distilled, bool (n,); None is all of them.

        batch: the share with the highest student cross-entropy among the given tokens, ties to the
        earlier one (Wang et al., ACL 2021, section 4.1).
        global: a student cross-entropy above the (1 - rate)-quantile of the queue's (section 4.2).
        teacher-entropy: a teacher entropy below the rate-quantile of the queue's.
        teacher-correct: the teacher's argmax is the reference.
        teacher-better: the teacher gives the reference more probability than the student does.
        """
        if self.name == "all":
            return None
        if self.name == "batch":
            n = tokens.student_nll.numel()
            chosen = torch.zeros(n, dtype=torch.bool, device=tokens.student_nll.device)
            order = torch.sort(tokens.student_nll, descending=True, stable=True).indices
            chosen[order[: round(self.rate * n)]] = True
            return chosen
        if self.queue is not None:
            return self.queue.above_quantile(self.score(tokens), 1 - self.rate)
        if self.name == "teacher-correct":
            return tokens.teacher_correct
        assert tokens.teacher_nll is not None
        return tokens.teacher_nll < tokens.student_nll

    def score(self, tokens: TokenStatistics) -> Tensor:
        """What the queue compares, higher is rather distilled, (n,)."""
        if self.name == "global":
            return tokens.student_nll
        assert tokens.teacher_entropy is not None
        return -tokens.teacher_entropy


class ScoreQueue:
    """The scores of the last ``capacity`` tokens trained on, over all ranks, the same on each.

    Scores wait until their update's optimizer step is taken and then enter once, rank by rank; the
    threshold therefore stands still during an update. Nothing enters from validation, dummy
    batches or steps that overflowed.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.scores = torch.empty(0)
        self._quantiles: Dict[float, float] = {}  # of these scores, as far as somebody asked
        self._waiting: List[Tensor] = []

    def above_quantile(self, scores: Tensor, q: float) -> Optional[Tensor]:
        """Which scores exceed the queue's q-quantile (linear interpolation); None when empty."""
        if not self.scores.numel():
            return None
        if q not in self._quantiles:
            ordered = self.scores.sort().values
            position = q * (ordered.numel() - 1)
            low = int(position)
            high = min(low + 1, ordered.numel() - 1)
            self._quantiles[q] = torch.lerp(ordered[low], ordered[high], position - low).item()
        return scores > self._quantiles[q]

    def wait(self, scores: Tensor) -> None:
        """Scores of a micro-batch whose update is under way."""
        self._waiting.append(scores.detach().float())

    def discard_waiting(self) -> None:
        """The update under way was given up, or a new one begins."""
        self._waiting = []

    def enter_waiting(self, group: Any = None, device: Optional[torch.device] = None) -> None:
        """The optimizer step was taken: what waits on every rank enters, in order of ranks.

        Args:
            group: the data-parallel process group; None is a single process.
            device: where ``group`` communicates.
        """
        waiting = torch.cat(self._waiting) if self._waiting else torch.empty(0)
        self._waiting = []
        for scores in _gather(waiting, group, device):
            self.scores = torch.cat([self.scores, scores.cpu()])[-self.capacity :]
        self._quantiles = {}

    def state_dict(self) -> Dict[str, Any]:
        return {"scores": self.scores.clone()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        self.scores = state["scores"][-self.capacity :].clone()
        self._quantiles = {}


def _gather(scores: Tensor, group: Any, device: Optional[torch.device]) -> List[Tensor]:
    """One vector per rank, which may have different lengths."""
    if group is None:
        return [scores]
    scores = scores.to(device)
    ranks = dist.get_world_size(group)
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(ranks)]
    dist.all_gather(lengths, torch.tensor([scores.numel()], device=device), group=group)
    longest = max(int(length) for length in lengths)
    padded = scores.new_zeros(longest)
    padded[: scores.numel()] = scores
    parts = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(parts, padded, group=group)
    return [part[: int(length)] for part, length in zip(parts, lengths)]
