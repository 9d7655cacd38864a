"""Batches from a token cache: documents packed end to end, or MiniMind's padded rows; resumable.

Purpose: spend no compute on padding. MiniMind's rows of 512 are 23% useful on its kind of text; packed micro-batches
are at least 99% useful, and `cu_seqlens` keeps documents apart.

Principle: a document of n tokens has n - 1 positions (inputs ids[:-1], targets ids[1:]). It is cut into pieces of at
most max_seq_len positions; neighbouring pieces share one token, so each token but the first is a target exactly once.
An epoch's plan shuffles the pieces by (seed, epoch) and fills micro-batches in that order; when the next piece does not
fit, the gap is filled with the best-fitting pieces from a look-ahead window. The plan does not depend on ranks:
micro-batch i goes to rank i mod world_size. The position counts micro-batches consumed by all ranks, so a run can resume
with any number of ranks.

Properties: a plan takes about 1 us per piece; a batch is two vectorised gathers from the memory map, no loop per token.
Shuffling uses raw Philox output, which NumPy guarantees to be stable, so a stored position stays valid.

T: positions in a packed batch, B: rows, L: positions in a row.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.data.batches import Batch, Batches, Position
from minimind_fast.data.cache import Document, Encoder, PretrainEncoder, TokenCache, build_cache, encode_pretrain
from minimind_fast.data.rows import BadRow, read_texts, string_field
from minimind_fast.errors import DataError, UserError

__all__ = [
    "BadRow", "Batch", "Batches", "DataError", "Document", "Encoder", "PackedBatches", "PaddedBatches",
    "Prefetcher", "PretrainEncoder", "TokenCache", "build_cache", "cut_pieces", "encode_pretrain", "read_texts",
    "string_field",
]  # fmt: skip

# Pieces that may be pulled forward to fill a gap. Larger windows fill no better and stray further from the shuffled order.
LOOK_AHEAD_PIECES = 1024
PLAN_VERSION = 1  # stored with the position: raise it when the same seed yields a different plan
MASK_SCAN_PIECES = 1 << 14


def cut_pieces(offsets: np.ndarray, max_seq_len: int, truncate: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most max_seq_len positions.

    Args:
        offsets: (num_docs + 1,) int64 bounds of the documents in tokens.
        max_seq_len: positions; a full piece reads max_seq_len + 1 tokens.
        truncate: keep only the first piece of each document.

    Returns:
        starts (P,) int64: a piece's first token; lengths (P,) int64: its positions. Documents of fewer than 2 tokens
        yield none.
    """
    positions = np.diff(offsets) - 1
    counts = np.maximum(-(-positions // max_seq_len), 0)
    if truncate:
        counts = np.minimum(counts, 1)
    document = np.repeat(np.arange(positions.size), counts)
    index = np.arange(document.size) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[:-1][document] + index * max_seq_len
    return starts, np.minimum(positions[document] - index * max_seq_len, max_seq_len)


class _Source:
    """An epoch's plan and each rank's share of it; subclasses fill the micro-batches."""

    def __init__(self, cache: TokenCache, rank: int, world_size: int, identity: dict[str, Any]):
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is not among the {world_size} ranks 0 to {world_size - 1}")
        self.cache = cache
        self.rank = rank
        self.world_size = world_size
        self.position = Position({"data": cache.fingerprint, "plan": PLAN_VERSION, **identity}, "batch")
        self._planned: tuple[int, list[np.ndarray]] | None = None
        self._num_planned: dict[int, int] = {}

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        raise NotImplementedError

    def _assemble(self, items: np.ndarray) -> Batch:
        raise NotImplementedError

    def _size(self, items: np.ndarray) -> int:
        raise NotImplementedError

    def plan(self, epoch: int) -> list[np.ndarray]:
        """Return the epoch's micro-batches, over all ranks, each as the indices of its pieces or rows."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._make_plan(epoch))
        return self._planned[1]

    def num_batches(self, epoch: int) -> int:
        """Return the number of micro-batches per rank in a whole epoch, equal on all ranks."""
        if epoch not in self._num_planned:  # for future epochs keep the count, not the plan
            self._num_planned[epoch] = len(self.plan(epoch))
        return -(-self._num_planned[epoch] // self.world_size)

    def num_left(self) -> int:
        """Return the number of micro-batches per rank left in the current epoch."""
        return -(-(len(self.plan(self.position.epoch)) - self.position.next) // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield this rank's micro-batches from the current position to the end of the epoch."""
        epoch = self.position.epoch
        plan = self.plan(epoch)
        while self.position.epoch == epoch:
            share = plan[self.position.next : self.position.next + self.world_size]
            if len(share) < self.world_size:
                share = self._spread(share)
            batch = self._assemble(share[self.rank])
            self.position.advance(self.world_size, len(plan))
            yield batch

    def _spread(self, share: list[np.ndarray]) -> list[np.ndarray]:
        """Divide an epoch's last few micro-batches among all ranks: halve the largest until there are enough."""
        share = list(share)
        while len(share) < self.world_size:
            largest = max(range(len(share)), key=lambda i: (share[i].size > 1, self._size(share[i])))
            items = share[largest]
            # Every second piece: two halves of similar size. A single piece leaves an empty second half, which becomes
            # one ignored position, so every rank still takes a step.
            share[largest] = items[::2]
            share.append(items[1::2])
        return share

    def _dummy(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full(shape, self.cache.pad_id), torch.full(shape, IGNORE_INDEX)

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed out, and the identity of the data."""
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position, stored by any number of ranks.

        Raises:
            ValueError: the state belongs to other data or settings.
        """
        self.position.load_state_dict(state)


class PackedBatches(_Source):
    """Micro-batches of whole documents laid end to end, without padding.

    Args:
        cache: the tokenized documents.
        batch_tokens: most positions in a micro-batch.
        max_seq_len: most positions in a piece; longer documents are cut (or truncated).
        seed: decides the order, together with the epoch.
        rank, world_size: select this process's share.
        truncate: drop what exceeds max_seq_len instead of cutting it into further pieces.
        shuffle: False keeps the file's order, except for gap filling.

    Raises:
        ValueError: inconsistent settings; DataError: no document has two tokens (or, with a mask, a target).
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        batch_tokens: int,
        max_seq_len: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        truncate: bool = False,
        shuffle: bool = True,
    ):
        if not 1 <= max_seq_len <= batch_tokens:
            raise UserError(f"max_seq_len {max_seq_len} must lie between 1 and the {batch_tokens} tokens of a batch")
        identity = {"kind": "packed", "seed": seed, "batch_tokens": batch_tokens, "max_seq_len": max_seq_len}
        super().__init__(cache, rank, world_size, identity | {"truncate": truncate, "shuffle": shuffle})
        self.batch_tokens, self.max_seq_len, self.seed = batch_tokens, max_seq_len, seed
        self.shuffle = shuffle
        self._starts, self._lengths = cut_pieces(np.asarray(cache.offsets), max_seq_len, truncate)
        self.num_short_docs = int((np.diff(cache.offsets) < 2).sum())
        self.total_targets = int(self._lengths.sum())
        self.num_without_targets = 0
        if cache.mask is not None:  # drop pieces without a target
            targets = self._count_targets(cache.mask)
            keep = self._trains(targets)
            self._starts, self._lengths = self._starts[keep], self._lengths[keep]
            self.total_targets = int(targets[keep].sum())
            self.num_without_targets = int((~keep).sum())
        if not self._lengths.size:
            raise DataError(f"{', '.join(cache.meta['sources'])}: no document with at least one target")
        # Bound the pieces per batch so that CUDA graphs see few distinct counts; twice the mean is seldom reached.
        self._max_docs = 2 * int(np.ceil(batch_tokens / self._lengths.mean())) + 16

    @property
    def num_pieces(self) -> int:
        """Pieces in an epoch, over all ranks."""
        return self._lengths.size

    def _trains(self, targets: np.ndarray) -> np.ndarray:
        """Return which pieces to keep, given their numbers of targets."""
        return targets > 0

    def _count_targets(self, mask: np.ndarray) -> np.ndarray:
        counts = np.zeros(self._lengths.size, np.int64)
        for begin in range(0, counts.size, MASK_SCAN_PIECES):
            part = slice(begin, begin + MASK_SCAN_PIECES)
            ends = np.cumsum(self._lengths[part])
            places = _places(self._starts[part], self._lengths[part], ends) + 1
            counted = np.take(mask, places) > 0
            counts[part] = np.add.reduceat(counted, ends - self._lengths[part], dtype=np.int64)
        return counts

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        return self._pack_shuffled(epoch, self._lengths, self._max_docs)

    def _pack_shuffled(self, epoch: int, lengths: np.ndarray, max_items: int) -> list[np.ndarray]:
        order = _shuffled(lengths.size, self.seed, epoch) if self.shuffle else np.arange(lengths.size)
        return _pack(lengths[order], order, self.batch_tokens, max_items)

    def _size(self, items: np.ndarray) -> int:
        return int(self._lengths[items].sum())

    def _assemble(self, items: np.ndarray) -> Batch:
        starts, lengths = self._starts[items], self._lengths[items]
        ends = np.cumsum(lengths)
        places = _places(starts, lengths, ends)
        num_positions = places.size
        width = max(num_positions, 1)  # a rank without a piece gets one ignored position
        input_ids, targets = self._dummy((width,))
        tokens, mask = self.cache.tokens, self.cache.mask
        input_ids[:num_positions] = torch.from_numpy(np.take(tokens, places).astype(np.int64))
        places += 1
        next_ids = np.take(tokens, places).astype(np.int64)
        weights, num_targets = None, num_positions
        if mask is not None:
            weight = np.take(mask, places)
            next_ids[weight == 0] = IGNORE_INDEX
            num_targets = int(np.count_nonzero(weight))
            if self.cache.meta["max_weight"] > 1:
                weights = torch.zeros(width)
                weights[:num_positions] = torch.from_numpy(weight.astype(np.float32))
        targets[:num_positions] = torch.from_numpy(next_ids)

        bounds = np.concatenate([np.zeros(1, np.int64), ends if num_positions else np.ones(1, np.int64)])
        cu, max_seqlen = torch.from_numpy(bounds.astype(np.int32)), int(lengths.max(initial=1))
        return Batch(input_ids, targets, cu, max_seqlen, num_targets, items.size, weights)


class PaddedBatches(_Source):
    """MiniMind's rows: shuffled each epoch, truncated at max_seq_len tokens, padded to max_seq_len - 1 positions.

    Args:
        cache: the tokenized documents.
        batch_size: rows in a micro-batch.
        max_seq_len: tokens in a row, including bos and eos; a truncated pretraining row still ends with eos.
        rank, world_size: select this process's share.
        seed: decides the order, together with the epoch; None keeps the file's.
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        batch_size: int,
        max_seq_len: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
    ):
        if batch_size < 1 or max_seq_len < 2:
            raise UserError(f"batch_size {batch_size} must be at least 1 and max_seq_len {max_seq_len} at least 2")
        identity: dict[str, Any] = {"kind": "padded", "batch_size": batch_size, "max_seq_len": max_seq_len}
        super().__init__(cache, rank, world_size, identity | {"seed": seed})
        self.batch_size, self.max_seq_len, self.seed = batch_size, max_seq_len, seed
        sizes = np.diff(cache.offsets)
        self._rows = np.flatnonzero(sizes >= 2)
        self.num_short_docs = cache.num_docs - self._rows.size
        if not self._rows.size:
            raise DataError(f"{', '.join(cache.meta['sources'])}: no document of at least two tokens")

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        rows = self._rows if self.seed is None else self._rows[_shuffled(self._rows.size, self.seed, epoch)]
        return np.split(rows, np.arange(self.batch_size, rows.size, self.batch_size))

    def _size(self, items: np.ndarray) -> int:
        return items.size

    def _assemble(self, items: np.ndarray) -> Batch:
        input_ids, targets = self._dummy((max(items.size, 1), self.max_seq_len - 1))
        mask = self.cache.mask
        weights = torch.zeros(targets.shape) if mask is not None and self.cache.meta["max_weight"] > 1 else None
        for row, document in enumerate(items):
            begin, end = int(self.cache.offsets[document]), int(self.cache.offsets[document + 1])
            stop = min(end, begin + self.max_seq_len)
            ids = self.cache.tokens[begin:stop].astype(np.int64)
            next_ids = ids[1:].copy()
            if mask is not None:
                weight = mask[begin + 1 : stop]
                next_ids[weight == 0] = IGNORE_INDEX
                if weights is not None:
                    weights[row, : next_ids.size] = torch.from_numpy(weight.astype(np.float32))
            elif stop < end:
                next_ids[-1] = self.cache.eos_id
            input_ids[row, : next_ids.size] = torch.from_numpy(ids[:-1])
            targets[row, : next_ids.size] = torch.from_numpy(next_ids)
        num_targets = int((targets != IGNORE_INDEX).sum())
        return Batch(input_ids, targets, None, self.max_seq_len - 1, num_targets, items.size, weights)


class Prefetcher:
    """Assembles the next batches in a background thread; its position is that of the last batch handed out.

    Args:
        source: data source, owned by the prefetcher from here on.
        depth: batches prepared ahead.
        pin: copy batches into page-locked memory; default: if there is a GPU.
    """

    def __init__(self, source: Batches, depth: int = 2, pin: bool | None = None):
        self.source = source
        self.depth = depth
        self.pin = torch.cuda.is_available() if pin is None else pin
        self._state = source.state_dict()

    def num_batches(self, epoch: int) -> int:
        """Return the number of micro-batches per rank in a whole epoch."""
        return self.source.num_batches(epoch)

    def num_left(self) -> int:
        """Return the number of micro-batches per rank left in the current epoch; not while iterating."""
        return self.source.num_left()

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a stored position; not while iterating."""
        self.source.load_state_dict(state)
        self._state = self.source.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the epoch; exceptions of the source are re-raised here."""
        results: queue.Queue[Any] = queue.Queue(maxsize=self.depth)
        stop = threading.Event()

        def put(item: Any) -> bool:
            while not stop.is_set():
                try:
                    results.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def work() -> None:
            try:
                for batch in self.source:
                    if not put((batch.pin_memory() if self.pin else batch, self.source.state_dict())):
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="prefetch", daemon=True)
        thread.start()
        try:
            while (item := results.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                batch, self._state = item
                yield batch
        finally:
            stop.set()
            thread.join()
            self.source.load_state_dict(self._state)  # the thread had run ahead


def _shuffled(size: int, seed: int, epoch: int) -> np.ndarray:
    """An order of `size` items."""
    key = np.array([seed % 2**64, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def _places(starts: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the token-file index of every position of the given pieces, in order."""
    return np.arange(ends[-1] if ends.size else 0) + np.repeat(starts - (ends - lengths), lengths)


def _pack(lengths: np.ndarray, names: np.ndarray, capacity: int, max_items: int) -> list[np.ndarray]:
    """Fill bins in the given order, and each bin's gap with the best-fitting of the next LOOK_AHEAD_PIECES.

    Args:
        lengths: (P,) positions of the pieces in order, each at least 1 and at most `capacity`.
        names: (P,) their ids in the result.
        capacity, max_items: most positions and pieces in a bin.

    Returns:
        The bins, each an array of names.
    """
    # Pieces in the window by length, oldest first. Bit n of `present` is set if length n occurs, so the largest length
    # that fits takes one shift and one bit_length.
    size: list[int] = lengths.tolist()
    waiting: dict[int, deque[int]] = {}
    present = 0
    taken = bytearray(len(size))
    chosen: list[int] = []
    bounds: list[int] = []
    head = tail = 0
    while head < len(size):
        gap, first = capacity, len(chosen)
        in_order = True
        while gap and len(chosen) - first < max_items:
            while tail < len(size) and tail < head + LOOK_AHEAD_PIECES:
                length = size[tail]
                waiting.setdefault(length, deque()).append(tail)
                present |= 1 << length
                tail += 1
            while head < len(size) and taken[head]:
                head += 1
            if head == len(size):
                break
            length = size[head]
            in_order = in_order and length <= gap
            if not in_order:
                fitting = present & ((2 << gap) - 1)
                if not fitting:
                    break
                length = fitting.bit_length() - 1
            same_length = waiting[length]
            piece = same_length.popleft()  # the oldest of its length; when filling in order, the head itself
            if not same_length:
                present ^= 1 << length
            taken[piece] = 1
            chosen.append(piece)
            gap -= length
        if len(chosen) > first:
            bounds.append(len(chosen))
    return np.split(names[np.asarray(chosen, np.int64)], bounds[:-1])
