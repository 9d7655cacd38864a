"""What a mixture's router hands to its experts.

Purpose: one type for both ops and the model.
Principle: a slot is one (token, choice) pair, numbered t * top_k + j; the plan sorts slots by expert.
Properties: a named tuple, because ZeRO-3 finds tensors only in tuples.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Each token's experts, and the plan for dispatching tokens to them."""

    weights: Tensor  # (T, top_k) float32: weight of each chosen expert
    experts: Tensor  # (T, top_k) int32: the chosen experts
    counts: Tensor  # (E,) int32: slots per expert
    order: Tensor  # (T * top_k,) int32: slots sorted by expert, stable
    inverse: Tensor  # (T * top_k,) int32: order[inverse[slot]] == slot
    aux_loss: Tensor  # () float32: load balancing, before its coefficient
    scores: Tensor  # (T, E) float32: softmax over all experts
