"""A matrix times its own transpose, half of it computed: both products of a Newton-Schulz step.

Purpose:    y = alpha x x^T + beta c for a batch, in half of the FLOPs of a matmul. Muon takes x x^T, and of that its
            polynomial b A + c A A^T.
Principle:  a program computes a tile on or below the diagonal, and stores it and its mirror image; c is added to each by
            its own values, so it need not be symmetric.
            backward  dx = alpha (dy + dy^T) x;  dc = beta dy  (PyTorch's matmul: Muon needs none)
Properties: M (M + BLOCK) K FLOPs where a matmul takes 2 M M K. Bytes in 16 bits: 2 M K read at least, 2 M M written, and as
            many read with c. Float32 accumulation and epilogue (float64 for float64), rounded once. Tiles of one matrix run
            one after the other, so that its rows stay in L2. No atomics: two runs agree bitwise, and y is exactly
            symmetric where c is.

Shapes: N matrices, M rows, K columns.
Source: Jordan, Muon, 2024; the idea of the mirrored tile is that of BLAS's syrk.
"""
# Triton's annotations (constexpr) are the compiler's view, not the caller's.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from minimind_fast.kernels.common import as_op, cdiv, next_power_of_2
from minimind_fast.kernels.grouped_matmul import matmul


def _launch_params(M: int, K: int, element_bytes: int) -> dict[str, int]:
    """Choose the tile: square, so that the diagonal passes through corners.

    Args:
        M, K: rows and columns.
        element_bytes: bytes of one value of x.
    Returns:
        BLOCK, BLOCK_K, num_warps and num_stages.
    """
    if element_bytes > 2:  # exact float32, no tensor cores: small tiles that stay in registers
        block, depth, warps, stages = 64, 32, 4, 2
    else:  # 128 x 128: 32 KB a stage, four stages fit the 163 KB of an A100; three the 99 KB of a desktop card
        block, depth, warps, stages = 128, 64, 8, 3
    block = min(block, max(16, next_power_of_2(M)))
    depth = min(depth, max(16, next_power_of_2(K)))
    return {"BLOCK": block, "BLOCK_K": depth, "num_warps": warps if block > 32 else 4, "num_stages": stages}


@triton.jit
def _symmetric_product_kernel(
    x_ptr, c_ptr, y_ptr, alpha, beta,
    M: tl.constexpr, K: tl.constexpr, HAS_C: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    wide: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    side: tl.constexpr = (M + BLOCK - 1) // BLOCK
    tiles: tl.constexpr = side * (side + 1) // 2
    pid = tl.program_id(0)
    tile = pid % tiles
    # Row i of the triangle begins at tile i (i + 1) / 2: the row is how many rows 1, 2, ... have begun.
    i = tl.full((), 0, tl.int32)
    for row in tl.static_range(1, side):
        i += (tile >= row * (row + 1) // 2).to(tl.int32)
    j = tile - i * (i + 1) // 2
    matrix = (pid // tiles).to(tl.int64)

    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)  # a row's offset can pass 2^31 elements
    cols = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    # Rows past the end read the last one; only stores are masked.
    a_at = x_ptr + matrix * (M * K) + tl.minimum(rows, M - 1)[:, None] * K + k[None, :]
    b_at = x_ptr + matrix * (M * K) + tl.minimum(cols, M - 1)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK, BLOCK), dtype=wide)
    acc = matmul(a_at, b_at, acc, k, K, 1, wide, BLOCK_K)
    acc = acc * alpha

    mask = (rows < M)[:, None] & (cols < M)[None, :]
    here = matrix * (M * M) + rows[:, None] * M + cols[None, :]
    value = acc
    if HAS_C:
        value += beta * tl.load(c_ptr + here, mask=mask, other=0.0).to(wide)
    tl.store(y_ptr + here, value.to(y_ptr.dtype.element_ty), mask=mask)
    if i != j:
        mirrored = (cols < M)[:, None] & (rows < M)[None, :]
        there = matrix * (M * M) + cols[:, None] * M + rows[None, :]
        value = tl.trans(acc)
        if HAS_C:
            value += beta * tl.load(c_ptr + there, mask=mirrored, other=0.0).to(wide)
        tl.store(y_ptr + there, value.to(y_ptr.dtype.element_ty), mask=mirrored)


@as_op("minimind_fast::symmetric_product")
def _symmetric_product(x: Tensor, c: Tensor | None, alpha: float, beta: float) -> Tensor:
    N, M, K = x.shape
    y = x.new_empty(N, M, M)
    if y.numel() > 0:
        x, summand, params = x.contiguous(), x if c is None else c.contiguous(), _launch_params(M, K, x.element_size())
        side = cdiv(M, params["BLOCK"])
        with torch.cuda.device_of(x):
            _symmetric_product_kernel[(N * side * (side + 1) // 2,)](
                x, summand, y, alpha, beta, M, K, c is not None, **params
            )  # fmt: skip
    return y


@_symmetric_product.register_fake
def _(x, c, alpha, beta):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


def _save(ctx, inputs, output):
    x, _, ctx.alpha, ctx.beta = inputs
    ctx.save_for_backward(x)


def _backward(ctx, dy):
    (x,) = ctx.saved_tensors
    dx = ctx.alpha * ((dy + dy.mT) @ x) if ctx.needs_input_grad[0] else None
    return dx, ctx.beta * dy if ctx.needs_input_grad[1] else None, None, None


_symmetric_product.register_autograd(_backward, setup_context=_save)


def symmetric_product(x: Tensor, c: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """alpha x x^T + beta c for each matrix of a batch, computing half of the product.

    Args:
        x: (N, M, K) float32, bfloat16, float16 or float64; any strides (copied if not contiguous).
        c: (N, M, M) in x's dtype, or None.
        alpha, beta: factors.
    Returns:
        (N, M, M) in x's dtype.
    Raises:
        ValueError: other shapes or dtypes.
    Source: Jordan, Muon: An optimizer for hidden layers in neural networks, 2024.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"symmetric_product needs a floating-point x (N, M, K), got {x.dtype} {tuple(x.shape)}.")
    if c is not None and (c.shape != (x.shape[0], x.shape[1], x.shape[1]) or c.dtype != x.dtype):
        raise ValueError(
            f"symmetric_product needs c (N, M, M) in x's dtype, {x.dtype} for {tuple(x.shape)}, "
            f"got {c.dtype} {tuple(c.shape)}."
        )
    return _symmetric_product(x, c, alpha, beta)
