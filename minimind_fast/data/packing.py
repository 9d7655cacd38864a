"""Batches from a token cache: documents packed end to end, or MiniMind's padded rows; resumable.

Purpose: feed the model useful tokens only. MiniMind's rows of 512 are 23% useful on its kind of text; packed
micro-batches are at least 99% useful, and `cu_seqlens` keeps documents apart.

Principle: a document of n tokens has n - 1 positions (inputs ids[:-1], targets ids[1:]). It is cut into pieces of at
most max_seq_len positions; neighbouring pieces share one token, so each token but the first is a target exactly once.
An epoch's plan shuffles the pieces by (seed, epoch) and fills micro-batches in that order; a gap that the next piece
does not fit is filled with the best fitting pieces from a look-ahead window. The plan knows nothing of ranks:
micro-batch i goes to rank i mod world_size. The position is the number of micro-batches that all ranks have used, so it
can be taken up by any number of ranks.

Properties: a plan takes about 1 us a piece; a batch is two vectorised gathers from the memory map, no loop per token.
Shuffling uses raw Philox output, which NumPy promises to keep, so a stored position stays valid.

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
from minimind_fast.data.rows import BadRow, DataError, read_texts, string_field

__all__ = [
    "BadRow", "Batch", "Batches", "DataError", "Document", "Encoder", "PackedBatches", "PaddedBatches",
    "Prefetcher", "PretrainEncoder", "TokenCache", "build_cache", "cut_pieces", "encode_pretrain", "read_texts",
    "string_field",
]  # fmt: skip

# Pieces that may be pulled forward to fill a gap. On pretrain_real.jsonl at 2,048 positions a batch: see tests; larger
# windows fill no better and stray further from the shuffled order.
LOOK_AHEAD_PIECES = 1024
PLAN_VERSION = 1  # part of the stored position: raise it when the same seed gives another plan
MASK_SCAN_PIECES = 1 << 14


def cut_pieces(offsets: np.ndarray, max_seq_len: int, truncate: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Cut documents into pieces of at most max_seq_len positions.

    Args:
        offsets: (num_docs + 1,) int64 bounds of the documents in tokens.
        max_seq_len: positions; such a piece reads max_seq_len + 1 tokens.
        truncate: keep only the first piece of each document.

    Returns:
        starts (P,) int64: a piece's first token; lengths (P,) int64: its positions. Documents of fewer than 2 tokens
        give none.
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
    """An epoch's plan and the ranks' shares of it; what a micro-batch holds is for the subclasses."""

    def __init__(self, cache: TokenCache, rank: int, world_size: int, identity: dict[str, Any]):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not among the {world_size} ranks 0 to {world_size - 1}")
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
        """Give the epoch's micro-batches, for all ranks together, each as the numbers of its pieces or rows."""
        if self._planned is None or self._planned[0] != epoch:
            self._planned = (epoch, self._make_plan(epoch))
        return self._planned[1]

    def num_batches(self, epoch: int) -> int:
        """Give the micro-batches that each rank gets in a whole epoch, the same number for all."""
        if epoch not in self._num_planned:  # asked for epochs to come, when only their number matters
            self._num_planned[epoch] = len(self.plan(epoch))
        return -(-self._num_planned[epoch] // self.world_size)

    def num_left(self) -> int:
        """Give the micro-batches that each rank still gets in the current epoch."""
        return -(-(len(self.plan(self.position.epoch)) - self.position.next) // self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        """Give this rank's micro-batches from the current position to the end of the epoch, then stop."""
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
        """Divide an epoch's last, too few micro-batches among all ranks: halve the largest until there are enough."""
        share = list(share)
        while len(share) < self.world_size:
            largest = max(range(len(share)), key=lambda i: (share[i].size > 1, self._size(share[i])))
            items = share[largest]
            # Every second piece: two halves of similar size. A single piece leaves an empty second half, which
            # becomes one ignored position, so that no rank waits for another.
            share[largest] = items[::2]
            share.append(items[1::2])
        return share

    def _dummy(self, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full(shape, self.cache.pad_id), torch.full(shape, IGNORE_INDEX)

    def state_dict(self) -> dict[str, Any]:
        """Give the position after the last batch that was handed out, and what it is a position in."""
        return self.position.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position, stored by any number of ranks.

        Raises:
            ValueError: it belongs to other data or other settings.
        """
        self.position.load_state_dict(state)


class PackedBatches(_Source):
    """Micro-batches of whole documents laid end to end, without padding.

    Args:
        cache: the tokenized documents.
        batch_tokens: positions in a micro-batch, at most.
        max_seq_len: positions in a piece, at most; longer documents are cut (or truncated).
        seed: decides the order, together with the epoch.
        rank, world_size: this process's share.
        truncate: drop what exceeds max_seq_len instead of cutting it into further pieces.
        shuffle: False keeps the file's order, except for gap filling.

    Raises:
        ValueError: settings that cannot be; DataError: no document has two tokens (or, with a mask, a target).
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
            raise ValueError(f"max_seq_len {max_seq_len} must lie between 1 and the {batch_tokens} tokens of a batch")
        identity = {"kind": "packed", "seed": seed, "batch_tokens": batch_tokens, "max_seq_len": max_seq_len}
        super().__init__(cache, rank, world_size, identity | {"truncate": truncate, "shuffle": shuffle})
        self.batch_tokens, self.max_seq_len, self.seed = batch_tokens, max_seq_len, seed
        self.shuffle = shuffle
        self._starts, self._lengths = cut_pieces(np.asarray(cache.offsets), max_seq_len, truncate)
        self.num_short_docs = int((np.diff(cache.offsets) < 2).sum())
        self.total_targets = int(self._lengths.sum())
        self.num_without_targets = 0
        if cache.mask is not None:  # a piece that trains nothing would only cost time
            targets = self._count_targets(cache.mask)
            keep = self._trains(targets)
            self._starts, self._lengths = self._starts[keep], self._lengths[keep]
            self.total_targets = int(targets[keep].sum())
            self.num_without_targets = int((~keep).sum())
        if not self._lengths.size:
            raise DataError(f"{', '.join(cache.meta['sources'])}: no document with at least one target")
        # A bound on the pieces of a batch, so that CUDA graphs meet few numbers of them; twice the mean is seldom reached.
        self._max_docs = 2 * int(np.ceil(batch_tokens / self._lengths.mean())) + 16

    @property
    def num_pieces(self) -> int:
        """Pieces in an epoch, over all ranks."""
        return self._lengths.size

    def _trains(self, targets: np.ndarray) -> np.ndarray:
        """Say which pieces stay, by their numbers of targets."""
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
        order = np.arange(lengths.size)
        if self.shuffle:
            key = np.array([self.seed % 2**64, epoch], np.uint64)
            keys = np.random.Philox(key=key).random_raw(order.size)
            order = np.argsort(keys, kind="stable")
        return _pack(lengths[order], order, self.batch_tokens, max_items)

    def _size(self, items: np.ndarray) -> int:
        return int(self._lengths[items].sum())

    def _assemble(self, items: np.ndarray) -> Batch:
        starts, lengths = self._starts[items], self._lengths[items]
        ends = np.cumsum(lengths)
        places = _places(starts, lengths, ends)
        num_positions = places.size
        width = max(num_positions, 1)  # a rank that was left without a piece gets one ignored position
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
    """MiniMind's own rows: file order, cut off at max_seq_len tokens, padded to max_seq_len - 1 positions.

    Args:
        cache: the tokenized documents.
        batch_size: rows in a micro-batch.
        max_seq_len: tokens in a row, bos and eos included; a pretraining row that is cut off still ends with eos.
        rank, world_size: this process's share.
    """

    def __init__(self, cache: TokenCache, *, batch_size: int, max_seq_len: int, rank: int = 0, world_size: int = 1):
        if batch_size < 1 or max_seq_len < 2:
            raise ValueError(f"batch_size {batch_size} must be at least 1 and max_seq_len {max_seq_len} at least 2")
        super().__init__(
            cache, rank, world_size, {"kind": "padded", "batch_size": batch_size, "max_seq_len": max_seq_len}
        )
        self.batch_size, self.max_seq_len = batch_size, max_seq_len
        sizes = np.diff(cache.offsets)
        self._rows = np.flatnonzero(sizes >= 2)
        self.num_short_docs = cache.num_docs - self._rows.size
        if not self._rows.size:
            raise DataError(f"{', '.join(cache.meta['sources'])}: no document of at least two tokens")

    def _make_plan(self, epoch: int) -> list[np.ndarray]:
        return np.split(self._rows, np.arange(self.batch_size, self._rows.size, self.batch_size))

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
        source: the batches; not to be used by others meanwhile.
        depth: batches made ahead.
        pin: copy batches into page-locked memory; default: when a GPU is there.
    """

    def __init__(self, source: Batches, depth: int = 2, pin: bool | None = None):
        self.source = source
        self.depth = depth
        self.pin = torch.cuda.is_available() if pin is None else pin
        self._state = source.state_dict()

    def num_batches(self, epoch: int) -> int:
        """Give the micro-batches that each rank gets in a whole epoch."""
        return self.source.num_batches(epoch)

    def num_left(self) -> int:
        """Give the micro-batches that each rank still gets in the current epoch; not while iterating."""
        return self.source.num_left()

    def state_dict(self) -> dict[str, Any]:
        """Give the position after the last batch that was handed out."""
        return self._state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a stored position; not while iterating."""
        self.source.load_state_dict(state)
        self._state = self.source.state_dict()

    def __iter__(self) -> Iterator[Batch]:
        """Give the rest of the epoch; an exception of the source is raised here."""
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


def _places(starts: np.ndarray, lengths: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Give the places in the token file of all positions of some pieces, in order."""
    return np.arange(ends[-1] if ends.size else 0) + np.repeat(starts - (ends - lengths), lengths)


def _pack(lengths: np.ndarray, names: np.ndarray, capacity: int, max_items: int) -> list[np.ndarray]:
    """Fill bins in the given order, and each bin's gap with the best fitting of the next LOOK_AHEAD_PIECES.

    Args:
        lengths: (P,) positions of the pieces in order, each at least 1 and at most `capacity`.
        names: (P,) what to call them in the result.
        capacity, max_items: of one bin.

    Returns:
        The bins, each an array of names.
    """
    # Pieces in the window by length, oldest first; bit n of `present` says that length n is there, so that the largest
    # length that fits is one shift and one bit_length away.
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
            piece = same_length.popleft()  # the oldest of its length; in order, that is the head itself
            if not same_length:
                present ^= 1 << length
            taken[piece] = 1
            chosen.append(piece)
            gap -= length
        if len(chosen) > first:
            bounds.append(len(chosen))
    return np.split(names[np.asarray(chosen, np.int64)], bounds[:-1])
