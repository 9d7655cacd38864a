"""RoPE's tables of rotation angles, including YaRN and Llama 3's scaling.

Purpose: one pair of tables, shared by the model, the op's cases and the eager baseline.
Principle: the angle of pair i at position t is t / theta^(2i / hd); YaRN blends interpolated and kept frequencies,
    by the pair's number; Llama 3 does so by its turns within the original context.
Properties: float32, made on the CPU.

Shapes: hd head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minimind_fast.config import ModelConfig


def rope_tables(config: ModelConfig, length: int | None = None) -> tuple[Tensor, Tensor]:
    """cos and sin of each position's rotation angles, including YaRN.

    Args:
        config: for head_dim, rope_theta and rope_scaling.
        length: number of positions; max_position_embeddings if None.

    Returns:
        cos, sin: (length, hd // 2) float32.

    Source: Su et al., RoFormer, 2021; Peng et al., YaRN, 2023 (blend of interpolated and kept frequencies by wavelength).
    """
    head_dim = config.head_dim
    assert head_dim is not None
    length = length or config.max_position_embeddings
    frequencies = 1.0 / config.rope_theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    scale = 1.0
    if config.rope_scaling and config.rope_scaling.get("type") == "llama3":
        frequencies = _llama3(frequencies, config.rope_scaling)
    elif config.rope_scaling:
        yarn = config.rope_scaling
        original = yarn["original_max_position_embeddings"]
        scale = float(yarn.get("attention_factor", 1.0))
        if config.max_position_embeddings > original:

            def dimension(rotations: float) -> float:
                """The pair that makes this many turns within the original context."""
                return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

            low = max(math.floor(dimension(yarn["beta_fast"])), 0)
            high = min(math.ceil(dimension(yarn["beta_slow"])), head_dim // 2 - 1)
            ramp = ((torch.arange(head_dim // 2).float() - low) / max(high - low, 0.001)).clamp(0, 1)
            frequencies = frequencies * (1 - ramp + ramp / yarn["factor"])
    angles = torch.outer(torch.arange(length).float(), frequencies)
    return angles.cos() * scale, angles.sin() * scale


def _llama3(frequencies: Tensor, scaling: dict) -> Tensor:
    """Few turns in the original context: stretched by the factor; many: kept; a straight line between. Source: Llama 3.1."""
    few, many = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - few) / (many - few)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / scaling["factor"])
