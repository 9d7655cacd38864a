"""Packed attention for hardware without a varlen kernel: documents gathered into rectangles of similar length.

Purpose: `attend_rows` is the backend `sdpa`, the one a CPU runs.
Principle: padding a causal row on the right is exact: real queries never look there. PyTorch's SDPA is slow on a CPU for
    short rows, such as MiniMind's. Training there uses batched matmuls, a block of queries at a time, each in tiles that
    fit a core's cache:
        P = softmax(Q K^T / sqrt(hd)),  O = P V,
        dV = P^T dO,  dP = dO V^T,  dS = P * (dP - rowsum(P * dP)),  dQ = dS K,  dK = dS^T Q.
Properties: scores, dP and dS are float32 until they enter a 16-bit matmul. Saved for backward: q, k, v, and in 16 bits P
    of rows up to KEPT, at most 320 bytes a token and query head; longer rows and float32 recompute P.
    Error in bf16 against float64, relative to SDPA's: O 1.2x, dQ 1.1x, dK and dV 0.6x (4 rows of 128, H 8, K 2, hd 64).
    Without gradients, with dropout and on a GPU, SDPA runs. Forward and backward in bf16 on 2 cores of a Zen 4 EPYC,
    SDPA forward with recomputed P backward -> this: 22 -> 13 ms for 64 rows of 64 tokens, 31 -> 18 ms for 30 of 128,
    77 -> 55 ms for 8 of 512 (H 8, K 2, hd 64).

Shapes: T tokens, H query heads, K kv heads, hd head_dim, N rows of L tokens, G = H / K.
Source: Dao et al., FlashAttention, 2022 (blocks of queries, P recomputed).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.ops.cpu import shapes as cpu_shapes
from minimind_fast.ops.reference import accum_dtype

SCRATCH = 2**19  # score elements at a time; 2**18 and 2**20 were within 5%
# Queries at a time: 64 skips a quarter of the pairs of a row of 128; rows above 512 use an eighth of their length.
BLOCK = 64
KEPT = 256  # longest row whose probabilities are saved


class Rectangles:
    """A pack's documents gathered into rectangles of similar length, for attention over rows.

    A document's length is rounded up (`_round`) and padded with its last token, which is harmless: a causal row never
    looks to its right, and the padding's results are dropped.

    Args:
        offsets: document bounds on the host, [0, ..., T].
        device: where to put the index tensors.
    """

    def __init__(self, offsets: list[int], device: torch.device) -> None:
        groups: dict[int, list[tuple[int, int]]] = {}
        for begin, end in zip(offsets, offsets[1:], strict=False):
            if end > begin:
                groups.setdefault(_round(end - begin), []).append((begin, end))
        # All of one length: use the rows as they are, move nothing.
        same = {end - begin for bounds in groups.values() for begin, end in bounds}
        if len(same) <= 1:
            length = max(same, default=1)
            self.shapes = [(offsets[-1] // length, length)]
            self.source = self.place = None
            return
        self.shapes = [(len(bounds), length) for length, bounds in sorted(groups.items())]
        source, place, base = [], [], 0
        for length, bounds in sorted(groups.items()):
            begin = torch.tensor([b for b, _ in bounds]).unsqueeze(1)
            last = torch.tensor([e - 1 for _, e in bounds]).unsqueeze(1)
            wanted = begin + torch.arange(length)
            source.append(torch.minimum(wanted, last).flatten())
            place.append((base + torch.arange(wanted.numel()).view_as(wanted))[wanted <= last])
            base += wanted.numel()
        self.source = torch.cat(source).to(device)  # (padded,) token at each padded position
        token = self.source[torch.cat(place).to(device)]
        self.place = torch.empty_like(token)  # (T,) padded position of each token
        self.place[token] = torch.cat(place).to(device)


def _round(length: int) -> int:
    """Round up to a multiple of a quarter of the length's power of two, at least 16: at most 1.25x above 64."""
    step = max(16, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


class _Spread(torch.autograd.Function):
    """(T, ...) -> (padded, ...); padding has no gradient, so backward is a look-up as well."""

    @staticmethod
    def forward(ctx, x, source, place):
        ctx.save_for_backward(place)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.index_select(0, place), None, None


class _Collect(torch.autograd.Function):
    """(padded, ...) -> (T, ...)."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.save_for_backward(place)
        ctx.padded = x.shape[0]
        return x.index_select(0, place)

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return grad.new_zeros(ctx.padded, *grad.shape[1:]).index_copy_(0, place, grad), None


def _by_kv_head(x: Tensor, kv_heads: int) -> Tensor:
    """(N, L, K G, hd) -> (N K, L G, hd): heads that share keys form one matrix; a block of queries is a slice of it."""
    n, length, _, hd = x.shape
    return x.reshape(n, length, kv_heads, -1, hd).transpose(1, 2).reshape(n * kv_heads, -1, hd)


def _by_row(x: Tensor, shape: torch.Size) -> Tensor:
    """The inverse, to shape (N, L, K G, hd)."""
    n, length, _, hd = shape
    return x.view(n, x.shape[0] // n, length, -1, hd).transpose(1, 2).reshape(shape)


def _blocks(length: int) -> list[tuple[int, int]]:
    block = max(BLOCK, length // 8)
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def kept(length: int, dtype: torch.dtype) -> int:
    """Number of probabilities saved for backward, per row and head.

    Args:
        length: tokens in the row.
        dtype: that of q, k and v.
    """
    return sum((end - start) * end for start, end in _blocks(length)) if dtype.itemsize == 2 and length <= KEPT else 0


def _tiles(batch: int, groups: int, length: int, wide: torch.dtype) -> Iterator[tuple[slice, slice, int, Tensor]]:
    """Pieces that fit the cache: (slice of the batch, slice of queries, number of keys, mask of later keys)."""
    for start, end in _blocks(length):
        future = torch.full((end - start, end), float("-inf"), dtype=wide).triu_(start + 1)
        mask = future.repeat_interleave(groups, 0)
        for some in cpu_shapes.pieces(batch, max(1, SCRATCH // mask.numel())):
            yield some, slice(start * groups, end * groups), end, mask


def _scores(q: Tensor, k: Tensor, mask: Tensor, space: Tensor, beta: float = 1.0) -> Tensor:
    """beta mask + q k^T / sqrt(hd), written to space, which stays in the cache from tile to tile."""
    q, k = q.to(space.dtype), k.to(space.dtype).transpose(1, 2)
    return torch.baddbmm(mask, q, k, beta=beta, alpha=q.shape[-1] ** -0.5, out=space.resize_(len(q), *mask.shape))


class _Rows(torch.autograd.Function):
    """Causal attention over rows by matmuls; (N, L, H, hd), (N, L, K, hd), (N, L, K, hd) -> (N, L, H, hd)."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.shapes, length, groups = (q.shape, k.shape), q.shape[1], q.shape[2] // k.shape[2]
        q, k, v = (_by_kv_head(x, k.shape[2]) for x in (q, k, v))
        space, out, saved = q.new_empty(0, dtype=accum_dtype(q.dtype)), torch.empty_like(q), []
        keep = kept(length, q.dtype) > 0
        for some, rows, end, mask in _tiles(len(q), groups, length, space.dtype):
            s = _scores(q[some, rows], k[some, :end], mask, space)
            p = torch.softmax(s, -1, out=s).to(q.dtype)
            out[some, rows] = torch.bmm(p, v[some, :end])
            if keep:
                saved.append(p)
        ctx.save_for_backward(q, k, v, *saved)
        return _by_row(out, ctx.shapes[0])

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        (_, length, heads, _), (_, _, kv_heads, _) = ctx.shapes
        grad, saved = _by_kv_head(grad, kv_heads), iter(saved)
        space, second = (q.new_empty(0, dtype=accum_dtype(q.dtype)) for _ in range(2))
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(k, dtype=space.dtype) for _ in range(2))
        for some, rows, end, mask in _tiles(len(q), heads // kv_heads, length, space.dtype):
            qs, gs, ks = q[some, rows], grad[some, rows], k[some, :end]
            if (p := next(saved, None)) is not None:
                wide = space.resize_(p.shape).copy_(p)
            else:
                s = _scores(qs, ks, mask, space)
                wide = torch.softmax(s, -1, out=s)
                p = wide.to(q.dtype)
            ds = _scores(gs, v[some, :end], mask, second, beta=0.0)
            ds = torch.ops.aten._softmax_backward_data.out(ds, wide, -1, wide.dtype, grad_input=ds).to(q.dtype)
            dq[some, rows] = torch.bmm(ds, ks)
            dk[some, :end] += torch.bmm(ds.transpose(1, 2), qs)
            dv[some, :end] += torch.bmm(p.transpose(1, 2), gs)
        return tuple(_by_row(x.to(q.dtype), y) for x, y in zip((dq, dk, dv), (*ctx.shapes, ctx.shapes[1]), strict=True))


def plain_rows(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """The same as `_Rows`, with PyTorch's SDPA.

    Args:
        q: (N, L, H, hd).
        k: (N, L, K, hd).
        v: (N, L, K, hd).
        dropout: probability of dropping an attention weight.

    Returns:
        (N, L, H, hd).
    """
    gqa = q.shape[2] > k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=gqa)
    return out.transpose(1, 2)


def attend_rows(q: Tensor, k: Tensor, v: Tensor, rectangles: Rectangles, dropout: float) -> Tensor:
    """Causal self-attention within each document.

    Args:
        q: (T, H, hd).
        k: (T, K, hd).
        v: (T, K, hd).
        rectangles: of the same documents.
        dropout: probability of dropping an attention weight.

    Returns:
        (T, H, hd).
    """
    if q.shape[0] == 0:
        return torch.empty_like(q)
    if rectangles.source is not None:
        q, k, v = (_Spread.apply(x, rectangles.source, rectangles.place) for x in (q, k, v))
    sizes = [n * length for n, length in rectangles.shapes]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    matmuls = q.device.type == "cpu" and wanted and not dropout
    outs = []
    for shape, *qkv in zip(rectangles.shapes, *(x.split(sizes) for x in (q, k, v)), strict=True):
        qs, ks, vs = (x.unflatten(0, shape) for x in qkv)
        out = _Rows.apply(qs, ks, vs) if matmuls else plain_rows(qs, ks, vs, dropout)
        outs.append(out.flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if rectangles.place is None else _Collect.apply(out, rectangles.place)


def leave_out_of_compilation() -> None:
    """Keep torch.compile out of `attend_rows`: it would spend minutes on code for each pack's rectangles.

    Not a decorator, which would load the compiler, and with it Triton, into every process.
    """
    global attend_rows
    attend_rows = torch.compiler.disable(attend_rows)  # type: ignore[assignment]
