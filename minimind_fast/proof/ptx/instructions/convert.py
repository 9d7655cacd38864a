"""Conversions between number formats.

Purpose: where a kernel's precision is decided: to 16 bits and back.
Principle: to nearest with ties to even, or to an integer by the rounding that the opcode names.
Properties: a float past an integer's range gives its end, NaN gives zero; integers are cut or widened by their sign.
"""

from __future__ import annotations

import re

import numpy as np

from minimind_fast.proof.ptx.formats import TYPES, from_half, pack, to_half, to_tf32
from minimind_fast.proof.ptx.instructions.table import Step, instruction
from minimind_fast.proof.ptx.lanes import reader, writer
from minimind_fast.proof.ptx.parse import Instruction, Program

_ROUND = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
_INTEGER = r"[us](?:8|16|32|64)"


@instruction(rf"cvt\.(?P<to>{_INTEGER})\.(?P<of>{_INTEGER})")
def _integer_to_integer(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write, read = writer(program, one.operands[0]), reader(program, one.operands[1], TYPES[match["of"]])
    to = TYPES[match["to"]]
    return lambda lanes, mask: write(lanes, np.asarray(read(lanes)).astype(to), mask)


@instruction(rf"cvt\.rn\.(?P<to>f32|f64)\.(?P<of>{_INTEGER})")
def _integer_to_float(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return _integer_to_integer(program, one, match)


@instruction(rf"cvt\.(?P<round>rzi|rni|rmi|rpi)(?:\.ftz)?\.(?P<to>{_INTEGER})\.(?P<of>f32|f64)")
def _float_to_integer(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write, read = writer(program, one.operands[0]), reader(program, one.operands[1], TYPES[match["of"]])
    to, way = TYPES[match["to"]], _ROUND[match["round"]]
    low, high = np.iinfo(to).min, np.iinfo(to).max

    def step(lanes, mask):
        value = way(np.asarray(read(lanes)).astype(np.float64))
        inside = np.nan_to_num(np.clip(value, float(low), np.nextafter(float(high), 0))).astype(to)
        write(lanes, np.where(value >= float(high), to(high), inside), mask)

    return step


@instruction(r"cvt\.(?P<round>rzi|rni|rmi|rpi)(?:\.ftz)?\.f32\.f32")
def _float_to_whole_float(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write, read = writer(program, one.operands[0]), reader(program, one.operands[1], np.float32)
    way = _ROUND[match["round"]]
    return lambda lanes, mask: write(lanes, way(read(lanes)), mask)


@instruction(r"cvt(?:\.rn)?\.(?P<to>f32|f64)\.(?P<of>f32|f64)")
def _float_to_float(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return _integer_to_integer(program, one, match)


@instruction(r"cvt\.f32\.(?P<of>f16|bf16)")
def _from_half(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write, read = writer(program, one.operands[0]), reader(program, one.operands[1], np.uint16)
    return lambda lanes, mask: write(lanes, from_half(read(lanes), match["of"]), mask)


@instruction(r"cvt\.rn\.(?P<to>f16|bf16)\.f32")
def _to_half(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write, read = writer(program, one.operands[0]), reader(program, one.operands[1], np.float32)
    return lambda lanes, mask: write(lanes, to_half(read(lanes), match["to"]), mask)


@instruction(r"cvt\.rn\.(?P<to>f16|bf16)x2\.f32")
def _to_two_halves(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """The first source becomes the upper half."""
    write = writer(program, one.operands[0])
    high, low = (reader(program, operand, np.float32) for operand in one.operands[1:3])
    return lambda lanes, mask: write(
        lanes, pack(to_half(low(lanes), match["to"]), to_half(high(lanes), match["to"])), mask
    )


@instruction(r"cvt\.(?P<round>rna|rn)\.tf32\.f32")
def _to_tf32(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write, read = writer(program, one.operands[0]), reader(program, one.operands[1], np.float32)
    return lambda lanes, mask: write(lanes, to_tf32(read(lanes), ties_away=match["round"] == "rna"), mask)
