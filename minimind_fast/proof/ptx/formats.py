"""Number formats that numpy does not have: bfloat16 and tf32.

Purpose: kernels compute in them, and a bit too many would hide a fault.
Principle: bfloat16 is the upper half of a float32, tf32 its upper 19 bits. Rounding adds half of the last kept bit, less
    one where that bit is even (to nearest, ties to even), and cuts.
Properties: NaN stays NaN, inf stays inf, a value past the largest becomes inf.
"""

from __future__ import annotations

import numpy as np

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Names in opcodes; b32 and its like are bits of no meaning.
TYPES: dict[str, type] = {
    **{f"{letter}{bits}": getattr(np, f"uint{bits}") for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,
}


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> float32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits of the nearest bfloat16, ties to even."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_tf32(values: np.ndarray, ties_away: bool = False) -> np.ndarray:
    """float32 -> the nearest tf32, as float32; ties to even, or away from zero."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    half = np.uint32(0x1000) if ties_away else np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    rounded = ((bits + half) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(values), rounded, values)


def cut_to_tf32(bits: np.ndarray) -> np.ndarray:
    """uint32 bits of float32 -> what a tf32 matrix unit reads of them: the lowest 13 bits are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def unpack(bits: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """A register of two 16-bit numbers -> the lower and the upper one, float32.

    Args:
        bits: uint32.
        kind: "f16" or "bf16".
    """
    low, high = (bits & np.uint32(0xFFFF)).astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)
    return from_half(low, kind), from_half(high, kind)


def from_half(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 bits of "f16" or "bf16" -> float32."""
    return from_bf16(bits) if kind == "bf16" else np.asarray(bits).view(np.float16).astype(np.float32)


def to_half(values: np.ndarray, kind: str) -> np.ndarray:
    """float32 -> uint16 bits of the nearest "f16" or "bf16"."""
    if kind == "bf16":
        return to_bf16(values)
    return np.ascontiguousarray(values, dtype=np.float32).astype(np.float16).view(np.uint16)


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Two uint16 -> one uint32."""
    return low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16))
