"""Read fairseq checkpoints without running what is inside them; average and write them.

A checkpoint is a pickle, and a teacher is often somebody else's file. ``torchfile`` opens it
without running what is inside; ``untrusted`` refuses a configuration that building the model would
run.
"""

import contextlib
import hashlib
import importlib
import math
import os
import re
import zipfile
from argparse import Namespace
from collections import OrderedDict
from typing import Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from omegaconf import OmegaConf

from ..errors import UserError
from . import torchfile, untrusted
from .torchfile import FAIRSEQ_GLOBALS, ForbiddenGlobal, local_module

# fairseq 0.12.2's encoder layers hold these weights twice and fill them in when they are loaded;
# later versions refuse them
SECOND_COPIES = re.compile(r"layers\.\d+\.(in_proj|out_proj|fc[12])_(weight|bias)$")

_MOST_NAMES = 8  # of a weight that is tied

# Since 2.6 torch.load has weights_only by default, with an allow-list that can name aliases.
_TORCH_CHECKS_GLOBALS = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) >= (2, 6)


class CheckpointError(UserError):
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
            found = getattr(importlib.import_module(local_module(module)), name)
            allowed.append((found, module + "." + name))
        except (ImportError, AttributeError):
            continue
    dtypes = getattr(np, "dtypes", None)
    allowed.extend(
        value for name, value in sorted(vars(dtypes or object).items()) if name.endswith("DType")
    )
    torch.serialization.add_safe_globals(allowed)  # type: ignore[attr-defined]


def read_checkpoint(path: str, trust: bool = False) -> Dict[str, Any]:
    """Read a fairseq checkpoint (zip or legacy format) onto the CPU.

    Args:
        path: the file.
        trust: open it with the full pickle machinery, which runs whatever the file asks for.

    Returns:
        its dictionary; ``state["model"]`` holds the weights.

    Raises:
        CheckpointError: no such file, not a fairseq checkpoint, damaged, weights that are no
            numbers, or (unless trusted) a pickle that asks for anything beyond what fairseq
            checkpoints hold. Nothing in the file has been executed then.
    """
    if not os.path.isfile(path):
        raise CheckpointError(f"{path}: no such checkpoint file")
    try:
        state = _load(path, trust)
        _check(path, state)
        if not trust:
            config = section(state, "model")
            arch = get(config, "_name") or get(config, "arch")
            untrusted.refuse_code(arch, config, state["model"])
    except CheckpointError:
        raise
    except ForbiddenGlobal as error:
        raise CheckpointError(
            f"{path}: refused, because its pickle asks for {error}, which no fairseq checkpoint "
            "needs. Nothing was executed. If you know where this file comes from and trust it, "
            "--trust-checkpoint (in training --teacher-trust-checkpoint) opens it all the same."
        ) from None
    except untrusted.Refused as error:
        raise CheckpointError(f"{path}: refused, because {error}") from None
    except Exception as error:  # nearly any, on a file that is something else
        raise CheckpointError(
            "{}: cannot be read as a fairseq checkpoint; it is {} ({}: {})".format(
                path, _kind(path), type(error).__name__, str(error).split("\n")[0][:300]
            )
        ) from error
    return state


def _kind(path: str) -> str:
    """What is taken for a checkpoint: often a page of a server, or a pointer to a large file."""
    start = b"\0"
    with contextlib.suppress(OSError), open(path, "rb") as file:
        start = file.read(60)
    if not start:
        return "empty"
    first_line = start.decode("ascii", "replace").split("\n")[0].strip()
    if len(first_line) > 8 and first_line.isprintable() and first_line.isascii():
        return f"text that begins with {first_line!r}"
    return "damaged, incomplete or something else"


def _load(path: str, trust: bool) -> Any:
    if not trust:
        return torchfile.read(path)
    more = {"weights_only": False} if _TORCH_CHECKS_GLOBALS else {}
    return torch.load(path, map_location="cpu", **more)


def _check(path: str, state: Any) -> None:
    """That everything in it which is used anywhere is of the kind that it should be."""
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(
            f"{path}: not a fairseq checkpoint: expected a dictionary with the model's weights "
            "under 'model', found "
            f"{_contents(state)}"
        )
    args: Any = state.get("args")
    cfg: Any = state.get("cfg")
    if args is None and cfg is None:
        raise CheckpointError(
            f"{path}: holds weights but neither 'cfg' nor 'args', so the model cannot be rebuilt; "
            "use a checkpoint that fairseq-train wrote"
        )
    if args is not None:
        if not isinstance(args, Namespace):
            raise TypeError(f"its 'args' are a {type(args).__name__}")
        state["args"] = untrusted.Plain().of(args)
        _modernise(state["args"])
    else:
        if OmegaConf.is_config(cfg):
            cfg = OmegaConf.create(untrusted.Plain().of(OmegaConf.to_container(cfg)))
            cfg = OmegaConf.to_container(cfg, resolve=True)
        parts = {name: untrusted.Plain().of(cfg[name]) for name in ("model", "task")}
        for name, part in parts.items():
            if not isinstance(part, (dict, Namespace)):
                raise TypeError(f"its {name} is a {type(part).__name__}")
        state["cfg"] = {**cfg, **parts}
    task = section(state, "task")
    for name in ("source_lang", "target_lang"):
        lang = get(task, name)
        if lang is not None and not re.fullmatch(r"\w[\w@.+-]*", lang):
            raise ValueError(f"{lang!r} is no name of a language"[:200])
    kinds = {"max_source_positions": int, "max_target_positions": int, "data": str, "_name": str}
    for part in (section(state, "model"), task):
        for name, kind in {**kinds, "arch": str}.items():
            if not isinstance(get(part, name), (kind, type(None))):
                raise TypeError(f"its option {name} is a {type(get(part, name)).__name__}")
    _check_weights(path, state)
    history = state.get("optimizer_history") or []
    if not all(isinstance(one.get("num_updates", 0), int) for one in history):
        raise TypeError("its number of updates is none")
    for side in symbols_in(state) or ():
        if not all(type(symbol) is str for symbol in side):
            raise TypeError("a symbol of its vocabulary is no text")
        # no dictionary's file could hold it
        if any("\n" in symbol or "\r" in symbol for symbol in side):
            raise ValueError("a symbol of its vocabulary has more than one line")
        "\n".join(side).encode("utf-8")


def _contents(state: Any) -> str:
    if isinstance(state, dict):
        return f"the keys {sorted(map(str, state))[:8]}"
    return type(state).__name__


def _check_weights(path: str, state: Dict[str, Any]) -> None:
    weights = state["model"]
    if not all(type(k) is str and isinstance(w, torch.Tensor) for k, w in weights.items()):
        raise TypeError("something among its weights is no tensor")
    if not any(weight.is_floating_point() for weight in weights.values()):
        raise ValueError("it has no weights")
    # tied ones are there under several names
    claimed = sum(weight.numel() * weight.element_size() for weight in weights.values())
    if claimed > _MOST_NAMES * os.path.getsize(path):
        raise ValueError(f"its weights claim {claimed:,} bytes")
    state["model"] = {k: w for k, w in weights.items() if not SECOND_COPIES.search(k)}
    broken = [name for name, weight in state["model"].items() if not _finite(name, weight)]
    if broken:
        raise CheckpointError(
            f"{path}: {len(broken)} of its weights hold NaN or inf ({', '.join(broken[:3])}): the "
            "training that wrote it diverged, or the file is damaged. Take an earlier checkpoint."
        )


def _finite(name: str, weight: torch.Tensor) -> bool:
    """Whether a weight has neither NaN nor +inf; a bias of -inf rules a symbol out."""
    if name.endswith("_float_tensor"):  # kept for its dtype alone: memory nobody wrote to
        return True
    if not weight.is_floating_point() or not weight.numel():
        return True
    try:
        return bool(weight.max() < math.inf)
    except RuntimeError:  # of a kind that no model has, which building it will say
        return True


def _modernise(args: Namespace) -> None:
    """What fairseq renamed in ``args`` over the years, as far as it tells what the model is."""
    if hasattr(args, "max_positions") and not hasattr(args, "max_source_positions"):
        args.max_source_positions = args.max_target_positions = args.max_positions
    if not hasattr(args, "task"):
        args.task = "translation"
    if isinstance(getattr(args, "data", None), list) and args.data:
        args.data = args.data[0]


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
            f"Start with --restore-file {max(whole, key=os.path.getmtime)}, once: of those beside "
            "it that are whole, it is the newest, and training goes on from there."
        )
    raise CheckpointError(
        f"{path} is cut short: a kill or a full disk interrupted its writing. {advice}"
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
                f"checkpoints 1 and {i + 1} cannot be averaged, they differ in {len(names)} "
                f"parameters: {', '.join(names[:5])}"
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
