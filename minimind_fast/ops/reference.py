"""Every op of the model in plain PyTorch: the meaning that kernels are held to.

Purpose: one function an op, short enough to check by eye, differentiable by autograd, on any device and in any dtype.
Principle: what MiniMind computes, in MiniMind's order of casts, written for whole packed streams of tokens.
Properties: no kernels, no state. In float64 the same functions are the truth of the error rule (see `verify.py`).
    The mixture of experts here is already the sorted, grouped form: one sort, one split, one matmul an expert.

Shapes: T tokens, D hidden, F ffn, H query heads, K kv heads, hd head_dim, E experts, V vocab; `...` any leading shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that norms, softmax and losses are computed in: float64 stays, everything narrower becomes float32.

    Args:
        dtype: of the input.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, cast_first: bool = False) -> Any:
    """Root-mean-square norm, optionally of `x + residual`.

    Args:
        x: (..., D) input.
        weight: (D,) scale.
        eps: added to the mean square.
        residual: (..., D) residual stream; the sum is rounded to x's dtype, as an eager addition would be.
        cast_first: round the normalised value to x's dtype before it meets the weight (MiniMind2); else after (MiniMind3).

    Returns:
        y (..., D) in x's dtype, or (y, h) with h = x + residual.

    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; MiniMind for the cast order.
    """
    h = x if residual is None else x + residual
    wide = h.to(accum_dtype(h.dtype))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = (weight * normed.to(h.dtype)).to(h.dtype) if cast_first else (weight * normed).to(h.dtype)
    return y if residual is None else (y, h)


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused QKV projection, normalise q and k where the model does, and rotate them by their positions.

    Args:
        qkv: (..., (H + 2K) * hd), in the order q, k, v.
        cos: (max_positions, hd // 2) float32 table.
        sin: (max_positions, hd // 2) float32 table.
        positions: (...) int32 or int64, index into the tables.
        num_heads: H.
        num_kv_heads: K.
        q_weight: (hd,) weight of the RMSNorm over each q head, or None.
        k_weight: (hd,) the same for k.
        eps: of those norms.

    Returns:
        q (..., H, hd), k (..., K, hd), v (..., K, hd) in qkv's dtype.

    Source: Su et al., RoFormer, 2021; the half form (not interleaved), as Llama and MiniMind use it.
    """
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    heads = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, head_dim))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=-2)
    if q_weight is not None:
        q = rms_norm(q, q_weight, eps)
    if k_weight is not None:
        k = rms_norm(k, k_weight, eps)
    index = positions.long()
    c, s = cos[index].unsqueeze(-2), sin[index].unsqueeze(-2)
    return _rotate(q, c, s), _rotate(k, c, s), v


def _rotate(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], dim=-1).to(x.dtype)


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


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
    grad_weights: Tensor | None = None,
):
    """Per-token log-probability of the target under softmax(hidden @ weight.T / temperature).

    Args:
        hidden: (..., D).
        weight: (V, D) of the head.
        targets: (...) int64; IGNORE_INDEX where there is no loss.
        temperature: divides the logits.
        return_entropy: also return the entropy of the distribution.
        grad_weights: (...) float32: a promise that the gradient will be one number times these, which lets the kernel
            save a matmul; it changes no result, and nothing here. Unless that number is a power of two, the kernel's
            d_hidden is rounded twice.

    Returns:
        logprobs (...) float32, 0 where ignored; with `return_entropy` also entropy (...) float32, 0 where ignored.
    """
    logits = (hidden @ weight.t()).to(accum_dtype(hidden.dtype))
    if temperature != 1.0:  # spares a CPU a pass over the largest tensor of a step, forward and backward
        logits = logits / temperature
    counted = targets != IGNORE_INDEX
    lse = logits.logsumexp(-1)
    picked = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    logprobs = torch.where(counted, picked - lse, 0.0)
    if not return_entropy:
        return logprobs
    entropy = lse - (torch.softmax(logits, -1) * logits).sum(-1)
    return logprobs, torch.where(counted, entropy, 0.0)


def linear_kl(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None = None,
    temperature: float = 1.0,
    reverse: bool = False,
) -> Tensor:
    """Per-token KL divergence between a teacher's and a student's next-token distributions.

    Args:
        student_hidden: (..., D).
        student_weight: (V, D).
        teacher_hidden: (..., D').
        teacher_weight: (V' >= V, D'); cut to the student's V rows before the softmax. No gradient reaches the teacher.
        mask: (...) bool; the result is 0 where it is False.
        temperature: divides both logits; there is no T^2 factor here.
        reverse: KL(student || teacher) instead of KL(teacher || student).

    Returns:
        (...) float32.

    Raises:
        ValueError: the teacher's vocabulary is smaller than the student's.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015.
    """
    vocab = student_weight.shape[0]
    if teacher_weight.shape[0] < vocab:
        raise ValueError(
            f"the teacher's vocabulary ({teacher_weight.shape[0]}) is smaller than the student's ({vocab})"
        )
    wide = accum_dtype(student_hidden.dtype)
    student = ((student_hidden @ student_weight.t()).to(wide) / temperature).log_softmax(-1)
    with torch.no_grad():
        logits = (teacher_hidden @ teacher_weight[:vocab].t()).to(wide)
        teacher = (logits / temperature).log_softmax(-1)
    p, q = (student, teacher) if reverse else (teacher, student)
    kl = (p.exp() * (p - q)).sum(-1)
    return kl if mask is None else torch.where(mask, kl, 0.0)


class Routing(NamedTuple):
    """Where each token goes in a mixture of experts, and the plan to bring it there.

    A slot is one (token, choice) pair, numbered t * top_k + j.
    """

    weights: Tensor  # (T, top_k) float32: how much each chosen expert counts
    experts: Tensor  # (T, top_k) int32: the chosen experts
    counts: Tensor  # (E,) int32: slots of each expert
    order: Tensor  # (T * top_k,) int32: slots sorted by expert, stable
    inverse: Tensor  # (T * top_k,) int32: order[inverse[slot]] == slot
    aux_loss: Tensor  # () float32: load balancing, before its coefficient
    scores: Tensor  # (T, E) float32: softmax over all experts


def moe_route(
    x: Tensor,
    gate_weight: Tensor,
    top_k: int,
    normalize: bool,
    cu_seqlens: Tensor | None = None,
    valid: Tensor | None = None,
) -> Routing:
    """Score the experts for each token, choose the best, and plan the dispatch.

    Args:
        x: (T, D).
        gate_weight: (E, D).
        top_k: experts a token.
        normalize: divide the chosen scores by their sum. With top_k = 1 the weight is then 1 and the router learns
            nothing from the language-model loss (MiniMind's own behaviour; `normalize=False` is the mended form).
        cu_seqlens: (documents + 1,) int32: the aux loss is the mean over documents (MiniMind2); None: over the whole
            batch (MiniMind3).
        valid: (T,) bool; False for padding, which counts neither in the aux loss nor in its averages.

    Returns:
        Routing; `weights`, `aux_loss` and `scores` carry gradients.

    Source: Shazeer et al., 2017 (sparsely gated experts); Fedus et al., Switch Transformers, 2021 (balancing loss).
    """
    num_experts = gate_weight.shape[0]
    scores = F.linear(x, gate_weight).to(accum_dtype(x.dtype)).softmax(-1)
    # A stable sort rather than topk, which leaves open who wins a tie: here it is the lower expert.
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


def moe_mlp(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Each token through the SwiGLU MLPs of its experts, summed by their weights.

    Args:
        x: (T, D).
        routing: of `moe_route`.
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
