"""The token cache: JSONL files become one memory-mapped file of token ids, built once and reused.

Purpose: tokenizing a corpus takes minutes and should not be repeated at every start, on every rank or for every epoch.
Each stage supplies an encoder (row -> documents of ids, with per-token weights if not all are targets).

Principle: the cache's name is a hash of what decides its content: the bytes of the files, the tokenizer's rules, the
encoder's name. It is built in a temporary folder and renamed when complete, so a folder with the final name is whole.
tokens.bin holds the documents end to end; document i is tokens[offsets[i]:offsets[i + 1]].

Properties: 2 bytes per token on disk (4 above 65,536 entries). The build streams one chunk of lines at a time. Two
processes that start together build once: the second waits for the lock; without file locks both build and the first
rename wins. A known file (path, size, mtime, inode) is not hashed again.
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
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from minimind_fast.data.containers import expand
from minimind_fast.data.formats import Formats
from minimind_fast.data.rows import BadRow, Lines, read_chunks, string_field
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.errors import DataError, UserError

try:
    import fcntl
except ImportError:  # not POSIX: no locks, but the atomic rename still keeps the cache whole
    fcntl = None

FORMAT_VERSION = 1
# A file modified less than this before hashing could change again without its time stamp moving.
SETTLED_NS = 2_000_000_000
CACHE_FOLDER = ".minimind_fast_cache"


Document = tuple[Sequence[int], Sequence[int] | None]  # token ids, and the weight (0-255) of each as a target


class Encoder(Protocol):
    """Turns rows into documents. `name` is part of the cache key: change it when the documents change."""

    name: str
    kind: str  # of rows, for `Formats`: "text", "chats" or "pairs"
    masked: bool  # every document comes with weights
    # It may have `notes() -> list[str]`: what the log says of the rows it has encoded.

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[list[Document] | BadRow]:
        """Return, for each row, its documents (none if the row is empty) or what is wrong with it."""
        ...


class PretrainEncoder:
    """`{"text": ...}` to bos + text + eos, every token a target; an empty text gives no document."""

    name = "pretrain-1"
    kind = "text"
    masked = False

    def __call__(self, rows: list[dict[str, Any]], tokenizer: Tokenizer) -> list[list[Document] | BadRow]:
        """Return one document for each non-empty row."""
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
        fingerprint: the cache key; equal for the same files, tokenizer and encoder.
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
        """Open a cache folder; None if it is missing or its files have the wrong sizes."""
        try:
            cache = cls(path)
            whole = cache.offsets.shape == (cache.num_docs + 1,) and int(cache.offsets[-1]) == cache.num_tokens
            return cache if whole else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def document(self, index: int) -> np.ndarray:
        """Return the token ids of one document, a view of the file."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def build_cache(
    paths: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    encode: Encoder = encode_pretrain,
    on_bad_line: str = "error",
    data_format: str = "auto",
    log: Callable[[str], None] = print,
) -> TokenCache:
    """Tokenize files of rows into a cache on disk, or open an existing one.

    Args:
        paths: one or more files, folders or globs; JSONL, or what `containers` opens.
        tokenizer: its fingerprint is part of the key.
        cache_dir: folder for caches; default `.minimind_fast_cache` beside the first file, or the user's cache folder
            if that is not writable.
        encode: rows to documents.
        on_bad_line: "error" stops at the first unusable line, "skip" skips and reports such lines.
        data_format: the format of the rows, one of `formats.NAMES`, or "auto" to recognise it.
        log: called with each progress line.

    Raises:
        DataError: a file is missing or empty, a line is unusable, no documents remain, or the disk is full.
    """
    if on_bad_line not in ("error", "skip"):
        raise UserError(f"on_bad_line is {on_bad_line!r}: use 'error' or 'skip'")
    sources = [Path(paths)] if isinstance(paths, (str, os.PathLike)) else [Path(path) for path in paths]
    if not sources:
        raise DataError("no data file given")
    formats = Formats(encode.kind, data_format)
    sources = expand(sources)
    folder = Path(cache_dir) if cache_dir is not None else _default_cache_dir(sources[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        states = [_file_state(source) for source in sources]
        hashes = [_content_hash(source, state, folder) for source, state in zip(sources, states, strict=True)]
        identity = [FORMAT_VERSION, hashes, tokenizer.fingerprint, tokenizer.bos_id, tokenizer.eos_id, encode.name]
        identity += [data_format] if data_format != "auto" else []
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
        final = folder / key
        cache = TokenCache.open(final)
        if cache is not None:
            for line in cache.meta.get("formats", []):
                log(line)
        else:
            with _lock(folder / f"{key}.lock", log) as locked:
                cache = TokenCache.open(final)  # another process may have built it while this one waited
                if cache is None:
                    if locked:  # any temporary folder here is left over from a killed build
                        for stale in folder.glob(f"{key}.*.tmp"):
                            shutil.rmtree(stale, ignore_errors=True)
                    cache = _build(sources, states, tokenizer, final, encode, on_bad_line, formats, log)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DataError(
                f"the disk is full: no room for the token cache in {folder}; choose another cache_dir"
            ) from (error)
        raise DataError(f"cannot make the token cache in {folder}: {error}") from error
    bad = cache.meta["bad_lines"]
    if bad["count"] and on_bad_line == "error":  # built by an earlier run with "skip"
        raise DataError(bad["first"][0])
    if bad["count"]:
        log(f"left out {bad['count']:,} unusable lines, the first: {bad['first'][0]}")
    for line in cache.meta.get("notes", []):
        log(line)
    return cache


def _build(
    sources: list[Path],
    states: list[list[int]],
    tokenizer: Tokenizer,
    final: Path,
    encode: Encoder,
    on_bad_line: str,
    formats: Formats,
    log: Callable[[str], None],
) -> TokenCache:
    start = time.monotonic()
    aside = final.with_name(f"{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    aside.mkdir()
    try:
        dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        lines = Lines(stop=on_bad_line == "error")
        lengths: list[np.ndarray] = []
        num_empty = max_weight = 0
        with contextlib.ExitStack() as files:
            tokens_file = files.enter_context(open(aside / "tokens.bin", "wb"))
            mask_file = files.enter_context(open(aside / "mask.bin", "wb")) if encode.masked else None
            for path, places, rows in read_chunks(sources, lines, formats, log):
                documents: list[Document] = []
                for place, result in zip(places, encode(rows, tokenizer), strict=True):
                    if isinstance(result, BadRow):
                        lines.bad(path, place, result.problem)
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
        notes = encode.notes() if hasattr(encode, "notes") else []  # type: ignore[attr-defined]
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
            "formats": formats.said,
            "notes": notes,
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
    """Rename the finished folder; if another process was first, use its result."""
    for _ in range(2):
        try:
            os.replace(aside, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
        if (cache := TokenCache.open(final)) is not None:
            return cache
        shutil.rmtree(final, ignore_errors=True)  # a damaged cache is in the way
    raise DataError(f"cannot put the token cache at {final}: remove that folder and start again")


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
    """SHA-256 of a file, remembered beside the caches until the file changes."""
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
    """Hold a file lock, released by the OS if the process dies; yields False where locks are unsupported."""
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
        except OSError:  # network file system without locks
            locked = False
        yield locked


def _flush(file: BinaryIO) -> None:
    """Flush a file to disk before the rename that declares it complete."""
    file.flush()
    os.fsync(file.fileno())
