"""Which matmuls oneDNN compiles by shape, and how to split a batch of them into few shapes.

Purpose: `compiled` says when a pack needs filler (`ops/documents.py`); `pieces` splits a batch of matmuls.
Principle: for each new shape of a 16-bit matmul, oneDNN compiles code into two buffers of 256 KiB. It keeps one for ever,
    the other for its last 1024 matmuls. A training step has some twenty matmuls of T rows, so packs of ever-changing T
    would cost 10 MB a step, and the gaps between those buffers are useless for large tensors.
Properties: touches no tensor.

Measured on two Zen 4 cores, oneDNN 3 of torch 2.13, bfloat16: 0.54 MiB a new matmul shape, of which 0.26 MiB remain with
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=0; nothing in float32.
Shapes: T positions of a packed batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


def compiled(device_type: str, dtype: torch.dtype) -> bool:
    """Whether each new matmul shape is compiled and kept.

    Args:
        device_type: "cuda" or "cpu".
        dtype: the weights' dtype.
    """
    return device_type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def pieces(size: int, largest: int) -> Iterator[slice]:
    """Split range(size) into pieces whose lengths are powers of two.

    Args:
        size: total length.
        largest: maximum length of a piece.

    Returns:
        The pieces in order, the longest first.
    """
    begin = 0
    while begin < size:
        length = 1 << min(largest, size - begin).bit_length() - 1
        yield slice(begin, begin + length)
        begin += length
