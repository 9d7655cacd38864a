"""Cases: calls of one op on drawn tensors, shared by tests, benchmarks and the proof.

Purpose: a record says here what its op is tried on; everything that calls an op reads the same cases.
Principle: a case is a name, a function that draws the arguments, and options; nothing is drawn before it is needed.
Properties: drawn on the CPU from a seed, so a case is the same on every machine. Imports no model and no proof.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX


class Draw:
    """Draws a case's tensors on the CPU from one seed."""

    def __init__(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, mean: float = 0.0, dtype: torch.dtype | None = None) -> Tensor:
        """N(mean, scale) values, rounded to the case's dtype or another."""
        values = torch.randn(shape, generator=self.generator) * scale + mean
        return values.to(dtype or self.dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers of [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def chance(self, share: float, *shape: int) -> Tensor:
        """bool, True with this probability."""
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def targets(self, vocab: int, tokens: int, ignored: float) -> Tensor:
        """(tokens,) int64 of [0, vocab), IGNORE_INDEX with the probability `ignored`."""
        return self.integers(0, vocab, tokens).masked_fill(self.chance(ignored, tokens), IGNORE_INDEX)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: the op's name.
        name: what is special about it.
        tensors: draws the tensors by name; None where an argument is absent.
        options: the other arguments.
        only: names of the dtypes that this case is for; all if empty.
        strided: take every other row of larger tensors, and one gradient expanded to all rows, as of a sum.
        arguments: makes the op's arguments of the tensors, where they are not the tensors themselves.
        promised: the tensor that the first output's gradient is a multiple of; "" if nothing is promised.
        fixed: tensors that another op lays out, which are never strided.
    """

    op: str
    name: str
    tensors: Callable[[Draw], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()
    strided: bool = False
    arguments: Callable[[dict[str, Any]], dict[str, Any]] = dict
    promised: str = ""
    fixed: tuple[str, ...] = ()

    def call(self, function: Callable, tensors: dict[str, Any]) -> tuple[Tensor, ...]:
        """Call an implementation.

        Args:
            function: the kernel or the reference.
            tensors: of `tensors`, perhaps cast.

        Returns:
            The op's outputs as a tuple.
        """
        out = function(**self.arguments(tensors), **self.options)
        return (out,) if isinstance(out, Tensor) else tuple(out)
