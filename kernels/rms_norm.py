"""RMSNorm, alone or fused with the preceding addition to the residual stream.

Purpose:    y = norm(x) w, or h = x + residual; y = norm(h) w, in one pass that reads and writes each tensor once.
Principle:  r = 1 / sqrt(mean(h^2) + eps);  n = h r;  y = n w
            g = dy w;  dh += r (g - n mean(g n));  dw = sum over tokens of dy n
            `cast_first` (MiniMind2) rounds n to x's dtype before multiplying by w, in y and in dw.
Properties: bytes a token in 16 bits: alone 4D forward, 6D backward; fused 8D forward (read x, residual; write y, h) and
            8D backward (read dy, dh, h; write the one gradient that x and residual share). 4 more for r, saved in
            float32 because recomputing it would add a reduction before the backward's own; n is recomputed from h and
            r. About 6 FLOPs a value forward, 12 backward: memory-bound.
            dw: each program of a fixed grid sums its rows in registers and writes one float32 partial row; a second
            small kernel adds those in a fixed order. No atomics: two runs on one card agree bitwise (the order depends
            on the card's number of multiprocessors).
            Float32 inside (float64 for float64); h is rounded as in eager, y and the gradients once.

Shapes: T tokens (all leading dimensions), D hidden.
Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; the partial sums of dw follow Triton's
    layer-norm tutorial, without its locks; Liger-Kernel shows that one row a program is slow at small D.
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

# A warp holds whole rows: sums over D are shuffles, and no program waits at a barrier. One warp up to 1024 columns,
# doubled with D beyond. An SM holds 32 such programs, so their number never limits bandwidth.
COLUMNS_PER_WARP = 1024
MAX_COLUMNS = 16 * COLUMNS_PER_WARP  # 16 warps: a longer row and its gradients would not fit in registers
# Values of a tile per thread, which sets a program's rows. Forward 48 (D 768 and 512: 2 rows; 64: 16): a warp has 6 KB
# of x and residual in flight, and reads w once for two rows. Backward 16 (512 and more: 1 row, 96: 4), because three
# tiles and dw are live; 24 spilled at 96 on sm_100.
VALUES_PER_THREAD_FWD = 48
VALUES_PER_THREAD_BWD = 16
MAX_ROWS = 256  # each row of a thread holds 64-bit addresses: 32 rows of one column spilled on sm_80
# Backward warps on each SM, as many as its registers hold (up to 130 a thread at 768 columns, 168 at 1024): with more,
# a second wave would double the time. 15 keep 15 x 3 KB = 45 KB in flight, as compiled (HBM latency needs about 30 KB), and
# their partial rows of dw (132 x 15 x 3 KB = 6 MB) stay in L2 until they are added. Without dw, one tile a program.
WARPS_PER_SM_BWD, WARPS_PER_SM_BWD_WIDE, WIDE_COLUMNS = 15, 12, 768
# Sum of the partial rows: 64-byte pieces of 256 rows at a time, so that D / 16 programs share the work.
DW_BLOCK_ROWS, DW_BLOCK_D, DW_NUM_WARPS = 256, 16, 8


def _pieces(D: int) -> tuple[int, int]:
    """Split D into two power-of-two pieces: 768 = 512 + 256, 640 = 512 + 128, 512 = 512 + 0, 100 = 64 + 64 (masked).

    One padded block would idle a quarter of its 1024 lanes at 768; two pieces idle at most a quarter of the second.
    """
    first = 1 << (D.bit_length() - 1)
    rest = D - first
    return first, next_power_of_2(rest) if rest else 0


def _launch_params(kernel: str, D: int) -> dict[str, int]:
    """Choose the tile and the warps for a hidden size.

    Args:
        kernel: "fwd", "bwd" or "dw".
        D: columns.
    Returns:
        The kernel's block sizes, num_warps and num_stages, as keyword arguments of the launch.
    """
    if kernel == "dw":
        return {"BLOCK_ROWS": DW_BLOCK_ROWS, "BLOCK_D": DW_BLOCK_D, "num_warps": DW_NUM_WARPS, "num_stages": 1}
    first, second = _pieces(D)
    num_warps = next_power_of_2(cdiv(D, COLUMNS_PER_WARP))
    values = {"fwd": VALUES_PER_THREAD_FWD, "bwd": VALUES_PER_THREAD_BWD}[kernel] * 32 * num_warps
    rows = min(1 << max(0, (values // (first + second)).bit_length() - 1), MAX_ROWS)
    return {"ROWS": rows, "BLOCK_A": first, "BLOCK_B": second, "num_warps": num_warps, "num_stages": 1}


@triton.jit
def _load(ptr, rows, stride, cols, mask, wide: tl.constexpr):
    return tl.load(ptr + rows[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(wide)


@triton.jit
def _store(ptr, rows, stride, cols, mask, value):
    tl.store(ptr + rows[:, None] * stride + cols[None, :], value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalise(h, rstd, CAST_FIRST: tl.constexpr, narrow: tl.constexpr, wide: tl.constexpr):
    """-> h * rstd, rounded to the input's dtype if CAST_FIRST."""
    n = h * rstd[:, None]
    return n.to(narrow).to(wide) if CAST_FIRST else n


@triton.jit
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rstd_ptr, num_rows, x_stride, residual_stride, eps,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    narrow: tl.constexpr = x_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if narrow == tl.float64 else tl.float32
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    a, mask_a = tl.arange(0, BLOCK_A), live[:, None]
    # Loads cannot move past a store: issue them all before the first one, so that they overlap.
    h_a = _load(x_ptr, rows, x_stride, a, mask_a, wide)
    w_a = tl.load(weight_ptr + a)
    if BLOCK_B > 0:
        b = BLOCK_A + tl.arange(0, BLOCK_B)
        mask_b = live[:, None] & (b < D)[None, :] if BLOCK_A + BLOCK_B != D else live[:, None]
        h_b = _load(x_ptr, rows, x_stride, b, mask_b, wide)
        w_b = tl.load(weight_ptr + b, mask=b < D, other=0.0)
    if HAS_RESIDUAL:
        h_a = (h_a + _load(residual_ptr, rows, residual_stride, a, mask_a, wide)).to(narrow).to(wide)
        if BLOCK_B > 0:
            h_b = (h_b + _load(residual_ptr, rows, residual_stride, b, mask_b, wide)).to(narrow).to(wide)
            _store(h_ptr, rows, D, b, mask_b, h_b)
        _store(h_ptr, rows, D, a, mask_a, h_a)

    squares = tl.sum(h_a * h_a, axis=1)
    if BLOCK_B > 0:
        squares += tl.sum(h_b * h_b, axis=1)
    rstd = tl.rsqrt(squares / D + eps)
    tl.store(rstd_ptr + rows, rstd, mask=live)

    n_a = _normalise(h_a, rstd, CAST_FIRST, narrow, wide)
    _store(y_ptr, rows, D, a, mask_a, n_a * w_a.to(wide)[None, :])
    if BLOCK_B > 0:
        n_b = _normalise(h_b, rstd, CAST_FIRST, narrow, wide)
        _store(y_ptr, rows, D, b, mask_b, n_b * w_b.to(wide)[None, :])


@triton.jit
def _rms_norm_bwd_kernel(
    dy_ptr, dh_ptr, h_ptr, weight_ptr, rstd_ptr, dx_ptr, partial_ptr, num_rows, dy_stride, dh_stride, h_stride,
    D: tl.constexpr, HAS_DH: tl.constexpr, WANT_DX: tl.constexpr, WANT_DW: tl.constexpr, CAST_FIRST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    narrow: tl.constexpr = h_ptr.dtype.element_ty
    wide: tl.constexpr = tl.float64 if narrow == tl.float64 else tl.float32
    pid = tl.program_id(0)
    a = tl.arange(0, BLOCK_A)
    w_a = tl.load(weight_ptr + a).to(wide)[None, :]
    # Summed over the rows at the end: the compiler would fuse a lane's bare product into a sum of two lanes, unrounded, but
    # not the other's, so that lanes that share a column would end with different last bits.
    dw_a = tl.zeros((ROWS, BLOCK_A), dtype=wide)
    if BLOCK_B > 0:
        b = BLOCK_A + tl.arange(0, BLOCK_B)
        w_b = tl.load(weight_ptr + b, mask=b < D, other=0.0).to(wide)[None, :]
        dw_b = tl.zeros((ROWS, BLOCK_B), dtype=wide)

    for tile in range(pid, tl.cdiv(num_rows, ROWS), tl.num_programs(0)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        live = rows < num_rows
        mask_a = live[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=live, other=0.0)
        dy_a = _load(dy_ptr, rows, dy_stride, a, mask_a, wide)
        h_a = _load(h_ptr, rows, h_stride, a, mask_a, wide)
        if BLOCK_B > 0:
            mask_b = live[:, None] & (b < D)[None, :] if BLOCK_A + BLOCK_B != D else live[:, None]
            dy_b = _load(dy_ptr, rows, dy_stride, b, mask_b, wide)
            h_b = _load(h_ptr, rows, h_stride, b, mask_b, wide)
        if HAS_DH and WANT_DX:
            dh_a = _load(dh_ptr, rows, dh_stride, a, mask_a, wide)
            if BLOCK_B > 0:
                dh_b = _load(dh_ptr, rows, dh_stride, b, mask_b, wide)

        # Applying r to the gradient instead of n takes five operations a value instead of seven, and no registers for n:
        # s = r dy, dw += s h, dx = s w - h (r^2 mean(h s w)).
        s_a = dy_a * rstd[:, None]
        if BLOCK_B > 0:
            s_b = dy_b * rstd[:, None]
        if WANT_DW:
            if CAST_FIRST:
                dw_a += dy_a * _normalise(h_a, rstd, True, narrow, wide)
            else:
                dw_a += s_a * h_a
            if BLOCK_B > 0:
                if CAST_FIRST:
                    dw_b += dy_b * _normalise(h_b, rstd, True, narrow, wide)
                else:
                    dw_b += s_b * h_b
        if WANT_DX:
            s_a *= w_a
            dot = tl.sum(s_a * h_a, axis=1)
            if BLOCK_B > 0:
                s_b *= w_b
                dot += tl.sum(s_b * h_b, axis=1)
            mean = (dot / D * rstd * rstd)[:, None]
            dx_a = s_a - h_a * mean
            if HAS_DH:
                dx_a += dh_a
            _store(dx_ptr, rows, D, a, mask_a, dx_a)
            if BLOCK_B > 0:
                dx_b = s_b - h_b * mean
                if HAS_DH:
                    dx_b += dh_b
                _store(dx_ptr, rows, D, b, mask_b, dx_b)

    if WANT_DW:
        partial_at = partial_ptr + pid.to(tl.int64) * D
        tl.store(partial_at + a, tl.sum(dw_a, axis=0))
        if BLOCK_B > 0:
            tl.store(partial_at + b, tl.sum(dw_b, axis=0), mask=b < D)


@triton.jit
def _rms_norm_dw_kernel(
    partial_ptr, dw_ptr, num_partials, D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr
):
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_ROWS, BLOCK_D), dtype=partial_ptr.dtype.element_ty)
    for start in range(0, num_partials, BLOCK_ROWS):
        rows = start + tl.arange(0, BLOCK_ROWS)
        mask = (rows < num_partials)[:, None] & (cols < D)[None, :]
        total += tl.load(partial_ptr + rows[:, None].to(tl.int64) * D + cols[None, :], mask=mask, other=0.0)
    tl.store(dw_ptr + cols, tl.sum(total, axis=0).to(dw_ptr.dtype.element_ty), mask=cols < D)


@as_op("minimind_fast::rms_norm_fwd")
def _rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, cast_first: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """-> y, h (empty without a residual), rstd."""
    D = x.shape[-1]
    y, rstd = x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accum_dtype(x))
    h = x.new_empty(0 if residual is None else x.shape)
    if x.numel() > 0:
        x2, params = as_rows(x), _launch_params("fwd", D)
        r2 = x2 if residual is None else as_rows(residual)
        with torch.cuda.device_of(x):
            _rms_norm_fwd_kernel[(cdiv(x2.shape[0], params["ROWS"]),)](
                x2, r2, weight.contiguous(), y, h, rstd, x2.shape[0], x2.stride(0), r2.stride(0), eps,
                D, residual is not None, cast_first, **params,
            )  # fmt: skip
    return y, h, rstd


@_rms_norm_fwd.register_fake
def _(x, residual, weight, eps, cast_first):
    h = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), h, x.new_empty(x.shape[:-1], dtype=accum_dtype(x))


@as_op("minimind_fast::rms_norm_bwd")
def _rms_norm_bwd(
    dy: Tensor,
    dh: Tensor | None,
    h: Tensor,
    weight: Tensor,
    rstd: Tensor,
    cast_first: bool,
    want_dx: bool,
    want_dw: bool,
) -> tuple[Tensor, Tensor]:
    """-> dx (for h, and so for x and residual) and dw, each empty where not wanted."""
    D = h.shape[-1]
    dx = h.new_empty(h.shape if want_dx else 0)
    dw = weight.new_empty(weight.shape if want_dw else 0)
    if h.numel() == 0:
        return dx, dw.zero_()
    h2, dy2, params = as_rows(h), as_rows(dy), _launch_params("bwd", D)
    dh2 = dy2 if dh is None else as_rows(dh)
    num_rows = h2.shape[0]
    warps = WARPS_PER_SM_BWD if D <= WIDE_COLUMNS else WARPS_PER_SM_BWD_WIDE
    tiles = cdiv(num_rows, params["ROWS"])
    programs = min(tiles, num_programs(h, warps, params["num_warps"])) if want_dw else tiles
    partial = h.new_empty((programs, D) if want_dw else (0,), dtype=accum_dtype(h))
    with torch.cuda.device_of(h):
        _rms_norm_bwd_kernel[(programs,)](
            dy2, dh2, h2, weight.contiguous(), rstd, dx, partial, num_rows, dy2.stride(0), dh2.stride(0), h2.stride(0),
            D, dh is not None, want_dx, want_dw, cast_first, **params,
        )  # fmt: skip
        if want_dw:
            params = _launch_params("dw", D)
            _rms_norm_dw_kernel[(cdiv(D, params["BLOCK_D"]),)](partial, dw, programs, D, **params)
    return dx, dw


@_rms_norm_bwd.register_fake
def _(dy, dh, h, weight, rstd, cast_first, want_dx, want_dw):
    return h.new_empty(h.shape if want_dx else 0), weight.new_empty(weight.shape if want_dw else 0)


def _save(ctx, inputs, output):
    x, residual, weight, _, ctx.cast_first = inputs
    ctx.has_residual = residual is not None
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dh, _):
    h, weight, rstd = ctx.saved_tensors
    want_dx, want_dw = ctx.needs_input_grad[0] or ctx.needs_input_grad[1], ctx.needs_input_grad[2]
    dy = torch.zeros_like(h) if dy is None else dy
    dx, dw = _rms_norm_bwd(dy, dh if ctx.has_residual else None, h, weight, rstd, ctx.cast_first, want_dx, want_dw)
    return (
        dx if ctx.needs_input_grad[0] else None,
        dx if ctx.needs_input_grad[1] else None,
        dw if want_dw else None,
        None,
        None,
    )


_rms_norm_fwd.register_autograd(_backward, setup_context=_save)
refuse_second_derivative(_rms_norm_bwd, "rms_norm")


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, cast_first: bool = False):
    """Normalise by the root mean square, optionally after adding to the residual stream.

    Args:
        x: (..., D) float32, bfloat16, float16 or float64; any strides (copied if the last dimension is not contiguous or
            the leading ones do not fold into one).
        weight: (D,) scale, in any floating-point dtype.
        eps: added to the mean square.
        residual: (..., D) residual stream, in x's dtype; the sum is rounded to that dtype.
        cast_first: round to x's dtype before multiplying by the weight (MiniMind2), not after.
    Returns:
        y (..., D) in x's dtype, or (y, h) with h = x + residual.
    Raises:
        ValueError: mismatched shapes or dtypes, or D above 16384.
        RuntimeError: a second derivative is requested.
    Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019.
    """
    if x.dim() == 0 or not x.is_floating_point() or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"rms_norm needs a floating-point x (..., D) and a weight (D,), got {x.dtype} {tuple(x.shape)} "
            f"and {tuple(weight.shape)}."
        )
    if x.shape[-1] > MAX_COLUMNS:
        raise ValueError(f"rms_norm's kernel holds whole rows, up to {MAX_COLUMNS} columns; got {x.shape[-1]}.")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"rms_norm needs the residual in x's shape and dtype, {tuple(x.shape)} {x.dtype}, "
            f"got {tuple(residual.shape)} {residual.dtype}."
        )
    y, h, _ = _rms_norm_fwd(x, residual, weight, eps, cast_first)
    return y if residual is None else (y, h)
