"""The dtype in which norms, softmax and losses are computed.

Purpose: one rule for every reference and every CPU op.
Principle: 16-bit inputs are summed in float32; float64 stays, so that a float64 reference is the ground truth.
Properties: no state.
"""

from __future__ import annotations

import torch


def accum_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
