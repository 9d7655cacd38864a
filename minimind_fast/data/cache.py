"""JSONL files to one memory-mapped file of token ids, made once and found again.

Purpose: tokenizing a corpus takes minutes and must not be repeated at each start, by each rank or for each epoch. Every
stage brings an encoder (row -> documents of ids, with a weight per token where not all are targets); all else is here.

Principle: the cache's name is a hash of what decides its content: the bytes of the files, the tokenizer's rules, the
encoder's name. It is written in a folder aside and renamed when whole, so a folder with the final name is complete.
tokens.bin holds the documents end to end; document i is tokens[offsets[i]:offsets[i + 1]].

Properties: 2 bytes a token on disk (4 above 65,536 entries). The build streams: it holds one chunk of lines, however
large the file. Two processes that start together build once: the second waits for the lock; where the file system has
no locks both build and the first rename wins. A known file (path, size, mtime, inode) is not hashed again.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar

import numpy as np

from minimind_fast.data.tokenizer import Tokenizer

try:
    import fcntl
except ImportError:  # not a POSIX system: without locks the rename alone keeps the cache whole
    fcntl = None

FORMAT_VERSION = 1
# The Rust tokenizer's results take about 100 bytes a token until they are copied out, so 1 MiB of text is some 40 MB.
# Throughput on 2 cores is the same from 256 KiB to 8 MiB.
CHUNK_BYTES = 1 << 20
MAX_LINE_BYTES = 1 << 28  # a longer "line" is a file that is not JSONL; reading it whole would fill the memory
PROGRESS_INTERVAL_S = 10.0
# A file changed less than this before it was hashed may change again within one tick of its time stamp.
SETTLED_NS = 2_000_000_000
CACHE_FOLDER = ".minimind_fast_cache"
MAX_REPORTED_LINES = 5
T = TypeVar("T")


class DataError(ValueError):
    """Something is wrong with the user's data; the message names the file, the line and the fault."""


@dataclass(frozen=True)
class BadRow:
    """What an encoder returns in place of documents for a row that it cannot use."""

    problem: str


Document = tuple[Sequence[int], Sequence[int] | None]  # token ids, and the weight (0-255) of each as a target


class Encoder(Protocol):
    """Turns rows into documents. `name` enters the cache key: change it when the documents change."""

    name: str
    masked: bool  # every document comes with weights

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[list[Document] | BadRow]:
        """Give, for each row, its documents (none if the row is empty) or what is wrong with it."""
        ...


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


class PretrainEncoder:
    """`{"text": ...}` to bos + text + eos, every token a target; an empty text gives no document."""

    name = "pretrain-1"
    masked = False

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[list[Document] | BadRow]:
        """Give one document for each row with a text."""
        texts = [string_field(row, "text") for row in rows]
        usable = [text for text in texts if isinstance(text, str) and text.strip()]
        encoded = iter(tokenizer.encode_batch(usable))
        bos, eos = tokenizer.bos_id, tokenizer.eos_id
        result: list[list[Document] | BadRow] = []
        for text in texts:
            if isinstance(text, BadRow):
                result.append(text)
            else:
                result.append([([bos, *next(encoded), eos], None)] if text.strip() else [])
        return result


encode_pretrain = PretrainEncoder()


class TokenCache:
    """A finished cache, memory-mapped.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32, all documents end to end.
        offsets: (num_docs + 1,) int64, where each document starts.
        mask: (num_tokens,) uint8 weight of each token as a target, or None: all are targets.
        fingerprint: the key; equal for the same files, tokenizer and encoder.
        meta: counts, bad lines, tokenizer and sources, as in meta.json.
    """

    def __init__(self, path: Path):
        self.path = path
        self.meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        self.fingerprint: str = self.meta["fingerprint"]
        self.tokenizer_fingerprint: str = self.meta["tokenizer_fingerprint"]
        self.pad_id: int = self.meta["pad_id"]
        self.eos_id: int = self.meta["eos_id"]
        self.num_docs: int = self.meta["num_docs"]
        self.num_tokens: int = self.meta["num_tokens"]
        shape = (self.num_tokens,)
        self.tokens = np.memmap(path / "tokens.bin", dtype=self.meta["dtype"], mode="r", shape=shape)
        self.offsets = np.load(path / "offsets.npy", mmap_mode="r")
        self.mask = np.memmap(path / "mask.bin", np.uint8, mode="r", shape=shape) if self.meta["masked"] else None

    @classmethod
    def open(cls, path: Path) -> TokenCache | None:
        """Open a cache folder; None if it is not there or its files do not have the sizes that it names."""
        try:
            cache = cls(path)
            whole = cache.offsets.shape == (cache.num_docs + 1,) and int(cache.offsets[-1]) == cache.num_tokens
            return cache if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def document(self, index: int) -> np.ndarray:
        """Give the token ids of one document, a view on the file."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def build_cache(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    encode: Encoder = encode_pretrain,
    on_bad_line: str = "error",
    log: Callable[[str], None] = print,
) -> TokenCache:
    """Tokenize JSONL files into a cache on disk, or open the one that is there.

    Args:
        paths: one or more JSONL files, one object per line; blank lines are passed over.
        tokenizer: its fingerprint is part of the key.
        cache_dir: where caches lie; default `.minimind_fast_cache` beside the first file, or, where that cannot be
            written, in the user's cache folder.
        encode: rows to documents.
        on_bad_line: "error" stops at the first unusable line, "skip" leaves such lines out and reports them.
        log: takes progress lines.

    Raises:
        DataError: a file is missing or empty, a line is unusable, no document is left, the disk is full.
    """
    if on_bad_line not in ("error", "skip"):
        raise ValueError(f"on_bad_line is {on_bad_line!r}: use 'error' or 'skip'")
    sources = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    if not sources:
        raise DataError("no data file given")
    for source in sources:
        _check_readable(source)
    folder = Path(cache_dir) if cache_dir is not None else _default_cache_dir(sources[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        states = [_file_state(source) for source in sources]
        hashes = [_content_hash(source, state, folder) for source, state in zip(sources, states, strict=True)]
        identity = [FORMAT_VERSION, hashes, tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eos_id, encode.name]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        final = folder / key
        cache = TokenCache.open(final)
        if cache is None:
            with _lock(folder / f"{key}.lock", log) as locked:
                cache = TokenCache.open(final)  # another process may have made it while this one waited
                if cache is None:
                    if locked:  # whatever lies aside now was left by a killed build
                        for stale in folder.glob(f"{key}.*.tmp"):
                            shutil.rmtree(stale, ignore_errors=True)
                    cache = _build(sources, states, tokenizer, final, encode, on_bad_line, log)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"the disk is full: no room for the token cache in {folder}; choose another cache_dir"
            ) from (error)
        raise DataError(f"cannot make the token cache in {folder}: {error}") from error
    bad = cache.meta["bad_lines"]
    if bad["count"] and on_bad_line == "error":  # made by an earlier run with "skip"
        raise DataError(bad["first"][0])
    if bad["count"]:
        log(f"left out {bad['count']:,} unusable lines, the first: {bad['first'][0]}")
    return cache


def read_rows(
    paths: Sequence[str | os.PathLike[str]],
    read: Callable[[dict[str, Any]], T | BadRow],
    *,
    on_bad_line: str = "error",
    log: Callable[[str], None] = print,
) -> Iterator[T]:
    """Give what `read` makes of each line of JSONL files, one by one, without holding a file in memory.

    Args:
        paths, on_bad_line, log: as for `build_cache`.
        read: takes a parsed line, gives what is wanted of it or what is wrong with it.

    Raises:
        DataError: a file is missing or empty, or a line is unusable.
    """
    sources = [Path(path) for path in paths]
    for source in sources:
        _check_readable(source)
    lines = _Lines(stop=on_bad_line == "error")
    for path, numbers, rows in _read_rows(sources, lines, log):
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
    """Give the non-empty texts of `{"text": ...}` JSONL files one by one.

    Args:
        paths, on_bad_line, log: as for `build_cache`.

    Raises:
        DataError: as `read_rows`.
    """
    texts = read_rows(paths, lambda row: string_field(row, "text"), on_bad_line=on_bad_line, log=log)
    return (text for text in texts if text.strip())


class _Lines:
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


def _build(
    sources: list[Path],
    states: list[list[int]],
    tokenizer: Tokenizer,
    final: Path,
    encode: Encoder,
    on_bad_line: str,
    log: Callable[[str], None],
) -> TokenCache:
    start = time.monotonic()
    aside = final.with_name(f"{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    aside.mkdir()
    try:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        lines = _Lines(stop=on_bad_line == "error")
        lengths: list[np.ndarray] = []
        num_empty = max_weight = 0
        with contextlib.ExitStack() as files:
            tokens_file = files.enter_context(open(aside / "tokens.bin", "wb"))
            mask_file = files.enter_context(open(aside / "mask.bin", "wb")) if encode.masked else None
            for path, numbers, rows in _read_rows(sources, lines, log):
                documents: list[Document] = []
                for number, result in zip(numbers, encode(rows, tokenizer), strict=True):
                    if isinstance(result, BadRow):
                        lines.bad(path, number, result.problem)
                        continue
                    num_empty += not result
                    documents += result
                sizes = np.fromiter((len(ids) for ids, _ in documents), np.int64, len(documents))
                lengths.append(sizes)
                total = int(sizes.sum())
                np.fromiter(chain.from_iterable(ids for ids, _ in documents), dtype, total).tofile(tokens_file)
                if mask_file:
                    weights = np.fromiter(chain.from_iterable(mask or () for _, mask in documents), np.uint8, total)
                    max_weight = max(max_weight, int(weights.max(initial=0)))
                    weights.tofile(mask_file)
            for file in (tokens_file, mask_file):
                if file:
                    _flush(file)
        offsets = np.concatenate([np.zeros(1, np.int64), *lengths]).cumsum()
        if offsets.size < 2:
            found = f"{lines.count:,} unusable and {num_empty:,} empty rows" if lines.count or num_empty else "no rows"
            first = f"; the first unusable: {lines.first[0]}" if lines.first else ""
            raise DataError(f"{', '.join(map(str, sources))}: no usable document, {found}{first}")
        if [_file_state(source) for source in sources] != states:
            raise DataError(
                f"{', '.join(map(str, sources))}: changed while being read; start again when it is complete"
            )
        with open(aside / "offsets.npy", "wb") as file:
            np.save(file, offsets)
            _flush(file)
        meta = {
            "fingerprint": final.name,
            "sources": [str(source.resolve()) for source in sources],
            "encoder": encode.name,
            "masked": encode.masked,
            "max_weight": max_weight if encode.masked else 1,
            "dtype": dtype.name,
            "num_docs": offsets.size - 1,
            "num_tokens": int(offsets[-1]),
            "num_empty": num_empty,
            "bad_lines": {"count": lines.count, "first": lines.first},
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "bos_id": tokenizer.bos_id,
            "eos_id": tokenizer.eos_id,
            "pad_id": tokenizer.pad_id,
        }
        with open(aside / "meta.json", "wb") as file:
            file.write(json.dumps(meta, ensure_ascii=False, indent=2).encode("utf-8"))
            _flush(file)
        cache = _publish(aside, final)
        seconds = time.monotonic() - start
        log(f"tokenized {cache.num_docs:,} documents, {cache.num_tokens:,} tokens in {seconds:.1f} s: {final}")
        return cache
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _publish(aside: Path, final: Path) -> TokenCache:
    """Rename the finished folder; where another process was first, take its result."""
    for _ in range(2):
        try:
            os.replace(aside, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
        if (cache := TokenCache.open(final)) is not None:
            return cache
        shutil.rmtree(final, ignore_errors=True)  # a damaged cache in our place
    raise DataError(f"cannot put the token cache at {final}: remove that folder and start again")


def _read_rows(
    sources: list[Path], lines: _Lines, log: Callable[[str], None]
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
    except (ValueError, RecursionError) as error:  # a number too long to read, objects nested too deep
        return BadRow(f"not usable JSON: {error}")
    if not isinstance(row, dict):
        return BadRow(f'{_json_type(row)}, not an object such as {{"text": "..."}}')
    return row


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _check_readable(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path} does not exist (seen from {Path.cwd()})")
    if not path.is_file():
        raise DataError(f"{path} is not a file: give the JSONL file itself")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path} cannot be read: you lack the permission")
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty")


def _default_cache_dir(source: Path) -> Path:
    beside = source.resolve().parent / CACHE_FOLDER
    try:
        beside.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=beside):
            return beside
    except OSError:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimind_fast"


def _file_state(path: Path) -> list[int]:
    state = path.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ino]


def _content_hash(path: Path, state: list[int], folder: Path) -> str:
    """SHA-256 of a file, remembered beside the caches as long as the file's state is the same."""
    name = hashlib.sha256(str(path.resolve()).encode("utf-8", "surrogateescape")).hexdigest()[:24]
    memo = folder / f"{name}.hash"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(memo.read_text(encoding="utf-8"))
        if known["state"] == state:
            return known["sha256"]
    now = time.time_ns()
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if now - state[1] > SETTLED_NS:
        aside = memo.with_name(f"{memo.name}.{os.getpid()}.tmp")
        aside.write_text(json.dumps({"state": state, "sha256": digest}), encoding="utf-8")
        os.replace(aside, memo)
    return digest


@contextlib.contextmanager
def _lock(path: Path, log: Callable[[str], None]) -> Iterator[bool]:
    """Hold a file lock, which the system drops if the process dies; False where there are no locks."""
    if fcntl is None:
        yield False
        return
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            log("another process is making this token cache: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        except OSError:  # a network file system without locks
            locked = False
        yield locked


def _flush(file: BinaryIO) -> None:
    """Put a file on the disk itself before the rename that declares it whole."""
    file.flush()
    os.fsync(file.fileno())
