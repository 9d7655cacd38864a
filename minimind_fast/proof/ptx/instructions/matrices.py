"""Matrix instructions of a warp: `mma.sync`, and the moves that bring its operands.

Purpose: matmuls on tensor cores before Hopper, and after it on cards for the desk.
Principle: a fragment is spread over the 32 lanes as the PTX manual draws it: `group` = lane / 4 is a row (a column of B),
    `inner` = lane % 4 counts pairs along the other side. Fragments become matrices, numpy multiplies them in float64.
Properties: products of 16-bit and of tf32 numbers are exact in float64, and the sum is rounded once; a card rounds its sum
    more often, by an amount that its maker does not say.

Shapes: W warps, M x K times K x 8.
Source: PTX ISA, "Matrix Fragments for mma.m16n8k8" and "m16n8k16", "ldmatrix".
"""

from __future__ import annotations

import re

import numpy as np

from minimind_fast.proof.ptx.formats import cut_to_tf32, unpack
from minimind_fast.proof.ptx.instructions.table import Step, instruction
from minimind_fast.proof.ptx.lanes import Lanes, address, reader, writer
from minimind_fast.proof.ptx.parse import Instruction, Program, UnknownPtx, vector
from minimind_fast.proof.ptx.threads import WARP, Mask

GROUP, INNER = np.arange(WARP) >> 2, np.arange(WARP) & 3


def whole_warps(lanes: Lanes, mask: Mask, size: int = WARP) -> None:
    """Note lanes that are missing where all of a warp (or of four) must take part."""
    if mask is None:
        return
    groups = mask.reshape(-1, size)
    part = groups.any(1) & ~groups.all(1)
    if part.any():
        lanes.note("a matrix instruction without all lanes of its warp", int(part.argmax()) * size, "")


@instruction(
    r"mma\.sync\.aligned\.m16n8k(?P<k>8|16)\.row\.col\.f32\.(?P<type>f16|bf16|tf32)\.(?P<other>f16|bf16|tf32)\.f32"
)
def _multiply(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    kind, k = match["type"], int(match["k"])
    if match["other"] != kind or (kind == "tf32" and k != 8):
        raise UnknownPtx(f"opcode {one.opcode!r}")
    d, a, b, c = (vector(operand) for operand in one.operands)
    writes = [writer(program, name) for name in d]
    read_a, read_b = ([reader(program, name, np.uint32) for name in names] for names in (a, b))
    read_c = [reader(program, name, np.float32) for name in c]

    def step(lanes, mask):
        whole_warps(lanes, mask)
        W = lanes.size // WARP

        def fragment(read):
            return lanes.full(read(lanes)).reshape(W, WARP)

        A, B, C = np.zeros((W, 16, k)), np.zeros((W, k, 8)), np.empty((W, 16, 8))
        if kind == "tf32":
            for r, read in enumerate(read_a):
                A[:, GROUP + 8 * (r & 1), INNER + 4 * (r >> 1)] = cut_to_tf32(fragment(read))
            for r, read in enumerate(read_b):
                B[:, INNER + 4 * r, GROUP] = cut_to_tf32(fragment(read))
        else:
            for r, read in enumerate(read_a):
                row, column = GROUP + 8 * (r & 1), 2 * INNER + 8 * (r >> 1)
                A[:, row, column], A[:, row, column + 1] = unpack(fragment(read), kind)
            for r, read in enumerate(read_b):
                row = 2 * INNER + 8 * r
                B[:, row, GROUP], B[:, row + 1, GROUP] = unpack(fragment(read), kind)
        for r, read in enumerate(read_c):
            C[:, GROUP + 8 * (r >> 1), 2 * INNER + (r & 1)] = fragment(read)
        D = (A @ B + C).astype(np.float32)
        for r, write in enumerate(writes):
            write(lanes, D[:, GROUP + 8 * (r >> 1), 2 * INNER + (r & 1)].reshape(-1), mask)

    return step


_TILES = {"x1": 1, "x2": 2, "x4": 4}
_MOVED = r"\.sync\.aligned\.m8n8\.(?P<tiles>x1|x2|x4)(?P<turned>\.trans)?\.shared\.b16"


def _row_lanes(lanes: Lanes, tile: int) -> np.ndarray:
    """The lanes whose addresses are the eight rows of a tile, warp by warp."""
    return (np.arange(lanes.size // WARP)[:, None] * WARP + 8 * tile + np.arange(8)).reshape(-1)


@instruction("ldmatrix" + _MOVED)
def _load_matrix(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """Tile i of 8 x 8: its rows stand at the addresses of lanes 8 i to 8 i + 7; a lane gets two neighbours of a row."""
    writes = [writer(program, name) for name in vector(one.operands[0])]
    at, turned = address(program, one.operands[1], np.uint32), bool(match["turned"])

    def step(lanes, mask):
        whole_warps(lanes, mask)
        place = at(lanes)
        for i, write in enumerate(writes):
            rows = np.zeros(lanes.size, bool)
            rows[_row_lanes(lanes, i)] = True
            found = lanes.shared.load(place, 8, 2, rows if mask is None else rows & mask)
            tiles = found.view(np.uint16)[_row_lanes(lanes, i)].reshape(-1, 8, 8)
            tiles = np.ascontiguousarray(tiles.transpose(0, 2, 1) if turned else tiles)
            write(lanes, tiles.reshape(-1, 2).view(np.uint32)[:, 0], mask)

    return step


@instruction("stmatrix" + _MOVED)
def _store_matrix(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """`ldmatrix`, the other way."""
    reads = [reader(program, name, np.uint32) for name in vector(one.operands[1])]
    at, turned = address(program, one.operands[0], np.uint32), bool(match["turned"])

    def step(lanes, mask):
        whole_warps(lanes, mask)
        place = at(lanes)
        for i, read in enumerate(reads):
            tiles = np.ascontiguousarray(lanes.full(read(lanes))).view(np.uint16).reshape(-1, 8, 8)
            tiles = np.ascontiguousarray(tiles.transpose(0, 2, 1) if turned else tiles)
            values = np.zeros((lanes.size, 2), np.uint64)
            rows = np.zeros(lanes.size, bool)
            rows[_row_lanes(lanes, i)] = True
            values[_row_lanes(lanes, i)] = tiles.reshape(-1, 8).view(np.uint64)
            lanes.shared.store(place, values, rows if mask is None else rows & mask)

    return step
