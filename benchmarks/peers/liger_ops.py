"""Liger-Kernel's ops with our signatures, and a MiniMind that runs on them.

Purpose:    the peer that most users have at hand: each op beside ours, and the eager baseline with Liger's RMSNorm, RoPE,
            SwiGLU and fused linear cross-entropy instead of PyTorch's operators.
Principle:  Liger's autograd functions are called as its own modules call them; nothing of it is installed or copied here.
Properties: RoPE tables are laid out once per batch, as its models do, outside the timed region. Its norms need contiguous q
            and k, which costs a copy with our fused projection; in the model they are separate. Its cross-entropy sums dW
            in float32, as it recommends; bfloat16 would not pass the check. Its grouped matmuls are autotuned at the
            first call: over all configurations with --shapes all, which takes minutes, else over `FEW`.

Source: liger-kernel 0.8 (linkedin/Liger-Kernel, BSD-2-Clause), its public functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.weak import WeakTensorKeyDictionary

from benchmarks.peers.eager_minimind import EagerAttention, EagerMiniMind, EagerMLP, Norm, repeat_kv
from minimind_fast.config import IGNORE_INDEX, ModelConfig
from minimind_fast.ops.routing import Routing

tune_all = False  # set by the suite
# Part of an autotuned MoE kernel's name -> configurations to try: Liger's fixed choice (LIGER_FUSED_MOE_AUTOTUNE=0) and
# similar ones that suit a Hopper card.
FEW: dict[str, list[dict[str, int]]] = {
    "dW": [
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8},
    ],
    "gather": [{"BLOCK_H": 256, "BLOCK_K": 1, "num_warps": 4}],
    "": [
        {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        {"BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ],
}


def _function(file: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"liger_kernel.ops.{file}"), name).apply


def _swiglu() -> Callable:
    fused = _function("swiglu", "LigerFusedGateUpSiLUMulFunction")
    return lambda gate_up: fused(gate_up)


def _mode(cast_first: bool) -> str:
    return "llama" if cast_first else "gemma"


def _rms_norm() -> Callable:
    norm = _function("fused_add_rms_norm", "LigerFusedAddRMSNormFunction")

    def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor, cast_first: bool):
        return norm(x, residual, weight, eps, 0.0, _mode(cast_first))

    return rms_norm


_tables: Any = WeakTensorKeyDictionary()  # positions -> their table rows in Liger's layout


def _rope() -> Callable:
    norm, rotate = _function("rms_norm", "LigerRMSNormFunction"), _function("rope", "LigerRopeFunction")

    def rope(qkv, cos, sin, positions, num_heads, num_kv_heads, q_weight=None, k_weight=None, eps=1e-6):
        hd = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
        heads = qkv.view(1, -1, num_heads + 2 * num_kv_heads, hd)
        q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
        if q_weight is not None:
            # Not in place: it would overwrite the benchmark's gradient.
            q, k = (norm(t, w, eps, 0.0, _mode(False), False) for t, w in ((q, q_weight), (k, k_weight)))
        if positions not in _tables:
            _tables[positions] = [torch.cat([t[positions.long()]] * 2, -1).unsqueeze(0) for t in (cos, sin)]
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), *_tables[positions])
        return q.transpose(1, 2)[0], k.transpose(1, 2)[0], v[0]

    return rope


_OPS = {"swiglu": _swiglu, "rms_norm": _rms_norm, "rope": _rope}
_NONE = {
    "linear_cross_entropy": "Liger's takes the mean over all tokens; token by token it computes the logits twice: see the "
    "group of the head's loss",
    "linear_kl": "Liger's distillation loss is another",
    "moe_route": "Liger has no router",
    "moe_mlp": "the peers of the mixture are in the group of its layer",
}


def op(name: str) -> Callable | str:
    """Liger's version of one of ops.NAMES, with our signature, or the reason why there is none."""
    return or_reason(_OPS[name]) if name in _OPS else _NONE.get(name, "Liger has no such op")


def or_reason(make: Callable[[], Any]) -> Any:
    """Call one of this file's makers; on an import failure return the reason."""
    try:
        return make()
    except (ImportError, AttributeError) as error:
        return f"Liger-Kernel is not installed, or is not as it was: {type(error).__name__}: {str(error)[:100]}"


@cache
def experts() -> Callable[[Tensor, Routing, Tensor, Tensor], Tensor]:
    """Liger's fused MoE, which plans from the chosen experts itself and waits for one number.

    Raises:
        ImportError: not installed.
        AttributeError: an incompatible version.
    """
    fused = _function("fused_moe", "LigerFusedMoEFunction")
    if not tune_all:
        tune_over_few(importlib.import_module("liger_kernel.ops.fused_moe_kernels"))
    return lambda x, routing, gate_up, down: fused(x, gate_up, down, routing.experts, routing.weights)


def tune_over_few(module: Any) -> None:
    """Restrict the autotuned kernels of a Liger module to the configurations in FEW."""
    for name, kernel in vars(module).items():
        if not hasattr(kernel, "configs"):
            continue
        wanted = next(some for part, some in FEW.items() if part in name)

        def named(config: Any) -> dict[str, int]:
            return {**config.kwargs, "num_warps": config.num_warps, "num_stages": config.num_stages}

        kept = [c for c in kernel.configs if any(some.items() <= named(c).items() for some in wanted)]
        kernel.configs = kept or kernel.configs


def mean_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Liger's fused linear cross-entropy: (hidden (T, D), weight (V, D), targets (T,)) -> the mean loss.

    Raises:
        ImportError: not installed.
        AttributeError: an incompatible version.
    """
    fused = _function("fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    how = (None, None, IGNORE_INDEX, 0.0, 0.0, "mean", None, False, torch.float32)
    return lambda hidden, weight, targets: fused(hidden, weight, targets, *how)[0]


class _Norm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        norm = _function("rms_norm", "LigerRMSNormFunction")
        return norm(x, self.weight, self.eps, 0.0, _mode(self.cast_first), False)


class _Attention(EagerAttention):
    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.project(x)
        rotate = _function("rope", "LigerRopeFunction")
        q, k = rotate(q.transpose(1, 2), k.transpose(1, 2), cos[:, :, 0], sin[:, :, 0])
        times = self.heads // self.kv
        k, v = repeat_kv(k.transpose(1, 2), times).transpose(1, 2), repeat_kv(v, times).transpose(1, 2)
        out = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(b, t, -1))


class _MLP(EagerMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_function("swiglu", "LigerSiLUMulFunction")(self.gate_proj(x), self.up_proj(x)))


class LigerMiniMind(EagerMiniMind):
    """The eager baseline on Liger's ops.

    Args:
        config: use_moe must be False.

    Raises:
        ImportError: Liger is not installed.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.mean_loss = mean_loss()
        swapped: dict[type, type] = {Norm: _Norm, EagerAttention: _Attention, EagerMLP: _MLP}
        for module in self.modules():
            module.__class__ = swapped.get(type(module), type(module))

    def loss(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of (B, T) tokens, without storing logits."""
        hidden = self.hidden(input_ids)
        return self.mean_loss(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())
