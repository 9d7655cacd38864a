"""Losses as pure functions of per-token log-probabilities.

Purpose: every stage's objective in a few lines that can be checked by hand.
Principle: the model turns tokens into log-probabilities of the targets; what a stage wants of them is arithmetic.
Properties: no model, no config, no state; sums rather than means, so that the trainer can divide by the count of the
    whole global batch.

Shapes: T tokens.
"""

from __future__ import annotations

from torch import Tensor


def lm(logprobs: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum of the negative log-likelihood over the counted positions.

    Args:
        logprobs: (...) float32, 0 where there is no target.
        weights: (...) float32 per-token weights, or None for 1.

    Returns:
        () float32.
    """
    return -(logprobs if weights is None else logprobs * weights).sum()
