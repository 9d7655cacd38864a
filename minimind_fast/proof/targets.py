"""GPUs that kernels are compiled for without having one.

Purpose: one table of what a launcher or a compiler asks of a card, for ahead-of-time compilation and for executed PTX.
Principle: while a card is stood in for, PyTorch's questions about it get the table's answers, and tensors of a given class
    say that they are a GPU's, so that launchers choose that card's tiles and grids.
Properties: numbers from the makers' data sheets. Everything is put back at the end.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch


@dataclass(frozen=True)
class Target:
    """A GPU to compile for.

    Attributes:
        name: of the architecture.
        backend: Triton's name of it.
        arch: Triton's name of the architecture within it.
        warp_size: threads.
        shared_limit_bytes: that one block may have.
        multiprocessors: of the card below.
        card: key of `cards.CARDS`; "" if its speeds are not there.
        clock_ghz: at which the data sheet's matmul peak is reached.
        warps, blocks: that a multiprocessor holds at most; 0 where no cost is worked out.
        shared_bytes: of a multiprocessor.
        l2_mib: second-level cache of the card.
    """

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_limit_bytes: int
    multiprocessors: int
    card: str = ""
    clock_ghz: float = 0.0
    warps: int = 0
    blocks: int = 0
    shared_bytes: int = 0
    l2_mib: int = 0


# Source: NVIDIA's data sheets; CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
TARGETS = {
    t.name: t
    for t in (
        Target("sm_75", "cuda", 75, 32, 64 * 1024, 40),  # T4
        Target("sm_80", "cuda", 80, 32, 163 * 1024, 108, "A100", 1.41, 64, 32, 164 * 1024, 40),
        Target("sm_86", "cuda", 86, 32, 99 * 1024, 84, "RTX 3090", 1.7, 48, 16, 100 * 1024, 6),
        Target("sm_89", "cuda", 89, 32, 99 * 1024, 128, "RTX 4090", 2.52, 48, 24, 100 * 1024, 72),
        Target("sm_90", "cuda", 90, 32, 227 * 1024, 132, "H200", 1.83, 64, 32, 228 * 1024, 50),  # and H100
        Target("sm_100", "cuda", 100, 32, 227 * 1024, 148, "B200", 1.86, 64, 32, 228 * 1024, 126),
        Target("sm_120", "cuda", 120, 32, 99 * 1024, 170, "RTX 5090", 2.41, 48, 24, 100 * 1024, 96),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024, 304),  # MI300X
    )
}


def properties(target: Target) -> SimpleNamespace:
    """What `torch.cuda.get_device_properties` would say of the card.

    Args:
        target: the card.
    """
    major, minor = divmod(target.arch, 10) if isinstance(target.arch, int) else (9, 4)
    return SimpleNamespace(
        multi_processor_count=target.multiprocessors,
        shared_memory_per_block_optin=target.shared_limit_bytes,
        major=major,
        minor=minor,
        L2_cache_size=50 << 20,
        warp_size=target.warp_size,
        total_memory=80 << 30,
    )


@contextlib.contextmanager
def patched(patches: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Set attributes, and put back what was there.

    Args:
        patches: (owner, name, value).
    """
    missing = object()
    before = [(owner, name, owner.__dict__.get(name, missing)) for owner, name, _ in patches]
    for owner, name, value in patches:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            delattr(owner, name) if value is missing else setattr(owner, name, value)


def as_card(target: Target, tensors: type, run: Any, jit_function: type) -> contextlib.AbstractContextManager[None]:
    """Let launchers believe that a card is there.

    Args:
        target: the card.
        tensors: the class of the tensors that are to be a GPU's.
        run: in the place of a kernel's launch.
        jit_function: Triton's class of kernels.
    """
    card = properties(target)
    return patched(
        [
            (jit_function, "run", run),
            (tensors, "is_cuda", property(lambda self: True)),
            (torch.cuda, "device_of", lambda *_: contextlib.nullcontext()),
            (torch.cuda, "get_device_properties", lambda *_: card),
            (torch.cuda, "get_device_capability", lambda *_: (card.major, card.minor)),
        ]
    )
