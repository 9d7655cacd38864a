"""The one reader of rows: files to objects, with errors that name file and line.

Purpose: `read_rows` yields rows one by one, `read_chunks` in chunks; `string_field` reads a field of a row, `read_json` a
    whole file that is one value.
Principle: a line is one JSON object in UTF-8; only a byte-order mark and blank lines are skipped. `containers` opens what
    the lines are packed in, `formats` turns rows of other formats into ours.
Properties: holds one chunk of lines at a time. A bad line stops the reading or is counted, as the user chose.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minimind_fast.data.containers import Container, expand
from minimind_fast.data.formats import Formats
from minimind_fast.errors import DataError, UserError

# The Rust tokenizer's results take about 100 bytes per token until copied out: 1 MiB of text is some 40 MB.
# Throughput on 2 cores is the same from 256 KiB to 8 MiB.
CHUNK_BYTES = 1 << 20
PROGRESS_INTERVAL_S = 10.0
MAX_REPORTED_LINES = 5
HALF_A_PAIR = "half of a surrogate pair, such as \\ud83d alone, which is no character"
T = TypeVar("T")


@dataclass(frozen=True)
class BadRow:
    """Returned by an encoder instead of documents for a row that it cannot use."""

    problem: str


def string_field(row: dict[str, Any], field: str) -> str | BadRow:
    """Read a text field of a row, or say what is wrong with it."""
    if field not in row:
        return BadRow(f'has no field "{field}" (its fields: {", ".join(sorted(row)) or "none"})')
    value = row[field]
    if not isinstance(value, str):
        return BadRow(f'"{field}" is {_json_type(value)}, not a string')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return BadRow(f'"{field}" holds {HALF_A_PAIR}')
    return value


def read_rows(
    paths: Sequence[str | os.PathLike[str]],
    read: Callable[[dict[str, Any]], T | BadRow],
    *,
    formats: Formats,
    on_bad_line: str = "error",
    log: Callable[[str], None] = print,
) -> Iterator[T]:
    """Yield `read(row)` for each row of some files, without holding a file in memory.

    Args:
        paths, on_bad_line, log: as for `build_cache`.
        read: takes a row in our format, returns the result or what is wrong with it.
        formats: what the rows are to hold.

    Raises:
        DataError: a file is missing, empty or no data, or a row is unusable.
    """
    lines = Lines(stop=on_bad_line == "error")
    for path, places, rows in read_chunks(expand(paths), lines, formats, log):
        for place, row in zip(places, rows, strict=True):
            result = read(row)
            if isinstance(result, BadRow):
                lines.bad(path, place, result.problem)
            else:
                yield result
    if lines.count:
        log(f"left out {lines.count:,} unusable lines, the first: {lines.first[0]}")


def read_texts(
    paths: Sequence[str | os.PathLike[str]], *, on_bad_line: str = "error", log: Callable[[str], None] = print
) -> Iterator[str]:
    """Yield the non-empty texts of files of `{"text": ...}` rows.

    Args:
        paths, on_bad_line, log: as for `build_cache`.

    Raises:
        DataError: as for `read_rows`.
    """

    def read(row: dict[str, Any]) -> str | BadRow:
        return string_field(row, "text")

    texts = read_rows(paths, read, formats=Formats("text"), on_bad_line=on_bad_line, log=log)
    return (text for text in texts if text.strip())


class Lines:
    """Counts unusable lines, or stops at the first."""

    def __init__(self, stop: bool):
        self.stop = stop
        self.count = 0
        self.first: list[str] = []

    def bad(self, path: Path, place: str, problem: str) -> None:
        """Note an unusable row; `place` is such as "line 3".

        Raises:
            DataError: the first one is to stop the reading.
        """
        message = f"{path}, {place}: {problem}"
        if self.stop:
            raise DataError(f"{message} (--on_bad_line skip leaves such lines out)")
        self.count += 1
        if len(self.first) < MAX_REPORTED_LINES:
            self.first.append(message)


def read_chunks(
    sources: list[Path], lines: Lines, formats: Formats, log: Callable[[str], None]
) -> Iterator[tuple[Path, list[str], list[dict[str, Any]]]]:
    """Read files in chunks of about CHUNK_BYTES: path, places such as "line 3", rows in our format."""
    total = sum(source.stat().st_size for source in sources)
    done, start = 0, time.monotonic()
    last_log = start
    for path in sources:
        formats.seen.clear()
        told = 0
        with Container(path) as container:
            places: list[str] = []
            rows: list[dict[str, Any]] = []
            size = 0
            for number, item, item_bytes in container:
                size += item_bytes
                row = _read(item, formats)
                if isinstance(row, BadRow):
                    lines.bad(path, f"{container.unit} {number:,}", row.problem)
                elif row is not None:
                    places.append(f"{container.unit} {number:,}")
                    rows.append(row)
                if len(formats.seen) > told:
                    formats.said.append(f"{path.name} is taken for {list(formats.seen)[told]}.")
                    log(formats.said[-1])
                    told += 1
                if size >= CHUNK_BYTES:
                    yield path, places, rows
                    places, rows, size = [], [], 0
                    now = time.monotonic()
                    if now - last_log > PROGRESS_INTERVAL_S:
                        last_log = now
                        read = done + container.bytes_read()
                        rate = read / (now - start)
                        left_s = (total - read) / rate
                        log(f"reading {path.name}: {read / total:.0%}, {rate / 1e6:.1f} MB/s, {left_s:.0f} s left")
            yield path, places, rows
        done += path.stat().st_size


def _read(item: Any, formats: Formats) -> dict[str, Any] | BadRow | None:
    """A line or a value as a row in our format; None if it is blank."""
    row = _parse(item) if isinstance(item, bytes) else item
    if row is None and isinstance(item, bytes) or isinstance(row, BadRow):
        return row
    if not isinstance(row, dict):
        return BadRow(f'{_json_type(row)}, not an object such as {{"text": "..."}}')
    try:
        return formats.adapt(row)
    except DataError as error:
        return BadRow(str(error))


def read_utf8(path: str | os.PathLike[str]) -> str:
    """Read a file of text.

    Args:
        path: UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it cannot be read, or is not UTF-8; names the line.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line}: not UTF-8 (byte 0x{content[error.start]:02x}): convert it") from None


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a file that holds one JSON value: a config, a list of tools.

    Args:
        path: UTF-8, with or without a byte-order mark.

    Raises:
        UserError: it cannot be read, or is not JSON in UTF-8; names the line.
    """
    text = read_utf8(path)
    try:
        value = json.loads(text, object_pairs_hook=_without_twins)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{path} holds {HALF_A_PAIR}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers too long, objects nested too deep, fields that come twice
        raise UserError(f"{path}: not usable JSON: {error}") from None
    return value


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """As `read_json`, for a file that must hold a JSON object.

    Raises:
        UserError: as there, or the value is none.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {_json_type(value)}")
    return value


def _parse(line: bytes) -> Any:
    """Parse one line; None if it is blank."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        return BadRow(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at byte {error.start + 1}): convert the file to UTF-8"
        )
    if not text.strip():
        return None
    try:
        row = json.loads(text, object_pairs_hook=_without_twins)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and "\r" in text[: error.pos + 1].lstrip():
            return BadRow("lines end in a carriage return alone: convert the file to line feeds")
        return BadRow(f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # also numbers too long and objects nested too deep
        return BadRow(f"not usable JSON: {error}")
    return BadRow("null, not an object") if row is None else row


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a field that comes twice, Python would drop the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twin = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise UserError(f'the field "{twin}" comes twice')
    return found


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
