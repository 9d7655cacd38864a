"""Ops written for a CPU's caches: `auto` trains with them if there is no GPU.

Purpose: the references' arithmetic with less memory traffic. Autograd over a chain of plain operators keeps several float32
    copies of each activation and reads all of them back; on two cores that was a quarter of a step.
Principle: each function processes its rows in chunks that fit the cache, saves only what it needs to recompute the rest,
    and writes each gradient once, in its final place.
Properties: forward rounds where the reference does; backward rounds once, at its end. For training only: without
    gradients, or while torch.compile traces, the reference runs. `embedding` is here for exactness, and always runs.

Shapes: T tokens, D hidden, F ffn, H query heads, K kv heads, hd head_dim, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from minimind_fast.config import IGNORE_INDEX
from minimind_fast.ops.numbers import accum_dtype
from minimind_fast.ops.promises import note_promise
from minimind_fast.ops.records import linear_cross_entropy as _linear_cross_entropy
from minimind_fast.ops.records import rms_norm as _rms_norm
from minimind_fast.ops.records import rope as _rope
from minimind_fast.ops.records import swiglu as _swiglu

CHUNK = 2**18  # elements at a time: a megabyte of float32, a server core's L2 cache
PROMISE = 1e-5  # tolerance of grad_weights, relative to the largest gradient
HEAD_ROWS = 512  # rows of logits at a time; 128 were 1.25x slower, 2048 no faster


def _chunks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, CHUNK // max(width, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _plain(*tensors: Tensor | None) -> bool:
    """Whether the reference should run: no gradient is needed, or torch.compile is tracing."""
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    return torch.compiler.is_compiling() or not wanted


def _norm_forward(x: Tensor, weight: Tensor, eps: float, cast_first: bool) -> tuple[Tensor, Tensor]:
    """x (..., D) -> (norm(x) * weight in x's dtype, rstd (..., 1))."""
    wide = x.to(accum_dtype(x.dtype))
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normed = wide * rstd
    return (weight * (normed.to(x.dtype) if cast_first else normed)).to(x.dtype), rstd


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `_norm_forward`, (..., D) -> (d_x, d_weight before its sum over rows), both wide."""
    wide = accum_dtype(x.dtype)
    normed = x.to(wide) * rstd  # not in place: `to` does not copy float32 input
    grad = grad.to(wide)
    d_weight = grad * normed
    d_normed = grad * weight
    d_normed.addcmul_(normed, (d_normed * normed).mean(-1, keepdim=True), value=-1.0)
    return d_normed.mul_(rstd), d_weight


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]
        return torch.nn.functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        wide = grad.to(accum_dtype(grad.dtype))
        summed = torch.ops.aten.embedding_dense_backward(wide, ids, ctx.rows, -1, False)
        return None, summed.to(grad.dtype)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Look up rows of a table, summing its gradient in float32.

    On a CPU PyTorch sums it in the table's dtype. In bfloat16 a sum stops growing at 256 times its terms: for a token that
    occurs 1,000 times in a batch the gradient was off by 3%, for one that occurs 8,000 times by half.

    Args:
        ids: (...) int64.
        weight: (V, D).

    Returns:
        (..., D).
    """
    return _Embedding.apply(ids, weight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual, cast_first):
        y, rstd = torch.empty_like(x), x.new_empty(x.shape[0], 1, dtype=accum_dtype(x.dtype))
        h = x if residual is None else torch.empty_like(x)
        for rows in _chunks(*x.shape):
            if residual is not None:
                torch.add(x[rows], residual[rows], out=h[rows])
            y[rows], rstd[rows] = _norm_forward(h[rows], weight, eps, cast_first)
        ctx.save_for_backward(h, weight, rstd)
        ctx.fused = residual is not None
        return (y, h) if ctx.fused else y

    @staticmethod
    def backward(ctx, dy, dh=None):  # type: ignore[override]
        h, weight, rstd = ctx.saved_tensors
        dx, d_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=accum_dtype(weight.dtype))
        for rows in _chunks(*h.shape):
            d, dw = _norm_backward(dy[rows], h[rows], weight, rstd[rows])
            d_weight += dw.sum(0)
            dx[rows] = d if dh is None else d.add_(dh[rows])
        return dx, d_weight.to(weight.dtype), None, dx if ctx.fused else None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, cast_first: bool = False) -> Any:
    """As `reference.rms_norm`; saves the sum and one number a row."""
    if _plain(x, weight, residual):
        return _rms_norm.rms_norm(x, weight, eps, residual, cast_first)
    flat, rest = (None if t is None else t.reshape(-1, x.shape[-1]) for t in (x, residual))
    out = _RMSNorm.apply(flat, weight, eps, rest, cast_first)
    return out.view_as(x) if residual is None else tuple(t.view_as(x) for t in out)


def _rotate(x: Tensor, c: Tensor, s: Tensor, out: Tensor) -> None:
    """out = (x1 c - x2 s, x2 c + x1 s) for the halves of x (rows, heads, hd) and c, s (rows, 1, hd / 2)."""
    x1, x2 = x.chunk(2, dim=-1)
    half = x1.shape[-1]
    out[..., :half] = (x1 * c).addcmul_(x2, s, value=-1.0)
    out[..., half:] = (x2 * c).addcmul_(x1, s)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, q_weight, k_weight, cos, sin, index, heads, kv_heads, eps):
        t, wide = qkv.shape[0], accum_dtype(qkv.dtype)
        x = qkv.view(t, heads + 2 * kv_heads, -1)
        head_dim = x.shape[-1]
        q, k = (qkv.new_empty(t, n, head_dim) for n in (heads, kv_heads))
        v = x[:, heads + kv_heads :].contiguous()
        parts = [(q, slice(0, heads), q_weight), (k, slice(heads, heads + kv_heads), k_weight)]
        rstd = [q.new_empty(t, n, 1, dtype=wide) if w is not None else None
                for n, w in ((heads, q_weight), (kv_heads, k_weight))]  # fmt: skip
        for rows in _chunks(t, qkv.shape[1]):
            c, s = cos[index[rows]].unsqueeze(1), sin[index[rows]].unsqueeze(1)
            for (out, where, weight), r in zip(parts, rstd, strict=True):
                y = x[rows, where]
                if weight is not None and r is not None:
                    y, r[rows] = _norm_forward(y, weight, eps, False)
                _rotate(y.to(wide), c, s, out[rows])
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin, index, *rstd)
        ctx.heads = heads, kv_heads
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):  # type: ignore[override]
        qkv, q_weight, k_weight, cos, sin, index, *rstd = ctx.saved_tensors
        heads, kv_heads = ctx.heads
        t, wide = qkv.shape[0], accum_dtype(qkv.dtype)
        x = qkv.view(t, heads + 2 * kv_heads, -1)
        dx = torch.empty_like(x)
        dx[:, heads + kv_heads :] = dv
        d_weights = [None if w is None else torch.zeros_like(w, dtype=wide) for w in (q_weight, k_weight)]
        parts = [(dq, slice(0, heads), q_weight), (dk, slice(heads, heads + kv_heads), k_weight)]
        for rows in _chunks(t, qkv.shape[1]):
            c, s = cos[index[rows]].unsqueeze(1), sin[index[rows]].unsqueeze(1)
            for (grad, where, weight), r, total in zip(parts, rstd, d_weights, strict=True):
                if weight is None or total is None:
                    _rotate(grad[rows].to(wide), c, -s, dx[rows, where])
                    continue
                turned = torch.empty_like(grad[rows], dtype=wide)
                _rotate(grad[rows].to(wide), c, -s, turned)
                dx[rows, where], dw = _norm_backward(turned, x[rows, where], weight, r[rows])
                total += dw.sum((0, 1))
        dw = [None if total is None else total.to(qkv.dtype) for total in d_weights]
        return dx.view_as(qkv), *dw, None, None, None, None, None, None


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
    """As `reference.rope`; saves only its input (and one number a head, if heads are normalised)."""
    if _plain(qkv, q_weight, k_weight):
        return _rope.rope(qkv, cos, sin, positions, num_heads, num_kv_heads, q_weight, k_weight, eps)
    flat, index = qkv.reshape(-1, qkv.shape[-1]), positions.reshape(-1).long()
    out = _Rope.apply(flat, q_weight, k_weight, cos, sin, index, num_heads, num_kv_heads, eps)
    q, k, v = (x.view(*qkv.shape[:-1], *x.shape[1:]) for x in out)
    return q, k, v


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        x = gate_up.reshape(-1, gate_up.shape[-1])
        out = x.new_empty(x.shape[0], x.shape[1] // 2)
        for rows in _chunks(*x.shape):
            gate, up = x[rows].chunk(2, dim=-1)
            torch.mul(torch.nn.functional.silu(gate), up, out=out[rows])
        return out.view(*gate_up.shape[:-1], out.shape[1])

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        x = gate_up.reshape(-1, gate_up.shape[-1])
        grad, dx = grad.reshape(x.shape[0], -1), torch.empty_like(x)
        for rows in _chunks(*x.shape):
            gate, up = x[rows].chunk(2, dim=-1)
            d_gate, d_up = dx[rows].chunk(2, dim=-1)
            torch.mul(grad[rows], torch.nn.functional.silu(gate), out=d_up)
            torch.ops.aten.silu_backward.grad_input(grad[rows] * up, gate, grad_input=d_gate)
        return dx.view_as(gate_up)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `reference.swiglu`; saves only its input."""
    return _swiglu.swiglu(gate_up) if _plain(gate_up) else _SwiGLU.apply(gate_up)


class _LinearCrossEntropy(torch.autograd.Function):
    """Log-probabilities, with the gradients of their weighted sum in the same pass: logits are computed only once."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, grad_weights, temperature):
        wide = accum_dtype(hidden.dtype)
        logprobs = torch.empty_like(targets, dtype=wide)
        d_logits = hidden.new_empty(hidden.shape[0], weight.shape[0])  # not in chunks, so that each product rounds once
        for start in range(0, hidden.shape[0], HEAD_ROWS):
            rows = slice(start, start + HEAD_ROWS)
            counted = targets[rows] != IGNORE_INDEX
            index = targets[rows].clamp(min=0).unsqueeze(1)
            logits = (hidden[rows] @ weight.t()).to(wide)
            if temperature != 1.0:
                logits.div_(temperature)
            top = logits.amax(-1, keepdim=True)
            picked = logits.gather(1, index)
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            logprobs[rows] = torch.where(counted, (picked - top - total.log()).squeeze(1), 0.0)
            share = torch.where(counted, grad_weights[rows] / temperature, 0.0).to(wide).unsqueeze(1)
            d_logits[rows] = logits.mul_(-share / total).scatter_add_(1, index, share)
        ctx.save_for_backward(targets, grad_weights, d_logits @ weight, d_logits.t() @ hidden)
        return logprobs

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        targets, grad_weights, d_hidden, d_weight = ctx.saved_tensors
        live = targets != IGNORE_INDEX
        given, promised = (torch.where(live, x, 0.0).double() for x in (grad, grad_weights))
        square = (promised * promised).sum()
        factor = float((given * promised).sum() / square) if square > 0 else 0.0
        # An inf or nan gradient breaks no promise: the result is nan, as usual.
        kept = ((given - factor * promised).abs() <= PROMISE * given.abs().amax()).all()
        note_promise(~kept & given.isfinite().all())
        factor = factor if kept else float("nan")
        return d_hidden * factor, d_weight * factor, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    return_entropy: bool = False,
    grad_weights: Tensor | None = None,
):
    """As `reference.linear_cross_entropy`; with grad_weights it holds one (T, V) tensor, not four (two in float32)."""
    if grad_weights is None or return_entropy or _plain(hidden, weight) or not targets.numel():
        return _linear_cross_entropy.linear_cross_entropy(hidden, weight, targets, temperature, return_entropy)
    flat = hidden.reshape(-1, hidden.shape[-1])
    out = _LinearCrossEntropy.apply(flat, weight, targets.reshape(-1), grad_weights.reshape(-1), temperature)
    return out.view_as(targets)
