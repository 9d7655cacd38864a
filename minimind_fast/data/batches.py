"""A micro-batch, what a loop needs of its source, and where a source stands.

Purpose: `Batch` is what every stage's data gives and every stage's loss takes; `Position` is saved with a checkpoint.
Principle: a batch is tensors and what the host knows of them, so that nothing has to be asked of a GPU.
Properties: knows no model and no file format.

T: positions in a packed batch, B: rows, L: positions in a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self

import torch


@dataclass
class Batch:
    """One micro-batch of one rank.

    Attributes:
        input_ids: (T,) packed or (B, L) rows, int64.
        targets: same shape, int64: the next token, or IGNORE_INDEX.
        cu_seqlens: (num_docs + 1,) int32 bounds of the packed documents, or None for rows.
        max_seqlen: no document or row is longer, in positions.
        num_targets: positions that count.
        num_docs: real documents (pieces) or rows.
        weights: same shape, float32, or None: each counted target weighs 1.
        factor: the trainer will multiply the sum of the batch's losses by this.
        documents: what `ops.documents.run` has worked out of the bounds; None before the first pass and after a move.
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
        """Copy the tensors into page-locked memory, from which a GPU copies while it computes."""
        return self._map(lambda tensor: tensor.pin_memory())


class Batches(Protocol):
    """What a training loop needs of a data source: iterating gives the rest of the current epoch.

    Batches that depend on the model (rollouts) say so by an attribute `needs_model = True`: none is made ahead. The state
    is the same on every rank, except for what stands under the key "own".
    """

    def __iter__(self) -> Iterator[Batch]: ...
    def num_batches(self, epoch: int) -> int: ...
    def num_left(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Position:
    """The place in the data of all ranks together, and what data that is.

    Args:
        identity: what decides the order; a stored position of another one is refused.
        unit: what `next` counts, "batch" or "prompt".
    """

    def __init__(self, identity: dict[str, Any], unit: str) -> None:
        self.identity, self.unit = identity, unit
        self.epoch = self.next = 0

    def advance(self, count: int, size: int) -> None:
        """Go on within the epoch, or to the beginning of the next.

        Args:
            count: units that all ranks have used up.
            size: units in an epoch.
        """
        self.next += count
        if self.next >= size:
            self.epoch, self.next = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Give identity, epoch and the next unit."""
        return {**self.identity, "epoch": self.epoch, f"next_{self.unit}": self.next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a position.

        Args:
            state: of `state_dict`; further keys are ignored.

        Raises:
            ValueError: it belongs to other data or other settings.
        """
        for name, mine in self.identity.items():
            if state.get(name) != mine:
                raise ValueError(
                    f"cannot resume the data position: {name} was {state.get(name)!r} and is {mine!r} now; "
                    "give the same data, tokenizer and options, or start a new run"
                )
        self.epoch, self.next = int(state["epoch"]), int(state[f"next_{self.unit}"])
