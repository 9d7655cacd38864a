"""Micro-batches, the interface of a data source, and the position within one.

Purpose: every data source yields `Batch` and every loss takes one; `Position` is saved with a checkpoint.
Principle: a batch carries its counts and bounds on the host beside its tensors, so nothing waits for a GPU.
Properties: independent of model and file format.

T: positions in a packed batch, B: rows, L: positions in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch

from minimind_fast.errors import UserError


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        input_ids: (T,) packed or (B, L) rows, int64.
        targets: same shape, int64: the next token, or IGNORE_INDEX.
        cu_seqlens: (num_docs + 1,) int32 bounds of the packed documents, or None for rows.
        max_seqlen: upper bound on a document's or row's length, in positions.
        num_targets: positions that enter the loss.
        num_docs: real documents (pieces) or rows.
        weights: same shape, float32 weight of each target, or None: all weigh 1.
        factor: the trainer multiplies the sum of the batch's losses by this.
        documents: cached result of `ops.documents.run`; None before the first pass and after a move.
    """

    input_ids: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor | None
    max_seqlen: int
    num_targets: int
    num_docs: int
    weights: torch.Tensor | None = None
    factor: float = 1.0
    documents: Any = field(default=None, repr=False, compare=False)

    def _map(self, function: Any) -> Self:
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, documents=None, **{name: function(tensor) for name, tensor in tensors.items()})

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy the tensors to a device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Copy the tensors into page-locked memory, so that copies to a GPU overlap with compute."""
        return self._map(lambda tensor: tensor.pin_memory())


class Batches(Protocol):
    """What the training loop expects of a data source: iterating yields the rest of the current epoch.

    A source whose batches depend on the model (rollouts) sets `needs_model = True`, which turns prefetching off. The
    state is the same on every rank, except under the key "own".
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def num_batches(self, epoch: int) -> int: ...
    def num_left(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Position:
    """The global position in the data, over all ranks, and the identity of that data.

    Args:
        identity: everything that decides the order; a stored position with another identity is refused.
        unit: what `next` counts, "batch" or "prompt".
    """

    def __init__(self, identity: dict[str, Any], unit: str) -> None:
        self.identity, self.unit = identity, unit
        self.epoch = self.next = 0

    def advance(self, count: int, size: int) -> None:
        """Advance within the epoch, or wrap to the start of the next.

        Args:
            count: units consumed by all ranks together.
            size: units in an epoch.
        """
        self.next += count
        if self.next >= size:
            self.epoch, self.next = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Return identity, epoch and the next unit."""
        return {**self.identity, "epoch": self.epoch, f"next_{self.unit}": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position.

        Args:
            state: from `state_dict`; other keys are ignored.

        Raises:
            ValueError: the state belongs to other data or settings.
        """
        for name, mine in self.identity.items():
            if state.get(name) != mine:
                raise UserError(
                    f"cannot resume the data position: {name} was {state.get(name)!r} and is {mine!r} now; "
                    "give the same data, tokenizer and options, or start a new run"
                )
        self.epoch, self.next = int(state["epoch"]), int(state[f"next_{self.unit}"])
