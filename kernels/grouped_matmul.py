"""Building blocks of matmuls over rows sorted by expert: a program's tile, the loop over the depth, ragged sums.

Purpose:    the device code that moe_mlp's forward and backward share.
Principle:  a program finds its expert, rows and columns from the counts on the device; the grid is an upper bound, and
            programs past the last row exit. A weight gradient is a matmul whose depth is an expert's rows.
Properties: sums run in a fixed order, no atomics: two runs agree bitwise.

Shapes: T tokens, E experts, S = T * top_k slots; sorted rows are slots in the plan's order.
Source: Triton's grouped-matmul tutorial for the order of the tiles.
"""

# Triton's annotations describe what its compiler sees (constexpr), not what a launch passes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportReturnType=false

import triton
import triton.language as tl


@triton.jit
def locate(
    counts_ptr, E: tl.constexpr, N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """-> this program's expert, first row, end of the expert's rows (no work if <= first row), column block."""
    column_blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    within = pid % (GROUP_M * column_blocks)
    tile = pid // (GROUP_M * column_blocks) * GROUP_M + within % GROUP_M
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    start = tl.sum(tl.where(e < expert, counts, 0), axis=0)
    end = start + tl.sum(tl.where(e == expert, counts, 0), axis=0)
    first = start + (tile - tl.sum(tl.where(e < expert, tiles, 0), axis=0)) * BLOCK_M
    return expert.to(tl.int64), first, end, within // GROUP_M


@triton.jit
def matmul(
    a_at, b_at, acc, k, K: tl.constexpr, stride: tl.constexpr, wide: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """acc += a b over depth K, from pointers to the first tiles; `stride` separates b's rows, a's columns are adjacent."""
    for start in range(0, K, BLOCK_K):
        if K % BLOCK_K == 0:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=(k < K - start)[None, :], other=0.0)
            b = tl.load(b_at, mask=(k < K - start)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee", out_dtype=wide)
        a_at += BLOCK_K
        b_at += BLOCK_K * stride
    return acc


@triton.jit
def halves(acc, M: tl.constexpr, N: tl.constexpr):
    """(M, 2N) -> its left and right (M, N), both in the same thread's registers: no data movement."""
    return tl.split(tl.permute(tl.reshape(acc, (M, 2, N)), (0, 2, 1)))


@triton.jit
def quarters(acc, M: tl.constexpr, N: tl.constexpr):
    left, right = halves(acc, M, 2 * N)
    return halves(left, M, N) + halves(right, M, N)


@triton.jit
def _moe_combine_kernel(
    rows_ptr, inverse_ptr, scale_ptr, out_ptr, num_tokens,
    D: tl.constexpr, TOP_K: tl.constexpr, HAS_SCALE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j scale[t, j] rows[inverse[t, j]]."""
    wide: tl.constexpr = tl.float64 if rows_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    t = pid // blocks * BLOCK_T + tl.arange(0, BLOCK_T)
    d = pid % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    live = t < num_tokens
    mask = live[:, None] & (d < D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), dtype=wide)
    for j in range(TOP_K):
        row = tl.load(inverse_ptr + t * TOP_K + j, mask=live, other=0).to(tl.int64)
        value = tl.load(rows_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0).to(wide)
        if HAS_SCALE:
            value = value * tl.load(scale_ptr + t * TOP_K + j, mask=live, other=0.0)[:, None]
        total += value
    tl.store(out_ptr + t[:, None].to(tl.int64) * D + d[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _moe_dw_kernel(
    a_ptr, b_ptr, counts_ptr, order_ptr, out_ptr,
    M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, SPLITS: tl.constexpr,
    GATHER_A: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out[split, expert] (M, N) = a^T b over one split of the expert's rows; either a (., M) or b (., N) is by token."""
    wide: tl.constexpr = tl.float64 if a_ptr.dtype.element_ty == tl.float64 else tl.float32
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks: tl.constexpr = (M + BLOCK_M - 1) // BLOCK_M * blocks_n
    pid = tl.program_id(0)
    tile, split = pid % blocks, pid // blocks % SPLITS
    # Longest sums first, so that a full expert does not start after the others have finished.
    e = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + e, mask=e < E, other=-1)
    ahead = (counts[None, :] > counts[:, None]) | ((counts[None, :] == counts[:, None]) & (e[None, :] < e[:, None]))
    rank = tl.sum(ahead.to(tl.int32), axis=1)
    expert = tl.sum(tl.where(rank == pid // (blocks * SPLITS), e, 0), axis=0)
    start = tl.sum(tl.where(e < expert, counts, 0), axis=0)
    count = tl.sum(tl.where(e == expert, counts, 0), axis=0)
    each = tl.cdiv(tl.cdiv(count, SPLITS), BLOCK_K) * BLOCK_K
    low = start + tl.minimum(split * each, count)
    high = start + tl.minimum((split + 1) * each, count)

    m = tile // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    for step in range(low, high, BLOCK_K):
        row = step + tl.arange(0, BLOCK_K)
        live = row < high
        token = tl.load(order_ptr + row, mask=live, other=0) // TOP_K
        a_row, b_row = (token, row) if GATHER_A else (row, token)
        a = tl.load(a_ptr + a_row[:, None].to(tl.int64) * M + (m % M)[None, :], mask=live[:, None], other=0.0)
        b = tl.load(b_ptr + b_row[:, None].to(tl.int64) * N + (n % N)[None, :], mask=live[:, None], other=0.0)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee", out_dtype=wide)
    out_at = out_ptr + ((split * E + expert).to(tl.int64) * M + m[:, None]) * N + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
