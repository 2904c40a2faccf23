"""A teacher's answer about a batch, in the student's vocabulary.

It travels from the task to the criterion as ``sample["teacher"]``. Its rows are the target
positions of the batch, flattened: row ``b * T + t`` is position ``t`` of sentence ``b``. Asked for
some rows, it gives their distributions: ``Dense`` (logits of the whole vocabulary) or ``Sparse``
(the likeliest symbols).
"""

import math
from functools import cached_property
from typing import (
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Protocol,
    Sequence,
    Tuple,
    Union,
)

import torch
from torch import Tensor

from ..errors import UserError
from .divergences import Distribution, ValueAndGradient, distribution
from .ranking import RankedRows, likeliest
from .states import Inside, Part
from .topk import CutBackward, Sampled, SampledBackward, Top, cut, sampled_forward_kl

# Rows times V. On a CPU a chunk's few buffers should stay in its caches; a GPU needs enough work
# per kernel.
_CHUNK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 25}


def rows_at_once(device: torch.device, vocabulary: int) -> int:
    """How many rows of vocabulary size to work on at a time."""
    return max(1, _CHUNK_ELEMENTS.get(device.type, 1 << 25) // vocabulary)


def rows_ahead(device: torch.device) -> int:
    """For how many times as many rows to ask a teacher in one go.

    Its projection of few rows is a small matrix product, slow on a CPU.
    """
    return 8 if device.type == "cpu" else 1


# A divergence's value (n,), its gradient for the compared outcomes, and what carries that back to
# all symbols (None: they are all)
Compared = Tuple[Tensor, Tensor, Union[CutBackward, SampledBackward, None]]


class Comparison(NamedTuple):
    """How a teacher's distributions are compared with a student's.

    Attributes:
        divergence: one of ``divergences``.
        temperature: of both.
        k: how many of the teacher's likeliest symbols to compare; 0: all that are known.
        tail: what becomes of the others, one of ``topk.TAILS``.
    """

    divergence: Callable[[Distribution, Distribution], ValueAndGradient]
    temperature: float
    k: int
    tail: str


class TeacherRows(RankedRows, Protocol):
    """A teacher's distributions at some rows, n of them."""

    def bad(self) -> Tensor:
        """Which rows hold NaN, +inf or no mass at all, bool (n,)."""

    def nll(self, target: Tensor) -> Tensor:
        """Of the references ``target`` (n,) at temperature 1, (n,), nats."""

    def best(self) -> Tensor:
        """The likeliest symbol of each row, (n,)."""

    def entropy(self) -> Tensor:
        """Of each row's whole distribution at temperature 1, (n,), nats."""

    def rows(self, index: Union[Tensor, slice]) -> "TeacherRows":
        """Some of these rows."""

    def compare(self, student: Distribution, how: Comparison) -> Compared:
        """The divergence between these distributions and the student's.

        Args:
            student: over the whole vocabulary, (n, V), already at the temperature.
        """


class Answer(Protocol):
    """A teacher's distributions at every row of one batch."""

    def rows(self, index: Tensor, like: Tensor) -> TeacherRows:
        """Those at the flat rows ``index`` (n,), in the dtype and on the device of ``like``."""

    def inside(self) -> List[Inside]:
        """What was found inside each of the teacher's models; nothing where nobody asked."""

    def not_finite(self, index: Tensor) -> List[str]:
        """Names of the models whose rows ``index`` hold NaN, +inf or no probability at all."""


class Dense:
    """Logits of the whole vocabulary for some rows, (n, V), at temperature 1."""

    def __init__(self, logits: Tensor, plain: Optional[Distribution] = None) -> None:
        self.logits = logits
        if plain is not None:
            self.plain = plain

    @cached_property
    def plain(self) -> Distribution:
        """The distribution at temperature 1."""
        return distribution(self.logits)

    def bad(self) -> Tensor:
        return ~self.plain.log_normaliser.isfinite().squeeze(-1)

    def nll(self, target: Tensor) -> Tensor:
        at_target = self.logits.gather(-1, target.unsqueeze(-1))
        return (self.plain.log_normaliser - at_target).squeeze(-1)

    def best(self) -> Tensor:
        return self.logits.argmax(dim=-1)

    def entropy(self) -> Tensor:
        log_p = self.plain.log_probabilities().clamp_(min=torch.finfo(self.logits.dtype).min)
        return -log_p.mul_(self.plain.probabilities).sum(-1)

    def likeliest(self, k: int) -> Tuple[Tensor, Tensor]:
        symbols = likeliest(self.logits, k)
        return symbols, self.probabilities_of(symbols)

    def probabilities_of(self, symbols: Tensor) -> Tensor:
        return (self.logits.gather(-1, symbols) - self.plain.log_normaliser).exp_()

    def rows(self, index: Union[Tensor, slice]) -> "Dense":
        plain = self.__dict__.get("plain")
        return Dense(self.logits[index], None if plain is None else plain.rows(index))

    def compare(self, student: Distribution, how: Comparison) -> Compared:
        t = how.temperature
        if how.k:
            teacher, student, back = cut(self.top(how.k, t, how.tail == "bucket"), student)
            return (*how.divergence(teacher, student), back)
        teacher = self.plain if t == 1 else distribution(self.logits / t)
        return (*how.divergence(teacher, student), None)

    def top(self, k: int, temperature: float, with_rest: bool) -> Top:
        """The k likeliest symbols at a temperature, and the rest's mass if asked for."""
        logits = self.logits if temperature == 1 else self.logits / temperature
        top, symbols = logits.topk(k, dim=-1)
        if not with_rest or k == logits.size(-1):
            return Top(symbols, top, None)
        others = logits.scatter(-1, symbols, -math.inf)
        return Top(symbols, top, torch.logsumexp(others, dim=-1, keepdim=True))


class Sparse:
    """The K likeliest symbols of some rows, likeliest first, and the mass of the others.

    Args:
        symbols: (n, K), in the student's vocabulary.
        log_probs: their log-probabilities at temperature 1, (n, K), nats.
        reference: the reference's log-probability, (n,), nats.
        entropy: of the whole distribution, (n,), nats.
        rests: by temperature, log of the sum of p^(1/T) over all other symbols, (n,); at
            temperature 1 one minus the K's sum will do. Empty if there are no others.
        whole: whether K is the whole vocabulary.
        drawn: symbols drawn from the others in proportion to p^(1/T), with replacement, (n, S).
        tempered_entropy: of the whole distribution at that T, (n,), nats.
    """

    def __init__(
        self,
        symbols: Tensor,
        log_probs: Tensor,
        reference: Tensor,
        entropy: Tensor,
        rests: Dict[float, Tensor],
        whole: bool,
        drawn: Optional[Tensor] = None,
        tempered_entropy: Optional[Tensor] = None,
    ) -> None:
        self.symbols, self.log_probs = symbols, log_probs
        self._reference, self._entropy = reference, entropy
        self.rests, self.whole = rests, whole
        self.drawn, self._tempered_entropy = drawn, tempered_entropy

    def bad(self) -> Tensor:
        return ~self.log_probs[:, 0].isfinite()

    def nll(self, target: Tensor) -> Tensor:
        return -self._reference

    def best(self) -> Tensor:
        return self.symbols[:, 0]

    def entropy(self) -> Tensor:
        return self._entropy

    def likeliest(self, k: int) -> Tuple[Tensor, Tensor]:
        return self.symbols[:, :k], self.log_probs[:, :k].exp()

    def probabilities_of(self, symbols: Tensor) -> Tensor:
        found = symbols.new_zeros(symbols.shape, dtype=self.log_probs.dtype)
        for known, log_prob in zip(self.symbols.unbind(-1), self.log_probs.unbind(-1)):
            here = symbols == known.unsqueeze(-1)
            found += here * log_prob.exp().unsqueeze(-1)
        return found

    def rows(self, index: Union[Tensor, slice]) -> "Sparse":
        return Sparse(
            self.symbols[index],
            self.log_probs[index],
            self._reference[index],
            self._entropy[index],
            {t: rest[index] for t, rest in self.rests.items()},
            self.whole,
            None if self.drawn is None else self.drawn[index],
            None if self._tempered_entropy is None else self._tempered_entropy[index],
        )

    def compare(self, student: Distribution, how: Comparison) -> Compared:
        if how.tail == "sample" and not self.whole:  # of forward-kl alone
            return sampled_forward_kl(self._sampled(how.temperature), student)
        top = self.top(how.k, how.temperature, how.tail == "bucket")
        teacher, student, back = cut(top, student)
        return (*how.divergence(teacher, student), back)

    def top(self, k: int, temperature: float, with_rest: bool) -> Top:
        """The k likeliest symbols (0: all K), and the others' mass if asked for."""
        k = k or self.symbols.size(-1)
        tempered = self.log_probs if temperature == 1 else self.log_probs / temperature
        top = Top(self.symbols[:, :k], tempered[:, :k], None)
        if not with_rest:
            return top
        parts = [tempered[:, k:]]
        if not self.whole:
            parts.append(self._rest(temperature))
        if sum(part.size(-1) for part in parts) == 0:
            return top
        return top._replace(rest=torch.logsumexp(torch.cat(parts, -1), dim=-1, keepdim=True))

    def _sampled(self, temperature: float) -> Sampled:
        """The K with their probabilities, and the drawn ones with equal shares of the rest's."""
        entropy = self._entropy if temperature == 1 else self._tempered_entropy
        assert entropy is not None and self.drawn is not None  # other caches are refused
        tempered = self.log_probs if temperature == 1 else self.log_probs / temperature
        parts = torch.cat([tempered, self._rest(temperature)], dim=-1)
        head, rest = torch.softmax(parts, dim=-1).split([tempered.size(-1), 1], dim=-1)
        shares = (rest / self.drawn.size(-1)).expand_as(self.drawn)
        symbols = torch.cat([self.symbols, self.drawn], dim=-1)
        return Sampled(symbols, torch.cat([head, shares], dim=-1), entropy)

    def _rest(self, temperature: float) -> Tensor:
        if temperature == 1 and 1 not in self.rests:
            # never 0: rounding the K to half precision may leave nothing of a tiny rest
            rest = 1 - self.log_probs.exp().sum(-1, keepdim=True)
            rest.clamp_(min=torch.finfo(torch.float16).tiny / 1024)
            # unless one of the K has no probability: then the others, less likely, have none either
            return rest.masked_fill_(self.log_probs[:, -1:].eq(-math.inf), 0).log_()
        return self.rests[temperature].unsqueeze(-1)


class Member(NamedTuple):
    """One model of a teacher: ``logits(rows)`` gives (len(rows), V) in the student's vocabulary.

    ``inside`` is what was found inside it, if anybody asked.
    """

    name: str
    logits: Callable[[Tensor], Tensor]
    inside: Optional[Inside] = None


class RunningAnswer:
    """Of a teacher that runs beside the student: rows are computed when they are asked for.

    Nothing of size tokens x vocabulary is held when the members are lazy.

    Args:
        members: one model, or those of an ensemble.
        log_weights: natural log of the ensemble's normalised weights.
        first: the number of the first model among all models of the training's teachers.
    """

    def __init__(
        self, members: Sequence[Member], log_weights: Sequence[float] = (0.0,), first: int = 0
    ) -> None:
        self.members = list(members)
        self.log_weights = list(log_weights)
        self._first = first

    def rows(self, index: Tensor, like: Tensor) -> Dense:
        return Dense(self.logits(index).to(like))

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

    def inside(self) -> List[Inside]:
        """Of each member, with its weight in the ensemble."""
        return [
            member.inside._replace(weight=math.exp(log_weight), model=number)
            for number, (member, log_weight) in enumerate(
                zip(self.members, self.log_weights), start=self._first
            )
            if member.inside is not None
        ]

    def not_finite(self, index: Tensor) -> List[str]:
        return [
            member.name
            for member in self.members
            if not torch.isfinite(torch.logsumexp(member.logits(index).float(), dim=-1)).all()
        ]


class MixedAnswer:
    """Of several teachers, each about some sentences of the batch.

    Args:
        parts: each one's answer, and what it is about; every sentence is in one.
        width: target positions of a sentence.
    """

    def __init__(self, parts: Sequence[Tuple[RunningAnswer, Part]], width: int) -> None:
        self.parts, self.width = parts, width
        sentences = torch.cat([part.sentences for _, part in parts])
        # of each sentence, in which part it is and where
        self._part, self._place = torch.empty_like(sentences), torch.empty_like(sentences)
        for number, (_, part) in enumerate(parts):
            own = part.sentences
            self._part[own] = number
            self._place[own] = torch.arange(len(own), device=own.device)

    def _split(self, index: Tensor) -> Iterator[Tuple[RunningAnswer, Tensor, Tensor]]:
        """The answers about some rows: which of these they are, and rows of their own."""
        sentence = torch.div(index, self.width, rounding_mode="floor")
        part, own = self._part[sentence], self._place[sentence] * self.width + index % self.width
        for number, (answer, _) in enumerate(self.parts):
            (here,) = (part == number).nonzero(as_tuple=True)
            if len(here):
                yield answer, here, own[here]

    def rows(self, index: Tensor, like: Tensor) -> Dense:
        found = [(here, answer.rows(own, like).logits) for answer, here, own in self._split(index)]
        if len(found) == 0:
            return self.parts[0][0].rows(index, like)
        if len(found) == 1:
            return Dense(found[0][1])
        logits = like.new_empty(len(index), found[0][1].size(-1))
        for here, own in found:
            logits[here] = own
        return Dense(logits)

    def inside(self) -> List[Inside]:
        """Of the members of each, about its part."""
        return [own._replace(part=part) for answer, part in self.parts for own in answer.inside()]

    def not_finite(self, index: Tensor) -> List[str]:
        names = [name for answer, _, own in self._split(index) for name in answer.not_finite(own)]
        return list(dict.fromkeys(names))


class CachedAnswer:
    """Of a teacher whose likeliest symbols were cached.

    Args:
        arrays: ``symbols`` (n, K), ``log_probs`` (n, K), ``reference`` (n,), ``entropy`` (n,),
            ``rests`` (n, number of temperatures), ``drawn`` (n, S), ``tempered_entropy`` (n,), as
            far as there are any: one row for every real target token of the batch, in its order.
        real: which target positions of the batch these are, bool (B, T).
        temperatures: of ``rests``.
        whole: whether K is the whole vocabulary.
    """

    def __init__(
        self,
        arrays: Dict[str, Tensor],
        real: Tensor,
        temperatures: Sequence[float],
        whole: bool,
    ) -> None:
        self.arrays, self.temperatures, self.whole = arrays, temperatures, whole
        self._position = real.flatten().cumsum(0) - 1

    @classmethod
    def blank(
        cls, real: Tensor, k: int, temperatures: Sequence[float], whole: bool
    ) -> "CachedAnswer":
        """Finite numbers for a batch that is in no cache and only keeps a rank busy."""
        n = int(real.sum())
        half: Dict[str, Any] = {"dtype": torch.float16, "device": real.device}
        arrays = {
            "symbols": torch.zeros(n, k, dtype=torch.int32, device=real.device),
            "drawn": torch.zeros(n, 1, dtype=torch.int32, device=real.device),
            "tempered_entropy": torch.zeros(n, **half),
            "log_probs": torch.zeros(n, k, **half),
            "reference": torch.zeros(n, **half),
            "entropy": torch.zeros(n, **half),
            "rests": torch.zeros(n, len(temperatures), **half),
        }
        return cls(arrays, real, temperatures, whole)

    def rows(self, index: Tensor, like: Tensor) -> Sparse:
        position = self._position[index]

        def part(name: str) -> Tensor:
            return self.arrays[name][position].to(like)

        rests, arrays = {}, self.arrays
        if "rests" in arrays:
            rests = dict(zip(self.temperatures, part("rests").unbind(-1)))
        return Sparse(
            arrays["symbols"][position].long(),
            part("log_probs"),
            part("reference"),
            part("entropy"),
            rests,
            self.whole,
            arrays["drawn"][position].long() if "drawn" in arrays else None,
            part("tempered_entropy") if "tempered_entropy" in arrays else None,
        )

    def inside(self) -> List[Inside]:
        return []

    def not_finite(self, index: Tensor) -> List[str]:
        return ["in the cache"]


class NotFiniteTeacherError(UserError, RuntimeError):
    """A teacher gave NaN, +inf or no probability at all.

    Args:
        teachers: names of the models that did.
        rows: the flat target rows of the batch, (n,).
        samples: ids of their sentences, or what else names them, where known.
    """

    def __init__(
        self, teachers: Sequence[str], rows: Tensor, samples: Optional[Sequence[Any]] = None
    ) -> None:
        self.teachers, self.rows = " and ".join(teachers), rows
        where = f"the rows {rows.tolist()}"
        if samples is not None:
            where = f"the samples with ids [{', '.join(map(str, samples))}]"
        super().__init__(
            f"teacher {self.teachers} gave NaN, +inf or no probability at all for {where}. Check "
            "its weights, or run it in a wider precision (--teacher-dtype fp32)"
        )

    def naming(self, ids: Sequence[Any], width: int) -> "NotFiniteTeacherError":
        """The same of a batch whose B sentences have these ids, and this many rows each."""
        sentences = torch.div(self.rows, width, rounding_mode="floor").unique()
        samples = [ids[sentence] for sentence in sentences.tolist()]
        return NotFiniteTeacherError([self.teachers], self.rows, samples)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
