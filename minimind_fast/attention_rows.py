"""Packed attention for hardware without a varlen kernel: documents laid into rectangles of like length.

Purpose: `attend_rows` is the backend `sdpa`, which is what a CPU runs.
Principle: a causal row padded at its right end is exact, as real queries never look to the right. Forward is PyTorch's
    own SDPA. Its backward on a CPU spends most of its time beside the arithmetic where rows are short, as MiniMind's are:
    so there backward is five batched matmuls, the probabilities computed again, a block of queries at a time:
        P = softmax(Q K^T / sqrt(hd)),  dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = dS K,  dK = dS^T Q.
Properties: scores, probabilities and dS are float32 until they enter a 16-bit matmul. Saved for backward: q, k, v, out.
    Scratch is SCRATCH elements, which fit a core's cache. Backward against PyTorch's, bf16, 2 cores of a Zen 4 EPYC:
    37 -> 14 ms for 64 rows of 64 tokens, 41 -> 21 ms for 30 of 128, 66 -> 54 ms for 8 of 512 (H 8, K 2, hd 64).

Shapes: T tokens, H query heads, K kv heads, hd head_dim, N rows of L tokens, G = H / K.
Source: Dao et al., FlashAttention, 2022 (the recomputed backward).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast import cpu_shapes
from minimind_fast.reference import accum_dtype

SCRATCH = 2**19  # score elements at a time; 2**22 was 3x slower, 2**18 and 2**20 the same
BLOCK = 128  # queries at a time: 128 spares a quarter of the pairs of a row of 256; long rows take an eighth of theirs


class Rectangles:
    """Documents of a pack laid into rectangles of like length, for attention that knows rows only.

    A document goes to the rectangle of its length rounded up (`_round`); its missing positions repeat its last token,
    which is harmless: a causal row never looks to its right, and what the repeated positions compute is dropped.

    Args:
        offsets: document bounds on the host, [0, ..., T].
        device: where the index tensors live.
    """

    def __init__(self, offsets: list[int], device: torch.device) -> None:
        groups: dict[int, list[tuple[int, int]]] = {}
        for begin, end in zip(offsets, offsets[1:], strict=False):
            if end > begin:
                groups.setdefault(_round(end - begin), []).append((begin, end))
        # One length for all: rows as they are, nothing to move.
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
        self.source = torch.cat(source).to(device)  # (padded,) token that stands at each padded position
        token = self.source[torch.cat(place).to(device)]
        self.place = torch.empty_like(token)  # (T,) padded position of each token
        self.place[token] = torch.cat(place).to(device)


def _round(length: int) -> int:
    """Up to a multiple of a quarter of the length's own power of two, at least 16: at most 1.25x the length above 64."""
    step = max(16, 1 << max(length.bit_length() - 3, 0))
    return -(-length // step) * step


class _Spread(torch.autograd.Function):
    """(T, ...) -> (padded, ...); the gradient of repeated tokens is nought, so that backward is a look-up as well."""

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


class _Rows(torch.autograd.Function):
    """Causal attention of rows, SDPA forward and matmuls backward; (N, H, L, hd), (N, K, L, hd) -> (N, H, L, hd)."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out = ctx.saved_tensors
        n, heads, length, hd = q.shape
        kv_heads, groups, scale = k.shape[1], heads // k.shape[1], hd**-0.5
        wide = accum_dtype(q.dtype)
        by_kv_head = (n * kv_heads, groups, length, hd)
        delta = (grad.to(wide) * out.to(wide)).sum(-1).reshape(by_kv_head[:3])
        q, grad = q.reshape(by_kv_head), grad.reshape(by_kv_head)
        k, v = (x.reshape(n * kv_heads, length, hd) for x in (k, v))
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(k, dtype=wide) for _ in range(2))
        block = max(BLOCK, length // 8)
        for start in range(0, length, block):
            end = min(start + block, length)
            future = torch.ones(end - start, end - start, dtype=torch.bool, device=q.device).triu_(1)
            rows = max(1, SCRATCH // (groups * (end - start) * end))
            for some in cpu_shapes.pieces(n * kv_heads, rows):
                qs, gs = q[some, :, start:end].flatten(1, 2), grad[some, :, start:end].flatten(1, 2)
                ks, vs = k[some, :end], v[some, :end]
                p = torch.bmm(qs.to(wide) * scale, ks.to(wide).transpose(1, 2))
                p.view(-1, groups, end - start, end)[..., start:].masked_fill_(future, float("-inf"))
                p = p.softmax(-1)
                ds = torch.bmm(gs.to(wide), vs.to(wide).transpose(1, 2))
                ds.sub_(delta[some, :, start:end].flatten(1, 2).unsqueeze(-1)).mul_(p).mul_(scale)
                p, ds = p.to(q.dtype), ds.to(q.dtype)
                dq[some, :, start:end] = torch.bmm(ds, ks).unflatten(1, (groups, -1))
                dk[some, :end] += torch.bmm(ds.transpose(1, 2), qs)
                dv[some, :end] += torch.bmm(p.transpose(1, 2), gs)
        dk, dv = (x.to(k.dtype).view(n, kv_heads, length, hd) for x in (dk, dv))
        return dq.view(n, heads, length, hd), dk, dv


def attend_rows(q: Tensor, k: Tensor, v: Tensor, rectangles: Rectangles, dropout: float) -> Tensor:
    """Causal self-attention within each document.

    Args:
        q: (T, H, hd).
        k: (T, K, hd).
        v: (T, K, hd).
        rectangles: of the documents.
        dropout: of the attention probabilities.

    Returns:
        (T, H, hd).
    """
    if q.shape[0] == 0:
        return torch.empty_like(q)
    if rectangles.source is not None:
        q, k, v = (_Spread.apply(x, rectangles.source, rectangles.place) for x in (q, k, v))
    sizes = [n * length for n, length in rectangles.shapes]
    outs = []
    for shape, *qkv in zip(rectangles.shapes, *(x.split(sizes) for x in (q, k, v)), strict=True):
        qs, ks, vs = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)
        if q.device.type == "cpu" and not dropout:
            out = _Rows.apply(qs, ks, vs)
        else:
            gqa = qs.shape[1] > ks.shape[1]
            out = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, dropout_p=dropout, enable_gqa=gqa)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return out if rectangles.place is None else _Collect.apply(out, rectangles.place)
