"""The width of sums: which dtype norms, softmax and losses are computed in.

Purpose: one rule for every reference and every op of the CPU.
Principle: 16-bit inputs are summed in float32; float64 stays, so that a reference in float64 is the truth.
Properties: no state.
"""

from __future__ import annotations

import torch


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower.

    Args:
        dtype: of the input.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
