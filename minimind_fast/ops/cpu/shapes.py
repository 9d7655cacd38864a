"""Few different shapes on a CPU, because oneDNN keeps what it has compiled for each of them.

Purpose: `extra`, `fill` and `fill_documents` bring a packed batch to one of a few sizes; `pieces` cuts a batch of matmuls.
Principle: a 16-bit matmul of a new shape is compiled by oneDNN into two buffers of 256 KiB. One of them it keeps for ever,
    the other for its last 1024 matmuls. A training step has some twenty matmuls of T rows, so that packs of ever new T
    would cost 10 MB a step, and what lies between those buffers is lost to large tensors as well.
Properties: the filler is made of ignored documents, none longer than a real one: no loss and no gradient comes of it. At
    most a sixteenth is added (or 15 positions), 2% on average; 16 sizes from T to 2 T. It costs 1.4% of a step.

Measured on two Zen 4 cores, oneDNN 3 of torch 2.13, bfloat16: 0.54 MiB a new matmul shape, of which 0.26 MiB stay with
    ONEDNN_PRIMITIVE_CACHE_CAPACITY=0; float32 nothing.
Shapes: T positions of a packed batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_STEP = 16


def round_up(size: int) -> int:
    """The next of 16 sizes to an octave.

    Args:
        size: at least 0.
    """
    step = max(LEAST_STEP, 1 << max(size.bit_length() - 5, 0))
    return -(-size // step) * step


def extra(size: int, weight: Tensor, mixture: bool) -> int:
    """Positions to add to a pack before a model runs it.

    Args:
        size: T.
        weight: of the model; only 16-bit ones on a CPU are multiplied by code that is made for the shape.
        mixture: of experts; it gets none: filler would meet the router, and the experts' shapes vary all the same.
    """
    compiled = weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)
    return round_up(size) - size if compiled and not mixture else 0


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


def fill(tensor: Tensor, extra: int, value: float = 0) -> Tensor:
    """Lengthen the first dimension.

    Args:
        tensor: (T, ...).
        extra: rows to add.
        value: in them.

    Returns:
        (T + extra, ...).
    """
    return F.pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, extra), value=value)


def fill_documents(cu_seqlens: Tensor, total: int, longest: int) -> Tensor:
    """Bounds with further documents behind the last.

    Args:
        cu_seqlens: (documents + 1,) int32, ends with T.
        total: what it is to end with, more than T.
        longest: no new document is longer.

    Returns:
        (more + 1,) int32.
    """
    begin = int(cu_seqlens[-1])
    more = torch.arange(begin, total, max(longest, 1), dtype=cu_seqlens.dtype)[1:]
    return torch.cat([cu_seqlens, more, more.new_full((1,), total)])
