"""Configurations of strangers' checkpoints.

Building the model that one describes must neither run code nor open other files, and take no more
memory than its weights are worth.
"""

import ast
import contextlib
import re
import resource
from argparse import Namespace
from typing import Any, Dict, Iterator, Mapping, Tuple

import numpy as np

from ..timing import memory

# What building a model evaluates as a Python expression, in the modules of fairseq's models that do
# not open files that the configuration names. A student's own --kd-hidden-layers and
# --kd-attention-layers, which no model reads, are not among it.
EVALUATED = re.compile(
    r"(?!kd_(hidden|attention)_layers$)(.*_)?"
    r"(layers|attention|adaptive_(softmax|input)_cutoff|character_filters"
    r"|xformers_att_config)$"
)
BUILDABLE = re.compile(
    r"fairseq\.models\.(transformer(\.\w+)?|transformer_(legacy|align|lm)|multilingual_transformer"
    r"|bart\.model|nat\.\w+|(lstm|fconv|lightconv)(_lm)?"
    r"|speech_to_text\.(s2t_transformer|s2t_conformer|convtransformer|berard))$"
)
# Files that training began from; the weights replace what was in them
_BEFORE_TRAINING = re.compile(r".*embed_path$|load_pretrained_\w+_from$")
_DEEPEST, _MOST_VALUES = 20, 1 << 16  # of a configuration
_BUILDING = 1 << 32  # bytes for building a model, beyond some times its weights


class Refused(Exception):
    """A configuration that asks for more than a model; what, is the message.

    Attributes:
        trustable: whether such models exist, so that who trusts the file may want to use it.
    """

    def __init__(self, message: str, trustable: bool = False) -> None:
        super().__init__(message)
        self.trustable = trustable


class Plain:
    """Configurations of plain types; neither deep nor large when it is written out."""

    def __init__(self) -> None:
        self.left = _MOST_VALUES

    def of(self, value: Any, depth: int = 0) -> Any:
        self.left -= 1
        if self.left < 0 or depth > _DEEPEST:
            raise ValueError("its configuration is too large")
        if isinstance(value, str):
            # references in them may multiply, or ask for the environment
            if "${" in value and not re.fullmatch(r"\$\{[\w.]+\}", value):
                raise ValueError(f"its configuration refers to {value!r}"[:200])
            return str(value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, Namespace):
            return Namespace(**self.of(vars(value), depth + 1))
        if isinstance(value, dict):
            return {
                str(key): None if _BEFORE_TRAINING.match(str(key)) else self.of(part, depth + 1)
                for key, part in value.items()
            }
        if isinstance(value, (list, tuple)):
            return type(value)([self.of(part, depth + 1) for part in value])
        return value


def refuse_code(arch: Any, options: Dict[str, Any], weights: Mapping[str, Any]) -> None:
    """Refuse a configuration that makes fairseq run something, or more than the file is worth.

    Raises:
        Refused: building the model would execute, or open, what the file says.
        ValueError: it is not a configuration of these weights.
    """
    from fairseq import models  # imports everything

    if not arch:  # fairseq would take the name of a section for it
        raise ValueError("it names no architecture")
    model = models.ARCH_MODEL_REGISTRY.get(arch, models.MODEL_REGISTRY.get(arch))
    module = getattr(model, "__module__", "")  # other modules' are this user's own
    if module.startswith("fairseq.") and not BUILDABLE.match(module):
        raise Refused(
            f"building its architecture {arch} evaluates, or opens, what the file says.",
            trustable=True,
        )
    for name, value in _fields(options):
        if isinstance(value, str) and EVALUATED.match(name) and not _is_literal(value):
            raise Refused(
                f"its option {name} is {repr(value):.200}, which building the model would "
                "execute. Nothing was executed."
            )
        if name.endswith("layers") and isinstance(value, int) and value > len(weights):
            raise ValueError(f"its option {name} is {value}, but it has {len(weights)} weights")


def _fields(options: Any) -> Iterator[Tuple[str, Any]]:
    """All fields of a configuration, and of those within it."""
    parts = vars(options) if isinstance(options, Namespace) else options
    for name, value in parts.items():
        yield name, value
        if isinstance(value, (dict, Namespace)):
            yield from _fields(value)


def _is_literal(text: str) -> bool:
    """Whether it is a literal, or short lists of such added and repeated: [(512, 3)] * 20."""
    try:
        return _length(ast.parse(text, mode="eval").body) <= _MOST_VALUES
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def _length(node: Any) -> int:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _length(node.left) + _length(node.right)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        times = ast.literal_eval(node.right)
        if isinstance(times, int) and isinstance(node.left, (ast.List, ast.BinOp)):
            return _length(node.left) * times
    ast.literal_eval(node)
    return len(getattr(node, "elts", "1"))


@contextlib.contextmanager
def bounded_memory(weights: Mapping[str, Any]) -> Iterator[None]:
    """While a checkpoint's model is built: its configuration may claim any size."""
    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    before = None
    # where the system counts it
    with contextlib.suppress(OSError, ValueError, AttributeError):
        used = memory("VmData")
        limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
        mine = (used or 0) + 4 * size + _BUILDING
        if used is not None and (limit == resource.RLIM_INFINITY or mine < limit):
            resource.setrlimit(resource.RLIMIT_DATA, (mine, hard))
            before = limit, hard
    try:
        yield
    finally:
        if before is not None:
            resource.setrlimit(resource.RLIMIT_DATA, before)
