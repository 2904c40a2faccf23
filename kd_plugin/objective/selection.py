"""Which tokens are distilled.

A selection decides about each real target token from a few numbers per token; it never sees the
vocabulary. All but ``batch`` decide about a token without looking at its micro-batch.

A new selection is a line in ``SELECTIONS``; the flags, their help and what the teacher is asked
follow from it.
"""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor

from .parameters import Parameter


class TokenStatistics(NamedTuple):
    """What a selection may depend on, each (n,); None where nobody needs it."""

    student_nll: Tensor  # nats at T = 1
    teacher_nll: Optional[Tensor] = None  # nats at T = 1
    teacher_entropy: Optional[Tensor] = None  # nats at T = 1
    teacher_correct: Optional[Tensor] = None  # the teacher's argmax is the reference
    group: Optional[Tensor] = None  # number of the group that it belongs to: a pair of languages


class _Described(NamedTuple):
    """How a selection decides: by ``decide``, or by comparing ``score`` with a queue of scores."""

    name: str
    description: str  # of the tokens that are distilled, for the help
    # which of the tokens, bool (n,), of their statistics and the rate; None is all of them
    decide: Callable[[TokenStatistics, float], Optional[Tensor]] = lambda tokens, rate: None
    # what the queue compares, (n,): the share ``rate`` with the highest is distilled
    score: Optional[Callable[[TokenStatistics], Tensor]] = None
    needs: Tuple[str, ...] = ()  # fields of TokenStatistics that the teacher must fill
    takes_rate: bool = False
    looks_at_batch: bool = False  # decides about all tokens of a micro-batch together


def _hardest(tokens: TokenStatistics, rate: float) -> Tensor:
    nll = tokens.student_nll
    chosen = torch.zeros_like(nll, dtype=torch.bool)
    order = torch.sort(nll, descending=True, stable=True).indices
    chosen[order[: round(rate * nll.numel())]] = True
    return chosen


SELECTIONS = (
    _Described("all", "every token"),
    _Described(
        "batch",
        "the share with the highest student cross-entropy of the micro-batch (Wang et al. 2021, "
        "section 4.1)",
        decide=_hardest,  # of equal ones the earlier
        takes_rate=True,
        looks_at_batch=True,
    ),
    _Described(
        "global",
        "the same share, compared with the last tokens of all ranks (section 4.2)",
        score=lambda tokens: tokens.student_nll,
        takes_rate=True,
    ),
    _Described(
        "teacher-entropy",
        "the share with the lowest teacher entropy, compared likewise (introduced here)",
        score=lambda tokens: -tokens.teacher_entropy,  # type: ignore[operator]
        needs=("teacher_entropy",),
        takes_rate=True,
    ),
    _Described(
        "teacher-correct",
        "those where the teacher's likeliest symbol is the reference (introduced here)",
        decide=lambda tokens, rate: tokens.teacher_correct,
        needs=("teacher_correct",),
    ),
    _Described(
        "teacher-better",
        "those whose reference the teacher gives more probability than the student does "
        "(introduced here)",
        decide=lambda tokens, rate: tokens.student_nll > tokens.teacher_nll,  # type: ignore
        needs=("teacher_nll",),
    ),
)
NAMES = tuple(one.name for one in SELECTIONS)
WITH_RATE = tuple(one.name for one in SELECTIONS if one.takes_rate)
WITH_QUEUE = tuple(one.name for one in SELECTIONS if one.score is not None)
# the help of --kd-selection
HELP = "which tokens are distilled: " + "; ".join(
    f"{one.name}, {one.description}" for one in SELECTIONS
)
RATE = Parameter(
    flag="--kd-selection-rate",
    keyword="rate",
    default=0.5,
    valid=lambda x: 0 < x <= 1,
    expected="above 0, at most 1",
    meaning=f"share of the tokens that {' and '.join(WITH_RATE)} select",
)
QUEUE_SIZE = Parameter(
    flag="--kd-queue-size",
    keyword="queue_size",
    default=30000,  # Wang et al. 2021
    valid=lambda x: x >= 1,
    expected="at least 1",
    meaning=f"how many of the last tokens {' and '.join(WITH_QUEUE)} compare with",
)


class Selection:
    """One of ``NAMES``, with its share ``rate`` and, where it compares, its queue.

    Args:
        groups: names of groups of tokens, each compared within itself; none compares all.
    """

    def __init__(
        self,
        name: str,
        rate: float = RATE.default,
        queue_size: int = QUEUE_SIZE.default,
        groups: Sequence[str] = (),
    ) -> None:
        (self._kind,) = [one for one in SELECTIONS if one.name == name]
        self.name, self.rate, self._groups = name, rate, len(groups)
        self.queue: Optional[ScoreQueue] = None
        if self._kind.score is not None:
            self.queue = ScoreQueues(queue_size, groups) if groups else ScoreQueue(queue_size)
        self.needs, self.looks_at_batch = self._kind.needs, self._kind.looks_at_batch

    def __call__(self, tokens: TokenStatistics) -> Optional[Tensor]:
        """Which of the tokens are distilled, bool (n,); None is all of them."""
        if self.queue is not None:
            return self.queue.above_quantile(self.score(tokens), 1 - self.rate, tokens.group)
        if not self._groups or not self.looks_at_batch:
            return self._kind.decide(tokens, self.rate)
        chosen = torch.zeros_like(tokens.student_nll, dtype=torch.bool)
        for group in range(self._groups):
            (here,) = (tokens.group == group).nonzero(as_tuple=True)  # type: ignore[union-attr]
            own = TokenStatistics(tokens.student_nll[here])  # all that is known of a whole batch
            chosen[here] = self._kind.decide(own, self.rate)  # type: ignore[assignment]
        return chosen

    def takes_all(self) -> bool:
        """Whether every token is distilled whatever its statistics, also of an empty queue."""
        return self.name == "all" or (self.queue is not None and self.queue.is_empty)

    def score(self, tokens: TokenStatistics) -> Tensor:
        """What the queue compares; the higher, the rather distilled, (n,)."""
        assert self._kind.score is not None, "this selection has no queue"
        return self._kind.score(tokens)


class ScoreQueue:
    """The scores of the last ``capacity`` tokens trained on, over all ranks, the same on each.

    An update calls ``begin``, then ``observe`` for each micro-batch, and ``commit`` once its
    optimizer step is taken: only then do its scores enter, rank by rank, so that the threshold
    stands still during an update. Scores of an update that is given up (an overflow) are dropped
    by the next ``begin``. Validation and dummy batches are not to be observed.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.scores = torch.empty(0)
        self._quantiles: Dict[float, float] = {}  # of these scores, where already computed
        self._observed: List[Tensor] = []
        self.is_new = True  # nothing was observed or loaded yet

    @property
    def is_empty(self) -> bool:
        return not self.scores.numel()

    def above_quantile(
        self, scores: Tensor, q: float, group: Optional[Tensor] = None
    ) -> Optional[Tensor]:
        """Which scores exceed the queue's q-quantile; None when empty."""
        return None if self.is_empty else scores > self.quantile(q)

    def quantile(self, q: float) -> float:
        """That of its scores, by linear interpolation; -inf when empty."""
        if self.is_empty:
            return -math.inf
        if q not in self._quantiles:
            ordered = self.scores.sort().values
            position = q * (ordered.numel() - 1)
            low = int(position)
            high = min(low + 1, ordered.numel() - 1)
            self._quantiles[q] = torch.lerp(ordered[low], ordered[high], position - low).item()
        return self._quantiles[q]

    def begin(self) -> None:
        """An update begins: drop what one that was given up has left."""
        self._observed = []

    def observe(self, scores: Tensor, group: Optional[Tensor] = None) -> None:
        """Scores of a micro-batch of the update under way, (n,)."""
        self._observed.append(scores.detach().float())
        self.is_new = False

    def commit(self, group: Any = None, device: Optional[torch.device] = None) -> None:
        """The optimizer step was taken: the scores of every rank enter, in order of ranks.

        Args:
            group: the data-parallel process group; None is a single process.
            device: where ``group`` communicates.
        """
        observed = torch.cat(self._observed) if self._observed else torch.empty(0)
        self._observed = []
        for scores in _gather(observed, group, device):
            self.append(scores.cpu())

    def append(self, scores: Tensor) -> None:
        """They enter, (n,), and the oldest leave."""
        self.scores = torch.cat([self.scores, scores])[-self.capacity :]
        self._quantiles = {}

    def state_dict(self) -> Dict[str, Any]:
        return {"scores": self.scores.clone()}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        if not torch.is_tensor(state["scores"]):
            return  # of groups: which came when is not known
        self.scores = state["scores"][-self.capacity :].clone()
        self.is_new = False
        self._quantiles = {}


class ScoreQueues(ScoreQueue):
    """A queue for each of some groups of tokens, used as one is.

    Args:
        capacity: of each.
        groups: their names, by which a checkpoint keeps them.
    """

    def __init__(self, capacity: int, groups: Sequence[str]) -> None:
        super().__init__(capacity)
        self.queues = {name: ScoreQueue(capacity) for name in groups}

    @property
    def is_empty(self) -> bool:
        return all(queue.is_empty for queue in self.queues.values())

    def above_quantile(
        self, scores: Tensor, q: float, group: Optional[Tensor] = None
    ) -> Optional[Tensor]:
        """Which scores exceed the q-quantile of their group's queue, or find it empty; None when
        all are empty.

        Args:
            group: number of each one's, (n,).
        """
        if self.is_empty:
            return None
        quantiles = [queue.quantile(q) for queue in self.queues.values()]
        return scores > scores.new_tensor(quantiles)[group]

    def observe(self, scores: Tensor, group: Optional[Tensor] = None) -> None:
        assert group is not None
        super().observe(torch.stack([scores.float(), group.float()], dim=1).flatten())

    def append(self, scores: Tensor) -> None:
        """Scores, each with its group's number behind it, (2 n,)."""
        values, groups = scores.view(-1, 2).unbind(1)
        for number, queue in enumerate(self.queues.values()):
            queue.append(values[groups == number])

    def state_dict(self) -> Dict[str, Any]:
        return {"scores": {name: queue.scores.clone() for name, queue in self.queues.items()}}

    def load_state_dict(self, state: Dict[str, Any]) -> None:
        scores = state["scores"]
        if torch.is_tensor(scores):
            return  # of all groups together
        for name in scores.keys() & self.queues.keys():
            self.queues[name].load_state_dict({"scores": scores[name]})
        self.is_new = False


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
