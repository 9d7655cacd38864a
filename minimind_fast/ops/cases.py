"""Cases: calls of one op on random tensors, shared by tests, benchmarks and the proof.

Purpose: a record lists its op's inputs as cases; everything that exercises an op uses the same ones.
Principle: a case is a name, a function that draws the arguments, and options; nothing is drawn before it is needed.
Properties: drawn on the CPU from a seed: a case is the same on every machine. Imports no model and no proof.
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
        """N(mean, scale) values, rounded to `dtype` or else the case's."""
        values = torch.randn(shape, generator=self.generator) * scale + mean
        return values.to(dtype or self.dtype).to(self.device)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Integers in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(dtype).to(self.device)

    def chance(self, share: float, *shape: int) -> Tensor:
        """bool, True with this probability."""
        return (torch.rand(shape, generator=self.generator) < share).to(self.device)

    def targets(self, vocab: int, tokens: int, ignored: float) -> Tensor:
        """(tokens,) int64 in [0, vocab), IGNORE_INDEX with probability `ignored`."""
        return self.integers(0, vocab, tokens).masked_fill(self.chance(ignored, tokens), IGNORE_INDEX)


@dataclass(frozen=True)
class Case:
    """One call of one op.

    Attributes:
        op: the op's name.
        name: what is special about the case.
        tensors: draws the tensors by name; None for an absent argument.
        options: the arguments that are not tensors.
        only: names of the dtypes to run in; all if empty.
        strided: take every other row of larger tensors, and expand one gradient over all rows, as a sum's backward does.
        arguments: builds the op's arguments from the tensors, if they differ.
        promised: the tensor that the first output's gradient is a multiple of; "" if nothing is promised.
        fixed: tensors laid out by another op, never strided.
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
            tensors: drawn by `self.tensors`, perhaps cast.

        Returns:
            The op's outputs as a tuple.
        """
        out = function(**self.arguments(tensors), **self.options)
        return (out,) if isinstance(out, Tensor) else tuple(out)
