"""Memory that nobody has written yet, and how it is known.

Purpose: a kernel that reads an element before anybody wrote it is told, even where its number would do no harm.
Principle: `torch.empty` and its kin are filled with one odd number of each dtype: a NaN with a payload, or a large
    integer. A kernel that loads exactly this number reads what nobody wrote.
Properties: whoever writes the memory, kernel or PyTorch, needs no book-keeping. One in millions of drawn numbers of 16
    bits could be the pattern; NaNs that arithmetic makes are others. Booleans and bytes have no number to spare.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

_PATTERNS = {
    torch.float16: np.uint16(0x7FA5),
    torch.bfloat16: np.uint16(0x7FE5),
    torch.float32: np.uint32(0x7FE5A5A5),
    torch.float64: np.uint64(0x7FFDA5A5A5A5A5A5),
    torch.int32: np.uint32(0x5A5A5A5A),
    torch.int64: np.uint64(0x5A5A5A5A5A5A5A5A),
}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def pattern_of(dtype: torch.dtype) -> np.unsignedinteger | None:
    """The bits that stand for "never written"; None where every number has a meaning."""
    return _PATTERNS.get(dtype)


def mark(tensor: Tensor) -> Tensor:
    """Fill a tensor with its dtype's pattern.

    Args:
        tensor: dense, on the CPU.
    """
    bits = pattern_of(tensor.dtype)
    if bits is not None and tensor.numel():
        tensor.detach().view(_BITS[bits.itemsize]).fill_(int(bits))
    return tensor


@contextlib.contextmanager
def marked_memory() -> Iterator[None]:
    """Mark what PyTorch allocates without filling it: `torch.empty`, `empty_like`, `new_empty`."""

    def marking(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def empty(*args, **kwargs):
            return mark(real(*args, **kwargs))

        return empty

    places = [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]
    before = [(owner, name, getattr(owner, name)) for owner, name in places]
    try:
        for owner, name, real in before:
            setattr(owner, name, marking(real))
        yield
    finally:
        for owner, name, real in before:
            setattr(owner, name, real)
