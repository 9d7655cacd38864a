"""The experts of a mixture: each token through its experts' SwiGLU MLPs, summed by the routing weights.

Purpose: the record of the op: reference, work, cases, timing.
Principle: slots sorted by expert, one split, one MLP an expert, rows scattered back and summed.
Properties: compute-bound. The reference reads the experts' loads on the host; the kernel does not.

Shapes: T tokens, D hidden, F ffn, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.ops.records.swiglu import swiglu
from minimind_fast.ops.registry import Op, Timing, Work
from minimind_fast.ops.routing import Routing

PLAN = ("experts", "counts", "order", "inverse")  # moe_route's output, always contiguous


def moe_mlp(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each token through its experts' SwiGLU MLPs, summed by the routing weights.

    Args:
        x: (T, D).
        routing: the result of `moe_route`.
        gate_up: (E, 2F, D) stacked expert weights, gate first.
        down: (E, D, F).

    Returns:
        (T, D) in x's dtype.
    """
    top_k = routing.experts.shape[1]
    token = routing.order.long() // top_k
    rows = x.index_select(0, token).split(routing.counts.tolist())
    outs = [F.linear(swiglu(F.linear(r, w1)), w2) for r, w1, w2 in zip(rows, gate_up, down, strict=True)]
    back = torch.cat(outs).index_select(0, routing.inverse.long()).view(-1, top_k, x.shape[-1])
    return (back * routing.weights.unsqueeze(-1).to(back.dtype)).sum(1).to(x.dtype)


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Forward: x and y; three matmuls a chosen expert. Backward: x, dy and dx; six."""
    assert c.moe_intermediate_size and c.num_experts_per_tok
    values, times = (3, 2) if direction == "backward" else (2, 1)
    flops = 6 * c.hidden_size * c.moe_intermediate_size * c.num_experts_per_tok * times
    return Work(tokens * values * c.hidden_size * element_bytes, tokens * flops)


def _arguments(tensors: dict[str, Any]) -> dict[str, Any]:
    """Build the Routing that the op takes, of which the experts read only weights and plan."""
    rest = {key: value for key, value in tensors.items() if key not in (*PLAN, "weights")}
    plan, weights = {key: tensors[key] for key in PLAN}, tensors["weights"]
    return {**rest, "routing": Routing(weights=weights, **plan, aux_loss=weights.sum(), scores=weights)}


def _case(
    name: str, tokens: int, hidden: int, ffn: int, experts: int, top_k: int, skew: float = 0.0, scale: float = 1.0
) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        liking = torch.rand(tokens, experts, generator=draw.generator)
        liking[:, 1:] -= skew  # 1: every token's first choice is expert 0
        chosen = liking.topk(top_k, -1).indices
        weights = torch.rand(tokens, top_k, generator=draw.generator) + 0.1
        weights = weights / weights.sum(-1, keepdim=True) if top_k > 1 else weights
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        inverse = order.argsort()
        counts = (flat[:, None] == torch.arange(experts)).sum(0)
        plan = dict(zip(PLAN, (chosen, counts, order, inverse), strict=True))
        return {
            "x": draw.normal(tokens, hidden),
            "weights": weights.to(draw.device),
            **{key: value.to(torch.int32).to(draw.device) for key, value in plan.items()},
            "gate_up": draw.normal(experts, 2 * ffn, hidden, scale=scale * hidden**-0.5),
            "down": draw.normal(experts, hidden, ffn, scale=scale * ffn**-0.5),
        }

    return Case("moe_mlp", name, tensors, arguments=_arguments, fixed=PLAN)


def _model_case(c: ModelConfig, tokens: int) -> Case | None:
    if not c.use_moe:
        return None
    assert c.moe_intermediate_size and c.num_experts_per_tok
    return _case("", tokens, c.hidden_size, c.moe_intermediate_size, c.num_experts, c.num_experts_per_tok)


def _matmul(c: ModelConfig, tokens: int) -> tuple[int, int, int]:
    return tokens * (c.num_experts_per_tok or 1), 2 * (c.moe_intermediate_size or 0), c.hidden_size


OP = Op(
    name="moe_mlp",
    reference=moe_mlp,
    differentiable=("x", "weights", "gate_up", "down"),
    work=_work,
    model_case=_model_case,
    cases=(
        _case("odd sizes", 37, 50, 34, 3, 2),
        _case("one expert has all", 40, 64, 64, 4, 1, skew=1.0),
        _case("one expert has half", 40, 64, 64, 4, 2, skew=1.0),
        _case("many experts, few tokens", 5, 32, 32, 16, 2),
        _case("one token", 1, 64, 64, 4, 2),
        _case("no tokens", 0, 64, 64, 4, 2),
    ),
    small={"moe_intermediate_size": 128},
    small_tokens=24,
    needs="ampere",
    of_mixtures=True,
    place=7,
    timing=Timing(place=4, matmul=_matmul, compiles=False, reference_waits=True),
    page="kernel_moe_mlp",
)
