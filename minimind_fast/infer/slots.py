"""Continuous batching over one KV cache of fixed size: rows join and leave between tokens.

Purpose: `Slots` is the server's decoder: rows join by `join`, or in pieces by `begin_piece`, and `leave`.
Principle: running rows are the first ones of the cache, so a step works on a plain view of it. A leaving row is replaced by
    the last one: one copy, of that row's length. Each number of rows has its own `Decoder` over its view of the cache,
    kept for reuse, with the fastest step for the device.
Properties: serving allocates only what a step needs. A freed row is wiped, so no answer sees another's text or a NaN it
    left. A row's tokens do not depend on other rows, except for matmul rounding, which varies with the batch size.

Shapes: B running rows, R rows of the cache, S slots, V vocab.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minimind_fast.infer.decode import Decoder, new_cache
from minimind_fast.infer.decode_cpu import Packs
from minimind_fast.model import MiniMind


class Slots:
    """Rows in flight.

    Args:
        model: in evaluation mode.
        rows: R, the maximum running at once.
        slots: S, the maximum tokens per row.
    """

    def __init__(self, model: MiniMind, rows: int, slots: int) -> None:
        self.model, self.rows, self.slots = model, rows, slots
        self.cache = new_cache(model, rows, slots)
        self.lengths: list[int] = []  # of the running rows
        self.staged = 0  # tokens so far of a prompt that arrives in pieces, in the row after the running ones
        self._decoders: dict[int, Decoder] = {}
        self._packs, self._graphs = Packs(), {}

    @property
    def free(self) -> int:
        """Number of rows that can still join."""
        return self.rows - len(self.lengths) - bool(self.staged)

    def _behind(self, count: int) -> Decoder:
        """A decoder for `count` rows after the running ones."""
        begin = len(self.lengths)
        return Decoder(self.model, count, self.slots, self.cache[:, begin : begin + count])

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Run whole prompts and append their rows to the batch.

        Args:
            prompts: at most `free` lists of token ids.

        Returns:
            (len(prompts), V) logits of the token after each.
        """
        assert len(prompts) <= self.free and not self.staged
        logits = self._behind(len(prompts)).prefill_piece(prompts)
        self.lengths += map(len, prompts)
        return logits

    def begin_piece(self, piece: Sequence[int], last: bool) -> Tensor:
        """Run the next piece of one prompt; other rows may step between pieces.

        Args:
            piece: token ids.
            last: the prompt is complete with this piece, and its row joins the batch.

        Returns:
            (1, V) logits of the token after the piece.
        """
        assert self.staged or self.free
        logits = self._behind(1).prefill_piece([piece], self.staged)
        self.staged += len(piece)
        if last:
            self.lengths.append(self.staged)
            self.staged = 0
        return logits

    def step(self, ids: Tensor) -> Tensor:
        """Run one token in each running row.

        Args:
            ids: (B,) int64.

        Returns:
            (B, V) logits of the next token.
        """
        count = len(self.lengths)
        if count not in self._decoders:
            shared = self.cache[:, :count], self._packs, self._graphs
            self._decoders[count] = Decoder(self.model, count, self.slots, *shared)
        decoder = self._decoders[count]
        decoder.lengths = self.lengths
        decoder.positions = torch.tensor(self.lengths, device=self.cache.device)
        logits = decoder.step(ids)
        self.lengths = decoder.lengths
        return logits

    def leave(self, row: int) -> None:
        """End a row; the last one takes its place."""
        last = len(self.lengths) - 1
        filled = self.lengths[row]
        if row != last:
            filled = max(filled, self.lengths[last])
            self._move(last, row, filled)
            self.lengths[row] = self.lengths[last]
        del self.lengths[last]
        if self.staged:
            filled = max(filled, self.staged)
            self._move(last + 1, last, filled)
        self._wipe(last + bool(self.staged), filled)

    def drop_staged(self) -> None:
        """Discard a prompt that arrives in pieces."""
        self._wipe(len(self.lengths), self.staged)
        self.staged = 0

    def clear(self) -> None:
        """End all rows, whatever state a failed step left them in."""
        self.lengths, self.staged = [], 0
        self.cache.zero_()

    def _move(self, source: int, target: int, filled: int) -> None:
        self.cache[:, target, :, :filled] = self.cache[:, source, :, :filled]

    def _wipe(self, row: int, filled: int) -> None:
        self.cache[:, row, :, :filled] = 0
