"""What packs of different length cost a GPU's allocator, by a model of it.

    python -m benchmarks.studies.allocator

Purpose: memory reserved over memory in use, with PyTorch's fixed segments and with growing ones (`expandable_segments`).
Principle: the allocator keeps what was freed. A block of one pack's length is too small for the next pack, or leaves a rest
    that is too small for anything: more is reserved. A segment that grows has no ends inside.
Properties: best fit, remainders split off, free neighbours merged, as for PyTorch's large blocks. Not modelled: small
    blocks, streams, and that PyTorch gives cached segments back, and waits, before it runs out. The forward and backward
    pass is minimind3's saved activations in their order.

Source: c10/cuda/CUDACachingAllocator.cpp of PyTorch, its rounding and its limits.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

MIB = 1 << 20
ROUND = 512  # bytes; every size is rounded up to it
SPLIT = MIB  # of a fixed segment a larger rest is split off
FIXED, LARGE, PAGE = 20 * MIB, 10 * MIB, 2 * MIB  # a segment for less than LARGE; else, and when growing, in pages


@dataclass(eq=False)
class Block:
    """A piece of a segment."""

    segment: int
    size: int
    free: bool = True


class Allocator:
    """The model.

    Args:
        grows: one segment that grows, rather than a new one whenever nothing fits.
    """

    def __init__(self, grows: bool) -> None:
        self.grows, self.reserved = grows, 0
        self.blocks: list[Block] = []  # by address

    def take(self, size: int) -> Block:
        """Allocate some bytes."""
        size = -(-size // ROUND) * ROUND
        block = min((b for b in self.blocks if b.free and b.size >= size), key=lambda b: b.size, default=None)
        block = block or self._reserve(size)
        if block.size - size > (0 if self.grows else SPLIT):
            self.blocks.insert(self.blocks.index(block) + 1, Block(block.segment, block.size - size))
            block.size = size
        block.free = False
        return block

    def _reserve(self, size: int) -> Block:
        last = self.blocks[-1] if self.blocks else Block(0, 0, free=False)
        tail = last.size if self.grows and last.free else 0
        more = FIXED if not self.grows and size < LARGE else -(-(size - tail) // PAGE) * PAGE
        self.reserved += more
        if tail:
            last.size += more
            return last
        self.blocks.append(Block(last.segment + (not self.grows), more))
        return self.blocks[-1]

    def give(self, block: Block) -> None:
        """Free a block; it is merged with free neighbours."""
        block.free = True
        at = self.blocks.index(block)
        for i in (at, at - 1):
            a, b = (self.blocks[j] if 0 <= j < len(self.blocks) else None for j in (i, i + 1))
            if a and b and a.free and b.free and a.segment == b.segment:
                a.size += b.size
                self.blocks.remove(b)


def step(allocator: Allocator, tokens: int, layers: int = 8, d: int = 768, qkv: int = 1536, ffn: int = 2432) -> int:
    """Forward and backward of a pack in 16 bits.

    Returns:
        Peak bytes in use.
    """
    sizes = [2 * tokens * n for n in (d, qkv, qkv, d, d, 2 * ffn, ffn)]
    saved = [(size, allocator.take(size)) for _ in range(layers) for size in sizes]
    live = sum(size for size, _ in saved)
    peak = live
    for size, block in reversed(saved):
        gradient = allocator.take(size)
        peak = max(peak, live + size)
        allocator.give(block)
        allocator.give(gradient)
        live -= size
    return peak


def reserved_share(spread: float, grows: bool, packs: int = 100, tokens: int = 32 * 340) -> float:
    """Bytes reserved over the peak in use.

    Args:
        spread: packs are shorter than `tokens` by up to this share.
        grows: as for `Allocator`.
        packs: number of steps.
        tokens: of the longest pack.
    """
    draw, allocator = random.Random(0), Allocator(grows)
    peak = max(step(allocator, int(tokens * (1 - spread * draw.random()))) for _ in range(packs))
    return allocator.reserved / peak


def main() -> None:
    print("| packs shorter by up to | fixed segments | growing |\n|---|---|---|")
    for spread in (0.0, 0.02, 0.1, 0.5):
        fixed, growing = (reserved_share(spread, grows) for grows in (False, True))
        print(f"| {spread:.0%} | {fixed:.2f} | {growing:.2f} |")


if __name__ == "__main__":
    main()
