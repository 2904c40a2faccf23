"""A stranger's checkpoints: they execute code, claim any size, or are no checkpoints at all.

Written when they are needed. The code in them makes a folder and does nothing else, so a test can
tell whether it ran.
"""

import argparse
import copy
import copyreg
import io
import os
import pickle
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import torch

EXTENSION = 0x70  # what copyreg might know os.mkdir by
BIG = 10**12


def state(**more: Any) -> Dict[str, Any]:
    """A small checkpoint as fairseq writes it."""
    return {
        "args": None,
        "cfg": {
            "model": argparse.Namespace(arch="transformer", _name="transformer", encoder_layers=1),
            "task": {"_name": "translation", "data": "bin", "source_lang": "aa"},
        },
        "model": OrderedDict(weight=torch.arange(6.0).view(2, 3), version=torch.tensor([3])),
        "optimizer_history": [{"num_updates": 7}],
        "extra_state": {"best": np.float64(4.25), "counts": np.array([1, 2, 3])},
        "task_state": {"source_symbols": ["<s>", "a"], "target_symbols": ["<s>", "b"]},
        "last_optimizer_state": {"state": {0: {"step": 1, "exp_avg": torch.zeros(3)}}},
        **more,
    }


class Mkdir:
    """Unpickles into a call that makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


# Parts of pickles: programs that leave one object behind


def text(value: Any) -> bytes:
    content = str(value).encode("utf-8", "surrogatepass")
    return pickle.BINUNICODE + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    content = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(content)]) + content


def named(module: str, attribute: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()


def several(*parts: bytes) -> bytes:
    return pickle.MARK + b"".join(parts) + pickle.TUPLE


def numbers(*values: int) -> bytes:
    return several(*map(number, values))


def listed(*parts: bytes) -> bytes:
    return pickle.EMPTY_LIST + pickle.MARK + b"".join(parts) + pickle.APPENDS


def pairs(parts: Dict[str, bytes]) -> bytes:
    inner = b"".join(text(key) + value for key, value in parts.items())
    return pickle.EMPTY_DICT + pickle.MARK + inner + pickle.SETITEMS


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + several(*arguments) + pickle.REDUCE


def doubled(times: int, first: bytes) -> bytes:
    """A tuple that holds the one before twice, and so on."""
    step = pickle.BINPUT + b"\1" + pickle.BINGET + b"\1" + pickle.TUPLE2
    return first + step * times


def tensor(
    count: int, size: bytes, stride: bytes, offset: bytes = number(0), key: str = "0"
) -> bytes:
    """A tensor of a storage that is said to have so many float32."""
    storage = several(
        text("storage"), named("torch", "FloatStorage"), text(key), text("cpu"), number(count)
    )
    hooks = call(named("collections", "OrderedDict"))
    rebuild = named("torch._utils", "_rebuild_tensor_v2")
    return call(rebuild, storage + pickle.BINPERSID, offset, size, stride, pickle.NEWFALSE, hooks)


def program(*parts: bytes) -> bytes:
    return pickle.PROTO + b"\2" + b"".join(parts) + pickle.STOP


WEIGHT = tensor(6, numbers(2, 3), numbers(3, 1))


def checkpoint(**parts: bytes) -> bytes:
    """A program that leaves a checkpoint, some of its parts given."""
    model = pairs({"weight": WEIGHT})
    usual = {"model": model, "args": pickle.NONE, "cfg": configuration()}
    return program(pairs({**usual, **parts}))


def configuration(task: Any = (), **model: bytes) -> bytes:
    model = {"arch": text("transformer"), **model}
    return pairs({"model": pairs(model), "task": pairs({"data": pickle.NONE, **dict(task)})})


# Files around pickles


def saved(content: Any, zipped: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def zipped(data: bytes, more: Any = (), how: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file of torch.save's kind, with a storage of six float32 and more entries."""
    usual = {"archive/version": b"3\n", "archive/data/0": bytes(24)}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr("archive/data.pkl", data)
        for entry, content in {**usual, **dict(more)}.items():
            archive.writestr(entry, content)
    return file.getvalue()


def aliased(data: bytes, name: str, times: int) -> bytes:
    """A zip file whose directory has an entry several times."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/data/0", bytes(24))
        archive.writestr("archive/data/1", bytes(1 << 20))
        for i in range(times):
            again = copy.copy(archive.getinfo("archive/data/1"))
            again.filename = name.format(i)
            archive.filelist.append(again)
    return file.getvalue()


def legacy(data: bytes, storages: bytes = b"", keys: Any = (), about: Any = None) -> bytes:
    """A file of torch before 1.6."""
    parts = [0x1950A86A20F9469CFC6C, 1001, about or {"little_endian": True}]
    head = b"".join(pickle.dumps(part, 2) for part in parts)
    return head + data + pickle.dumps(list(keys), 2) + storages


def tarred(data: bytes) -> bytes:
    """A file of torch before 0.2."""
    file = io.BytesIO()
    nothing = pickle.dumps(0, 2)
    with tarfile.open(fileobj=file, mode="w") as archive:
        for entry, content in (
            ("storages", nothing + pickle.dumps([], 2)),
            ("tensors", nothing),
            ("pickle", data),
        ):
            about = tarfile.TarInfo(entry)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return file.getvalue()


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


# The corpus


def extension_known() -> None:
    """As if something in this process had registered what some of the files ask for."""
    if ("posix", "mkdir") not in copyreg._extension_registry:  # type: ignore[attr-defined]
        copyreg.add_extension("posix", "mkdir", EXTENSION)


def pieces_of_code(marker: Path) -> List[bytes]:
    """Parts of pickles that make a folder when Python's own pickle runs them."""
    return list(_code(marker).values())


def _code(marker: Path) -> Dict[str, bytes]:
    path, mkdir = text(marker), named("posix", "mkdir")
    partial, nothing = named("functools", "partial"), pickle.EMPTY_TUPLE
    made = partial + several(named("builtins", "int")) + pickle.NEWOBJ
    changed = made + several(mkdir, several(path), pickle.EMPTY_DICT, pickle.NONE) + pickle.BUILD
    expression = f"__import__('os').mkdir({str(marker)!r})"
    return {
        "reduce": call(mkdir, path),
        "eval": call(named("__builtin__", "eval"), text(expression)),
        "build": changed + nothing + pickle.REDUCE,
        "newobj": partial + several(mkdir, path) + pickle.NEWOBJ + nothing + pickle.REDUCE,
        "inst": pickle.MARK + path + pickle.INST + b"posix\nmkdir\n",
        "obj": pickle.MARK + mkdir + path + pickle.OBJ,
        "extension of one byte": call(pickle.EXT1 + struct.pack("<B", EXTENSION), path),
        "extension of two bytes": call(pickle.EXT2 + struct.pack("<H", EXTENSION), path),
        "extension of four bytes": call(pickle.EXT4 + struct.pack("<i", EXTENSION), path),
        "stack global": call(text("posix") + text("mkdir") + pickle.STACK_GLOBAL, path),
        "persistent id": call(mkdir, path) + pickle.BINPERSID,
        "key": pickle.EMPTY_DICT + call(mkdir, path) + pickle.NONE + pickle.SETITEM,
    }


def executing(marker: Path) -> Dict[str, bytes]:
    """Files that make a folder when torch opens them with Python's own pickle."""
    evil = Mkdir(marker)
    states = {
        "everything": evil,
        "nested": state(hidden=[{"deep": (evil,)}]),
        "in the optimizer state": state(last_optimizer_state={"state": evil}),
        "in the arguments": state(args=argparse.Namespace(arch="lstm", seed=evil)),
    }
    plain = program(_code(marker)["reduce"])
    return {
        **{"zip, " + how: zipped(checkpoint(x=code)) for how, code in _code(marker).items()},
        **{"zip, " + where: saved(content) for where, content in states.items()},
        **{"legacy, " + where: saved(content, False) for where, content in states.items()},
        "zip, compressed": zipped(plain, how=zipfile.ZIP_DEFLATED),
        "zip, entries outside": zipped(plain, {"archive/../../../outside": b"x"}),
        "legacy, about the system": legacy(checkpoint(), about=evil),
        "legacy, keys": legacy(program(pickle.EMPTY_DICT), keys=[evil]),
        "tar": tarred(plain),
        "pickle": plain,
        "pickle, protocol 0": pickle.dumps(evil, 0),
        "pickle, protocol 4": pickle.dumps(evil, 4),
    }


def lying() -> Dict[str, bytes]:
    """Files that claim any size, or hold something that no checkpoint holds."""
    found = {"zip, " + what: zipped(checkpoint(x=part)) for what, part in _objects().items()}
    found.update(
        ("zip, " + what, zipped(checkpoint(model=pairs({"weight": WEIGHT, "a": part}))))
        for what, part in _tensors().items()
    )
    found.update(("zip, " + what, zipped(checkpoint(**parts))) for what, parts in _parts().items())
    return {**found, **_containers()}


def _tensors() -> Dict[str, bytes]:
    one = numbers(1)
    return {
        "10^12 numbers": tensor(BIG, numbers(BIG), one),
        "one number more than there are": tensor(7, numbers(7), one),
        "a storage that is not there": tensor(6, numbers(6), one, key="1"),
        "a storage outside": tensor(6, numbers(6), one, key="../data.pkl"),
        "one number expanded to 10^12": tensor(6, numbers(BIG), numbers(0)),
        "rows that overlap": tensor(6, numbers(5, 2), numbers(1, 1)),
        "beyond the storage": tensor(6, numbers(2), one, number(5)),
        "before the storage": tensor(6, numbers(2), one, number(-1)),
        "negative sizes": tensor(6, numbers(-1, -6), numbers(1, 1)),
        "negative strides": tensor(6, numbers(2), numbers(-1), number(5)),
        "a thousand dimensions": tensor(6, numbers(*[1] * 1000), numbers(*[1] * 1000)),
        "a size of 2^70": tensor(6, numbers(0, 2**70), numbers(1, 1)),
        "a tensor of text": text("weight"),
    }


def _objects() -> Dict[str, bytes]:
    eight = pickle.SHORT_BINBYTES + b"\x08" + bytes(8)
    multiarray = "numpy.core.multiarray"

    def dtype(code: str) -> bytes:
        return call(named("numpy", "dtype"), text(code), pickle.NEWFALSE, pickle.NEWTRUE)

    def array(size: bytes, kind: bytes) -> bytes:
        empty = call(
            *(named(multiarray, "_reconstruct"), named("numpy", "ndarray")),
            *(numbers(0), pickle.SHORT_BINBYTES + b"\1b"),
        )
        return empty + several(number(1), size, kind, pickle.NEWFALSE, eight) + pickle.BUILD

    hexadecimal = text("ha")
    for _ in range(60):
        hexadecimal = call(named("_codecs", "encode"), hexadecimal, text("hex"))
    members = pickle.MARK + doubled(64, pickle.EMPTY_TUPLE)
    attributes = several(pickle.NONE, pairs({"__eq__": pickle.NONE}))
    return {
        "text of 2^62 bytes": pickle.BINUNICODE8 + struct.pack("<Q", 1 << 62),
        "2^31 bytes": pickle.BINBYTES + struct.pack("<I", 1 << 31),
        "an array of 2^35 bytes": b"\x96" + struct.pack("<Q", 1 << 35),
        "a number of 2^30 bytes": pickle.LONG4 + struct.pack("<i", 1 << 30),
        "a frame of 2^62 bytes": pickle.FRAME + struct.pack("<Q", 1 << 62) + pickle.NONE,
        "the object number 2^31": pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 1 << 31),
        "an object that is not there": pickle.BINGET + b"\x77",
        "text that doubles": hexadecimal,
        "text of what doubles": call(named("builtins", "str"), doubled(64, text("ha"))),
        "a key that doubles": pickle.EMPTY_DICT + members[1:] + pickle.NONE + pickle.SETITEM,
        "a member that doubles": pickle.EMPTY_SET + members + pickle.ADDITEMS,
        "an array of 10^12 numbers": array(numbers(BIG), dtype("f8")),
        "an array of objects": array(numbers(1), dtype("O")),
        "a pointer": call(named(multiarray, "scalar"), dtype("O"), eight),
        "a number of 10^9 bytes": call(named(multiarray, "scalar"), dtype("V1000000000"), eight),
        "an array made by its class": call(named("numpy", "ndarray"), numbers(BIG)),
        "a class that is changed": named("argparse", "Namespace") + attributes + pickle.BUILD,
        "items for a number": number(1) + pickle.MARK + pickle.NONE * 2 + pickle.SETITEMS,
        "an id that is no tuple": text("0") + pickle.BINPERSID,
        "an id of something else": several(text("module"), *[text("x")] * 4) + pickle.BINPERSID,
    }


def _parts() -> Dict[str, Dict[str, bytes]]:
    """Programs of whole checkpoints, by what they have in which part."""
    itself = pickle.EMPTY_DICT + pickle.BINPUT + b"\2" + text("x") + pickle.BINGET + b"\2"
    models: Dict[str, Dict[str, bytes]] = {
        "a configuration that doubles": {"x": doubled(64, text("ha"))},
        "a configuration in itself": {"x": itself + pickle.SETITEM},
        "a deep configuration": {"x": pickle.EMPTY_LIST * 1000 + pickle.APPEND * 999},
        "references that double": {"x": text("${y}${y}")},
        "an architecture that is a list": {"arch": pickle.EMPTY_LIST},
        "an architecture without a name": {"arch": text("")},
        "10^9 layers": {"encoder_layers": number(10**9)},
        "positions of text": {"max_source_positions": text("x")},
    }
    tasks: Dict[str, Dict[str, bytes]] = {
        "the environment": {"data": text("${env:HOME}")},
        "a language outside": {"source_lang": text("../../x")},
        "a language that is a list": {"source_lang": pickle.EMPTY_LIST},
        "data that is a number": {"data": number(1)},
    }
    symbols = {
        "a symbol that is a number": number(1),
        "a symbol of two lines": text("a\nb"),
        "a symbol of half a character": text("\ud800"),
    }
    one = listed(text("a"))
    items = pairs({"items": pickle.NONE}) + pickle.BUILD
    return {
        **{what: {"cfg": configuration(**model)} for what, model in models.items()},
        **{what: {"cfg": configuration(task)} for what, task in tasks.items()},
        "a configuration of text": {"cfg": pairs({"model": text("x"), "task": pickle.EMPTY_DICT})},
        **{
            w: {"task_state": pairs({"source_symbols": listed(s), "target_symbols": one})}
            for w, s in symbols.items()
        },
        "no model in the configuration": {"cfg": pairs({"task": pickle.EMPTY_DICT})},
        "arguments of text": {"args": text("args")},
        "updates of text": {"optimizer_history": listed(pairs({"num_updates": text("x")}))},
        "a history of text": {"optimizer_history": text("x")},
        "no weights": {"model": pickle.EMPTY_DICT},
        "weights of text": {"model": text("x")},
        "a method replaced": {"model": call(named("collections", "OrderedDict")) + items},
        "a weight that has no name": {"model": b"}" + number(1) + WEIGHT + pickle.SETITEM},
    }


def _containers() -> Dict[str, bytes]:
    large = 1 << 18
    views = {str(i): tensor(large, numbers(large), numbers(1), key="1") for i in range(99)}
    huge = tensor(BIG, numbers(BIG), numbers(1))
    whole, old = saved(state()), saved(state(), zipped=False)
    compressed, six = zipfile.ZIP_DEFLATED, struct.pack("<q", 6)
    return {
        "zip, many views of one storage": zipped(
            checkpoint(model=pairs(views)), {"archive/data/1": bytes(4 * large)}
        ),
        "zip, big-endian": zipped(checkpoint(), {"archive/byteorder": b"big"}),
        "zip, a bomb": zipped(program(pickle.NONE * (1 << 28)), how=compressed),
        "zip, a bomb beside": zipped(checkpoint(), {"archive/data/1": bytes(1 << 28)}, compressed),
        "zip, entries that share their bytes": aliased(checkpoint(), "archive/data/a{}", 1000),
        "zip, an entry twice": aliased(checkpoint(), "archive/data.pkl", 1),
        "zip, two pickles": zipped(checkpoint(), {"more/data.pkl": checkpoint()}),
        "zip, another": aliased(b"", "archive/data.pkl/x", 0).replace(b"data.pkl", b"data.txt"),
        "zip, no end of the pickle": zipped(checkpoint()[:-1]),
        "zip, a million brackets": zipped(checkpoint(x=pickle.EMPTY_LIST * 10**6)),
        "zip, nothing but a mark": zipped(program(pickle.MARK)),
        "zip, empty": b"PK\5\6" + bytes(18),
        "zip, its first bytes": b"PK\3\4",
        "zip, truncated": whole[:-30],
        "zip, a weight's bit flipped": flipped(whole, whole.index(np.float32(5).tobytes())),
        "legacy, 10^12 numbers": legacy(
            checkpoint(model=pairs({"weight": huge})), struct.pack("<q", BIG), ["0"]
        ),
        "legacy, two sizes": legacy(checkpoint(), struct.pack("<q", 5) + bytes(24), ["0"]),
        "legacy, too short": legacy(checkpoint(), six + bytes(20), ["0"]),
        "legacy, a storage too few": legacy(checkpoint()),
        "legacy, a storage too many": legacy(checkpoint(), six + bytes(24), ["0", "1"]),
        "legacy, big-endian": legacy(checkpoint(), about={"little_endian": False}),
        "legacy, truncated": old[:-30],
        "nothing": b"",
        "text": b"no checkpoint at all",
        "zeros": bytes(1000),
    }


def configured(whole: Dict[str, Any], **options: Any) -> Dict[str, Any]:
    """A checkpoint with other options of its model."""
    changed = copy.deepcopy(whole)
    vars(changed["cfg"]["model"]).update(options)
    return changed


def built(marker: Path) -> Dict[str, Dict[str, Any]]:
    """Options of a model that make a folder when stock fairseq builds it."""
    code = f"[__import__('os').mkdir({str(marker)!r})]"
    return {
        "transformer": {"adaptive_softmax_cutoff": code},
        "transformer_align": {"encoder": {"xformers_att_config": code}},
        "fconv": {"encoder_layers": code},
        "lstm": {"decoder_attention": code},
        "wav2vec2": {"conv_feature_layers": code},
    }
