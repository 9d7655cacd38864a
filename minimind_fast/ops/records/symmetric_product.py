"""A matrix times its own transpose, for Muon's Newton-Schulz steps.

Purpose: the record of the op: reference, work, cases, timing.
Principle: y = alpha x x^T + beta c; half of a symmetric matrix is known from the other half.
Properties: bound by matmuls. The optimizer calls it, once a step on all matrices, so no token does: T stands for the columns
    of one matrix with D rows, as long as a feed-forward's are wide.

Shapes: N matrices, M rows, K columns; D hidden, T columns in the models' cases.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.ops.registry import Op, Timing, Work


def symmetric_product(x: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha x x^T + beta c for each matrix of a batch.

    Args:
        x: (N, M, K).
        c: (N, M, M), or None.
        alpha: factor of the product.
        beta: factor of c.

    Returns:
        (N, M, M) in x's dtype.

    Source: Jordan, Muon: An optimizer for hidden layers in neural networks, 2024.
    """
    if c is not None:
        return torch.baddbmm(c, x, x.mT, beta=beta, alpha=alpha)
    product = x @ x.mT
    return product if alpha == 1.0 else alpha * product


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Forward: x, and half a matmul. Backward: x and its gradient, a matmul. What does not grow with T is left out."""
    passes = 2 if direction == "backward" else 1
    return Work(passes * c.hidden_size * tokens * element_bytes, passes * c.hidden_size**2 * tokens)


def _case(
    name: str, batch: int, rows: int, columns: int, summand: bool = False, scale: float = 1.0, **factors: float
) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        x = draw.normal(batch, rows, columns, scale=scale * max(columns, 1) ** -0.5)
        return {"x": x, "c": draw.normal(batch, rows, rows) if summand else None}

    return Case("symmetric_product", name, tensors, factors)


OP = Op(
    name="symmetric_product",
    reference=symmetric_product,
    differentiable=("x", "c"),
    work=_work,
    model_case=lambda c, tokens: _case("", 1, c.hidden_size, tokens),
    cases=(
        _case("polynomial", 2, 40, 40, summand=True, alpha=2.0315, beta=-4.775),
        _case("more than a tile, odd", 3, 150, 70, summand=True),
        _case("a product alone, scaled", 2, 33, 50, alpha=-0.5),
        _case("one row", 4, 1, 65, summand=True),
        _case("one column", 2, 70, 1),
        _case("no columns", 1, 5, 0, summand=True, beta=2.0),
        _case("no matrices", 0, 16, 16),
        _case("large values", 1, 20, 64, scale=30.0),
    ),
    small={"hidden_size": 96},
    needs="ampere",
    in_forward=False,
    forward_only=True,
    place=8,
    timing=Timing(
        place=8,
        matmul=lambda c, tokens: (c.hidden_size, c.hidden_size, tokens),
        no_backward="its backward is PyTorch's matmul, and the optimizer needs none",
    ),
)
