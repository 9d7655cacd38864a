"""Causal attention over packed documents, with whichever backend is available.

Purpose: `attention(q, k, v, cu_seqlens, max_seqlen)` never lets a token see another document; `use("eager")` chooses the
    backend for the whole process, as `ops.use` chooses kernels.
Principle: softmax(q k^T / sqrt(hd)) v within each document. On a GPU a varlen flash kernel reads `cu_seqlens` itself.
    On a CPU documents of similar length are gathered into small rectangles (`cpu/attention.py`).
Properties: memory grows with T; work grows with the sum of squared document lengths (up to the rectangles' rounding),
    never with T squared. `eager` builds the T x T mask on purpose, as the plainest definition. The choice is stored in a
    table by device type and dtype: layers decide nothing, and torch.compile has no graph break.

Backends: flash_attn (Dao-AILab's generation for this GPU), torch_varlen (`torch.nn.attention.varlen`), sdpa, eager.
Shapes: T tokens, H query heads, K kv heads, hd head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind_fast.errors import UserError
from minimind_fast.ops import flash
from minimind_fast.ops.cpu import attention as attention_rows
from minimind_fast.ops.cpu.attention import Rectangles
from minimind_fast.ops.precision import before_ampere, capability
from minimind_fast.ops.reference import accum_dtype

BACKENDS = ("auto", "flash_attn", "torch_varlen", "sdpa", "eager")

# Tables, not functools.cache: torch.compile would trace through the cache.
_chosen: dict[tuple[str, str, torch.dtype, bool], tuple[str, str]] = {}
_dao: dict[tuple[tuple[int, int], bool], tuple[flash.Attend | None, str]] = {}
_asked = "auto"


def _flash_attn() -> tuple[flash.Attend | None, str]:
    """(the generation of Dao-AILab's attention for this GPU or None, why)."""
    key = capability(), torch.are_deterministic_algorithms_enabled()
    if key not in _dao:
        _dao[key] = flash.best(key[0])
    return _dao[key]


def _unknown(backend: str) -> str:
    return f"unknown attention backend {backend!r}; choose one of {', '.join(BACKENDS)}"


def resolve(backend: str, device_type: str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, str]:
    """The backend that will run, and why.

    Args:
        backend: one of BACKENDS.
        device_type: "cuda" or "cpu".
        dtype: of q, k and v; flash kernels take bfloat16 and float16 only.

    Returns:
        (backend, reason).

    Raises:
        ValueError: an unknown name, or a backend requested by name that cannot run here.
    """
    if backend not in BACKENDS:
        raise UserError(_unknown(backend))
    half = dtype in (torch.bfloat16, torch.float16)
    can_flash = device_type == "cuda" and half and not before_ampere()
    if backend == "flash_attn":
        if not can_flash:
            raise UserError(
                f"--attention flash_attn needs an Ampere or newer GPU and bf16 or fp16, not {device_type} and {dtype}"
            )
        found, why = _flash_attn()
        if found is None:
            raise UserError(f"--attention flash_attn: {why} (pip install flash-attn)")
        return "flash_attn", f"asked for; {why}"
    if backend == "torch_varlen":
        if not can_flash or flash.of_torch() is None:
            raise UserError(
                "--attention torch_varlen needs an Ampere or newer GPU, bf16 or fp16, and torch.nn.attention.varlen"
            )
        return "torch_varlen", "asked for"
    if backend != "auto":
        return backend, "asked for"
    if can_flash:
        found, why = _flash_attn()
        if found is not None:
            return "flash_attn", why
        if flash.of_torch() is not None:
            return "torch_varlen", why
    return "sdpa", "no GPU" if device_type != "cuda" else "no varlen flash attention for this GPU and dtype"


class use:
    """Choose the backend of every model from now on, or within a `with` block.

    Args:
        backend: one of BACKENDS.

    Raises:
        ValueError: an unknown name. `chosen` checks whether it can run, once device and dtype are known.
    """

    def __init__(self, backend: str) -> None:
        global _asked
        if backend not in BACKENDS:
            raise UserError(_unknown(backend))
        self._before, _asked = _asked, backend

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        global _asked
        _asked = self._before


def chosen(device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that `use` has chosen for such tensors, and why.

    The first call for a device and dtype imports packages; later calls, also compiled ones, only look the answer up.

    Args:
        device_type: "cuda" or "cpu".
        dtype: that of q, k and v.

    Returns:
        (backend, reason).

    Raises:
        ValueError: a backend requested by name cannot run there.
    """
    return _look_up(_asked, device_type, dtype)


def _look_up(backend: str, device_type: str, dtype: torch.dtype) -> tuple[str, str]:
    key = (backend, device_type, dtype, torch.are_deterministic_algorithms_enabled())
    if key not in _chosen:
        _chosen[key] = resolve(backend, device_type, dtype)
    return _chosen[key]


def leave_out_of_compilation(backend: str) -> None:
    """Keep torch.compile out of a backend whose code path differs from pack to pack.

    Args:
        backend: a resolved one, not "auto".
    """
    if backend == "sdpa":
        attention_rows.leave_out_of_compilation()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    backend: str = "auto",
    dropout: float = 0.0,
    rectangles: Rectangles | None = None,
) -> Tensor:
    """Causal self-attention within each packed document.

    Args:
        q: (T, H, hd).
        k: (T, K, hd), K divides H.
        v: (T, K, hd).
        cu_seqlens: (documents + 1,) int32, document i is [cu[i], cu[i + 1]).
        max_seqlen: the longest document, in tokens.
        backend: one of BACKENDS; auto: what `use` has chosen.
        dropout: probability of dropping an attention weight.
        rectangles: built from the same cu_seqlens, once for all layers; only sdpa needs them.

    Returns:
        (T, H, hd) in q's dtype.

    Source: Dao, FlashAttention-2, 2023 (the varlen interface).
    """
    name, _ = _look_up(_asked if backend == "auto" else backend, q.device.type, q.dtype)
    return RUN[name](q, k, v, cu_seqlens, max_seqlen, dropout, rectangles)


def _run_flash(q, k, v, cu_seqlens, max_seqlen, dropout, _rectangles):
    attend, _ = _flash_attn()
    assert attend is not None
    return attend(q, k, v, cu_seqlens, max_seqlen, dropout)


def _run_varlen(q, k, v, cu_seqlens, max_seqlen, dropout, _rectangles):
    attend = flash.of_torch()
    assert attend is not None
    return attend(q, k, v, cu_seqlens, max_seqlen, dropout)


def _run_rows(q, k, v, cu_seqlens, _max_seqlen, dropout, rectangles):
    if rectangles is None:
        rectangles = Rectangles(cu_seqlens.tolist(), q.device)
    return attention_rows.attend_rows(q, k, v, rectangles, dropout)


def _run_eager(q, k, v, cu_seqlens, _max_seqlen, dropout, _rectangles):
    """The definition, with the full T x T mask."""
    t, heads, head_dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
    where = torch.arange(t, device=q.device)
    document = torch.searchsorted(cu_seqlens[1:].contiguous(), where, right=True)
    allowed = (document[:, None] == document[None, :]) & (where[:, None] >= where[None, :])
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(head_dim)
    wide = accum_dtype(q.dtype)
    probs = scores.to(wide).masked_fill(~allowed, float("-inf")).softmax(-1).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", F.dropout(probs, dropout), v)


# Resolved backend -> function (q, k, v, cu_seqlens, max_seqlen, dropout, rectangles) -> (T, H, hd).
RUN: dict[str, Callable[..., Tensor]] = {
    "flash_attn": _run_flash,
    "torch_varlen": _run_varlen,
    "sdpa": _run_rows,
    "eager": _run_eager,
}
