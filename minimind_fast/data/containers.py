"""The containers that data come in: plain or compressed lines, a JSON array, Parquet; a folder or a glob of them.

Purpose: `expand(paths)` finds the files; `Container(path)` yields their lines or values, whatever they are packed in.
Principle: the first bytes of a file tell what it is, not its name. What cannot be read is refused by its right name: a zip
    archive, UTF-16, a web page, a Git LFS pointer.
Properties: streams; at most one line, value or row group is held. A file that was cut short is an error, also where a
    decompressor would simply end. Parquet needs pyarrow and .zst needs zstandard: `pip install "minimind_fast[data]"`.

Source: magic numbers of RFC 1952 (gzip) and RFC 8878 (Zstandard), and of the formats' own documents.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Self

from minimind_fast.data.minimind import sets
from minimind_fast.errors import DataError, UserError

MAX_LINE_BYTES = 1 << 28  # a longer "line" means the file is not JSONL; do not read it into memory
READ_BYTES = 1 << 20
SUFFIXES = (".jsonl", ".json", ".ndjson", ".parquet")  # of a folder's files, also with one of the following
PACKED = (".gz", ".zst", ".bz2", ".xz")

_KINDS = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"))
_TO_UTF8 = "convert it to UTF-8"
_REFUSED = (
    (b"PK\x03\x04", "a zip archive", "unpack it, and give the files in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and give the files in it"),
    (b"\xff\xfe", "UTF-16 text", _TO_UTF8),
    (b"\xfe\xff", "UTF-16 text", _TO_UTF8),
    (b"version https://git-lfs", "a Git LFS pointer and not the data", "fetch the data with `git lfs pull`"),
    (b"<!doctype html", "a web page", "download the file itself"),
    (b"<html", "a web page", "download the file itself"),
    (b"%PDF", "a PDF", "give JSONL"),
    (b"ARROW1", "an Arrow file", "save it as Parquet or JSONL, with `to_parquet` or `to_json` of `datasets`"),
    (b"SQLite format 3", "a database", "export it as JSONL"),
)
_TABLES = {".csv": "a table (CSV)", ".tsv": "a table (TSV)"}
_SPACE = re.compile(r"\s*")


def expand(paths: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """The files that paths, folders and globs name.

    Args:
        paths: a file as it is; a folder stands for the data files below it, a glob for what it matches, in order of name.

    Raises:
        DataError: something is missing, empty or unreadable, or a folder or glob holds no data.
    """
    found: list[Path] = []
    for path in paths:
        path = Path(path)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if _is_data(p.relative_to(path)) and p.is_file())
            if not inside:
                raise DataError(f"{path} is a folder without data files ({', '.join(SUFFIXES)})")
            found += inside
        elif not path.exists() and glob.has_magic(str(path)):
            inside = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not inside:
                raise DataError(f"{path} matches no file (seen from {Path.cwd()})")
            found += inside
        else:
            found.append(path)
    for path in found:
        _check(path)
    return found


def _is_data(path: Path) -> bool:
    if any(part.startswith(".") for part in path.parts):  # a token cache, .git
        return False
    name = path.with_suffix("") if path.suffix in PACKED else path
    return name.suffix in SUFFIXES


def _check(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} does not exist (seen from {Path.cwd()}){sets.missing(path)}")
    if not path.is_file():
        raise DataError(f"{path} is not a file: give a data file, or a folder of them")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: you lack the permission")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")


class Container:
    """An open data file.

    Args:
        path: a file; see `expand`.

    Attributes:
        unit: what its numbers count, "line" or "row".

    Raises:
        DataError: what the file is, if it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.unit = path, "line"
        self._raw: BinaryIO = open(path, "rb")  # noqa: SIM115  (closed by __exit__)
        self._tell = self._raw.tell
        head = self._raw.read(512)
        self._raw.seek(0)
        kind = next((kind for magic, kind in _KINDS if head.startswith(magic)), "")
        try:
            if head.startswith(b"PAR1"):
                self.unit, self._items = "row", self._table()
                return
            stream = self._unpacked(kind)
            if kind:
                with self._named_errors():
                    head = stream.peek(512)
            self._refuse(head)
            inner = head.removeprefix(codecs.BOM_UTF8).lstrip()
            self._items = self._array(stream) if inner.startswith(b"[") else self._lines(stream)
        except BaseException:
            self._raw.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._raw.close()

    def __iter__(self) -> Iterator[tuple[int, Any, int]]:
        """Yield (number of the line or row, a line as bytes or a parsed value, its size in bytes)."""
        with self._named_errors():
            yield from self._items

    def bytes_read(self) -> int:
        """How far into the file reading is."""
        return self._tell()

    def _named_errors(self) -> _Damaged:
        return _Damaged(self.path)

    def _refuse(self, head: bytes) -> None:
        for magic, what, advice in _REFUSED:
            if head.lower().startswith(magic.lower()):
                raise DataError(f"{self.path} is {what}: {advice}")
        if head[257:262] == b"ustar":
            raise DataError(f"{self.path} is a tar archive: unpack it, and give the files in it")
        what = _TABLES.get(self.path.suffix.lower())
        if what and head.lstrip()[:1] not in (b"{", b"["):
            raise DataError(f'{self.path} is {what}: give JSONL, one object such as {{"text": "..."}} a line')

    def _unpacked(self, kind: str) -> io.BufferedReader:
        if kind == "gzip":
            return io.BufferedReader(gzip.GzipFile(fileobj=self._raw))  # type: ignore[arg-type]
        if kind == "bzip2":
            return io.BufferedReader(bz2.BZ2File(self._raw))  # type: ignore[arg-type]
        if kind == "xz":
            return io.BufferedReader(lzma.LZMAFile(self._raw))  # type: ignore[arg-type]
        if kind == "zstd":
            return io.BufferedReader(_Zstd(self._raw, _needed("zstandard", self.path)), READ_BYTES)
        return self._raw  # type: ignore[return-value]

    def _lines(self, stream: BinaryIO) -> Iterator[tuple[int, bytes, int]]:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                raise DataError(f"{self.path}, line {number:,}: longer than {MAX_LINE_BYTES >> 20} MiB; is it JSONL?")
            yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line, len(line)

    def _array(self, stream: BinaryIO) -> Iterator[tuple[int, Any, int]]:
        """The elements of a JSON array, on one line or many."""
        utf8 = codecs.getincrementaldecoder("utf-8-sig")()
        text, at, line, count = "", 0, 1, 0
        begun = wants_value = False

        def wrong(what: str) -> DataError:
            return DataError(f"{self.path}, line {line:,}: not a JSON array: {what}")

        while True:
            space = _SPACE.match(text, at)
            assert space is not None
            line, at = line + text.count("\n", at, space.end()), space.end()
            after = text[at : at + 1]
            value = end = None
            if after and begun and wants_value and not (after == "]" and not count):
                try:
                    value, end = json.JSONDecoder().raw_decode(text, at)
                except json.JSONDecodeError as error:
                    may_go_on = error.msg.startswith("Unterminated") or error.pos >= len(text) - 16
                    if not may_go_on or len(text) - at > MAX_LINE_BYTES:
                        raise wrong(error.msg) from None
                    after = ""  # the value goes on in what is not read yet
                except RecursionError as error:
                    raise wrong(str(error)) from None
            if not after:
                part = stream.read(READ_BYTES)
                try:
                    text, at = text[at:] + utf8.decode(part, final=not part), 0
                except UnicodeDecodeError as error:
                    raise wrong(f"not UTF-8 ({error.reason}): {_TO_UTF8}") from None
                if not part:
                    raise wrong("it ends in the middle; was the file cut short?")
            elif end is not None:
                yield line, value, end - at
                count += 1
                line, at, wants_value = line + text.count("\n", at, end), end, False
            elif not begun:
                begun, wants_value, at = True, True, at + 1
            elif after == "]":
                if (text[at + 1 :] + utf8.decode(stream.read(READ_BYTES))).strip():
                    raise wrong("something follows its end; JSONL has one object a line and no brackets around")
                return
            elif after == ",":
                wants_value, at = True, at + 1
            else:
                raise wrong("a comma is missing")

    def _table(self) -> Iterator[tuple[int, Any, int]]:
        parquet = _needed("pyarrow.parquet", self.path)
        done = number = 0
        self._tell = lambda: done
        try:
            table = parquet.ParquetFile(self._raw)
            share = self.path.stat().st_size / max(table.metadata.num_rows, 1)
            for batch in table.iter_batches(batch_size=256):
                size = batch.nbytes // max(batch.num_rows, 1)
                for row in batch.to_pylist():
                    number += 1
                    done = int(number * share)
                    yield number, row, size
        except (ValueError, OSError) as error:  # pyarrow's own are subclasses of these
            raise DataError(f"{self.path} is Parquet, but damaged or cut short: {error}") from None


class _Damaged:
    """Names the file if its decompressor fails."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)) or (
            isinstance(error, OSError) and error.errno is None  # bz2's
        ):
            raise DataError(f"{self.path}: the compressed file is damaged or cut short ({error})") from None


class _Zstd(io.RawIOBase):
    """The content of a .zst file; the package's own reader ends silently where a frame is cut."""

    def __init__(self, raw: BinaryIO, package: Any) -> None:
        self._raw, self._package = raw, package
        self._frame = package.ZstdDecompressor().decompressobj()
        self._fresh, self._left, self._ready = True, b"", b""

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer; 0 at the end."""
        while not self._ready:
            part = self._left or self._raw.read(READ_BYTES // 8)
            self._left = b""
            if not part:
                if not self._fresh:
                    raise EOFError("it ends within a frame")
                return 0
            try:
                self._ready, self._fresh = self._frame.decompress(part), False
            except self._package.ZstdError as error:
                raise EOFError(str(error)) from None
            if self._frame.eof:
                self._left, self._fresh = self._frame.unused_data, True
                self._frame = self._package.ZstdDecompressor().decompressobj()
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _needed(name: str, path: Path) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(
            f'{path} needs the package {package}: pip install "minimind_fast[data]", or give the rows as JSONL'
        ) from None
