"""Rotary positions on a fused QKV projection, with the RMSNorm of q and k heads in the same pass.

Purpose:    from one matmul's rows q | k | v to q and k ready for attention: each value is read once and written once,
            where eager needs a split, two norms, two gathers and a dozen products. v is a view of the projection.
Principle:  a head (x1, x2) of two halves at position p, angles t = p theta_i from a table:
            n = x w / sqrt(mean(x^2) + eps) if the model has the norm, else n = x
            y1 = n1 cos t - n2 sin t;  y2 = n2 cos t + n1 sin t
            Backward rotates back, g1 = dy1 cos t + dy2 sin t, g2 = dy2 cos t - dy1 sin t, then as in RMSNorm:
            dx = r (g w - m mean(g w m)), m = x r;  dw = sum over tokens and heads of g m
Properties: bytes a token in 16 bits: forward 4 (H + K) hd. Backward 6 (H + K) hd with norms, 4 (H + K) hd without, and
            4 K hd to copy dv into its columns of d_qkv (a concatenation would move all of d_qkv again).
            About 10 FLOPs a value forward, 25 backward: memory-bound.
            Saved: qkv if there are norms, else only positions and tables. 1/rms is recomputed: the heads are in
            registers anyway, and saving it would move 4 (H + K) bytes a token twice.
            dw as in rms_norm: partial sums in registers, one float32 row a program, added in a fixed order by a second
            kernel. No atomics: two runs on one card agree bitwise. Float32 inside (float64 for float64), one rounding.
            Positions are not checked against the tables, because that would wait for the device.

Shapes: T tokens (all leading dimensions), H query heads, K kv heads, hd head_dim.
Source: Su et al., RoFormer, 2021, in the half form of Llama and MiniMind; Qwen3 for the norms of q and k.
"""
# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimind_fast.kernels.common import (
    accum_dtype,
    as_op,
    as_rows,
    cdiv,
    next_power_of_2,
    num_programs,
    refuse_second_derivative,
)

# A program holds all heads of its tokens, so the cosines are read once; a head lies within one warp, so its norm is a
# shuffle. At most this many values of q and k a thread: MiniMind3 has 48 with one token in one warp (12 heads of 96,
# padded to 128), MiniMind2 80 with four tokens (head_dim 64) or two (80, 96).
VALUES_PER_THREAD = 96
# With norms, the backward holds a tile's inputs, gradients and sums of dw at once: half as many.
VALUES_PER_THREAD_NORM_BWD = 48
# Values of the k tile a thread that make a 16-byte load: a program takes tokens up to that, if they fit.
VECTOR = 8
MAX_WARPS = 16
# Backward warps on each SM, as many as its registers hold (195 to 206 a thread for MiniMind3, by architecture): with
# more, a second wave would double the time. 9 x 5.4 KB are in flight. Without dw, one tile a program.
WARPS_PER_SM_BWD = 9
# Sum of the partial rows: 64-byte pieces of 256 rows at a time.
DW_BLOCK_ROWS, DW_BLOCK_D, DW_NUM_WARPS = 256, 16, 8


def _launch_params(kernel: str, num_heads: int, num_kv_heads: int, head_dim: int, has_norm: bool) -> dict[str, int]:
    """Choose the tile and the warps for a model's heads.

    Args:
        kernel: "fwd", "bwd" or "dw".
        num_heads, num_kv_heads, head_dim: H, K and hd.
        has_norm: whether q or k is normalised.
    Returns:
        The kernel's block sizes, num_warps and num_stages, as keyword arguments of the launch.
    """
    if kernel == "dw":
        return {"BLOCK_ROWS": DW_BLOCK_ROWS, "BLOCK_D": DW_BLOCK_D, "num_warps": DW_NUM_WARPS, "num_stages": 1}
    block_h, block_k = next_power_of_2(num_heads), next_power_of_2(num_kv_heads)
    block_half = next_power_of_2(head_dim // 2)
    limit = VALUES_PER_THREAD_NORM_BWD if kernel == "bwd" and has_norm else VALUES_PER_THREAD
    block_t, num_warps = 1, 1
    values = (block_h + block_k) * 2 * block_half / 32  # per thread, for one token in one warp
    while values / num_warps > limit and num_warps < MAX_WARPS:
        num_warps *= 2
    while 2 * block_t * values / num_warps <= limit and block_t * block_k * block_half < VECTOR * 32 * num_warps:
        block_t *= 2
    params = {"BLOCK_T": block_t, "BLOCK_H": block_h, "BLOCK_K": block_k, "BLOCK_HALF": block_half}
    if kernel == "bwd":
        side_by_side = max(1, VECTOR * 32 * num_warps // block_half)
        params["FOLD_Q"] = min(block_t * block_h, side_by_side)
        params["FOLD_K"] = min(block_t * block_k, side_by_side)
    return params | {"num_warps": num_warps, "num_stages": 1}


@triton.jit
def _at(ptr, tokens, token_stride, head_stride, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """-> pointers (tokens, heads, first half of a head)."""
    heads, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_HALF)
    return ptr + tokens[:, None, None] * token_stride + heads[None, :, None] * head_stride + d[None, None, :]


@triton.jit
def _mask(live, N: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """-> mask of the same tile, without the terms that are always true."""
    mask = live[:, None, None]
    if BLOCK_N != N:
        mask = mask & (tl.arange(0, BLOCK_N) < N)[None, :, None]
    if BLOCK_HALF != HALF:
        mask = mask & (tl.arange(0, BLOCK_HALF) < HALF)[None, None, :]
    return mask


@triton.jit
def _angles(cos_ptr, sin_ptr, positions, live, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, wide: tl.constexpr):
    """-> cos and sin (tokens, 1, half) at the tokens' positions."""
    d = tl.arange(0, BLOCK_HALF)
    mask = live[:, None]
    if BLOCK_HALF != HALF:
        mask = mask & (d < HALF)[None, :]
    at = positions.to(tl.int64)[:, None] * HALF + d[None, :]
    c = tl.load(cos_ptr + at, mask=mask, other=0.0).to(wide)
    s = tl.load(sin_ptr + at, mask=mask, other=0.0).to(wide)
    return c[:, None, :], s[:, None, :]


@triton.jit
def _weight(ptr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, wide: tl.constexpr):
    """-> both halves of a norm's weight, (1, 1, half)."""
    d = tl.arange(0, BLOCK_HALF)
    w1 = tl.load(ptr + d, mask=d < HALF, other=0.0).to(wide)
    w2 = tl.load(ptr + HALF + d, mask=d < HALF, other=0.0).to(wide)
    return w1[None, None, :], w2[None, None, :]


@triton.jit
def _rstd(x1, x2, eps, HALF: tl.constexpr):
    return tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, axis=2) / (2 * HALF) + eps)[:, :, None]


@triton.jit
def _rotate_and_store(at, mask, x1, x2, c, s, HALF: tl.constexpr):
    narrow: tl.constexpr = at.dtype.element_ty
    tl.store(at, (x1 * c - x2 * s).to(narrow), mask=mask)
    tl.store(at + HALF, (x2 * c + x1 * s).to(narrow), mask=mask)


@triton.jit
def _rope_fwd_kernel(
    qkv_ptr, cos_ptr, sin_ptr, positions_ptr, q_weight_ptr, k_weight_ptr, q_ptr, k_ptr, num_tokens, qkv_stride, eps,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if qkv_ptr.dtype.element_ty == tl.float64 else tl.float32
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = tokens < num_tokens
    positions = tl.load(positions_ptr + tokens, mask=live, other=0)
    mask_q = _mask(live, H, HALF, BLOCK_H, BLOCK_HALF)
    mask_k = _mask(live, K, HALF, BLOCK_K, BLOCK_HALF)
    q_at = _at(qkv_ptr, tokens, qkv_stride, 2 * HALF, BLOCK_H, BLOCK_HALF)
    k_at = _at(qkv_ptr + H * 2 * HALF, tokens, qkv_stride, 2 * HALF, BLOCK_K, BLOCK_HALF)
    q1 = tl.load(q_at, mask=mask_q, other=0.0).to(wide)
    q2 = tl.load(q_at + HALF, mask=mask_q, other=0.0).to(wide)
    k1 = tl.load(k_at, mask=mask_k, other=0.0).to(wide)
    k2 = tl.load(k_at + HALF, mask=mask_k, other=0.0).to(wide)
    c, s = _angles(cos_ptr, sin_ptr, positions, live, HALF, BLOCK_HALF, wide)
    if Q_NORM:
        w1, w2 = _weight(q_weight_ptr, HALF, BLOCK_HALF, wide)
        rstd = _rstd(q1, q2, eps, HALF)
        q1, q2 = q1 * rstd * w1, q2 * rstd * w2
    if K_NORM:
        w1, w2 = _weight(k_weight_ptr, HALF, BLOCK_HALF, wide)
        rstd = _rstd(k1, k2, eps, HALF)
        k1, k2 = k1 * rstd * w1, k2 * rstd * w2
    q_at = _at(q_ptr, tokens, H * 2 * HALF, 2 * HALF, BLOCK_H, BLOCK_HALF)
    k_at = _at(k_ptr, tokens, K * 2 * HALF, 2 * HALF, BLOCK_K, BLOCK_HALF)
    _rotate_and_store(q_at, mask_q, q1, q2, c, s, HALF)
    _rotate_and_store(k_at, mask_k, k1, k2, c, s, HALF)


@triton.jit
def _norm_bwd(x1, x2, g1, g2, w1, w2, eps, HALF: tl.constexpr):
    """-> the norm's input gradient in halves, and the terms of its weight gradient."""
    rstd = _rstd(x1, x2, eps, HALF)
    m1, m2 = x1 * rstd, x2 * rstd
    p1, p2 = g1 * m1, g2 * m2
    g1, g2 = g1 * w1, g2 * w2
    mean = tl.sum(g1 * m1 + g2 * m2, axis=2)[:, :, None] / (2 * HALF)
    return (g1 - m1 * mean) * rstd, (g2 - m2 * mean) * rstd, p1, p2


@triton.jit
def _fold(p, ROWS: tl.constexpr, FOLD: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """-> the tile's heads, summed within each thread (no shuffles)."""
    return tl.sum(tl.reshape(p, (ROWS // FOLD, FOLD, BLOCK_HALF)), axis=0)


@triton.jit
def _store_dw(ptr, dw1, dw2, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    d = tl.arange(0, BLOCK_HALF)
    tl.store(ptr + d, tl.sum(dw1, axis=0), mask=d < HALF)
    tl.store(ptr + HALF + d, tl.sum(dw2, axis=0), mask=d < HALF)


@triton.jit
def _rope_bwd_kernel(
    dq_ptr, dk_ptr, dv_ptr, qkv_ptr, cos_ptr, sin_ptr, positions_ptr, q_weight_ptr, k_weight_ptr, d_qkv_ptr,
    partial_ptr, num_tokens, dq_stride, dq_head_stride, dk_stride, dk_head_stride, dv_stride, dv_head_stride,
    qkv_stride, eps,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, Q_NORM: tl.constexpr, K_NORM: tl.constexpr,
    WANT_DX: tl.constexpr, WANT_DW: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_HALF: tl.constexpr,
    FOLD_Q: tl.constexpr, FOLD_K: tl.constexpr,
):  # fmt: skip
    narrow: tl.constexpr = d_qkv_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if narrow == tl.float64 else tl.float32
    row: tl.constexpr = (H + 2 * K) * 2 * HALF
    pid = tl.program_id(0)
    if Q_NORM and WANT_DW:
        dwq1 = tl.zeros((FOLD_Q, BLOCK_HALF), dtype=wide)
        dwq2 = tl.zeros((FOLD_Q, BLOCK_HALF), dtype=wide)
    if K_NORM and WANT_DW:
        dwk1 = tl.zeros((FOLD_K, BLOCK_HALF), dtype=wide)
        dwk2 = tl.zeros((FOLD_K, BLOCK_HALF), dtype=wide)

    for tile in range(pid, tl.cdiv(num_tokens, BLOCK_T), tl.num_programs(0)):
        tokens = (tile * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        live = tokens < num_tokens
        positions = tl.load(positions_ptr + tokens, mask=live, other=0)
        mask_q = _mask(live, H, HALF, BLOCK_H, BLOCK_HALF)
        mask_k = _mask(live, K, HALF, BLOCK_K, BLOCK_HALF)
        dq_at = _at(dq_ptr, tokens, dq_stride, dq_head_stride, BLOCK_H, BLOCK_HALF)
        dk_at = _at(dk_ptr, tokens, dk_stride, dk_head_stride, BLOCK_K, BLOCK_HALF)
        q1 = tl.load(dq_at, mask=mask_q, other=0.0).to(wide)
        q2 = tl.load(dq_at + HALF, mask=mask_q, other=0.0).to(wide)
        k1 = tl.load(dk_at, mask=mask_k, other=0.0).to(wide)
        k2 = tl.load(dk_at + HALF, mask=mask_k, other=0.0).to(wide)
        if WANT_DX:
            dv_at = _at(dv_ptr, tokens, dv_stride, dv_head_stride, BLOCK_K, BLOCK_HALF)
            v1 = tl.load(dv_at, mask=mask_k, other=0.0)
            v2 = tl.load(dv_at + HALF, mask=mask_k, other=0.0)
        if Q_NORM:
            q_at = _at(qkv_ptr, tokens, qkv_stride, 2 * HALF, BLOCK_H, BLOCK_HALF)
            xq1 = tl.load(q_at, mask=mask_q, other=0.0).to(wide)
            xq2 = tl.load(q_at + HALF, mask=mask_q, other=0.0).to(wide)
        if K_NORM:
            k_at = _at(qkv_ptr + H * 2 * HALF, tokens, qkv_stride, 2 * HALF, BLOCK_K, BLOCK_HALF)
            xk1 = tl.load(k_at, mask=mask_k, other=0.0).to(wide)
            xk2 = tl.load(k_at + HALF, mask=mask_k, other=0.0).to(wide)
        c, s = _angles(cos_ptr, sin_ptr, positions, live, HALF, BLOCK_HALF, wide)

        # v, then k, then q: the small tiles free their registers before the largest needs them.
        out = _at(d_qkv_ptr, tokens, row, 2 * HALF, BLOCK_H, BLOCK_HALF)
        k_out = _at(d_qkv_ptr + H * 2 * HALF, tokens, row, 2 * HALF, BLOCK_K, BLOCK_HALF)
        if WANT_DX:
            tl.store(k_out + K * 2 * HALF, v1, mask=mask_k)
            tl.store(k_out + K * 2 * HALF + HALF, v2, mask=mask_k)
        k1, k2 = k1 * c + k2 * s, k2 * c - k1 * s
        if K_NORM:
            w1, w2 = _weight(k_weight_ptr, HALF, BLOCK_HALF, wide)
            k1, k2, p1, p2 = _norm_bwd(xk1, xk2, k1, k2, w1, w2, eps, HALF)
            if WANT_DW:
                dwk1 += _fold(p1, BLOCK_T * BLOCK_K, FOLD_K, BLOCK_HALF)
                dwk2 += _fold(p2, BLOCK_T * BLOCK_K, FOLD_K, BLOCK_HALF)
        if WANT_DX:
            tl.store(k_out, k1.to(narrow), mask=mask_k)
            tl.store(k_out + HALF, k2.to(narrow), mask=mask_k)
        q1, q2 = q1 * c + q2 * s, q2 * c - q1 * s
        if Q_NORM:
            w1, w2 = _weight(q_weight_ptr, HALF, BLOCK_HALF, wide)
            q1, q2, p1, p2 = _norm_bwd(xq1, xq2, q1, q2, w1, w2, eps, HALF)
            if WANT_DW:
                dwq1 += _fold(p1, BLOCK_T * BLOCK_H, FOLD_Q, BLOCK_HALF)
                dwq2 += _fold(p2, BLOCK_T * BLOCK_H, FOLD_Q, BLOCK_HALF)
        if WANT_DX:
            tl.store(out, q1.to(narrow), mask=mask_q)
            tl.store(out + HALF, q2.to(narrow), mask=mask_q)

    if WANT_DW:
        partial_at = partial_ptr + pid * (4 * HALF)
        if Q_NORM:
            _store_dw(partial_at, dwq1, dwq2, HALF, BLOCK_HALF)
        if K_NORM:
            _store_dw(partial_at + 2 * HALF, dwk1, dwk2, HALF, BLOCK_HALF)


@triton.jit
def _rope_dw_kernel(
    partial_ptr, dw_ptr, num_partials, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=partial_ptr.dtype.element_ty)
    for start in range(0, num_partials, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_partials)[:, None] & (cols < D)[None, :]
        total += tl.load(partial_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), mask=cols < D)


def _heads(x: Tensor) -> Tensor:
    """View as (T, heads, hd) with adjacent hd; copies only where strides rule it out."""
    x = x.reshape(-1, *x.shape[-2:])
    return x if x.stride(-1) == 1 else x.contiguous()


@as_op("minimind_fast::rope_fwd")
def _rope_fwd(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, q_weight: Tensor | None, k_weight: Tensor | None,
    num_heads: int, num_kv_heads: int, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    q = qkv.new_empty(*qkv.shape[:-1], num_heads, head_dim)
    k = qkv.new_empty(*qkv.shape[:-1], num_kv_heads, head_dim)
    if qkv.numel() > 0:
        x, has_norm = as_rows(qkv), q_weight is not None or k_weight is not None
        params = _launch_params("fwd", num_heads, num_kv_heads, head_dim, has_norm)
        wq = x if q_weight is None else q_weight.contiguous()
        wk = x if k_weight is None else k_weight.contiguous()
        with torch.cuda.device_of(x):
            _rope_fwd_kernel[(cdiv(x.shape[0], params["BLOCK_T"]),)](
                x, cos.contiguous(), sin.contiguous(), positions.contiguous(), wq, wk, q, k, x.shape[0], x.stride(0),
                eps, num_heads, num_kv_heads, head_dim // 2, q_weight is not None, k_weight is not None, **params,
            )  # fmt: skip
    return q, k


@_rope_fwd.register_fake
def _(qkv, cos, sin, positions, q_weight, k_weight, num_heads, num_kv_heads, eps):
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    q = qkv.new_empty(*qkv.shape[:-1], num_heads, head_dim)
    return q, qkv.new_empty(*qkv.shape[:-1], num_kv_heads, head_dim)


@as_op("minimind_fast::rope_bwd")
def _rope_bwd(
    dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    qkv: Tensor | None, q_weight: Tensor | None, k_weight: Tensor | None, eps: float, want_dx: bool, want_dw: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> d_qkv and the weight gradients (2, hd) of q's and k's norms, each empty where not wanted."""
    num_heads, num_kv_heads, head_dim = dq.shape[-2], dk.shape[-2], dq.shape[-1]
    d_qkv = dq.new_empty((*dq.shape[:-2], (num_heads + 2 * num_kv_heads) * head_dim) if want_dx else 0)
    weight = q_weight if q_weight is not None else k_weight
    dw = dq.new_empty((2, head_dim) if want_dw else 0, dtype=dq.dtype if weight is None else weight.dtype)
    if dq.numel() == 0:
        return d_qkv, dw.zero_()
    dq, dk, dv = _heads(dq), _heads(dk), _heads(dv)
    x = dq if qkv is None else as_rows(qkv)
    wq = dq if q_weight is None else q_weight.contiguous()
    wk = dq if k_weight is None else k_weight.contiguous()
    params = _launch_params("bwd", num_heads, num_kv_heads, head_dim, qkv is not None)
    tiles = cdiv(dq.shape[0], params["BLOCK_T"])
    programs = min(tiles, num_programs(dq, WARPS_PER_SM_BWD, params["num_warps"])) if want_dw else tiles
    # A missing norm leaves its half of the partial rows unwritten.
    new = dq.new_empty if q_weight is not None and k_weight is not None else dq.new_zeros
    partial = new((programs, 2 * head_dim) if want_dw else (0,), dtype=accum_dtype(dq))
    with torch.cuda.device_of(dq):
        _rope_bwd_kernel[(programs,)](
            dq, dk, dv, x, cos.contiguous(), sin.contiguous(), positions.contiguous(), wq, wk, d_qkv, partial,
            dq.shape[0], dq.stride(0), dq.stride(1), dk.stride(0), dk.stride(1), dv.stride(0), dv.stride(1),
            x.stride(0), eps, num_heads, num_kv_heads, head_dim // 2, q_weight is not None, k_weight is not None,
            want_dx, want_dw, **params,
        )  # fmt: skip
        if want_dw:
            params = _launch_params("dw", num_heads, num_kv_heads, head_dim, True)
            _rope_dw_kernel[(cdiv(2 * head_dim, params["BLOCK_D"]),)](partial, dw, programs, 2 * head_dim, **params)
    return d_qkv, dw


@_rope_bwd.register_fake
def _(dq, dk, dv, cos, sin, positions, qkv, q_weight, k_weight, eps, want_dx, want_dw):
    num_heads, num_kv_heads, head_dim = dq.shape[-2], dk.shape[-2], dq.shape[-1]
    d_qkv = dq.new_empty((*dq.shape[:-2], (num_heads + 2 * num_kv_heads) * head_dim) if want_dx else 0)
    weight = q_weight if q_weight is not None else k_weight
    return d_qkv, dq.new_empty((2, head_dim) if want_dw else 0, dtype=dq.dtype if weight is None else weight.dtype)


refuse_second_derivative(_rope_bwd, "rope")


class _Rope(torch.autograd.Function):
    """Autograd for the two ops. Unlike a custom op, it may return a view of its input: v is not copied."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, positions, q_weight, k_weight, num_heads, num_kv_heads, eps):
        q, k = _rope_fwd(qkv, cos, sin, positions, q_weight, k_weight, num_heads, num_kv_heads, eps)
        v = qkv.unflatten(-1, (num_heads + 2 * num_kv_heads, q.shape[-1])).narrow(
            -2, num_heads + num_kv_heads, num_kv_heads
        )
        has_norm = q_weight is not None or k_weight is not None
        ctx.save_for_backward(cos, sin, positions, qkv if has_norm else None, q_weight, k_weight)
        ctx.eps = eps
        return q, k, v

    @staticmethod
    def backward(ctx, dq, dk, dv):
        cos, sin, positions, qkv, q_weight, k_weight = ctx.saved_tensors
        want_dx, _, _, _, want_q, want_k, *_ = ctx.needs_input_grad
        d_qkv, dw = _rope_bwd(
            dq, dk, dv, cos, sin, positions, qkv, q_weight, k_weight, ctx.eps, want_dx, want_q or want_k
        )
        return (
            d_qkv if want_dx else None, None, None, None, dw[0] if want_q else None, dw[1] if want_k else None,
            None, None, None,
        )  # fmt: skip


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
    """Split a fused QKV projection, normalise q and k if the model does, and rotate them by their positions.

    Args:
        qkv: (..., (H + 2K) * hd) float32, bfloat16, float16 or float64, in the order q | k | v; any strides (copied if
            the last dimension is not contiguous or the leading ones do not fold into one).
        cos, sin: (max_positions, hd // 2) float32 tables.
        positions: (...) int32 or int64, rows of the tables (not checked); broadcast over missing leading dimensions.
        num_heads, num_kv_heads: H and K.
        q_weight: (hd,) weight of the RMSNorm over each q head, or None.
        k_weight: (hd,) the same for k, in the same dtype.
        eps: added to the mean square of those norms.
    Returns:
        q (..., H, hd) and k (..., K, hd), contiguous, and v (..., K, hd), a view of qkv; all in qkv's dtype.
    Raises:
        ValueError: mismatched shapes or dtypes, or an odd head_dim.
        RuntimeError: a second derivative is requested.
    Source: Su et al., RoFormer, 2021; the half form (not interleaved), as in Llama and MiniMind.
    """
    heads = num_heads + 2 * num_kv_heads
    if qkv.dim() == 0 or not qkv.is_floating_point() or qkv.shape[-1] % heads or qkv.shape[-1] // heads % 2:
        raise ValueError(
            f"rope needs a floating-point qkv (..., ({num_heads} + 2 * {num_kv_heads}) * head_dim) with an even "
            f"head_dim, got {qkv.dtype} {tuple(qkv.shape)}."
        )
    head_dim = qkv.shape[-1] // heads
    if cos.shape != sin.shape or cos.dim() != 2 or cos.shape[1] != head_dim // 2 or cos.dtype != sin.dtype:
        raise ValueError(
            f"rope needs cos and sin of shape (max_positions, {head_dim // 2}) in one dtype, "
            f"got {cos.dtype} {tuple(cos.shape)} and {sin.dtype} {tuple(sin.shape)}."
        )
    if positions.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rope needs positions in int32 or int64, got {positions.dtype}.")
    if positions.shape != qkv.shape[:-1]:
        try:
            positions = positions.expand(qkv.shape[:-1])
        except RuntimeError as error:
            raise ValueError(f"rope: positions {tuple(positions.shape)} do not fit qkv {tuple(qkv.shape)}.") from error
    for weight in (q_weight, k_weight):
        if weight is not None and weight.shape != (head_dim,):
            raise ValueError(f"rope needs norm weights of shape ({head_dim},), got {tuple(weight.shape)}.")
    if q_weight is not None and k_weight is not None and q_weight.dtype != k_weight.dtype:
        raise ValueError(f"rope needs both norm weights in one dtype, got {q_weight.dtype} and {k_weight.dtype}.")
    return _Rope.apply(qkv, cos, sin, positions, q_weight, k_weight, num_heads, num_kv_heads, eps)
