"""What a student learns from the inside of a teacher: hidden states and attention.

A ``Place`` is where in a model something is looked at; what is found there at each position of a
batch is its state, (B, L, d), or its attention map, (B, queries, keys). ``compare`` is the way in:
each term is a sum over real positions, differentiable for the student by autograd. Nothing of
tokens x vocabulary is touched; beside states and maps themselves, memory is of B x L x L.
"""

import contextlib
import math
import re
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from ..errors import UserError

# Of which side's positions the dimensions behind the first one are
SIDES: Dict[str, Tuple[str, ...]] = {
    "encoder": ("encoder",),
    "decoder": ("decoder",),
    "encoder-self": ("encoder", "encoder"),
    "decoder-self": ("decoder", "decoder"),
    "cross": ("decoder", "encoder"),
}
HIDDEN = tuple(kind for kind, sides in SIDES.items() if len(sides) == 1)
MAPS = tuple(kind for kind, sides in SIDES.items() if len(sides) == 2)
# Of each kind: the flag that asks for it, and the one that says in which layers
FLAG = {kind: "--kd-hidden" if kind in HIDDEN else "--kd-attention-weight" for kind in SIDES}
LAYERS_FLAG = {
    kind: "--kd-hidden-layers" if kind in HIDDEN else "--kd-attention-layers" for kind in SIDES
}


class Place(NamedTuple):
    """Where in a model: a kind of ``SIDES`` and a layer, from 0, or from -1 backwards."""

    kind: str
    layer: int


class LayerPair(NamedTuple):
    """A student's layer that learns from a teacher's."""

    kind: str
    student: int
    teacher: int

    @property
    def of_student(self) -> Place:
        return Place(self.kind, self.student)

    @property
    def of_teacher(self) -> Place:
        return Place(self.kind, self.teacher)


class Part(NamedTuple):
    """What of a batch one of several teachers reads.

    Attributes:
        sentences: numbers (n,); ``columns``: of source positions (S',).
    """

    sentences: Tensor
    columns: Tensor

    def of(self, whole: Tensor, sides: Sequence[str]) -> Tensor:
        """Its own rows and columns of a tensor (B, ...) about positions of these sides."""
        own = whole[self.sentences.to(whole.device)]
        for at, side in enumerate(sides, start=1):
            if side == "encoder":
                own = own.index_select(at, self.columns.to(whole.device))
        return own


class Inside(NamedTuple):
    """What was found inside one model of a teacher, at the student's positions.

    Attributes:
        states: by place; states (B, L, d), maps (B, queries, keys).
        weight: of the model in an ensemble; all of them sum to 1.
        shared: by side, at which of the positions the teacher has the student's symbol, bool
            (B, L); at all of a side that is not there.
        model: its number among all models of the training's teachers.
        part: what of the student's batch it is about, B and L being its own; None is all.
    """

    states: Mapping[Place, Tensor]
    weight: float = 1.0
    shared: Mapping[str, Tensor] = {}
    model: int = 0
    part: Optional[Part] = None


class StateTerm(NamedTuple):
    """One term of the loss.

    Attributes:
        name: of its metric, in bits where the term is a divergence.
        how: one of ``LOSSES``.
        weight: of the sum over the positions of all layers.
        layers: which learn from which.
    """

    name: str
    how: str
    weight: float
    layers: Tuple[LayerPair, ...]

    @property
    def has_maps(self) -> bool:
        """Whether linear maps are trained along."""
        return self.how == "mse"

    @property
    def unit(self) -> float:
        """What the metric is told in: nats, or as it is."""
        return 1.0 if self.how == "mse" else math.log(2)


class Found(NamedTuple):
    """The sum of a term over positions, differentiable, and how many these are; scalars."""

    value: Tensor
    positions: Tensor


def parse_layers(text: str, flag: str, kinds: Sequence[str]) -> Tuple[LayerPair, ...]:
    """``encoder:-1=-1,decoder:0=2``: kind, student's layer, teacher's layer.

    Args:
        kinds: that the flag takes.

    Raises:
        UserError: anything else; names ``flag``.
    """
    pairs: List[LayerPair] = []
    for part in text.split(","):
        found = re.fullmatch(r"([a-z-]+):(-?\d{1,4})=(-?\d{1,4})", part.strip())
        if not found or found.group(1) not in kinds:
            raise UserError(
                f"{flag}: expected STUDENT=TEACHER layers of {', '.join(kinds)}, counted from 0 or "
                f"backwards from -1, as in {kinds[0]}:-1=-1,{kinds[-1]}:0=2; got {text!r}"
            )
        pairs.append(LayerPair(found.group(1), int(found.group(2)), int(found.group(3))))
    if len(set(pairs)) < len(pairs):
        raise UserError(f"{flag}: a pair of layers is named twice in {text!r}")
    return tuple(pairs)


def compare(
    term: StateTerm,
    student: Mapping[Place, Tensor],
    teacher: Sequence[Inside],
    positions: Mapping[str, Tensor],
    counted: Mapping[str, Tensor],
    maps: Sequence[Tensor] = (),
) -> Found:
    """The sum of a term over all pairs of layers and the models of teachers, by their weights.

    A layer that the student left out (``--encoder-layerdrop``) contributes nothing, and its
    positions are not counted.

    Args:
        student: what was found inside it.
        teacher: likewise of each of its models, or of those of several teachers.
        positions: by side, which are not padding, bool (B, L).
        counted: those of them that the loss is summed over.
        maps: W of ``mse``, of each pair of layers for each model of the training's teachers.

    Raises:
        UserError: a map is of other widths than the states.
    """
    zero = counted["decoder"].new_zeros((), dtype=torch.float32)
    found, models = Found(zero, zero), len(maps) // len(term.layers)
    unused = {*range(len(maps))}
    for number, pair in enumerate(term.layers):
        mine = student.get(pair.of_student)
        if mine is None:
            continue
        mine = mine.to(torch.promote_types(mine.dtype, torch.float32))
        sides = SIDES[pair.kind]
        for model in teacher:
            theirs = model.states[pair.of_teacher].to(mine)
            masks = [(positions if at else counted)[side] for at, side in enumerate(sides)]
            own = mine
            if model.part is not None:
                own = model.part.of(mine, sides)
                masks = [model.part.of(mask, [side]) for side, mask in zip(sides, masks)]
            masks = [
                mask & model.shared[side].to(mask.device) if side in model.shared else mask
                for side, mask in zip(sides, masks)
            ]
            which = number * models + model.model
            unused.discard(which)
            with full_precision():
                value = LOSSES[term.how](own, theirs, *masks, *maps[which : which + 1])
            found = Found(
                found.value + model.weight * value,
                found.positions + model.weight * masks[0].sum(),
            )
    # ranks that average gradients wait for one of every map
    nothing = (0 * maps[which].float().sum() for which in sorted(unused))
    return found._replace(value=sum(nothing, found.value))


def relations(student: Tensor, teacher: Tensor, real: Tensor) -> Tensor:
    """How alike the positions of each sentence are to one another (after MiniLMv2, Wang et al.
    2021): KL(teacher's row || student's row) of softmax(H H^T / sqrt(d)) over a sentence's real
    positions, summed over them, nats. Widths need not be equal.

    Args:
        student, teacher: states, (B, L, d) of each its own d.
        real: bool (B, L).
    """
    log_p, log_q = _log_relations(teacher, real), _log_relations(student, real)
    # where a key is padding, both are a number that is far from finite, and p is 0
    difference = (log_p - log_q).masked_fill(~real.unsqueeze(1), 0)
    return (log_p.exp() * difference).sum(-1).masked_fill(~real, 0).sum()


def _log_relations(states: Tensor, real: Tensor) -> Tensor:
    # what stands at padding must not matter, not even where it is not a number
    states = states.masked_fill(~real.unsqueeze(-1), 0)
    scores = torch.matmul(states, states.transpose(1, 2)) / math.sqrt(states.size(-1))
    lowest = torch.finfo(scores.dtype).min
    return torch.log_softmax(scores.masked_fill(~real.unsqueeze(1), lowest), dim=-1)


def attention(student: Tensor, teacher: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """How alike two attention maps are (after Zagoruyko & Komodakis 2017): KL(teacher's row ||
    student's row) over real keys, summed over real queries, nats. Both are renormalised over these
    keys, which matters where the teacher also reads tags.

    Args:
        student, teacher: maps (B, Q, K), of rows that sum to 1: averages over heads.
        queries: bool (B, Q); ``keys``: bool (B, K).
    """
    real = queries.unsqueeze(2) & keys.unsqueeze(1)
    p, q = _rows(teacher, real), _rows(student, real)
    return (p * (_log(p) - _log(q))).sum()


def _rows(weights: Tensor, real: Tensor) -> Tensor:
    weights = weights.masked_fill(~real, 0)
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _log(weights: Tensor) -> Tensor:
    """Finite, and without gradient, where the weight is 0: at masked keys."""
    return weights.clamp(min=torch.finfo(weights.dtype).tiny).log()


def mse(student: Tensor, teacher: Tensor, real: Tensor, linear: Tensor) -> Tensor:
    """|W h_s - h_t|^2 / (2 d_t) (FitNets, Romero et al. 2015), summed over real positions.

    Args:
        student, teacher: states, (B, L, d_s) and (B, L, d_t).
        real: bool (B, L).
        linear: W, (d_t, d_s).

    Raises:
        UserError: W is of other widths.
    """
    widths = teacher.size(-1), student.size(-1)
    if linear.shape != widths:
        raise UserError(
            f"--kd-hidden mse: expected states of a teacher {linear.size(0)} wide and of a student "
            f"{linear.size(1)} wide, as their configurations say, and got {widths[0]} and "
            f"{widths[1]}: take --kd-hidden relations"
        )
    difference = student[real] @ linear.to(student).t() - teacher[real]
    return difference.pow(2).sum() / (2 * widths[0])


def first_maps(widths: Sequence[Tuple[int, int]]) -> List[Tensor]:
    """W of ``mse`` as training begins, (d_t, d_s) for each such widths.

    The identity between equal widths; others are random, the same in every process. The global
    random generator is left alone.
    """
    maps = []
    for seed, (theirs, ours) in enumerate(widths):
        generator = torch.Generator().manual_seed(seed)
        random = torch.randn(theirs, ours, generator=generator) / math.sqrt(ours)
        maps.append(torch.eye(ours) if theirs == ours else random)
    return maps


LOSSES: Dict[str, Callable[..., Tensor]] = {
    "relations": relations,
    "mse": mse,
    "attention": attention,
}
OF_HIDDEN = ("relations", "mse")


def full_precision() -> Any:
    """Whatever autocast the student's forward pass runs under."""
    if torch.is_autocast_enabled():
        return torch.autocast("cuda", enabled=False)
    return contextlib.nullcontext()
