"""Read fairseq checkpoints without running what is inside them; average and write them.

A checkpoint is a pickle, and a teacher is often somebody else's file. Only the globals that
fairseq's own checkpoints hold may be looked up while one is opened: torch >= 2.6 enforces that
itself (``weights_only``), older torch gets an unpickler that does.
"""

import hashlib
import importlib
import os
import pickle
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from argparse import Namespace
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch

# What fairseq's checkpoints hold besides tensors, as (module, name). Some names exist at one end
# of the supported versions only.
_METERS = (
    "AverageMeter",
    "TimeMeter",
    "StopwatchMeter",
    "MetersDict",
    "SumMeter",
    "ConcatTensorMeter",
)
_NODES = (
    "AnyNode",
    "StringNode",
    "IntegerNode",
    "FloatNode",
    "BooleanNode",
    "EnumNode",
    "BytesNode",
)
_BUILTINS = ("dict", "list", "tuple", "set", "int", "float", "str", "bool")
FAIRSEQ_GLOBALS: Tuple[Tuple[str, str], ...] = (
    ("argparse", "Namespace"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    *(("builtins", name) for name in _BUILTINS),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *(
        (module + ".multiarray", name)
        for module in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    ),
    *(
        (module, name)
        for module in ("fairseq.meters", "fairseq.logging.meters")
        for name in _METERS
    ),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.base", "Metadata"),
    ("omegaconf.base", "ContainerMetadata"),
    *(("omegaconf.nodes", name) for name in _NODES),
    ("typing", "Any"),
)
# What tensors are pickled with. torch >= 2.6 allows these by itself.
_TORCH_GLOBALS = (
    ("torch._utils", "_rebuild_tensor"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_parameter"),
    ("torch", "Size"),
    ("torch", "device"),
    *(("torch", name) for name in ("float16", "bfloat16", "float32", "float64", "bool", "uint8")),
    *(("torch", name) for name in ("int8", "int16", "int32", "int64")),
    *(("torch", kind + "Storage") for kind in ("Half", "BFloat16", "Float", "Double", "Bool")),
    *(("torch", kind + "Storage") for kind in ("Byte", "Char", "Short", "Int", "Long")),
)

# fairseq 0.12.2's encoder layers hold these weights twice and fill them in when they are loaded;
# later versions refuse them
SECOND_COPIES = re.compile(r"layers\.\d+\.(in_proj|out_proj|fc[12])_(weight|bias)$")

# Since 2.6 torch.load has weights_only by default, with an allow-list that can name aliases.
_TORCH_CHECKS_GLOBALS = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) >= (2, 6)


class CheckpointError(ValueError):
    """A file that cannot be used as a fairseq checkpoint; the message says why and what to do."""


def allow_fairseq_globals() -> None:
    """Let ``torch.load`` open fairseq checkpoints where it refuses unknown globals (torch >= 2.6).

    Without this, even stock ``fairseq-generate`` and resuming fail there.
    """
    if not _TORCH_CHECKS_GLOBALS:
        return
    allowed: List[Any] = []
    # a resumed rank receives the first one's checkpoint, its tensors replaced by placeholders
    received = ("fairseq.distributed.utils", "_TensorPlaceholder")
    for module, name in (*FAIRSEQ_GLOBALS, received):
        try:
            found = getattr(importlib.import_module(_local(module)), name)
            allowed.append((found, module + "." + name))
        except (ImportError, AttributeError):
            continue
    dtypes = getattr(np, "dtypes", None)
    allowed.extend(
        value for name, value in sorted(vars(dtypes or object).items()) if name.endswith("DType")
    )
    torch.serialization.add_safe_globals(allowed)  # type: ignore[attr-defined]


def _local(module: str) -> str:
    """The name here of what numpy 2 renamed to ``numpy._core``, with a mere alias left behind."""
    names = ("numpy.core", "numpy._core")
    return module.replace(*(names if hasattr(np, "_core") else names[::-1]))


class _RestrictedPickle:
    """Stands in for the ``pickle`` module in ``torch.load``: looks up allow-listed globals only."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            # torch pickles with protocol 2, which uses Python 2's names
            module, name = NAME_MAPPING.get((module, name), (module, name))
            module = IMPORT_MAPPING.get(module, module)
            if (module, name) not in FAIRSEQ_GLOBALS and (module, name) not in _TORCH_GLOBALS:
                raise pickle.UnpicklingError("forbidden global {}.{}".format(module, name))
            return super().find_class(_local(module), name)

    @classmethod
    def load(cls, file: Any, **kwargs: Any) -> Any:
        return cls.Unpickler(file, **kwargs).load()

    UnpicklingError = pickle.UnpicklingError
    __name__ = "restricted pickle"


# The name in this reader's own refusal, and in torch's
_FORBIDDEN = re.compile(r"(?:forbidden global|\bGLOBAL) ([\w.]+)")


def read_checkpoint(path: str, trust: bool = False) -> Dict[str, Any]:
    """Read a fairseq checkpoint (zip or legacy format) onto the CPU.

    Args:
        path: the file.
        trust: open it with the full pickle machinery, which runs whatever the file asks for.

    Returns:
        its dictionary; ``state["model"]`` holds the weights.

    Raises:
        CheckpointError: no such file, not a fairseq checkpoint, damaged, or (unless trusted) a
            pickle that asks for anything beyond what fairseq checkpoints hold. Nothing in the file
            has been executed then.
    """
    if not os.path.isfile(path):
        raise CheckpointError("{}: no such checkpoint file".format(path))
    try:
        state = _load(path, trust)
    except Exception as error:  # torch raises nearly anything on a file that is not its own
        forbidden = _FORBIDDEN.search(str(error))
        if forbidden:
            raise CheckpointError(
                "{}: refused, because its pickle asks for {}, which no fairseq checkpoint needs. "
                "Nothing was executed. If you know where this file comes from and trust it, "
                "--trust-checkpoint (in training --teacher-trust-checkpoint) opens it all the "
                "same.".format(path, forbidden.group(1))
            ) from None
        raise CheckpointError(
            "{}: cannot be read as a fairseq checkpoint; it is damaged, incomplete or something "
            "else ({}: {})".format(path, type(error).__name__, str(error).split("\n")[0][:300])
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(
            "{}: not a fairseq checkpoint: expected a dictionary with the model's weights under "
            "'model', found {}".format(
                path,
                "the keys {}".format(sorted(map(str, state))[:8])
                if isinstance(state, dict)
                else type(state).__name__,
            )
        )
    if state.get("args") is None and state.get("cfg") is None:
        raise CheckpointError(
            "{}: holds weights but neither 'cfg' nor 'args', so the model cannot be rebuilt; "
            "use a checkpoint that fairseq-train wrote".format(path)
        )
    if state.get("args") is not None:
        _modernise(state["args"])
    weights = state["model"].items()
    state["model"] = {k: w for k, w in weights if not SECOND_COPIES.search(str(k))}
    return state


def _modernise(args: Namespace) -> None:
    """What fairseq renamed in ``args`` over the years, as far as it tells what the model is."""
    if hasattr(args, "max_positions") and not hasattr(args, "max_source_positions"):
        args.max_source_positions = args.max_target_positions = args.max_positions
    if not hasattr(args, "task"):
        args.task = "translation"
    if isinstance(getattr(args, "data", None), list) and args.data:
        args.data = args.data[0]


def _load(path: str, trust: bool) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise ValueError("it is a TorchScript archive")
    if _TORCH_CHECKS_GLOBALS:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    # torch's stub wants a module here; anything with Unpickler and load does
    module = pickle if trust else _RestrictedPickle
    return torch.load(path, map_location="cpu", pickle_module=module)


# What fairseq-train names its checkpoints besides checkpoint_last.pt
_NAMED = re.compile(r"checkpoint(\d+|_\d+_\d+|_best|\.best_.+)\.pt")


def refuse_cut_short(path: str) -> None:
    """Refuse to train on from a checkpoint of which only the beginning was written.

    fairseq writes each checkpoint under another name first, but then copies it to
    ``checkpoint_last.pt``, where a kill or a full disk may come in between. What torch says of such
    a file ("Invalid argument", or advice on ``weights_only``) helps nobody.

    Raises:
        CheckpointError: it is such a file; the message names the newest one that is whole.
    """
    if not os.path.isfile(path) or not _cut_short(path):
        return
    folder = os.path.dirname(path)
    others = [os.path.join(folder, name) for name in os.listdir(folder) if _NAMED.fullmatch(name)]
    whole = [other for other in others if other != path and not _cut_short(other)]
    advice = "No whole checkpoint lies beside it: delete it to train from the beginning."
    if whole:
        advice = (
            "Start with --restore-file {}, once: of those beside it that are whole, it is the "
            "newest, and training goes on from there.".format(max(whole, key=os.path.getmtime))
        )
    raise CheckpointError(
        "{} is cut short: a kill or a full disk interrupted its writing. {}".format(path, advice)
    )


def _cut_short(path: str) -> bool:
    """Whether a zip archive, torch's format since 1.6, has no end."""
    with open(path, "rb") as file:
        return b"PK".startswith(file.read(2)) and not zipfile.is_zipfile(path)


def section(state: Dict[str, Any], name: str) -> Any:
    """``name`` ("model", "task", ...) of a checkpoint's configuration, old or new format.

    Returns the flat ``Namespace`` of an ``args`` checkpoint, else whatever ``cfg`` has there
    (mapping or Namespace).
    """
    args = state.get("args")
    return args if args is not None else state["cfg"][name]


def get(config: Any, name: str, default: Any = None) -> Any:
    """A field of a ``section``, whatever its kind."""
    if config is None:
        return default
    if isinstance(config, Namespace):
        return getattr(config, name, default)
    return config.get(name, default)


def average(states: Sequence[Dict[str, Any]]) -> Dict[str, torch.Tensor]:
    """The mean of several checkpoints' weights, summed in float64, in the first one's dtypes.

    Raises:
        CheckpointError: they do not hold the same parameters in the same shapes.
    """
    shapes = [{name: tuple(p.shape) for name, p in state["model"].items()} for state in states]
    for i, other in enumerate(shapes):
        if other != shapes[0]:
            names = sorted(
                n for n in set(other) | set(shapes[0]) if other.get(n) != shapes[0].get(n)
            )
            raise CheckpointError(
                "checkpoints 1 and {} cannot be averaged, they differ in {} parameters: {}".format(
                    i + 1, len(names), ", ".join(names[:5])
                )
            )
    mean = OrderedDict()
    for name, first in states[0]["model"].items():
        if first.is_floating_point():
            total = sum(state["model"][name].double() for state in states)
            mean[name] = (total / len(states)).to(first.dtype)
        else:
            mean[name] = first
    return mean


def symbols_in(state: Dict[str, Any]) -> Optional[Tuple[List[str], List[str]]]:
    """The (source, target) symbols that a student of this plugin saved in its checkpoint."""
    saved = state.get("task_state") or {}
    source, target = saved.get("source_symbols"), saved.get("target_symbols")
    return (list(source), list(target)) if source and target else None


def digest(path: str) -> str:
    """SHA-256 of a file's content, hexadecimal."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 22), b""):
            found.update(block)
    return found.hexdigest()
