"""Instructions in which the lanes of a warp read each other.

Purpose: reductions and scans inside a warp.
Principle: an index into the warp's lanes, worked out as PTX words it.
Properties: a lane that reads one that does not take part is a finding, and so is a reduction without all lanes.
"""

from __future__ import annotations

import re

import numpy as np

from minimind_fast.proof.ptx.formats import TYPES
from minimind_fast.proof.ptx.instructions.table import Step, instruction
from minimind_fast.proof.ptx.lanes import reader, writer
from minimind_fast.proof.ptx.parse import Instruction, Program
from minimind_fast.proof.ptx.threads import WARP


def source_lane(mode: str, lane: np.ndarray, by: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which lane a shuffle reads.

    Args:
        mode: "up", "down", "bfly" or "idx".
        lane: of the reader, 0 to 31.
        by: distance, pattern or index.
        bounds: the clamp in its lowest five bits, the mask of segments in bits 8 to 12.

    Returns:
        The source, the reader itself where that lies outside; and whether it lies inside.
    """
    lane, by, clamp, segment = lane.astype(np.int64), by.astype(np.int64) & 31, bounds & 31, (bounds >> 8) & 31
    lowest, highest = lane & segment, (lane & segment) | (clamp & ~segment & 31)
    if mode == "up":
        source = lane - by
        inside = source >= highest  # with a clamp of 0 this is the segment's first lane
    else:
        source = {"down": lane + by, "bfly": lane ^ by, "idx": lowest | (by & ~segment & 31)}[mode]
        inside = source <= highest
    return np.where(inside, source, lane), inside


@instruction(r"shfl\.sync\.(?P<mode>up|down|bfly|idx)\.b32")
def _shuffle(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    target, _, flag = one.operands[0].partition("|")
    write, read = writer(program, target), reader(program, one.operands[1], np.uint32)
    write_flag = writer(program, flag) if flag else None
    by, bounds = (reader(program, operand, np.uint32) for operand in one.operands[2:4])

    def step(lanes, mask):
        distance, limits = (lanes.full(f(lanes)).astype(np.int64) for f in (by, bounds))
        source, inside = source_lane(match["mode"], lanes.lane, distance, limits)
        source = source + lanes.warp_of * WARP
        if mask is not None and not mask[source][mask].all():
            lane = int((mask & ~mask[source]).argmax())
            lanes.note(
                "a shuffle reads a lane that takes no part", lane, f"lane {lane % WARP} reads {source[lane] % WARP}"
            )
        write(lanes, lanes.full(read(lanes))[source], mask)
        if write_flag:
            write_flag(lanes, inside, mask)

    return step


@instruction(r"redux\.sync\.(?P<name>add|min|max|and|or|xor)\.(?P<type>[bus]32)")
def _reduce(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[match["name"]]
    dtype = TYPES[match["type"]]
    write, read = writer(program, one.operands[0]), reader(program, one.operands[1], dtype)

    def step(lanes, mask):
        if mask is not None:
            warps = mask.reshape(-1, WARP)
            part = warps.any(1) & ~warps.all(1)
            if part.any():
                lanes.note("a reduction without all lanes of its warp", int(part.argmax()) * WARP, "")
        found = function.reduce(lanes.full(read(lanes)).reshape(-1, WARP), axis=1).astype(dtype)
        write(lanes, np.repeat(found, WARP), mask)

    return step


@instruction(r"bar\.warp\.sync")
def _warp_barrier(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """Nothing to do: the lanes of a warp run in lockstep here."""
    return lambda lanes, mask: None
