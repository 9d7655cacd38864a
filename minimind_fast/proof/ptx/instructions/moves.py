"""Loads, stores and asynchronous copies.

Purpose: between registers, shared memory and global memory.
Principle: the opcode says space, vector and width; the memories check and do the rest.
Properties: cache hints change nothing here. A `cp.async` reads global memory at once and lands at its wait.
"""

from __future__ import annotations

import re

import numpy as np

from minimind_fast.proof.ptx.formats import TYPES, UNSIGNED
from minimind_fast.proof.ptx.instructions.table import Step, instruction
from minimind_fast.proof.ptx.lanes import address, reader, writer
from minimind_fast.proof.ptx.parse import Instruction, Program, vector

_HINTS = r"(?:\.(?:relaxed|weak|nc|ca|cg|cs|wb|wt|gpu|sys|L1::\w+|L2::(?!cache_hint)\w+))*"
_VECTOR = r"(?:\.v(?P<count>2|4|8))?"
_TYPE = r"\.(?P<type>[bus](?:8|16|32|64)|f(?:32|64))"
_WIDTH = {"global": np.uint64, "shared": np.uint32}


@instruction(r"ld\.param" + _TYPE)
def _load_parameter(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write, dtype = writer(program, one.operands[0]), np.dtype(TYPES[match["type"]])
    name, _, offset = one.operands[1].strip("[] ").partition("+")
    start = int(offset or 0)

    def step(lanes, mask):
        raw = lanes.launch.parameters[name.strip()][start : start + dtype.itemsize]
        write(lanes, np.frombuffer(raw, dtype)[0], mask)

    return step


@instruction(r"ld\.(?P<space>global|shared)" + _HINTS + _VECTOR + _TYPE)
def _load(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    space, dtype = match["space"], np.dtype(TYPES[match["type"]])
    writes = [writer(program, name) for name in vector(one.operands[0])]
    at = address(program, one.operands[1], _WIDTH[space])

    def step(lanes, mask):
        if space == "global":
            found = lanes.launch.memory.load(lanes, at(lanes), dtype.itemsize, len(writes), mask)
        else:
            found = lanes.shared.load(at(lanes), dtype.itemsize, len(writes), mask)
        for i, write in enumerate(writes):
            write(lanes, np.ascontiguousarray(found[:, i]).view(dtype), mask)

    return step


@instruction(r"st\.(?P<space>global|shared)" + _HINTS + _VECTOR + _TYPE)
def _store(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    space, dtype = match["space"], UNSIGNED[np.dtype(TYPES[match["type"]]).itemsize]
    at = address(program, one.operands[0], _WIDTH[space])
    reads = [reader(program, name, dtype) for name in vector(one.operands[1])]

    def step(lanes, mask):
        values = np.stack([lanes.full(read(lanes)) for read in reads], 1)
        if space == "global":
            lanes.launch.memory.store(lanes, at(lanes), values, mask)
        else:
            lanes.shared.store(at(lanes), values, mask)

    return step


@instruction(r"cp\.async\.(?:ca|cg)\.shared\.global" + _HINTS)
def _copy(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """With a fourth operand only so many bytes are read, and the rest is zero."""
    size = int(one.operands[2], 0)
    to, of = address(program, one.operands[0], np.uint32), address(program, one.operands[1], np.uint64)
    taken = reader(program, one.operands[3], np.uint32) if len(one.operands) > 3 else None
    unit = min(size, 8)

    def step(lanes, mask):
        some = None if taken is None else lanes.full(taken(lanes)).astype(np.int64)
        reading = mask
        if some is not None:
            reading = some > 0 if mask is None else mask & (some > 0)
        values = lanes.launch.memory.load(lanes, of(lanes), unit, size // unit, reading).view(np.uint8)
        if some is not None:
            values = np.where(np.arange(size) < some[:, None], values, np.uint8(0))
        lanes.shared.start_copy(to(lanes), values, mask)

    return step


@instruction(r"cp\.async\.commit_group")
def _commit(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lambda lanes, mask: lanes.shared.commit(mask)


@instruction(r"cp\.async\.wait_(?P<what>group|all)")
def _wait(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    everything = match["what"] == "all"
    left = 0 if everything else int(one.operands[0], 0)
    return lambda lanes, mask: lanes.shared.wait(left, mask, uncommitted=everything)


@instruction(r"createpolicy\.fractional\.L2::\w+\.b64")
def _policy(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """A hint for the cache: any number will do."""
    write = writer(program, one.operands[0])
    return lambda lanes, mask: write(lanes, np.uint64(0), mask)
