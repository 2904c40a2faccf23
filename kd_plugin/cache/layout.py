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
      partial/          while it is being written: header.json, and a folder for each shard

A row is a target token, the end-of-sentence symbol included and padding symbols in the text not, in
the order of the sentence;
sentences are in the order of the binarised data, and one that the teacher cannot read has no rows.
Arrays are flat, little-endian, without a header, to be memory-mapped. An array of no width has no
file. At temperature 1 the mass outside of the k is one minus theirs (to half precision's rounding
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
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from fairseq import utils

from ..files import FileError, differences, digest, read_json, write_json

FORMAT, VERSION = "kd_plugin teacher cache", 1
MANIFEST, HEADER, PARTIAL = "manifest.json", "header.json", "partial"
OFFSETS = "offsets"
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
_BLOCK = 1 << 22
# What a header says of the data; it must be the same in training
_DATA = ("dictionaries", "files", "settings")


class CacheError(FileError):
    """A cache that cannot be used, or not be written; the message says why and what to do."""


class Array(NamedTuple):
    """How one array lies in its file."""

    dtype: str
    width: Tuple[int, ...]  # of a row: () or (k,)

    @property
    def row_bytes(self) -> int:
        return int(np.dtype(self.dtype).itemsize * math.prod(self.width))


def arrays(vocabulary: int, k: int, temperatures: Sequence[float]) -> Dict[str, Array]:
    """The arrays that have a value per row."""
    found = {
        "symbols": Array("<u2" if vocabulary <= 1 << 16 else "<u4", (k,)),
        "log_probs": Array("<f2", (k,)),
        "reference": Array("<f2", ()),
        "entropy": Array("<f2", ()),
        "rests": Array("<f2", (rests(vocabulary, k, temperatures),)),
    }
    return {name: array for name, array in found.items() if array.row_bytes}


def rests(vocabulary: int, k: int, temperatures: Sequence[float]) -> int:
    """Width of ``rests``: where the k are the whole vocabulary there is no rest."""
    return len(temperatures) if k < vocabulary else 0


def array_file(folder: Path, name: str) -> Path:
    return folder / (name + ".bin")


# What a cache was made from


def describe_data(task: Any, subset: str, combine: bool) -> Dict[str, Any]:
    """What a row's meaning depends on: files by content, dictionaries, and the task's settings.

    Raises:
        CacheError: the task reads several data folders in turn, or pads sentences to buckets.
    """
    cfg = task.cfg
    if cfg.num_batch_buckets > 0:
        raise CacheError("a teacher cache cannot be used with --num-batch-buckets")
    folders = utils.split_paths(cfg.data)
    if len(folders) != 1:
        raise CacheError(
            f"a teacher cache is for one data folder, but {len(folders)} are given ({cfg.data}), "
            "one per epoch: train without --teacher-cache, or binarise into one folder"
        )
    settings = {
        "source_lang": cfg.source_lang,
        "target_lang": cfg.target_lang,
        "upsample_primary": cfg.upsample_primary,
        # only then does the position's limit change what the teacher reads
        "truncate_source": cfg.max_source_positions if cfg.truncate_source else None,
    }
    return {
        "dictionaries": {
            "source": _digest_of_text("\n".join(task.source_dictionary.symbols)),
            "target": _digest_of_text("\n".join(task.target_dictionary.symbols)),
        },
        "files": {
            os.path.basename(path): digest(path)
            for path in _data_files(folders[0], subset, cfg, combine)
        },
        "settings": settings,
    }


def _data_files(folder: str, subset: str, cfg: Any, combine: bool) -> List[str]:
    """The files that fairseq reads for a subset: with ``combine`` also train1, train2, ..."""
    found: List[str] = []
    for i in count():
        here = []
        for pair in ((cfg.source_lang, cfg.target_lang), (cfg.target_lang, cfg.source_lang)):
            prefix = os.path.join(folder, "{}{}.{}-{}.".format(subset, i or "", *pair))
            for lang in pair:
                name = glob.escape(prefix + lang)
                here += glob.glob(name) + glob.glob(name + ".bin") + glob.glob(name + ".idx")
        found += sorted(here)
        if not here or not combine:
            return found
    return found


def _digest_of_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def data_differences(ours: Dict[str, Any], theirs: Dict[str, Any]) -> List[str]:
    return differences(ours, theirs, _DATA)


# Reading and writing


def checksum(path: Path) -> str:
    value = 0
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


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
        )

    temperatures, teachers = manifest.get("temperatures"), manifest.get("teachers")
    return (
        all(natural(manifest.get(key)) for key in ("sentences", "rows"))
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
    )
