"""Readers of files, given what chance makes of good ones.

Each opens a changed file, or says in a sentence that names it what is wrong: always its own error.
No file makes it run anything or take much memory. Seeded, so that a failure can be had again.
"""

import gzip
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, List, NamedTuple

import hostile
import numpy as np
import pytest
import torch
from folders import (
    BATCHES,
    HEADER,
    LENGTHS,
    begin_cache,
    begin_hypotheses,
    begun_cache,
    begun_hypotheses,
    finish_cache,
    finish_hypotheses,
    hypotheses,
    targets,
)
from subwords import train

from kd_plugin.cache import CachedSubset, layout
from kd_plugin.cache.writer import CacheWriter
from kd_plugin.checkpoints import Checkpoint, Role
from kd_plugin.checkpoints import dictionaries as vocabulary
from kd_plugin.decoding import Converted, vocabularies
from kd_plugin.export.ctranslate2 import read_record
from kd_plugin.files import FileError
from kd_plugin.report.curves import read_curves
from kd_plugin.report.measured import Measured
from kd_plugin.sequences import Output, dropped, exchange, inspect
from kd_plugin.sequences.exchange.formats import FORMATS, recognise
from kd_plugin.vocabulary import SubwordModel
from kd_plugin.vocabulary import read_record as read_record_of_vocabulary

ALLOWED = 400 << 20  # bytes beyond what the process had
SHARE = 200  # of the long form's inputs that the short one tries
ACTS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "socket.connect")


# what chance does


def any_bytes(rng: random.Random, content: bytes, pieces: List[bytes]) -> bytes:
    """Some stretches changed, left out, repeated or put in."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at = rng.randrange(len(content) + 1)
        to = min(len(content), at + rng.choice([1, 1, 2, 4, 8, 30]))
        huge = rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
        number = struct.pack("<Q", huge)[: rng.choice([1, 2, 4, 8])]
        if at < to and rng.random() < 0.2:
            number = bytes([content[at] ^ 1 << rng.randrange(8)])
        middle, end = rng.choice(
            [
                (number, at + len(number)),
                (bytes([rng.randrange(256)]), to),
                (rng.choice(pieces), at),
                (rng.choice(pieces), to),
                (b"", to),
                (content[at:to] * rng.choice([2, 2, 50]), to),
                (b"", len(content) if rng.random() < 0.3 else to),
            ]
        )
        content = content[:at] + middle + content[end:]
    return content


ODD = [None, True, -1, 0, 0.5, 1e308, 10**400, 2**63, "", "x", "\0", "\ud800", "../x", "/dev/zero",
    "\x1b[2J", [], {}, [[]], [0], {"x": 1}, math.nan, math.inf]  # fmt: skip


def any_value(rng: random.Random, value: Any) -> Any:
    """A JSON value with another one somewhere in it, or without a part."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(ODD)
    changed = value.copy()
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.15:
        del changed[key]
    else:
        changed[key] = any_value(rng, value[key])
    return changed


def any_json(rng: random.Random, path: Path) -> None:
    content = json.dumps(any_value(rng, json.loads(path.read_text())))
    path.write_text(content if rng.random() < 0.9 else "[" * 10**5)


def change_bytes(rng: random.Random, path: Path) -> None:
    path.write_bytes(any_bytes(rng, path.read_bytes(), [b"\n", b'"', b"[", b"\xff", b"\0" * 64]))


# what is read


class Reader(NamedTuple):
    """A good folder, how it is changed, and how it is opened.

    Attributes:
        name: in the counts.
        inputs: how many the long form tries.
        make: writes the good folder.
        change: changes it.
        look: opens it, and looks at all of it.
    """

    name: str
    inputs: int
    make: Callable[[Path], Any]
    change: Callable[[random.Random, Path], Any]
    look: Callable[[Path], Any]


def checkpoint_reader(name: str, inputs: int, good: bytes, pack: Any, exact: bool) -> Reader:
    """Args:
    good: what is changed; ``pack`` makes a file of it.
    exact: whether a file that can be opened holds what it held.
    """
    code = hostile.pieces_of_code(Path("executed"))
    opcodes = [bytes([value]) for value in range(256)]
    pieces = [*opcodes, *code, *(good[at : at + 9] for at in range(0, len(good), 9))]

    def change(rng: random.Random, folder: Path) -> None:
        (folder / "c.pt").write_bytes(pack(any_bytes(rng, good, pieces)))

    def look(folder: Path) -> None:
        found = Checkpoint.open(str(folder / "c.pt"), Role("model"))
        assert all(isinstance(weight, torch.Tensor) for weight in found.weights.values())
        if exact:
            assert torch.equal(found.weights["weight"], hostile.state()["model"]["weight"])
            symbols = hostile.state()["task_state"]
            assert found.symbols == (symbols["source_symbols"], symbols["target_symbols"])

    return Reader(
        name, inputs, lambda folder: (folder / "c.pt").write_bytes(pack(good)), change, look
    )


def checkpoint_readers() -> List[Reader]:
    whole, old = (hostile.saved(hostile.state(), zipped) for zipped in (True, False))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in entries if name.endswith("data.pkl")]

    def pack(data: bytes) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in {**entries, pickled: data}.items():
                archive.writestr(name, content)
        return file.getvalue()

    return [
        checkpoint_reader("checkpoints, their pickle", 40000, entries[pickled], pack, False),
        checkpoint_reader("checkpoints, zip files", 10000, whole, bytes, True),
        checkpoint_reader("checkpoints, legacy files", 20000, old, bytes, False),
    ]


def change_cache(rng: random.Random, folder: Path) -> None:
    """As an attacker would, who knows how to write checksums."""
    path = folder / "train" / "manifest.json"
    if rng.random() < 0.3:
        array = rng.choice(sorted(path.parent.glob("*.bin")))
        content = array.read_bytes()
        at = rng.randrange(len(content))
        array.write_bytes(content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :])
    manifest = json.loads(path.read_text())
    arrays = [p for p in path.parent.glob("*.bin") if p.stem != layout.BLOCKS]
    manifest["checksums"] = {p.stem: layout.checksum(p) for p in arrays}
    blocks = [  # each file is smaller than a block
        zlib.crc32((path.parent / f"{name}.bin").read_bytes())
        for name in layout.arrays(9, 2, [2.0])
        if (path.parent / f"{name}.bin").is_file()
    ]
    if rng.random() < 0.9:
        np.array(blocks, dtype="<u4").tofile(str(path.parent / f"{layout.BLOCKS}.bin"))
    if rng.random() < 0.8:
        manifest = any_value(rng, manifest)
    if isinstance(manifest, dict):
        manifest.pop("checksum", None)
        layout.write_manifest(path.parent, manifest)
    if rng.random() < 0.1:
        change_bytes(rng, path)


def look_at_cache(folder: Path) -> None:
    cache = CachedSubset(str(folder), "train", lambda whole: HEADER)
    for i in range(len(cache)):
        rows = cache.rows(i)
        assert len(rows["reference"]) == cache.lengths()[i] and (rows["symbols"] < 9).all()
    CacheWriter(str(folder), HEADER, LENGTHS, BATCHES, targets=targets).manifest()


def change_begun_cache(rng: random.Random, folder: Path) -> None:
    partial = folder / "train" / "partial"
    if rng.random() < 0.7:
        any_json(rng, partial / "header.json")
    else:
        change_bytes(rng, rng.choice(sorted(partial.glob("shard*/*.bin"))))


def change_hypotheses(rng: random.Random, folder: Path) -> None:
    path = folder / "hypotheses.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    at = rng.randrange(len(lines))
    if rng.random() < 0.6:
        changed = json.dumps(any_value(rng, json.loads(lines[at])))
        lines[at] = (changed if rng.random() < 0.95 else "[" * 10**5).encode() + b"\n"
    else:
        lines[at] = any_bytes(rng, lines[at], [b"\n", b'"', b"{", b"\\ud800", b"\xff", b"1e999"])
    path.write_bytes(b"".join(lines))


def look_at_hypotheses(folder: Path) -> None:
    for sentence, nbest in hypotheses(folder):
        assert sentence >= 0 and nbest
        for one in nbest:
            assert "\n" not in one.subwords and one.subwords.encode("utf-8") is not None
            assert isinstance(one.score, float) and isinstance(one.finished, bool)


def change_plan(rng: random.Random, folder: Path) -> None:
    path = folder / "plan.npz"
    if rng.random() < 0.5:
        return change_bytes(rng, path)
    odd = [-1, 3, 4, 0.5, math.nan, 1 << 40]
    arrays = {
        name: np.array([rng.choice(odd) if rng.random() < 0.3 else n for n in values])
        for name, values in (("sentences", [3, 1, 0, 2, 4]), ("lengths", [2, 3]))
    }
    np.savez(str(path), **arrays)


def look_at_plan(folder: Path) -> None:
    store = begin_hypotheses(folder)
    ids = np.concatenate([np.zeros(0, np.int64), *store.batches])
    assert (ids >= 0).all() and len(set(ids.tolist())) == len(ids)
    assert 0 <= store.done <= len(store.batches)
    store.close()


RECORD = {
    "settings": {"select": "best"},
    "counts": {"sentences": 3, "dropped": {"empty": 1}, "distilled": 2, "original": 0,
        "source_tokens": 9, "target_tokens": 9, "unknown_tokens": 0},
    "means": {"score_per_token": -0.3, "closeness": None},
    "files": ["train.bin"],
}  # fmt: skip


def look_at_record(folder: Path) -> None:
    output = Output(str(folder), {"select": "best"})
    output.differences()
    output.contents()


INSPECTED = {
    **RECORD,
    "mix": {"order": "in-order", "parts": [{"name": "a", "weight": 1.0, "sentences": 2,
        "written": 0, "pairs": "12"}]},
    "files": ["dict.a.txt", "dict.b.txt", "train.a-b.a.idx"],
}  # fmt: skip
DROPPED = "3\tempty\ta b\t\t-0.5\n"


def write_inspected(folder: Path) -> None:
    (folder / "text").mkdir()
    (folder / "record.json").write_text(json.dumps(INSPECTED))
    for name in ("train.a", "train.b", "train.subwords.a", "train.subwords.b"):
        (folder / "text" / name).write_text("a b\nc\n")
    (folder / "text" / "dropped.tsv").write_text(DROPPED)
    assert "2 random pairs" in str(inspect(str(folder)))


def change_inspected(rng: random.Random, folder: Path) -> None:
    if rng.random() < 0.7:
        any_json(rng, folder / "record.json")
    else:
        change_bytes(rng, folder / "text" / rng.choice(["train.a", "dropped.tsv"]))


def look_at_dropped(path: Path) -> None:
    for one in dropped.read(path):
        assert isinstance(one.sentence, int) and one.line().count("\n") == 1


MEASURED = {
    "settings": {"beam": 1},
    "about": {"parameters": 1, "parameters_without_embeddings": None, "bytes": 5, "file_bytes": 6,
        "precision": "int8"},
    "said": {"1": ["a", None]},
    "tokens": {"1": 2},
    "seconds": {"1": [0.5]},
    "memory": 5,
    "runs": ["r"],
}  # fmt: skip
LOG = (
    '{"epoch": 1, "nll_loss": "6.1", "num_updates": "5"}\n'
    "epoch 001 | valid on 'valid' subset | nll_loss 6.16 | num_updates 7\n"
)


def look_at_converted(folder: Path) -> None:
    record, symbols = read_record(folder), vocabularies(folder)
    assert isinstance(record.get("parameters", 1), (int, type(None))) and len(symbols) == 2
    model = Converted.open(folder)
    assert all(longest is None or longest >= 0 for longest in model.positions)
    assert model.special and all(isinstance(token, str) for token in model.special)


def converted_weights() -> bytes:
    """A file of CTranslate2's with two variables and another name for one of them."""

    def text(name: str) -> bytes:
        return struct.pack("<H", len(name) + 1) + name.encode() + b"\0"

    variables = [
        text(f"{side}/position_encodings/encodings") + struct.pack("<BIIBI", 2, 8, 2, 0, 64)
        for side in ("encoder", "decoder")
    ]
    return b"".join(
        [
            struct.pack("<I", 6) + text("TransformerSpec") + struct.pack("<II", 7, 2),
            *(variable + bytes(64) for variable in variables),
            struct.pack("<I", 1) + text("other") + text("encoder/position_encodings/encodings"),
        ]
    )


def change_converted(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    change = any_json if path.suffix == ".json" else change_bytes
    change(rng, path)


def write_converted(folder: Path) -> None:
    (folder / "kd_export.json").write_text(json.dumps({"parameters": 5, "quantization": "int8"}))
    (folder / "shared_vocabulary.json").write_text(json.dumps(["<s>", "a"]))
    (folder / "config.json").write_text(json.dumps({"eos_token": "</s>", "add_source_eos": True}))
    (folder / "model.bin").write_bytes(converted_weights())


def write_subword_models(folder: Path) -> None:
    """With a normaliser, and with bytes; small, so that chance finds all parts of them."""
    lines = ["der mann geht nach haus", "ein hund steht auf der bank"] * 9
    for kind, more in (("unigram", {}), ("bpe", {"byte_fallback": True})):
        content = train(lines, kind, 320, normalization_rule_name="identity", **more)
        (folder / f"{kind}.model").write_bytes(content)
    (folder / "normaliser.model").write_bytes(train(lines, "unigram", 320))


def change_subword_model(rng: random.Random, folder: Path) -> None:
    path = rng.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    for other in folder.iterdir():
        if other != path:
            other.unlink()
    if path.stem == "normaliser":
        changed = bytearray(content)
        for _ in range(rng.choice([1, 10, 3000])):
            changed[rng.randrange(len(changed) - 200000, len(changed) - 100)] = rng.randrange(256)
        path.write_bytes(changed)
    else:
        pieces = [b"\x0a", b"\x18\x02", *(content[at : at + 9] for at in range(0, 900, 9))]
        path.write_bytes(any_bytes(rng, content, pieces))


def look_at_subword_model(folder: Path) -> None:
    for path in folder.iterdir():
        model = SubwordModel.open(str(path), "--spm")
        model.encode("der hund ging, a\u0300 \ufb01 \u3042", str)
        keep = {piece.text for piece in model.pieces[::2]}
        cut = SubwordModel(model.cut(keep), model.name)
        assert all(piece.type not in (1, 4) or piece.text in keep for piece in cut.pieces)
        cut.encode("der hund ging, a\u0300 \ufb01 \u3042", str)


VOCABULARY = {
    "settings": {"size": 5, "text": ["0" * 64]},
    "symbols": 5,
    "teacher_symbols": 9,
    "pieces": 5,
    "teacher_pieces": 9,
    "characters_left_out": 1,
    "bytes_unknown": 0,
    "measured": {"text": {"tokens": 9, "differently": 1, "unknown_before": 0, "tokens_after": 10,
        "unknown": 1, "examples": ["x"]}},
    "files": {"dict.txt": "0" * 64},
}  # fmt: skip


def one_file(name: str, inputs: int, file: str, good: Any, look: Callable[[Path], Any]) -> Reader:
    change = any_json if file.endswith(".json") else change_bytes
    content = good if isinstance(good, str) else json.dumps(good)
    return Reader(
        name,
        inputs,
        lambda folder: (folder / file).write_text(content),
        lambda rng, folder: change(rng, folder / file),
        lambda folder: look(folder / file),
    )


TRANSLATIONS = {
    "x.txt": b"a b\n\nc\n",
    "x.tsv": b"id\tsource\ttranslation\tscore\n0\ta\tb\t-0.5\n0\ta\tc\t\n2\td\te\t-1e-3\n",
    "x.out": b"S-1\ta\nH-1\t-0.5\tb\nD-1\t-0.5\tb\nS-0\tc\nH-0\t-1\td\nD-0\t-1\td\n",
    "x.nbest": b"0 ||| a b ||| F0= -1 ||| -0.5\n0 ||| c ||| F0= 1 ||| -2\n1 ||| d ||| F= 1 ||| 0\n",
    "x.jsonl": b'{"id": 0, "source": "a", "translations": [{"text": "b", "score": -0.5}]}\n'
    b'{"src": "c", "hypotheses": ["d", "\\u00e9"], "scores": [1, null]}\n',
}


def write_translations(folder: Path) -> None:
    for name, content in TRANSLATIONS.items():
        (folder / name).write_bytes(content)
        (folder / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))


def change_translations(rng: random.Random, folder: Path) -> None:
    """One of them stays there."""
    path = folder / rng.choice(sorted(TRANSLATIONS))
    path = path if rng.random() < 0.7 else path.with_name(f"{path.name}.gz")
    pieces = [b"\t", b"\n", b" ||| ", b"9" * 5000, b"nan", b"1e999", b"\\ud800", b"\xff", b"\0"]
    content = any_bytes(rng, path.read_bytes(), pieces)
    if path.suffix == ".jsonl" and rng.random() < 0.6:
        line = json.loads(TRANSLATIONS["x.jsonl"].splitlines()[rng.randrange(2)])
        content = json.dumps(any_value(rng, line)).encode()
    for other in folder.iterdir():
        other.unlink()
    path.write_bytes(content)


def look_at_translations(folder: Path) -> None:
    for path in folder.iterdir():
        with exchange.readable_twice([str(path)]) as files:
            read = FORMATS[recognise(files[0])]
            for item in (*read(files[0], True), *read(files[0], False)):
                assert item.sentence is None or item.sentence >= 0
                for text, score in item.translations:
                    assert "\0" not in text and text.encode("utf-8") is not None
                    assert math.isfinite(score) or math.isnan(score)


def readers() -> List[Reader]:
    return [
        Reader(
            "translations made elsewhere",
            30000,
            write_translations,
            change_translations,
            look_at_translations,
        ),
        *checkpoint_readers(),
        Reader("caches", 15000, finish_cache, change_cache, look_at_cache),
        Reader("caches that were begun", 4000, begun_cache, change_begun_cache, begin_cache),
        Reader("n-best lists", 15000, finish_hypotheses, change_hypotheses, look_at_hypotheses),
        Reader(
            "n-best lists that were begun",
            4000,
            begun_hypotheses,
            change_plan,
            look_at_plan,
        ),
        one_file("records", 4000, "record.json", RECORD, lambda path: look_at_record(path.parent)),
        one_file(
            "records of vocabularies",
            4000,
            "record.json",
            VOCABULARY,
            lambda path: read_record_of_vocabulary(path.parent),
        ),
        Reader(
            "SentencePiece models",
            6000,
            write_subword_models,
            change_subword_model,
            look_at_subword_model,
        ),
        Reader(
            "finished data that are inspected",
            4000,
            write_inspected,
            change_inspected,
            lambda folder: inspect(str(folder)),
        ),
        one_file("what was dropped", 4000, "dropped.tsv", 3 * DROPPED, look_at_dropped),
        one_file("measurements", 4000, "m.json", MEASURED, lambda p: Measured(p, {"beam": 1})),
        one_file("dictionaries", 4000, "dict.txt", "a 5\nb 3\n", lambda p: vocabulary.read(str(p))),
        one_file("logs", 4000, "train.log", LOG, lambda path: read_curves(str(path))),
        Reader("CTranslate2's folders", 6000, write_converted, change_converted, look_at_converted),
    ]


READERS = readers()


def try_all(reader: Reader, inputs: int, pipe: Any) -> None:
    """In a process that may take little more memory than it has."""
    base = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="fuzz-", dir=base))
    acts = []
    try:
        good, changed = folder / "good", folder / "changed"
        good.mkdir()
        reader.make(good)
        shutil.copytree(str(good), str(changed))
        reader.look(changed)  # a good one can be opened
        os.chdir(str(folder))
        sys.addaudithook(lambda event, _: acts.append(event) if event in ACTS else None)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ALLOWED, used + ALLOWED))
        for i in range(inputs):
            shutil.rmtree(str(changed))
            shutil.copytree(str(good), str(changed))
            reader.change(random.Random(i), changed)
            try:
                reader.look(changed)
                fault = None
            except (FileError, ValueError) as error:
                own = type(error).__module__.startswith("kd_plugin.")
                fault = None if own and str(changed) in str(error) else repr(error)
                if "MemoryError" in str(error):
                    fault = repr(error)
            except Exception as error:
                fault = repr(error)
            if acts or (folder / "executed").exists():
                fault = f"it was executed: {acts}"
            if fault:
                pipe.send(f"input {i}: {fault}")
                return
        pipe.send("")
    finally:
        shutil.rmtree(str(folder), ignore_errors=True)


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_readers(reader, long, count):
    inputs = reader.inputs if long else reader.inputs // SHARE
    ours, theirs = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=try_all, args=(reader, inputs, theirs)
    )
    process.start()
    theirs.close()
    try:
        fault = ours.recv()
    except EOFError:
        process.join()
        fault = f"the process ended with {process.exitcode}"
    process.join()
    assert not fault
    count("files changed by chance, given to their readers", inputs)


def test_enough_of_them():
    assert sum(reader.inputs for reader in READERS) >= 10**5
