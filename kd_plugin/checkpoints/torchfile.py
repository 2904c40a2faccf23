"""Files of ``torch.save``, opened without running what is inside; zip and legacy format.

Such a file is a pickle with raw numbers beside it, and a pickle is a program: it calls what it
names. Here it is run by a machine that knows few instructions, looks up few names, and calls a
handful of functions, with such arguments as torch, numpy and fairseq write there. What it builds
is never larger than the file by more than a factor, whatever sizes the file claims.
"""

import importlib
import math
import mmap
import os
import pickle
import re
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, defaultdict
from typing import Any, Callable, Dict, List, Set, Tuple

import numpy as np
import torch
from torch import Tensor

# What fairseq's checkpoints hold besides tensors, as (module, name). Some names exist at one end
# of the supported versions only.
_OBJECTS = (
    ("argparse", "Namespace"),
    *(
        (module, name + "Meter")
        for module in ("fairseq.meters", "fairseq.logging.meters")
        for name in ("Average", "Time", "Stopwatch", "Sum", "ConcatTensor")
    ),
    ("omegaconf.dictconfig", "DictConfig"),
    ("omegaconf.listconfig", "ListConfig"),
    ("omegaconf.base", "Metadata"),
    ("omegaconf.base", "ContainerMetadata"),
    *(
        ("omegaconf.nodes", name + "Node")
        for name in ("Any", "String", "Integer", "Float", "Boolean", "Enum", "Bytes")
    ),
)
FAIRSEQ_GLOBALS: Tuple[Tuple[str, str], ...] = (
    *_OBJECTS,
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    *(
        ("builtins", name)
        for name in ("dict", "list", "tuple", "set", "int", "float", "str", "bool")
    ),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    *(
        (module + ".multiarray", name)
        for module in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    ),
    ("fairseq.meters", "MetersDict"),
    ("fairseq.logging.meters", "MetersDict"),
    ("typing", "Any"),
)

# Since 2.6 torch.load has weights_only by default, with an allow-list that can name aliases.
TORCH_CHECKS_GLOBALS = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) >= (2, 6)

_LARGEST_PICKLE = 1 << 26  # without the tensors' numbers
_MOST_DIMENSIONS = 16
_LEGACY_MAGIC, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001


class ForbiddenGlobal(Exception):
    """A pickle that asks for something that no fairseq checkpoint needs; which, is the message."""


def _local_module(module: str) -> str:
    """The name here of what numpy 2 renamed to ``numpy._core``, with a mere alias left behind."""
    names = ("numpy.core", "numpy._core")
    return module.replace(*(names if hasattr(np, "_core") else names[::-1]))


def allow_fairseq_globals() -> None:
    """Let ``torch.load`` open fairseq checkpoints where it refuses unknown globals (torch >= 2.6).

    Without this, even stock ``fairseq-generate`` and resuming fail there.
    """
    if not TORCH_CHECKS_GLOBALS:
        return
    allowed: List[Any] = []
    # a resumed rank receives the first one's checkpoint, its tensors replaced by placeholders
    received = ("fairseq.distributed.utils", "_TensorPlaceholder")
    for module, name in (*FAIRSEQ_GLOBALS, received):
        try:
            found = getattr(importlib.import_module(_local_module(module)), name)
            allowed.append((found, module + "." + name))
        except (ImportError, AttributeError):
            continue
    dtypes = getattr(np, "dtypes", None)
    allowed.extend(
        value for name, value in sorted(vars(dtypes or object).items()) if name.endswith("DType")
    )
    torch.serialization.add_safe_globals(allowed)  # type: ignore[attr-defined]


def read(path: str) -> Any:
    """What ``torch.save`` wrote, on the CPU; parameters as plain tensors.

    Raises:
        ForbiddenGlobal: its pickle asks for something that no fairseq checkpoint needs.
        Exception: of nearly any kind: it is damaged, or something else. Nothing was executed.
    """
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            return _read_zip(file)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return _read_legacy(content)


def _read_zip(file: Any) -> Any:
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if any(name.endswith("/constants.pkl") for name in entries):
            raise ValueError("it is a TorchScript archive")
        check_stored(archive)
        names = [name for name in entries if name.endswith("/data.pkl")]
        if len(names) != 1:
            raise ValueError(f"expected one data.pkl in it, found {len(names)}")
        folder = names[0][: -len("data.pkl")]
        order = folder + "byteorder"
        if order in entries and archive.read(order) != b"little":
            raise ValueError("its numbers are not little-endian")
        found: Dict[str, bytearray] = {}

        def storage(key: str, dtype: torch.dtype, size: int) -> Tensor:
            entry = entries[folder + "data/" + key]
            if entry.file_size != size:
                raise ValueError(f"a tensor claims {size} bytes, the file has {entry.file_size}")
            if key not in found:
                found[key] = bytearray(size)
                with archive.open(entry) as content:
                    content.readinto(found[key])  # type: ignore[attr-defined]
                    content.read()  # its end, where the checksum is compared
            return _numbers(found[key], dtype)

        with archive.open(names[0]) as content:
            return _Machine(content, storage).load()


def check_stored(archive: zipfile.ZipFile) -> None:
    """Refuse a zip file in which anything takes more bytes than it has, or is there twice."""
    entries = archive.infolist()
    file: Any = archive.fp
    if len({entry.filename for entry in entries}) != len(entries):
        raise ValueError("two entries have the same name")
    if (
        any(
            entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size
            for entry in entries
        )
        or sum(entry.file_size for entry in entries) > os.fstat(file.fileno()).st_size
    ):
        raise ValueError("it is compressed, or claims to hold more than it does")


def _read_legacy(content: mmap.mmap) -> Any:
    found: Dict[str, Tuple[bytearray, int]] = {}
    left = len(content)

    def storage(key: str, dtype: torch.dtype, size: int) -> Tensor:
        nonlocal left
        if key not in found:
            left -= size
            if left < 0:
                raise ValueError("its tensors claim more bytes than the file has")
            found[key] = bytearray(size), _item_size(dtype)
        if len(found[key][0]) != size:
            raise ValueError("a storage has two sizes")
        return _numbers(found[key][0], dtype)

    def next_object() -> Any:
        return _Machine(content, storage).load()

    if next_object() != _LEGACY_MAGIC or next_object() != _LEGACY_VERSION:
        raise ValueError("torch.save did not write it")
    if not next_object()["little_endian"]:
        raise ValueError("its numbers are not little-endian")
    whole = next_object()
    for key in next_object():
        numbers, item = found.pop(key)
        if struct.unpack("<q", content.read(8))[0] * item != len(numbers):
            raise ValueError("a storage has two sizes")
        if len(numbers) > len(content) - content.tell():
            raise EOFError("it ends too early")
        numbers[:] = content.read(len(numbers))
    if found:
        raise EOFError(f"{len(found)} tensors are missing")
    return whole


def _item_size(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype).element_size()


def _numbers(content: bytearray, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)


# What a pickle may call, with what arguments


class _Storage:
    """Stands for a class of ``torch.FloatStorage``'s kind."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _tensor(
    storage: Tensor, offset: int, size: Tuple, stride: Tuple, *rest: Any
) -> Tensor:  # rest: requires_grad, hooks, and the flags of complex numbers
    numbers = (offset, *size, *stride)
    if not isinstance(storage, Tensor) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError("a tensor whose shape is malformed")
    if len(size) > _MOST_DIMENSIONS or math.prod(size) > storage.numel() or any(rest[2:]):
        raise ValueError("a tensor claims more numbers than its storage has")
    return storage.as_strided(size, stride, offset)


def _parameter(data: Tensor, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise ValueError("a parameter that is not a tensor")
    return data


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 pickles bytes for Python 2."""
    if encoding != "latin1":
        raise ValueError(f"text is to be encoded as {encoding!r}"[:100])
    return text.encode("latin1")


def _dtype(name: str, align: Any = False, copy: Any = True) -> np.dtype:
    if not re.fullmatch(r"[<>=|]?(b1|[iu][1248]|f[248])", name):
        raise ValueError(f"an array of {name!r}"[:100])
    return np.dtype(name, False, True)  # type: ignore[call-overload]


def _scalar(dtype: np.dtype, content: bytes) -> Any:
    (value,) = np.frombuffer(content, _checked(dtype))
    return value


def _array(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An empty array, which is filled by ``_fill``."""
    if kind is not np.ndarray or shape != (0,):
        raise ValueError("an array that is not empty when it is made")
    return np.ndarray((0,), np.int8)


def _fill(array: np.ndarray, state: Tuple) -> None:
    _, shape, dtype, _, content = state
    if type(content) is not bytes or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError("an array that holds something other than numbers")
    if math.prod(shape) * _checked(dtype).itemsize != len(content):
        raise ValueError(f"an array claims {math.prod(shape)} numbers")
    array.__setstate__(state)


def _checked(dtype: Any) -> np.dtype:
    if not isinstance(dtype, np.dtype) or dtype.hasobject or dtype.names is not None:
        raise ValueError("an array that holds something other than numbers")
    return dtype


def _ordered(pairs: Any = ()) -> OrderedDict:
    return OrderedDict((_key(key), value) for key, value in pairs)


def _default(factory: Any = None) -> defaultdict:
    return defaultdict(factory)


def _set(items: List) -> Set:
    return set(map(_key, items))


def _size(sizes: Any) -> torch.Size:
    return torch.Size(sizes)


def _device(*what: Any) -> torch.device:
    return torch.device(*what)


def _key(key: Any) -> Any:
    """What a dictionary's key or a set's member may be: nothing whose hash takes long."""
    for part in key if type(key) is tuple else (key,):
        if part is not None and not isinstance(part, (str, bytes, int, float, np.generic)):
            raise ValueError(f"a key of the type {type(part).__name__}")
    return key


_DTYPES = {
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Float": torch.float32,
    "Double": torch.float64,
    "Bool": torch.bool,
    "Byte": torch.uint8,
    "Char": torch.int8,
    "Short": torch.int16,
    "Int": torch.int32,
    "Long": torch.int64,
}
# What stands here for what a pickle names
_STAND_INS: Dict[Tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("_codecs", "encode"): _encode,
    **{("torch", str(dtype)[len("torch.") :]): dtype for dtype in _DTYPES.values()},
    **{
        (module, kind + "Storage"): _Storage(dtype)
        for kind, dtype in _DTYPES.items()
        for module in ("torch", "torch.cuda")
    },
    **{
        (module + ".multiarray", name): function
        for module in ("numpy.core", "numpy._core")
        for name, function in (("_reconstruct", _array), ("scalar", _scalar))
    },
}
# Classes by what makes their instances
_MAKERS: Dict[Any, Callable] = {
    OrderedDict: _ordered,
    defaultdict: _default,
    set: _set,
    np.dtype: _dtype,
    torch.Size: _size,
    torch.device: _device,
}
_FUNCTIONS = (_tensor, _parameter, _encode, _array, _scalar)


class _Instructions(Dict[int, Any]):
    def __missing__(self, code: int) -> Any:
        raise pickle.UnpicklingError(f"the instruction {code:#04x}, which no checkpoint contains")


_USED = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 BINSTRING SHORT_BINSTRING
EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
EMPTY_SET ADDITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET"""


# in Python: the one in C makes room for as many objects as any number in the file says
class _Machine(pickle._Unpickler):  # type: ignore[name-defined]
    """Runs a pickle.

    Args:
        file: where it begins.
        storage: gives a storage's numbers, by its key, dtype and size in bytes.
    """

    stack: List[Any]
    pop_mark: Callable[[], List[Any]]
    append: Callable[[Any], None]
    dispatch = _Instructions(
        (getattr(pickle, name)[0], pickle._Unpickler.dispatch[getattr(pickle, name)[0]])  # type: ignore[attr-defined]
        for name in _USED.split()
    )

    def __init__(self, file: Any, storage: Callable[[str, torch.dtype, int], Tensor]) -> None:
        super().__init__(_Limited(file), encoding="utf-8")
        self._storage = storage
        self._classes: Set[Any] = set()  # of objects that are no more than their attributes

    def find_class(self, module: str, name: str) -> Any:
        # torch pickles with protocol 2, which uses Python 2's names
        module, name = NAME_MAPPING.get((module, name), (module, name))
        module = IMPORT_MAPPING.get(module, module)
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if (module, name) not in FAIRSEQ_GLOBALS:
            raise ForbiddenGlobal(f"{module}.{name}")
        found = getattr(importlib.import_module(_local_module(module)), name)
        if (module, name) in _OBJECTS:
            self._classes.add(found)
        return found

    def persistent_load(self, identifier: Any) -> Tensor:
        what, kind, key, _, count, *view = identifier
        if what != "storage" or not isinstance(kind, _Storage) or view not in ([], [None]):
            raise ValueError("a malformed storage")
        if type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("a malformed storage")
        return self._storage(key, kind.dtype, count * _item_size(kind.dtype))

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(arguments) is not tuple:
            raise ValueError("a call without arguments")
        if getattr(function, "__name__", None) == "MetersDict":
            function = _ordered  # it sorts itself by what its members say
        known = any(function is one for one in _FUNCTIONS)
        call = function if known else _MAKERS.get(function)
        if call is None:
            raise ForbiddenGlobal(f"a call of {getattr(function, '__name__', 'something')}")
        self.append(call(*arguments))

    def load_newobj(self) -> None:
        arguments = self.stack.pop()
        kind = self.stack.pop()
        if kind not in self._classes or arguments != ():
            raise ForbiddenGlobal(f"an instance of {getattr(kind, '__name__', 'something')}")
        self.append(kind.__new__(kind))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is np.ndarray:
            _fill(target, state)
        elif isinstance(target, np.dtype):
            if state[:1] + state[2:] != (3, None, None, None, -1, -1, 0):
                raise ValueError("an array that holds something other than numbers")
            target.__setstate__(state)  # type: ignore[attr-defined]
        elif type(target) is OrderedDict or type(target) in self._classes:
            if type(state) is not dict or not all(type(key) is str for key in state):
                raise ValueError("malformed attributes")
            # omegaconf's classes complete what an earlier version has written
            restore = getattr(target, "__setstate__", target.__dict__.update)
            restore(state)
        else:
            raise ForbiddenGlobal(f"a change of {type(target).__name__}")

    def load_append(self) -> None:
        item = self.stack.pop()
        _kind(self.stack[-1], list).append(item)

    def load_appends(self) -> None:
        items = self.pop_mark()
        _kind(self.stack[-1], list).extend(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _kind(self.stack[-1], dict)[_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = _kind(self.stack[-1], dict)
        for i in range(0, len(items), 2):
            target[_key(items[i])] = items[i + 1]

    def load_additems(self) -> None:
        items = self.pop_mark()
        _kind(self.stack[-1], set).update(map(_key, items))

    dispatch.update(
        {
            pickle.REDUCE[0]: load_reduce,
            pickle.NEWOBJ[0]: load_newobj,
            pickle.BUILD[0]: load_build,
            pickle.APPEND[0]: load_append,
            pickle.APPENDS[0]: load_appends,
            pickle.SETITEM[0]: load_setitem,
            pickle.SETITEMS[0]: load_setitems,
            pickle.ADDITEMS[0]: load_additems,
        }
    )


def _kind(target: Any, kind: Any) -> Any:
    if not isinstance(target, kind):
        raise ValueError(f"items for a {type(target).__name__}")
    return target


class _Limited:
    """The beginning of a file: as much as a pickle may have."""

    def __init__(self, file: Any) -> None:
        self._file, self._left = file, _LARGEST_PICKLE

    def read(self, size: int) -> bytes:
        content = self._take(self._file.read(min(size, self._left + 1)))
        if len(content) < size:
            raise EOFError("its pickle ends too early")
        return content

    def readline(self) -> bytes:
        return self._take(self._file.readline())

    def _take(self, content: bytes) -> bytes:
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"its pickle has more than {_LARGEST_PICKLE} bytes")
        return content
