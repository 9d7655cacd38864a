"""Floats of 16 bits, alone, two in a register, or beside float32; and two float32 in a register.

Purpose: the arithmetic that bfloat16 and float16 kernels do without widening first.
Principle: widened to float32 or float64, worked out as in `arithmetic.py`, rounded once to the result's format.
Properties: those with float32 beside them, or two float32 in a register, are of sm_100 and later.

Source: PTX ISA, "Half Precision Floating Point Instructions", "Mixed Precision Floating Point Instructions".
"""

from __future__ import annotations

import operator
import re

import numpy as np

from minimind_fast.proof.ptx.formats import from_half, pack, to_half, unpack
from minimind_fast.proof.ptx.instructions.arithmetic import BINARY, fused, maximum, minimum, taking
from minimind_fast.proof.ptx.instructions.table import Step, instruction
from minimind_fast.proof.ptx.lanes import reader, writer
from minimind_fast.proof.ptx.parse import Instruction, Program


@instruction(r"(?P<name>add|sub|mul|fma|max|min|neg|abs)(?:\.rn)?(?P<nan>\.NaN)?\.(?P<type>bf16|f16)(?P<pair>x2)?")
def _half(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """16-bit floats, one in a 16-bit register or two in a 32-bit one."""
    kind, pair, nan = match["type"], bool(match["pair"]), bool(match["nan"])
    function = {
        **BINARY,
        "fma": lambda a, b, c: a.astype(np.float64) * b + c,
        "max": maximum(nan),
        "min": minimum(nan),
        "neg": operator.neg,
        "abs": np.abs,
    }[match["name"]]
    taking(one, function)
    write = writer(program, one.operands[0])
    reads = [reader(program, operand, np.uint32 if pair else np.uint16) for operand in one.operands[1:]]

    def step(lanes, mask):
        values = [read(lanes) for read in reads]
        sides = zip(*[unpack(v, kind) for v in values], strict=True) if pair else [[from_half(v, kind) for v in values]]
        rounded = [to_half(function(*side), kind) for side in sides]
        write(lanes, pack(*rounded) if pair else rounded[0], mask)

    return step


@instruction(r"(?P<name>add|sub|fma)(?:\.rn)?\.f32\.(?P<type>bf16|f16)")
def _mixed(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """16-bit numbers and a last operand in float32, since sm_100: rounded once, in float32."""
    function = taking(one, {**BINARY, "fma": fused}[match["name"]])
    write = writer(program, one.operands[0])
    narrow = [reader(program, operand, np.uint16) for operand in one.operands[1:-1]]
    last = reader(program, one.operands[-1], np.float32)

    def step(lanes, mask):
        values = [from_half(lanes.full(read(lanes)), match["type"]) for read in narrow]
        write(lanes, np.asarray(function(*values, last(lanes)), np.float32), mask)

    return step


@instruction(r"(?P<name>add|sub|mul|fma)(?:\.rn)?\.f32x2")
def _two_floats(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """Two float32 in a 64-bit register, since sm_100."""
    function = taking(one, {**BINARY, "fma": fused}[match["name"]])
    write = writer(program, one.operands[0])
    reads = [reader(program, operand, np.uint64) for operand in one.operands[1:]]

    def step(lanes, mask):
        values = [np.ascontiguousarray(lanes.full(read(lanes))).view(np.float32) for read in reads]
        write(lanes, np.ascontiguousarray(function(*values), np.float32).view(np.uint64), mask)

    return step
