"""Lines of strangers' text files, compressed or not, in bounded memory; faults have a place."""

import codecs
import contextlib
import gzip
import os
import shutil
import sys
import tempfile
import zlib
from typing import Any, BinaryIO, Iterator, List, Optional, Sequence

from ...files import FileError

FLAG = "--import"
LONGEST = 1 << 24  # bytes of a line
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UTF16 = codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE  # no text in UTF-8 begins so
_BLOCK = 1 << 12  # compressed bytes at a time: at most some 128 MiB of text


class Lines:
    """The lines of a text file, without their ends; ``number`` is of the last one, from 1.

    Args:
        path: what is read; gzip and Zstandard are known by their first bytes.
        name: of the file, for messages.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path, self.name, self.number = path, name, 0

    def __iter__(self) -> Iterator[str]:
        """Raises FileError: the file is no text in UTF-8, or is damaged."""
        self.number = 0
        with open(self.path, "rb") as raw:
            for line in self._binary(raw):
                self.number += 1
                if self.number == 1 and line.startswith(_UTF16):
                    raise self.fault("UTF-16: make it UTF-8 with iconv -f utf-16 -t utf-8")
                if b"\0" in line:
                    raise self.fault("NUL, which no text holds")
                try:
                    text = line.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise self.fault(f"not UTF-8 ({error.reason})") from None
                if self.number == 1 and text.startswith("\ufeff"):
                    text = text[1:]
                yield text.rstrip("\r\n")

    def fault(self, message: str, number: Optional[int] = None) -> FileError:
        """The error of a line, the last one unless its number is given."""
        return FileError(f"{FLAG} {self.name}, line {number or self.number}: {message}")

    def _binary(self, raw: BinaryIO) -> Iterator[bytes]:
        magic = raw.read(len(_ZSTD))
        raw.seek(0)
        try:
            if magic.startswith(_GZIP):
                with gzip.GzipFile(fileobj=raw, mode="rb") as unpacked:
                    yield from self._bounded(unpacked)
            elif magic == _ZSTD:
                yield from self._split(_unpack_zstd(raw, f"{FLAG} {self.name}"))
            else:
                yield from self._bounded(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FileError(
                f"{FLAG} {self.name}: cut short or damaged behind line {self.number} ({error})"
            ) from None

    def _bounded(self, file: Any) -> Iterator[bytes]:
        while True:
            line = file.readline(LONGEST + 1)
            if not line:
                return
            if len(line) > LONGEST:  # called only then, for speed
                self._refuse_long(line)
            yield line

    def _split(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        rest = b""
        for block in blocks:
            *whole, rest = (rest + block).split(b"\n")
            for line in whole:
                self._refuse_long(line)
                yield line
            self._refuse_long(rest)
        if rest:
            yield rest

    def _refuse_long(self, line: bytes) -> None:
        if len(line) > LONGEST:
            self.number += 1
            raise self.fault(f"longer than {LONGEST:,} bytes")


def _unpack_zstd(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Blocks of text; its reader of streams would not tell of a file that was cut short.

    Raises:
        FileError: without the package; EOFError: the file is damaged.
    """
    try:
        import zstandard
    except ImportError:
        raise FileError(
            f"{name} is compressed with Zstandard: pip install 'kd_plugin[zstd]', or unpack it"
        ) from None
    unpack, rest, whole = zstandard.ZstdDecompressor().decompressobj(), b"", True
    while True:
        block = rest or file.read(_BLOCK)
        rest = b""
        if not block:
            if not whole:
                raise EOFError("the end is missing")
            return
        try:
            yield unpack.decompress(block)
        except zstandard.ZstdError as error:
            raise EOFError(str(error)) from None
        whole = unpack.eof
        if whole:  # another frame may follow
            rest = unpack.unused_data
            unpack = zstandard.ZstdDecompressor().decompressobj()


@contextlib.contextmanager
def readable_twice(names: Sequence[str]) -> Iterator[List[Lines]]:
    """The files of these names; "-" is standard input, which passes through a temporary file.

    Raises:
        FileError: there is no such file.
    """
    with contextlib.ExitStack() as stack:
        found = []
        for name in names:
            if name != "-" and not os.path.exists(name):
                raise FileError(f"{FLAG} {name}: no such file")
            if os.path.isfile(name):
                found.append(Lines(name, name))
                continue
            if os.path.isdir(name):
                raise FileError(f"{FLAG} {name}: expected a file, found a folder")
            copy = stack.enter_context(tempfile.NamedTemporaryFile(prefix="kd_plugin-"))
            if name == "-":
                shutil.copyfileobj(sys.stdin.buffer, copy)
            else:  # a pipe
                with open(name, "rb") as pipe:
                    shutil.copyfileobj(pipe, copy)
            copy.flush()
            found.append(Lines(copy.name, "standard input" if name == "-" else name))
        yield found
