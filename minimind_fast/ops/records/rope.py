"""RoPE on the fused QKV projection, with the norms of q and k if the model has them.

Purpose: the record of the op: reference, work, cases, timing.
Principle: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the two halves of a head, by the token's position.
Properties: memory-bound; v is a view of the projection.

Shapes: T tokens, H query heads, K kv heads, hd head_dim; `...` any leading shape.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minimind_fast.config import YARN, ModelConfig
from minimind_fast.ops.cases import Case, Draw
from minimind_fast.ops.records.rms_norm import rms_norm
from minimind_fast.ops.registry import Op, Timing, Work
from minimind_fast.ops.rotary import rope_tables

POSITIONS = 2048  # rows of the cases' tables


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
        qkv: (..., (H + 2K) * hd), in the order q, k, v.
        cos, sin: (max_positions, hd // 2) float32 tables.
        positions: (...) int32 or int64, index into the tables.
        num_heads, num_kv_heads: H and K.
        q_weight: (hd,) weight of the RMSNorm over each q head, or None.
        k_weight: (hd,) the same for k.
        eps: added to the mean square of those norms.

    Returns:
        q (..., H, hd), k (..., K, hd), v (..., K, hd) in qkv's dtype.

    Source: Su et al., RoFormer, 2021; the half form (not interleaved), as in Llama and MiniMind.
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


def _work(c: ModelConfig, direction: str, tokens: int, element_bytes: int) -> Work:
    """Forward: read and write q and k. Backward: their gradients (with norms also q and k), and a copy of v's gradient."""
    assert c.head_dim is not None
    qk, kv = (c.num_attention_heads + c.num_key_value_heads) * c.head_dim, c.num_key_value_heads * c.head_dim
    values = (3 if c.qk_norm else 2) * qk + 2 * kv if direction == "backward" else 2 * qk
    return Work(tokens * values * element_bytes)


def _case(name: str, tokens: int, config: ModelConfig, scale: float = 1.0) -> Case:
    heads, kv_heads, head_dim, norm = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.qk_norm,
    )  # fmt: skip
    assert head_dim is not None

    def tensors(draw: Draw) -> dict[str, Any]:
        cos, sin = (table.to(draw.device) for table in rope_tables(config, POSITIONS))
        qkv = draw.normal(tokens, (heads + 2 * kv_heads) * head_dim, scale=scale)
        norms = [draw.normal(head_dim, scale=0.2, mean=1.0) if norm else None for _ in "qk"]
        return {
            "qkv": qkv,
            "cos": cos,
            "sin": sin,
            "positions": draw.integers(0, POSITIONS, tokens),
            "q_weight": norms[0],
            "k_weight": norms[1],
        }

    return Case("rope", name, tensors, {"num_heads": heads, "num_kv_heads": kv_heads, "eps": config.rms_norm_eps})


def _odd(name: str, tokens: int, heads: int, kv_heads: int, head_dim: int, norm: bool, scale: float = 1.0, **more: Any):
    """A case with a head layout that no preset has."""
    shape = dict(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, qk_norm=norm)
    return _case(name, tokens, ModelConfig(**{**shape, "rms_norm_eps": 1e-6, **more}), scale)


OP = Op(
    name="rope",
    reference=rope,
    cpu="minimind_fast.ops.cpu.fused:rope",
    differentiable=("qkv", "q_weight", "k_weight"),
    work=_work,
    model_case=lambda c, tokens: _case("", tokens, c),
    cases=(
        _odd("q/k norm, head_dim 64", 9, 8, 2, 64, True),
        _odd("one head", 5, 1, 1, 32, False),
        _odd("as many kv heads as heads", 6, 4, 4, 16, True),
        _odd("odd head_dim half", 7, 3, 1, 10, True),
        _odd("odd head_dim half, no norm", 7, 5, 5, 6, False),
        _odd("head_dim 128", 3, 4, 2, 128, True),
        _odd("one token", 1, 8, 4, 96, True),
        _odd("no tokens", 0, 8, 4, 96, True),
        _odd("huge values", 4, 2, 1, 64, True, scale=500.0),
        _odd("tiny values", 4, 2, 1, 64, True, scale=1e-3),
        _odd("yarn", 8, 2, 1, 64, False, rope_scaling=dict(YARN)),
    ),
    place=2,
    timing=Timing(place=3, cpu_tokens=2048),
    page="kernel_rope",
    # On sm_100 only: a B200's memory gives each multiprocessor half as many bytes again as an H200's.
    issue_bound={
        "_rope_fwd_kernel": "with q/k norm: sums over the heads, narrow loads of the angles",
        "_rope_bwd_kernel": "with q/k norm: the norm's sums are made again for its gradient",
    },
)
