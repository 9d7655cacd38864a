"""Matrix instructions of four warps on Hopper: `wgmma`, which runs on while the warps go on.

Purpose: matmuls as an H100 or H200 does them.
Principle: a descriptor says where an operand lies in shared memory and how its 16-byte pieces are swizzled. The product is
    worked out at once, but its accumulators stay out of reach, and its operands held, until the group is waited for.
Properties: found are accumulators read before the wait, operands overwritten before it, and operands that a warp wrote
    with no fence (`fence.proxy.async`) or no barrier since. Sums as in `mma.sync`: in float64, rounded once.

Shapes: a group of four warps multiplies 64 x k by k x n.
Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions": matrix descriptor, swizzling modes, fragments of D.
"""

from __future__ import annotations

import re
from functools import lru_cache

import numpy as np

from minimind_fast.proof.ptx.formats import cut_to_tf32, from_half, unpack
from minimind_fast.proof.ptx.instructions.matrices import GROUP, INNER, whole_warps
from minimind_fast.proof.ptx.instructions.table import Step, instruction
from minimind_fast.proof.ptx.lanes import Lanes, predicate, reader
from minimind_fast.proof.ptx.parse import Instruction, Program, UnknownPtx, vector

GROUP_LANES = 128
_SWIZZLE_BYTES = {1: 128, 2: 64, 3: 32}  # by bits 62 and 63


@lru_cache(maxsize=4096)
def element_addresses(descriptor: int, rows: int, k: int, turned: bool, size: int = 2) -> np.ndarray:
    """Where the elements of an operand lie.

    Args:
        descriptor: 64 bits.
        rows: M or N.
        k: columns.
        turned: stored with k outside.
        size: bytes of an element.

    Returns:
        (rows, k) int64 bytes in the program's shared memory.
    """

    def field(low: int) -> int:
        return (descriptor >> low & 0x3FFF) << 4

    start, leading, stride, mode = field(0), field(16), field(32), descriptor >> 62
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if mode == 0:
        if turned:
            raise UnknownPtx("wgmma with an operand that is transposed and not swizzled")
        piece = 16 // size  # elements of a row of the smallest tile
        return start + r // 8 * stride + c // piece * leading + r % 8 * 16 + c % piece * size
    width = _SWIZZLE_BYTES[mode]
    if turned:
        across = width // size
        at = start + r // across * leading + c // 8 * stride + c % 8 * width + r % across * size
    else:
        at = start + r // 8 * stride + r % 8 * width + c * size
    return at ^ ((at >> 7 & width // 16 - 1) << 4)


@instruction(
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k(?P<k>8|16)\.f32\.(?P<type>f16|bf16|tf32)\.(?P<other>f16|bf16|tf32)"
)
def _multiply(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    kind, n, k = match["type"], int(match["n"]), int(match["k"])
    size = 4 if kind == "tf32" else 2
    if match["other"] != kind or k != 32 // size:
        raise UnknownPtx(f"opcode {one.opcode!r}")
    slots = [program.registers[name][0] for name in vector(one.operands[0])]
    from_registers = one.operands[1][0] == "{"
    fragments = [reader(program, name, np.uint32) for name in vector(one.operands[1])] if from_registers else []
    describe_a = None if from_registers else reader(program, one.operands[1], np.uint64)
    describe_b = reader(program, one.operands[2], np.uint64)
    keep = predicate(program, one.operands[3])
    scale = int(one.operands[4]) * int(one.operands[5])
    turns = [bool(int(flag)) for flag in one.operands[6:]] or [False, False]  # tf32 has no such flags
    turned_a, turned_b = (False, turns[0]) if from_registers else turns
    warp, lane = np.divmod(np.arange(GROUP_LANES), 32)

    def operand(lanes: Lanes, first: int, describe, rows: int, turned: bool, held: list[np.ndarray]) -> np.ndarray:
        descriptors = lanes.full(describe(lanes))[first : first + GROUP_LANES]
        if (descriptors != descriptors[0]).any():
            lanes.note("a matmul's descriptor differs between lanes", first, "")
        at = element_addresses(int(descriptors[0]), rows, k, turned, size)
        bits, cells = lanes.shared.matmul_reads(first, at, size)
        held.append(cells)
        return (cut_to_tf32(bits) if kind == "tf32" else from_half(bits, kind)).astype(np.float64)

    def fragment(lanes: Lanes, first: int) -> np.ndarray:
        A = np.zeros((64, k))
        for r, read in enumerate(fragments):
            bits = lanes.full(read(lanes))[first : first + GROUP_LANES]
            row = 16 * warp + GROUP[lane] + 8 * (r & 1)
            if kind == "tf32":
                A[row, INNER[lane] + 4 * (r >> 1)] = cut_to_tf32(bits)
            else:
                column = 2 * INNER[lane] + 8 * (r >> 1)
                A[row, column], A[row, column + 1] = unpack(bits, kind)
        return A

    def step(lanes, mask):
        whole_warps(lanes, mask, GROUP_LANES)
        kept, held = lanes.full(keep(lanes)), []
        before = [lanes.flying.get(slot, lanes.registers[slot]) for slot in slots]
        D = np.zeros((len(slots), lanes.size), np.float32)
        for i, (slot, bits) in enumerate(zip(slots, before, strict=True)):
            if bits is not None:
                D[i] = bits.view(np.float32)
            elif kept.any():
                D[i] = lanes.undefined(slot, 4).view(np.float32)
        D = np.where(kept, D, np.float32(0))
        for first in range(0, lanes.size, GROUP_LANES):
            if mask is not None and not mask[first]:
                continue
            B = operand(lanes, first, describe_b, n, turned_b, held)
            A = fragment(lanes, first) if describe_a is None else operand(lanes, first, describe_a, 64, turned_a, held)
            product = scale * (A @ B.T)
            mine = slice(first, first + GROUP_LANES)
            for i in range(len(slots)):
                j, r = divmod(i, 4)
                row, column = 16 * warp + GROUP[lane] + 8 * (r >> 1), 8 * j + 2 * INNER[lane] + (r & 1)
                D[i, mine] = (product[row, column] + D[i, mine]).astype(np.float32)
        for i, (slot, bits) in enumerate(zip(slots, before, strict=True)):
            value = D[i].view(np.uint32)
            if mask is not None and bits is not None:
                value = np.where(mask, value, bits)
            lanes.flying[slot], lanes.registers[slot] = value, None
        lanes.matmuls.append((lanes.matmul_groups, slots, held))

    return step


@instruction(r"wgmma\.commit_group\.sync\.aligned")
def _commit(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    def step(lanes, mask):
        lanes.matmul_groups += 1

    return step


@instruction(r"wgmma\.wait_group\.sync\.aligned")
def _wait(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    left = int(one.operands[0])

    def step(lanes, mask):
        done = [m for m in lanes.matmuls if m[0] < lanes.matmul_groups - left]
        lanes.matmuls = [m for m in lanes.matmuls if m[0] >= lanes.matmul_groups - left]
        busy = {slot for _, slots, _ in lanes.matmuls for slot in slots}
        for _, slots, held in done:
            for cells in held:
                lanes.shared.matmul_done(cells)
            for slot in slots:
                if slot not in busy and slot in lanes.flying:
                    lanes.registers[slot] = lanes.flying.pop(slot)

    return step


@instruction(r"wgmma\.fence\.sync\.aligned")
def _fence(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """Orders registers between matmuls; registers have an order here."""
    return lambda lanes, mask: None


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def _proxy_fence(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lambda lanes, mask: lanes.shared.fence(mask)
