"""What passes from the router of a mixture of experts to its experts.

Purpose: one type for both ops and for the model.
Principle: a slot is one (token, choice) pair, numbered t * top_k + j; the plan sorts slots by expert.
Properties: a named tuple, as ZeRO-3 finds tensors in tuples only.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """Where each token goes in a mixture of experts, and the plan to bring it there."""

    weights: Tensor  # (T, top_k) float32: how much each chosen expert counts
    experts: Tensor  # (T, top_k) int32: the chosen experts
    counts: Tensor  # (E,) int32: slots of each expert
    order: Tensor  # (T * top_k,) int32: slots sorted by expert, stable
    inverse: Tensor  # (T * top_k,) int32: order[inverse[slot]] == slot
    aux_loss: Tensor  # () float32: load balancing, before its coefficient
    scores: Tensor  # (T, E) float32: softmax over all experts
