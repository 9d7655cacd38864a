"""RMSNorm, alone or after adding to the residual stream.

Purpose: the record of the op: reference, work, cases, timing.
Principle: y = x / sqrt(mean(x^2) + eps) * weight, in float32.
Properties: memory-bound; the fused form reads x and the residual and writes y and their sum.

Shapes: T tokens, D hidden; `...` any leading shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.ops.numbers import accum_dtype
from minimind_fast.ops.registry import Op, Timing, Work


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, cast_first: bool = False) -> Any:
    """Root-mean-square norm, optionally of `x + residual`.

    Args:
        x: (..., D) input.
        weight: (D,) scale.
        eps: added to the mean square.
        residual: (..., D) residual stream; the sum is rounded to x's dtype, as in eager.
        cast_first: round to x's dtype before multiplying by the weight (MiniMind2); else after (MiniMind3).

    Returns:
        y (..., D) in x's dtype, or (y, h) with h = x + residual.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; MiniMind for the cast order.
    """
    h = x if residual is None else x + residual
    wide = h.to(accum_dtype(h.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = (weight * normed.to(h.dtype)).to(h.dtype) if cast_first else (weight * normed).to(h.dtype)
    return y if residual is None else (y, h)


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Forward: x, residual, y, h. Backward: dy, dh, h, dx."""
    return Work(tokens * 4 * c.hidden_size * element_bytes)


def _case(
    name: str,
    shape: tuple[int, ...],
    eps: float = 1e-5,
    cast_first: bool = False,
    residual: bool = True,
    scale: float = 1.0,
) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        out = {"x": draw.normal(*shape, scale=scale), "weight": draw.normal(shape[-1], scale=0.2, mean=1.0)}
        return {**out, "residual": draw.normal(*shape, scale=scale) if residual else None}

    return Case("rms_norm", name, tensors, {"eps": eps, "cast_first": cast_first})


def _model_case(c: ModelConfig, tokens: int) -> Case:
    assert c.rms_norm_eps is not None
    return _case("", (tokens, c.hidden_size), c.rms_norm_eps, bool(c.norm_cast_first))


OP = Op(
    name="rms_norm",
    reference=rms_norm,
    cpu="minimind_fast.ops.cpu.fused:rms_norm",
    differentiable=("x", "weight", "residual"),
    work=_work,
    model_case=_model_case,
    cases=(
        _case("no residual", (5, 64), residual=False),
        _case("no residual, cast first", (2, 3, 96), residual=False, cast_first=True),
        _case("one row", (1, 512)),
        _case("no rows", (0, 128)),
        _case("one column", (7, 1)),
        _case("odd width", (3, 5, 333), cast_first=True),
        _case("wide", (3, 2050)),
        _case("huge values", (4, 100), scale=100.0),
        _case("squares past fp16", (4, 100), scale=2000.0),
        _case("values near eps", (4, 100), scale=1e-3),
        _case("zeros", (4, 100), scale=0.0),
    ),
    place=1,
    timing=Timing(place=2, cpu_tokens=2048, compile_on_cpu=True),
    page="kernel_rms_norm",
)
