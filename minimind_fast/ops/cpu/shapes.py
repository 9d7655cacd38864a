"""Which matmuls oneDNN compiles for their shape, and how a batch of them is cut into few different shapes.

Purpose: `compiled` says where a pack wants filler (`ops/documents.py`); `pieces` cuts a batch of matmuls.
Principle: a 16-bit matmul of a new shape is compiled by oneDNN into two buffers of 256 KiB. One of them it keeps for ever,
    the other for its last 1024 matmuls. A training step has some twenty matmuls of T rows, so packs of ever new T would
    cost 10 MB a step, and what lies between those buffers is lost to large tensors as well.
Properties: no tensor is touched here.

Measured on two Zen 4 cores, oneDNN 3 of torch 2.13, bfloat16: 0.54 MiB a new matmul shape, of which 0.26 MiB stay with
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=0; float32 nothing.
Shapes: T positions of a packed batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def compiled(device_type: str, dtype: torch.dtype) -> bool:
    """Whether each new shape of a matmul is compiled and kept.

    Args:
        device_type: "cuda" or "cpu".
        dtype: of the weights.
    """
    return device_type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def pieces(size: int, largest: int) -> Iterator[slice]:
    """Cut 0 .. size into pieces whose lengths are powers of two.

    Args:
        size: in all.
        largest: no piece is longer.

    Returns:
        The pieces in order, the long ones first.
    """
    begin = 0
    while begin < size:
        length = 1 << min(largest, size - begin).bit_length() - 1
        yield slice(begin, begin + length)
        begin += length
