"""Split-K weight gradients: dW = dY^T X by cuBLAS, by cuBLAS in pieces, and in Triton.

Purpose:    an experiment. At D = 768 a weight gradient has few output tiles (0.14 to 0.86 of a wave of 128 x 256 tiles),
            which leaves multiprocessors idle: what does cuBLAS reach there, and does splitting the rows do better?
Principle:  two passes, no atomics. Piece s of the rows gives a float32 partial (N, K); the partials are added in order and
            rounded once. Enough pieces to fill the multiprocessors, each of at least MIN_ROWS rows.
Properties: 2TNK FLOPs; 8NK bytes per piece beyond the operands. Bitwise deterministic. 16-bit or float32 operands.

Shapes: T rows (tokens), N outputs, K inputs of a projection; dY (T, N), X (T, K), dW (N, K).
Source: Triton's matmul tutorial for the tiles; split-K as in CUTLASS's documentation.
"""

# Triton's annotations describe what its compiler sees (constexpr), not what a launch passes.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MIN_ROWS = 512  # per piece: with fewer, its partial costs more than its product
MAX_PIECES = 32
SUM_BLOCK = 1024  # elements of dW per program of the second pass


def pieces(T: int, N: int, K: int, multiprocessors: int, block_n: int = 128, block_k: int = 256) -> int:
    """The number of pieces to split the rows into.

    Args:
        T, N, K: the shape.
        multiprocessors: their number on the card.
        block_n, block_k: shape of an output tile.

    Returns:
        1 or more: the fewest pieces whose tiles fill 90% of the last wave, else the number that fills it best.
    """
    tiles = -(-N // block_n) * -(-K // block_k)
    most = max(1, min(MAX_PIECES, T // MIN_ROWS))

    def filled(count: int) -> float:
        programs = tiles * count
        return programs / (-(-programs // multiprocessors) * multiprocessors)

    return next((s for s in range(1, most + 1) if filled(s) >= 0.9), max(range(1, most + 1), key=filled))


@triton.jit
def _partials(
    dy_ptr, x_ptr, out_ptr, T, rows,
    N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """One output tile of one piece's product. Neighbours share a piece, so its rows are read from L2."""
    tiles_k: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    tile, piece = tl.program_id(0), tl.program_id(1)
    n = tile // tiles_k * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    first = piece * rows
    end = tl.minimum(first + rows, T)
    t = first + tl.arange(0, BLOCK_T)
    dy_at = dy_ptr + t[:, None].to(tl.int64) * N + n[None, :]
    x_at = x_ptr + t[:, None].to(tl.int64) * K + k[None, :]
    inside_n, inside_k = (n < N)[None, :], (k < K)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for start in range(first, end, BLOCK_T):
        rest = (tl.arange(0, BLOCK_T) < end - start)[:, None]
        dy = tl.load(dy_at, mask=rest & inside_n, other=0.0)
        x = tl.load(x_at, mask=rest & inside_k, other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
        dy_at += BLOCK_T * N
        x_at += BLOCK_T * K
    at = piece.to(tl.int64) * N * K + n[:, None] * K + k[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & inside_k)


@triton.jit
def _add_partials(partial_ptr, out_ptr, pieces, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(pieces):
        total += tl.load(partial_ptr + at, mask=inside, other=0.0)
        partial_ptr += size
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def _tile(element_bytes: int) -> dict[str, int]:
    if element_bytes > 2:  # float32 exactly, without tensor cores: small tiles that stay in registers
        return {"BLOCK_N": 64, "BLOCK_K": 64, "BLOCK_T": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_N": 128, "BLOCK_K": 256, "BLOCK_T": 64, "num_warps": 8, "num_stages": 4}


def weight_grad(dy: Tensor, x: Tensor, count: int | None = None) -> Tensor:
    """dW = dY^T X by split-K in Triton.

    Args:
        dy: (T, N), contiguous.
        x: (T, K), contiguous, same dtype.
        count: number of pieces; None chooses for the card.

    Returns:
        (N, K) in their dtype.

    Raises:
        ValueError: incompatible operands.
    """
    if dy.shape[0] != x.shape[0] or dy.dtype != x.dtype or not (dy.is_contiguous() and x.is_contiguous()):
        raise ValueError("dy (T, N) and x (T, K) must be contiguous, of one dtype and of as many rows")
    (T, N), K = dy.shape, x.shape[1]
    tile = _tile(dy.element_size())
    if count is None:
        processors = torch.cuda.get_device_properties(dy.device).multi_processor_count if dy.is_cuda else 1
        count = pieces(T, N, K, processors, tile["BLOCK_N"], tile["BLOCK_K"])
    out = dy.new_empty(N, K)
    partial = out if count == 1 else dy.new_empty(count, N, K, dtype=torch.float32)
    grid = (triton.cdiv(N, tile["BLOCK_N"]) * triton.cdiv(K, tile["BLOCK_K"]), count)
    _partials[grid](dy, x, partial, T, triton.cdiv(T, count), N, K, **tile)
    if count > 1:
        _add_partials[(triton.cdiv(N * K, SUM_BLOCK),)](partial, out, count, N * K, BLOCK=SUM_BLOCK)
    return out


def in_pieces(dy: Tensor, x: Tensor, count: int) -> Tensor:
    """The same by cuBLAS: one batched matmul over `count` pieces plus the remaining rows, summed in float32.

    Args:
        dy: (T, N).
        x: (T, K).
        count: number of pieces.

    Returns:
        (N, K) in their dtype, rounded once.
    """
    rows = dy.shape[0] // count
    a, b = (t[: rows * count].view(count, rows, -1) for t in (dy, x))
    out = _wide_bmm(a.transpose(1, 2), b).sum(0)
    if rest := dy.shape[0] - rows * count:
        out += _wide_bmm(dy[None, -rest:].transpose(1, 2), x[None, -rest:])[0]
    return out.to(dy.dtype)


def _wide_bmm(a: Tensor, b: Tensor) -> Tensor:
    """A batched matmul with a float32 result; a CPU has none for narrow operands."""
    return torch.bmm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.bmm(a.float(), b.float())
