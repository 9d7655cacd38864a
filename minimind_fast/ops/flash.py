"""Flash attention for packed documents: which implementation fits a GPU, and how each is called.

Purpose: `best(capability)` and `of_torch()` find what is installed; both return a function of one signature.
Principle: the generations of Dao-AILab's kernels share a function's name, not its parameters: the fourth is `cu_seqlens_q`
    in 2 and 3, `qv` in 4. So everything but q, k and v is passed by name. A generation is used only on GPUs for which it
    has a backward pass.
Properties: under `torch.use_deterministic_algorithms` gradients are added in a fixed order, and a generation that cannot
    do that on this GPU is passed over. PyTorch 2.11's function cannot group heads: K and V are repeated there, which costs
    2% of a step.

Source: the signatures of flash-attn 2.8, flash_attn_3, flash-attn-4 4.0.0b36 and PyTorch 2.11 and 2.13, which
    tests/ops/flash_signatures.py records; `_flash_attn_bwd` of flash-attn-4 for its GPUs.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from minimind_fast.errors import UserError

# (q, k, v, cu_seqlens, max_seqlen, dropout) -> (T, H, hd)
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, int, float], Tensor]


class Generation(NamedTuple):
    """One generation of Dao-AILab's kernels.

    Attributes:
        module: exports flash_attn_varlen_func.
        majors: major compute capabilities with a forward and a backward pass; 0 stands for AMD.
        repeats: those whose backward pass can add in a fixed order.
        dropout: whether it can drop attention weights.
        traced: whether torch.compile can see through it.
    """

    module: str
    majors: tuple[int, ...]
    repeats: tuple[int, ...]
    dropout: bool
    traced: bool


# In order of preference: 3 is tuned for Hopper and has nothing for Blackwell; 4 compiles itself at the first call.
GENERATIONS = (
    Generation("flash_attn_interface", (9,), (9,), dropout=False, traced=True),
    Generation("flash_attn.cute", (9, 10, 11, 12), (9, 10, 11), dropout=False, traced=False),
    Generation("flash_attn", (0, 8, 9, 10, 12), (0, 8, 9, 10, 12), dropout=True, traced=True),
)

# Tables, not functools.cache: torch.compile would trace through the cache.
_imported: dict[str, Callable | None] = {}
_torch: dict[str, Attend | None] = {}


def _function(module: str) -> Callable | None:
    if module not in _imported:
        try:
            _imported[module] = importlib.import_module(module).flash_attn_varlen_func
        except (ImportError, AttributeError, OSError):
            _imported[module] = None
    return _imported[module]


def best(capability: tuple[int, int]) -> tuple[Attend | None, str]:
    """The first installed generation that can train on a GPU.

    Args:
        capability: the GPU's, such as (9, 0); (0, 0) for AMD.

    Returns:
        (function or None, a phrase that says why).
    """
    passed = []
    for generation in GENERATIONS:
        function = _function(generation.module)
        if function is None:
            continue
        if capability[0] not in generation.majors:
            passed.append(f"{generation.module} does not train on compute capability {capability[0]}.{capability[1]}")
        elif torch.are_deterministic_algorithms_enabled() and capability[0] not in generation.repeats:
            passed.append(f"{generation.module} cannot repeat its sums on this GPU")
        else:
            return call(generation, function), "; ".join([f"{generation.module} is installed", *passed])
    return None, "; ".join(passed) or "flash-attn is not installed"


def call(generation: Generation, function: Callable) -> Attend:
    """A generation's function behind the common signature.

    Args:
        generation: one of GENERATIONS.
        function: its flash_attn_varlen_func.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
        if dropout and not generation.dropout:
            raise UserError(f"{generation.module} has no dropout; use --attention sdpa or --dropout 0")
        out = function(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=max_seqlen,
            max_seqlen_k=max_seqlen,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
            **({"dropout_p": dropout} if dropout else {}),
        )
        return out[0] if isinstance(out, tuple) else out

    untraced: Any = torch.compiler.disable(attend)
    return attend if generation.traced else untraced


def of_torch() -> Attend | None:
    """PyTorch's own varlen attention, or None if this PyTorch has none."""
    if "varlen" not in _torch:
        try:
            _torch["varlen"] = call_torch(importlib.import_module("torch.nn.attention.varlen").varlen_attn)
        except (ImportError, AttributeError):
            _torch["varlen"] = None
    return _torch["varlen"]


def call_torch(function: Callable) -> Attend:
    """`varlen_attn` behind the common signature; deterministic where torch.use_deterministic_algorithms asks for it.

    Args:
        function: torch.nn.attention.varlen.varlen_attn.
    """
    groups_itself = "enable_gqa" in inspect.signature(function).parameters

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout: float) -> Tensor:
        if dropout:
            raise UserError("torch_varlen attention has no dropout; use --attention sdpa or --dropout 0")
        groups = q.shape[1] // k.shape[1]
        extra: dict[str, Any] = {"window_size": (-1, 0)}
        if groups_itself:
            extra["enable_gqa"] = groups > 1
        elif groups > 1:
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        return function(q, k, v, cu_seq_q=cu_seqlens, cu_seq_k=cu_seqlens, max_q=max_seqlen, max_k=max_seqlen, **extra)

    return attend
