"""The cache's format: the one place that knows how it lies on disk.

A cache is a folder with one subfolder per subset (``train``, ``valid``), each complete in itself::

    train/
      manifest.json     written last: without it there is no cache
      offsets.bin       <i8 (sentences + 1): sentence i has the rows offsets[i] to offsets[i + 1]
      symbols.bin       <u2, or <u4 for more than 65,536 symbols (rows, k): the likeliest first
      log_probs.bin     <f2 (rows, k): their log-probabilities at temperature 1, nats
      reference.bin     <f2 (rows): the reference's, likewise
      entropy.bin       <f2 (rows): of the whole distribution at temperature 1, nats
      rests.bin         <f2 (rows, temperatures): log of the sum of p^(1/T) over the symbols that
                        are not among the k, for each temperature T of the manifest
      drawn.bin         as symbols (rows, tail_samples): drawn from those that are not among the k,
                        with replacement, in proportion to p^(1/T); T is the manifest's only
                        temperature
      tempered_entropy.bin  <f2 (rows): of the whole distribution at that T, nats, unless T is 1
      blocks.bin        <u4: the CRC-32 of each 64 KiB of these files, but offsets.bin; the last of
                        a file may be shorter; one file after the other, in the order from above
      partial/          while it is being written: header.json, and a folder for each shard

A row is a target token, the end-of-sentence symbol included, in the order of the sentence; padding
symbols in the text and tags of languages before it have none. Sentences are in the order of the
binarised data, and one that the teacher cannot read has no rows.
Arrays are flat, little-endian, without a header, to be memory-mapped. An array of no width has no
file. A block is compared with its CRC-32 when a process first reads of it; a cache
of an earlier version has no ``blocks.bin`` and is compared as a whole when it is opened. At
temperature 1 the mass outside of the k is one minus theirs (to half precision's rounding
of theirs) unless it is among the manifest's temperatures.
"""

import glob
import hashlib
import json
import math
import os
import zlib
from itertools import count
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np

from ..files import FileError, differences, digest, digest_of_sample, read_json, write_json

FORMAT, VERSION = "kd_plugin teacher cache", 1
MANIFEST, HEADER, PARTIAL = "manifest.json", "header.json", "partial"
OFFSETS, BLOCKS = "offsets", "blocks"
BLOCK = 1 << 16  # bytes that are compared with their checksum together
# Of all rows, in the manifest; losses in bits
SUMMARY = (
    "bytes",
    "bytes_per_token",
    "covered_mean",
    "covered_1st_percentile",
    "nll_loss",
    "entropy",
    "agreement",
)
# Newer ones, which a manifest may lack
MORE_SUMMARY = ("tail_bits", "calibration_error")
_READ = 1 << 22
# What a header says of the data and must be the same in training; an earlier version's does not
# have the samples, and its files are compared as a whole
_DATA = ("dictionaries", "data", "settings")
_WHOLE_DATA = ("dictionaries", "files", "settings")


class CacheError(FileError):
    """A cache that cannot be used, or not be written; the message says why and what to do."""


class Array(NamedTuple):
    """How one array lies in its file."""

    dtype: str
    width: Tuple[int, ...]  # of a row: () or (k,)

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * math.prod(self.width))


def arrays(
    vocabulary: int, k: int, temperatures: Sequence[float], samples: int = 0
) -> Dict[str, Array]:
    """The arrays that have a value per row."""
    samples = samples if k < vocabulary else 0
    symbol = "<u2" if vocabulary <= 1 << 16 else "<u4"
    found = {
        "symbols": Array(symbol, (k,)),
        "log_probs": Array("<f2", (k,)),
        "reference": Array("<f2", ()),
        "entropy": Array("<f2", ()),
        "rests": Array("<f2", (rests(vocabulary, k, temperatures),)),
        "drawn": Array(symbol, (samples,)),
    }
    if samples and temperatures[0] != 1:
        found["tempered_entropy"] = Array("<f2", ())
    return {name: array for name, array in found.items() if array.row_bytes}


def rests(vocabulary: int, k: int, temperatures: Sequence[float]) -> int:
    """Width of ``rests``: where the k are the whole vocabulary there is no rest."""
    return len(temperatures) if k < vocabulary else 0


def array_file(folder: Path, name: str) -> Path:
    return folder / (name + ".bin")


# What a cache was made from


def describe_data(
    dictionaries: Dict[str, Sequence[str]],
    settings: Dict[str, Any],
    paths: Sequence[str],
    whole: bool,
) -> Dict[str, Any]:
    """What a row's meaning depends on: files by content, dictionaries, and the task's settings.

    Args:
        dictionaries: the symbols of each.
        settings: what the task makes of the files, as plain types.
        paths: the subset's files.
        whole: also compute the digests of whole files, whose cost grows with them.
    """
    described = {
        "dictionaries": {
            side: _digest_of_text("\n".join(symbols)) for side, symbols in dictionaries.items()
        },
        "data": {os.path.basename(path): digest_of_sample(path) for path in paths},
        "settings": settings,
    }
    if whole:
        described["files"] = {os.path.basename(path): digest(path) for path in paths}
    return described


def data_files(folder: str, subset: str, combine: bool, endings: Sequence[str]) -> List[str]:
    """The files that fairseq reads for a subset: with ``combine`` also train1, train2, ...

    Args:
        endings: of the names, behind the subset's: ``.de-en.de``, say.
    """
    found: List[str] = []
    for i in count():
        here: List[str] = []
        for ending in endings:
            name = glob.escape(os.path.join(folder, f"{subset}{i or ''}{ending}"))
            here += glob.glob(name) + glob.glob(name + ".bin") + glob.glob(name + ".idx")
        here = list(filter(os.path.isfile, here))
        found += sorted(here)
        if not here or not combine:
            return found
    return found


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# Gives what ``describe_data`` says; True is ``whole``
Describe = Callable[[bool], Dict[str, Any]]


def data_differences(
    describe: Describe, manifest: Dict[str, Any], whole: bool = False
) -> List[str]:
    """In words: where the data at hand is not what the manifest says.

    Args:
        whole: compare whole files even where the manifest has samples of them.
    """
    whole = whole or "data" not in manifest
    return differences(describe(whole), manifest, _WHOLE_DATA if whole else _DATA)


# Reading and writing


class Checksums:
    """The CRC-32 of a file as it is written: of the whole, and of each block."""

    def __init__(self) -> None:
        self.whole, self.blocks = 0, []  # type: int, List[int]
        self._in_block = 0

    def update(self, content: memoryview) -> None:
        self.whole = zlib.crc32(content, self.whole)
        while len(content):
            if self._in_block == 0:
                self.blocks.append(0)
            part = content[: BLOCK - self._in_block]
            self.blocks[-1] = zlib.crc32(part, self.blocks[-1])
            self._in_block = (self._in_block + len(part)) % BLOCK
            content = content[len(part) :]


def checksum(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_READ), b""):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def blocks_in(size: int) -> int:
    return -(-size // BLOCK)


def write_manifest(folder: Path, content: Dict[str, Any]) -> None:
    write_json(folder / MANIFEST, {**content, "checksum": _checksum_of(content)})


def _checksum_of(content: Dict[str, Any]) -> str:
    rest = {key: value for key, value in content.items() if key != "checksum"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"


def read_manifest(folder: Path) -> Dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        CacheError: it is damaged, of another version, or no cache's.
    """
    path = folder / MANIFEST
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise CacheError(f"{path} is not the manifest of a teacher cache")
    if manifest.get("version") != VERSION:
        raise CacheError(
            f"the cache {folder} has version {manifest.get('version')} of the format, and this "
            f"kd_plugin reads version {VERSION}: make it again with fairseq-kd-cache"
        )
    if manifest.get("checksum") != _checksum_of(manifest) or not _well_formed(manifest):
        raise CacheError(f"{path} is damaged: delete {folder} and make the cache again")
    return manifest


def _well_formed(manifest: Dict[str, Any]) -> bool:
    """Whether everything that is read from the manifest is of the kind that it should be."""

    def natural(x: Any, least: int = 0, most: int = 1 << 62) -> bool:
        return isinstance(x, int) and not isinstance(x, bool) and least <= x <= most

    def number(x: Any, least: float = 0) -> bool:
        return isinstance(x, (int, float)) and not isinstance(x, bool) and least < x < 1e300

    def teacher(x: Any) -> bool:
        return (
            isinstance(x, dict)
            and isinstance(x.get("path"), str)
            and "\0" not in x["path"]
            and natural(x.get("bytes"), 1)
            and isinstance(x.get("sha256"), str)
            and natural(x.get("modified_ns", 0))
        )

    temperatures, teachers = manifest.get("temperatures"), manifest.get("teachers")
    return (
        all(natural(manifest.get(key)) for key in ("sentences", "rows"))
        and manifest.get("block_bytes", BLOCK) == BLOCK
        and natural(manifest.get("tail_samples", 0), 0, 1 << 16)
        and (not manifest.get("tail_samples") or len(manifest.get("temperatures") or ()) == 1)
        and natural(manifest.get("vocabulary"), 1, 1 << 32)
        and natural(manifest.get("k"), 1)
        and manifest["k"] <= manifest["vocabulary"]
        and isinstance(temperatures, list)
        and all(map(number, temperatures))
        and isinstance(teachers, list)
        and all(map(teacher, teachers))
        and isinstance(manifest.get("checksums"), dict)
        and isinstance(manifest.get("summary"), dict)
        and all(number(manifest["summary"].get(key), -1e300) for key in SUMMARY)
        and all(number(manifest["summary"].get(key, 0), -1e300) for key in MORE_SUMMARY)
    )
