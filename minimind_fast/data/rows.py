"""The JSONL reader: files to objects, with errors that name file and line.

Purpose: `read_rows` yields rows one by one, `read_chunks` in chunks; `string_field` reads a field of a row.
Principle: a line is one JSON object in UTF-8; only a byte-order mark and blank lines are skipped.
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

# The Rust tokenizer's results take about 100 bytes per token until copied out: 1 MiB of text is some 40 MB.
# Throughput on 2 cores is the same from 256 KiB to 8 MiB.
CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 28  # a longer "line" means the file is not JSONL; do not read it into memory
PROGRESS_INTERVAL_S = 10.0
MAX_REPORTED_LINES = 5
T = TypeVar("T")


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file, the line and the fault."""


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
        return BadRow(f'"{field}" holds half of a surrogate pair, such as \\ud83d alone, which is no character')
    return value


def read_rows(
    paths: Sequence[str | os.PathLike[str]],
    read: Callable[[dict[str, Any]], T | BadRow],
    *,
    on_bad_line: str = "error",
    log: Callable[[str], None] = print,
) -> Iterator[T]:
    """Yield `read(row)` for each line of JSONL files, without holding a file in memory.

    Args:
        paths, on_bad_line, log: as for `build_cache`.
        read: takes a parsed line, returns the result or what is wrong with it.

    Raises:
        DataError: a file is missing or empty, or a line is unusable.
    """
    sources = [Path(path) for path in paths]
    for source in sources:
        check_readable(source)
    lines = Lines(stop=on_bad_line == "error")
    for path, numbers, rows in read_chunks(sources, lines, log):
        for number, row in zip(numbers, rows, strict=True):
            result = read(row)
            if isinstance(result, BadRow):
                lines.bad(path, number, result.problem)
            else:
                yield result
    if lines.count:
        log(f"left out {lines.count:,} unusable lines, the first: {lines.first[0]}")


def read_texts(
    paths: Sequence[str | os.PathLike[str]], *, on_bad_line: str = "error", log: Callable[[str], None] = print
) -> Iterator[str]:
    """Yield the non-empty texts of `{"text": ...}` JSONL files.

    Args:
        paths, on_bad_line, log: as for `build_cache`.

    Raises:
        DataError: as for `read_rows`.
    """
    texts = read_rows(paths, lambda row: string_field(row, "text"), on_bad_line=on_bad_line, log=log)
    return (text for text in texts if text.strip())


class Lines:
    """Counts unusable lines, or stops at the first."""

    def __init__(self, stop: bool):
        self.stop = stop
        self.count = 0
        self.first: list[str] = []

    def bad(self, path: Path, line: int, problem: str) -> None:
        message = f"{path}, line {line:,}: {problem}"
        if self.stop:
            raise DataError(f"{message} (--on_bad_line skip leaves such lines out)")
        self.count += 1
        if len(self.first) < MAX_REPORTED_LINES:
            self.first.append(message)


def read_chunks(
    sources: list[Path], lines: Lines, log: Callable[[str], None]
) -> Iterator[tuple[Path, list[int], list[dict[str, Any]]]]:
    """Read the files in chunks of about CHUNK_BYTES: path, line numbers, parsed objects."""
    total = sum(source.stat().st_size for source in sources)
    done, start = 0, time.monotonic()
    last_log = start
    for path in sources:
        numbers: list[int] = []
        rows: list[dict[str, Any]] = []
        size, number = 0, 0
        with open(path, "rb") as file:
            while line := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                size += len(line)
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(f"{path}, line {number:,}: longer than {MAX_LINE_BYTES >> 20} MiB; is it JSONL?")
                row = _parse(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
                if isinstance(row, BadRow):
                    lines.bad(path, number, row.problem)
                elif row is not None:
                    numbers.append(number)
                    rows.append(row)
                if size >= CHUNK_BYTES:
                    yield path, numbers, rows
                    numbers, rows = [], []
                    done, size = done + size, 0
                    now = time.monotonic()
                    if now - last_log > PROGRESS_INTERVAL_S:
                        last_log = now
                        rate = done / (now - start)
                        left_s = (total - done) / rate
                        log(f"reading {path.name}: {done / total:.0%}, {rate / 1e6:.1f} MB/s, {left_s:.0f} s left")
        yield path, numbers, rows
        done += size


def _parse(line: bytes) -> dict[str, Any] | BadRow | None:
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
        row = json.loads(text)
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at character {error.pos + 1}")
    except (ValueError, RecursionError) as error:  # also numbers too long and objects nested too deep
        return BadRow(f"not usable JSON: {error}")
    if not isinstance(row, dict):
        return BadRow(f'{_json_type(row)}, not an object such as {{"text": "..."}}')
    return row


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def check_readable(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} does not exist (seen from {Path.cwd()})")
    if not path.is_file():
        raise DataError(f"{path} is not a file: give the JSONL file itself")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: you lack the permission")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")
