"""One model of several checkpoints of a training: the mean of their weights."""

import re
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import torch

from ..errors import Faults
from .checkpoint import Checkpoint, CheckpointError
from .roles import Role

# Options of training, or of how long sentences may be: they do not change what a model computes
_NOT_COMPUTED = re.compile(
    r"dropout|layerdrop|quant_noise|freeze|embed_path|min_params_to_wrap|max_\w+_positions"
    r"|(checkpoint|offload)_activations"
)
_MOST_NAMED = 5  # differences in a message


def is_computed(option: str) -> bool:
    """Whether what a model computes depends on one of its options."""
    return not _NOT_COMPUTED.search(option)


def average(
    paths: Sequence[str],
    role: Role,
    trust: bool = False,
    refuse: Optional[Callable[[Checkpoint], None]] = None,
) -> Checkpoint:
    """The mean of several checkpoints' weights, summed in float64, in the first one's dtypes.

    They are read one after the other, so that there is one at a time in memory besides the sum.

    Args:
        refuse: called with the first checkpoint before the others are read; may raise.

    Returns:
        the last checkpoint, with these weights.

    Raises:
        CheckpointError: one cannot be read, or they are not of one architecture, built with the
            same options, for the same languages, symbols and parameters.
    """
    first = Checkpoint.open(paths[0], role, trust)
    if refuse is not None:
        refuse(first)
    dtypes = {name: weight.dtype for name, weight in first.weights.items()}
    total = {
        # copied also where they are float64: tied weights share storage, to be added to once
        name: weight.to(torch.float64, copy=True) if weight.is_floating_point() else weight
        for name, weight in first.weights.items()
    }
    shapes, model = _shapes(first), _Model.of(first)
    first = last = first.with_weights({})
    for path in paths[1:]:
        last = Checkpoint.open(path, role, trust)
        faults = Faults()
        for difference in model.differences(_Model.of(last)):
            faults.add(difference)
        different = _differing(shapes, _shapes(last))
        faults.check(
            not different, f"they differ in {len(different)} parameters: {_some(different)}"
        )
        faults.raise_if_any(CheckpointError, f"{first} and {last} cannot be averaged: ")
        for name, summed in total.items():
            if dtypes[name].is_floating_point:
                summed += last.weights[name]
        last = last.with_weights({})
    mean = {
        name: (summed / len(paths)).to(dtypes[name]) if dtypes[name].is_floating_point else summed
        for name, summed in total.items()
    }
    return last.with_weights(mean)


class _Model:
    """What has to agree between models whose weights can be averaged, besides the shapes."""

    def __init__(
        self,
        architecture: Optional[str],
        languages: Tuple[Any, Any],
        options: Dict[str, Any],
        symbols: Optional[Tuple[List[str], List[str]]],
    ) -> None:
        self.architecture = architecture
        self.languages = languages
        self.options = options
        self.symbols = symbols

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "_Model":
        options = {
            name: value
            for name, value in vars(checkpoint.complete_options()).items()
            if is_computed(name)
        }
        symbols, languages = checkpoint.symbols, checkpoint.languages
        if symbols is None and all(languages):
            found = checkpoint.dictionaries([str(language) for language in languages])
            symbols = found and (found.source.symbols, found.target.symbols)
        return cls(checkpoint.architecture, languages, options, symbols)

    def differences(self, other: "_Model") -> List[str]:
        """In words; what one of them does not say cannot differ."""
        if self.architecture != other.architecture:
            return [f"they are a {self.architecture} and a {other.architecture}"]
        found = [
            f"{name} is {self.options.get(name)!r} and {other.options.get(name)!r}"
            for name in _differing(self.options, other.options)[:_MOST_NAMED]
        ]
        if all(self.languages) and all(other.languages) and self.languages != other.languages:
            pairs = ["-".join(languages) for languages in (self.languages, other.languages)]
            found.append(f"they translate {' and '.join(pairs)}")
        for side, mine, theirs in zip(
            ("source", "target"), self.symbols or (), other.symbols or ()
        ):
            if mine != theirs:
                found.append(
                    f"their {side} dictionaries differ ({len(mine)} and {len(theirs)} symbols)"
                )
        return found


def _shapes(checkpoint: Checkpoint) -> Dict[str, torch.Size]:
    return {name: weight.shape for name, weight in checkpoint.weights.items()}


def _differing(mine: Dict[str, Any], other: Dict[str, Any]) -> List[str]:
    return sorted(name for name in {*mine, *other} if mine.get(name) != other.get(name))


def _some(names: List[str]) -> str:
    return ", ".join(names[:_MOST_NAMED]) + (", ..." if len(names) > _MOST_NAMED else "")
