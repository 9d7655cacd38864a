"""SwiGLU on the fused gate-up projection.

Purpose: the record of the op: reference, work, cases, timing.
Principle: silu(gate) * up.
Properties: memory-bound; forward reads 2F values a token and writes F.

Shapes: T tokens, F ffn; `...` any leading shape.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.ops.cases import Case
from minimind_fast.ops.registry import Op, Timing, Work


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up on a fused projection.

    Args:
        gate_up: (..., 2F), gate first.

    Returns:
        (..., F) in the same dtype.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def _width(c: ModelConfig) -> int:
    width = c.moe_intermediate_size if c.use_moe else c.intermediate_size
    assert width is not None
    return width


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Forward: gate, up, out. Backward: d_out, gate, up, d_gate, d_up."""
    return Work(tokens * (5 if direction == "backward" else 3) * _width(c) * element_bytes)


def _case(name: str, shape: tuple[int, ...], scale: float = 1.0, only: tuple[str, ...] = ()) -> Case:
    return Case("swiglu", name, lambda draw: {"gate_up": draw.normal(*shape, scale=scale)}, only=only)


def _model_case(c: ModelConfig, tokens: int) -> Case | None:
    """In a mixture only the shared experts call the op, if any; the routed ones run inside moe_mlp."""
    return _case("", (tokens, 2 * _width(c))) if not c.use_moe or c.num_shared_experts else None


OP = Op(
    name="swiglu",
    reference=swiglu,
    cpu="minimind_fast.ops.cpu.fused:swiglu",
    differentiable=("gate_up",),
    work=_work,
    model_case=_model_case,
    cases=(
        _case("odd width", (2, 3, 2 * 333)),
        _case("one column", (17, 2)),
        _case("one row", (1, 2 * 64)),
        _case("no rows", (0, 2 * 64)),
        _case("huge values", (5, 2 * 96), scale=30.0),
        _case("saturated", (5, 2 * 96), scale=1000.0, only=("float32", "bfloat16")),
        _case("tiny values", (5, 2 * 96), scale=1e-3),
    ),
    place=3,
    timing=Timing(place=1, cpu_tokens=2048, compile_on_cpu=True),
    page="kernel_swiglu",
    issue_bound={
        "_swiglu_fwd_kernel": "on sm_100 only: a sigmoid for 6 bytes, and a B200 has the fastest memory an SM"
    },
)
