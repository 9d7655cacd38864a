"""A batch whose rows come and go at token boundaries, over one KV cache of fixed size.

Purpose: `Slots`, what a server decodes with: rows join by `join` or piece by piece by `begin_piece`, and `leave`.
Principle: the rows that run are the first ones of the cache, so that a step works on a plain view of it. A row that
    leaves is replaced by the last one: one copy, as long as that row. For each number of rows there is a `Decoder` over
    its view of the cache, kept for the next time; it brings the step that is fastest on the device.
Properties: nothing is allocated while serving but what a step itself needs. A freed row is wiped: no answer can see
    another's text, nor be spoiled by a NaN that it left. A row's tokens do not depend on the other rows, but for the
    rounding of matmuls of another height.

Shapes: B rows that run, R rows of the cache, S slots, V vocab.
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
        rows: R, the most that run at once.
        slots: S, the most tokens that a row will have.
    """

    def __init__(self, model: MiniMind, rows: int, slots: int) -> None:
        self.model, self.rows, self.slots = model, rows, slots
        self.cache = new_cache(model, rows, slots)
        self.lengths: list[int] = []  # of the rows that run
        self.staged = 0  # tokens so far of a prompt that comes in pieces; it lies behind the rows that run
        self._decoders: dict[int, Decoder] = {}
        self._packs = Packs()

    @property
    def free(self) -> int:
        """Rows that could join."""
        return self.rows - len(self.lengths) - bool(self.staged)

    def _behind(self, count: int) -> Decoder:
        """For `count` rows behind those that run."""
        begin = len(self.lengths)
        return Decoder(self.model, count, self.slots, self.cache[:, begin : begin + count])

    def join(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Run whole prompts; their rows go on as the last ones.

        Args:
            prompts: at most `free` lists of token ids.

        Returns:
            (their number, V) logits of the token after each.
        """
        assert len(prompts) <= self.free and not self.staged
        logits = self._behind(len(prompts)).prefill_piece(prompts)
        self.lengths += map(len, prompts)
        return logits

    def begin_piece(self, piece: Sequence[int], last: bool) -> Tensor:
        """Run the next piece of one prompt, while other rows wait; they may step before the piece after it.

        Args:
            piece: token ids.
            last: the prompt is whole with it, and its row goes on as the last one.

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
        """Run one more token in each row that runs.

        Args:
            ids: (B,) int64.

        Returns:
            (B, V) logits of the token after it.
        """
        count = len(self.lengths)
        if count not in self._decoders:
            self._decoders[count] = Decoder(self.model, count, self.slots, self.cache[:, :count], self._packs)
        decoder = self._decoders[count]
        decoder.lengths = self.lengths
        decoder.positions = torch.tensor(self.lengths, device=self.cache.device)
        logits = decoder.step(ids)
        self.lengths = decoder.lengths
        return logits

    def leave(self, row: int) -> None:
        """End a row; the last one takes its place.

        Args:
            row: its index.
        """
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
        """Forget the prompt that comes in pieces."""
        self._wipe(len(self.lengths), self.staged)
        self.staged = 0

    def clear(self) -> None:
        """End all rows, whatever state a failed step has left."""
        self.lengths, self.staged = [], 0
        self.cache.zero_()

    def _move(self, source: int, target: int, filled: int) -> None:
        self.cache[:, target, :, :filled] = self.cache[:, source, :, :filled]

    def _wipe(self, row: int, filled: int) -> None:
        self.cache[:, row, :, :filled] = 0
