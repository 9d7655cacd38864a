"""The router of a mixture of experts: scores, the best experts, the dispatch plan, the balancing loss.

Purpose: the record of the op: reference, work, cases, timing.
Principle: softmax over the experts, its top_k, a stable sort of the slots by expert.
Properties: rounding decides near ties between experts, so cases contain none.

Shapes: T tokens, D hidden, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.config import ModelConfig
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.ops.numbers import accum_dtype
from minimind_fast.ops.registry import Op, Timing, Work
from minimind_fast.ops.routing import Routing


def moe_route(
    x: Tensor,
    gate_weight: Tensor,
    top_k: int,
    normalize: bool,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
) -> Routing:
    """Score the experts for each token, choose the best ones and plan the dispatch.

    Args:
        x: (T, D).
        gate_weight: (E, D).
        top_k: experts a token.
        normalize: divide the chosen scores by their sum. With top_k = 1 the weight is then 1 and the router learns
            nothing from the language-model loss (as in MiniMind; `normalize=False` fixes it).
        cu_seqlens: (documents + 1,) int32: the aux loss is a mean over documents (MiniMind2); None: one over the batch
            (MiniMind3).
        valid: (T,) bool; False for padding, which the aux loss and its averages leave out.

    Returns:
        Routing; `weights`, `aux_loss` and `scores` carry gradients.

    Source: Shazeer et al., 2017 (sparsely gated experts); Fedus et al., Switch Transformers, 2021 (balancing loss).
    """
    num_experts = gate_weight.shape[0]
    scores = F.linear(x, gate_weight).to(accum_dtype(x.dtype)).softmax(-1)
    # A stable sort, because topk leaves ties undefined: here the lower expert wins.
    weights, experts = (x[:, :top_k] for x in scores.sort(dim=-1, descending=True, stable=True))
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    aux_loss = _balance(scores, experts, num_experts, cu_seqlens, valid)
    i32 = torch.int32
    counts = flat.bincount(minlength=num_experts)
    return Routing(weights, experts.to(i32), counts.to(i32), order.to(i32), inverse.to(i32), aux_loss, scores)


def _balance(scores: Tensor, experts: Tensor, num_experts: int, cu_seqlens: Tensor | None, valid: Tensor | None):
    """E * sum_e f_e P_e over the batch, or its mean over documents."""
    chosen = torch.zeros_like(scores).scatter_add_(1, experts.long(), torch.ones_like(scores[:, : experts.shape[1]]))
    live = scores.new_ones(scores.shape[0]) if valid is None else valid.to(scores.dtype)
    if cu_seqlens is None:
        document, count = torch.zeros_like(live, dtype=torch.long), 1
    else:
        count = cu_seqlens.numel() - 1
        where = torch.arange(live.numel(), device=live.device)
        document = torch.searchsorted(cu_seqlens[1:].contiguous(), where, right=True).clamp(max=max(count - 1, 0))
    length = live.new_zeros(count).index_add_(0, document, live)
    load = scores.new_zeros(count, num_experts).index_add_(0, document, chosen * live[:, None])
    mass = scores.new_zeros(count, num_experts).index_add_(0, document, scores * live[:, None])
    share = load / (length * experts.shape[1]).clamp(min=1)[:, None]
    per_document = num_experts * (share * mass / length.clamp(min=1)[:, None]).sum(-1)
    return per_document.sum() / (length > 0).sum().clamp(min=1)


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Forward: x. Backward: x and its gradient."""
    return Work(tokens * (2 if direction == "backward" else 1) * c.hidden_size * element_bytes)


def _case(
    name: str,
    tokens: int,
    hidden: int,
    experts: int,
    top_k: int,
    normalize: bool,
    documents: int = 0,
    padded: bool = False,
) -> Case:
    def tensors(draw: Draw) -> dict[str, Any]:
        gate = draw.normal(experts, hidden, scale=3 * hidden**-0.5)
        x = draw.normal(tokens, hidden)
        if tokens and type(x) is Tensor:  # not for tensors without data
            x = _without_near_ties(x, gate, top_k)
        cu = None
        if documents:
            cu = torch.arange(documents + 1) * tokens // documents
            cu = cu.to(torch.int32).to(draw.device)
        valid = draw.chance(0.8, tokens) if padded else None
        return {"x": x, "gate_weight": gate, "cu_seqlens": cu, "valid": valid}

    return Case("moe_route", name, tensors, {"top_k": top_k, "normalize": normalize})


def _without_near_ties(x: Tensor, gate: Tensor, top_k: int) -> Tensor:
    """Replace each token whose order of experts depends on rounding by a clear one."""
    logits = (x.double() @ gate.double().t()).sort(-1, descending=True).values
    gap = (logits[:, :-1] - logits[:, 1:])[:, :top_k]
    clear = gap.min(-1).values > 0.1 if gap.numel() else x.new_ones(x.shape[0], dtype=torch.bool)
    best = x[gap.min(-1).values.argmax()] if gap.numel() else x[0]
    return torch.where(clear[:, None], x, best)


def _model_case(c: ModelConfig, tokens: int) -> Case | None:
    if not c.use_moe:
        return None
    assert c.num_experts_per_tok is not None
    documents = min(tokens, 4) if c.aux_loss_per_sequence else 0
    return _case("", tokens, c.hidden_size, c.num_experts, c.num_experts_per_tok, c.norm_topk_prob, documents)


OP = Op(
    name="moe_route",
    reference=moe_route,
    differentiable=("x", "gate_weight"),
    work=_work,
    model_case=_model_case,
    cases=(
        _case("odd sizes", 37, 50, 5, 3, True),
        _case("many experts", 40, 64, 64, 6, True),
        _case("documents and padding", 50, 64, 4, 2, True, documents=3, padded=True),
        _case("padding", 50, 64, 4, 1, False, padded=True),
        _case("all experts", 9, 32, 4, 4, True),
        _case("one token", 1, 32, 4, 2, True),
        _case("no tokens", 0, 32, 4, 2, True),
    ),
    needs="ampere",
    of_mixtures=True,
    place=6,
    timing=Timing(place=6, reference_waits=True),
    page="kernel_moe_route",
    issue_bound={"_route_plan_kernel": "every tile adds up the counts of all tiles before it, out of L2"},
)
