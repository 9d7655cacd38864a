"""Sums, products, comparisons and bits.

Purpose: the instructions that look at one lane only.
Principle: numpy's operation of the same dtype; integers wrap as on a card. A product inside a fused multiply-add is
    exact: float32 in float64, 16 bits in float32, rounded once at the end.
Properties: approximations (ex2.approx, div.full) are computed well and rounded: a card's own last bit may differ. `.ftz`
    flushes subnormal inputs and results to zero.
"""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from minimind_fast.proof.ptx.formats import TYPES
from minimind_fast.proof.ptx.instructions.table import Step, instruction
from minimind_fast.proof.ptx.lanes import predicate, reader, writer
from minimind_fast.proof.ptx.parse import Instruction, Program, UnknownPtx

Function = Callable[..., Any]
SMALLEST = np.finfo(np.float32).tiny


def flush(values: Any) -> Any:
    """Subnormal float32 -> zero of the same sign."""
    return np.where(np.abs(values) < SMALLEST, values * np.float32(0), values)


def taking(one: Instruction, function: Function) -> Function:
    """The function, if it takes as many operands as the instruction has beside its first.

    Args:
        one: the instruction.
        function: of numpy, which would take one operand more for the place of its result, or of Python.

    Raises:
        UnknownPtx: it takes more or fewer.
    """
    inputs = getattr(function, "nin", None) or len(inspect.signature(function).parameters)
    if inputs != len(one.operands) - 1:
        raise UnknownPtx(f"opcode {one.opcode!r} with {len(one.operands)} operands: `{one}`")
    return function


def lanewise(program: Program, one: Instruction, dtype: Any, function: Function, ftz: bool = False) -> Step:
    """The step of an instruction that applies a function to all operands but the first.

    Args:
        program: whose registers.
        one: the instruction.
        dtype: of every operand.
        function: of as many arrays.
        ftz: flush subnormals.
    """
    write = writer(program, one.operands[0])
    reads, function = [reader(program, operand, dtype) for operand in one.operands[1:]], taking(one, function)

    def step(lanes, mask):
        values = [read(lanes) for read in reads]
        if ftz:
            write(lanes, flush(np.asarray(function(*map(flush, values)), dtype)), mask)
        else:
            write(lanes, np.asarray(function(*values), dtype), mask)

    return step


def fused(a: Any, b: Any, c: Any) -> Any:
    """a b + c in float32, rounded once."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def maximum(nan: bool) -> Function:
    """The larger of two numbers; of a NaN and a number the number, or the NaN."""
    return np.maximum if nan else np.fmax


def minimum(nan: bool) -> Function:
    """The smaller, likewise."""
    return np.minimum if nan else np.fmin


# -------------------------------------------------------------------------------------------------------------- floats

BINARY = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}


@instruction(r"(?P<name>add|sub|mul)(?:\.rn)?(?P<ftz>\.ftz)?\.(?P<type>f32|f64)")
def _float_binary(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lanewise(program, one, TYPES[match["type"]], BINARY[match["name"]], bool(match["ftz"]))


@instruction(r"div\.(?:full|rn|approx)(?P<ftz>\.ftz)?\.f32")
def _divide(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lanewise(program, one, np.float32, operator.truediv, bool(match["ftz"]))


@instruction(r"fma\.rn(?P<ftz>\.ftz)?\.f32")
def _fused(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lanewise(program, one, np.float32, fused, bool(match["ftz"]))


@instruction(r"(?P<name>max|min)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.f32")
def _float_extreme(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """Of two numbers, or since sm_100 of three."""
    two = (maximum if match["name"] == "max" else minimum)(bool(match["nan"]))
    function = two if len(one.operands) == 3 else lambda a, b, c: two(two(a, b), c)
    return lanewise(program, one, np.float32, function, bool(match["ftz"]))


@instruction(r"(?P<name>neg|abs)(?P<ftz>\.ftz)?\.f32")
def _sign(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    function = operator.neg if match["name"] == "neg" else np.abs
    return lanewise(program, one, np.float32, function, bool(match["ftz"]))


_CURVES: dict[str, Function] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}


@instruction(r"(?P<name>ex2|lg2|rsqrt|rcp|sqrt|tanh)\.(?:approx|rn)(?P<ftz>\.ftz)?\.f32")
def _curve(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    curve = _CURVES[match["name"]]
    return lanewise(program, one, np.float32, lambda x: curve(x.astype(np.float64)), bool(match["ftz"]))


# ------------------------------------------------------------------------------------------------------------ integers


@instruction(r"(?P<name>add|sub)\.(?P<type>[us](?:16|32|64))")
def _integer_binary(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lanewise(program, one, TYPES[match["type"]], BINARY[match["name"]])


@instruction(r"(?P<name>max|min)\.(?P<type>[us](?:16|32|64))")
def _integer_extreme(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lanewise(program, one, TYPES[match["type"]], np.maximum if match["name"] == "max" else np.minimum)


@instruction(r"neg\.(?P<type>s(?:16|32|64))")
def _integer_negative(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lanewise(program, one, TYPES[match["type"]], operator.neg)


def _quotient(a: Any, b: Any) -> Any:
    """Rounded towards zero, unlike numpy's; nothing is divided by zero in a healthy kernel."""
    b = np.where(b == 0, np.asarray(1, np.asarray(b).dtype), b)
    whole = a // b
    return whole + ((a - whole * b != 0) & ((a < 0) != (b < 0))).astype(whole.dtype)


@instruction(r"(?P<name>div|rem)\.(?P<type>[us](?:16|32|64))")
def _integer_division(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    remainder = match["name"] == "rem"
    return lanewise(
        program, one, TYPES[match["type"]], lambda a, b: a - _quotient(a, b) * b if remainder else _quotient(a, b)
    )


@instruction(r"(?P<name>mul|mad)\.lo\.(?P<type>[us](?:16|32|64))")
def _low_product(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    function = operator.mul if match["name"] == "mul" else lambda a, b, c: a * b + c
    return lanewise(program, one, TYPES[match["type"]], function)


@instruction(r"(?P<name>mul|mad)\.(?P<part>wide|hi)\.(?P<sign>[us])(?P<bits>16|32)")
def _wide_product(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """The whole product, or its upper half; `mad` adds a number of the result's width."""
    narrow, wide = TYPES[match["sign"] + match["bits"]], TYPES[match["sign"] + str(2 * int(match["bits"]))]
    upper, shift = match["part"] == "hi", wide(int(match["bits"]))
    write = writer(program, one.operands[0])
    a, b = (reader(program, operand, narrow) for operand in one.operands[1:3])
    c = reader(program, one.operands[3], narrow if upper else wide) if match["name"] == "mad" else None

    def step(lanes, mask):
        product = np.asarray(a(lanes)).astype(wide) * np.asarray(b(lanes)).astype(wide)
        product = (product >> shift).astype(narrow) if upper else product
        write(lanes, product if c is None else product + c(lanes), mask)

    return step


# ---------------------------------------------------------------------------------------------------------------- bits

_LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


@instruction(r"(?P<name>and|or|xor)\.b(?P<bits>16|32|64)")
def _logic(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lanewise(program, one, TYPES["b" + match["bits"]], _LOGIC[match["name"]])


@instruction(r"not\.b(?P<bits>16|32|64)")
def _not(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    return lanewise(program, one, TYPES["b" + match["bits"]], operator.invert)


@instruction(r"(?P<name>and|or|xor|not)\.pred")
def _predicate_logic(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write = writer(program, one.operands[0])
    reads = [predicate(program, operand) for operand in one.operands[1:]]
    function: Function = {**_LOGIC, "not": np.logical_not}[match["name"]]
    return lambda lanes, mask: write(lanes, function(*[read(lanes) for read in reads]), mask)


@instruction(r"(?P<name>shl|shr)\.(?P<type>[bus](?:16|32|64))")
def _shift(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """A shift by the width or more gives zero, or the sign of a signed number."""
    dtype = TYPES[match["type"]]
    bits, left, signed = 8 * np.dtype(dtype).itemsize, match["name"] == "shl", np.dtype(dtype).kind == "i"
    write, read = writer(program, one.operands[0]), reader(program, one.operands[1], dtype)
    amount = reader(program, one.operands[2], np.uint32)

    def step(lanes, mask):
        values, by = np.asarray(read(lanes)), np.asarray(amount(lanes))
        within = np.minimum(by, np.uint32(bits - 1)).astype(dtype)
        shifted = values << within if left else values >> within
        write(lanes, shifted if signed and not left else np.where(by < bits, shifted, dtype(0)), mask)

    return step


@instruction(r"shf\.(?P<way>[lr])\.(?P<mode>wrap|clamp)\.b32")
def _funnel(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    left, wrap = match["way"] == "l", match["mode"] == "wrap"

    def function(low, high, by):
        by = (by & 31 if wrap else np.minimum(by, 32)).astype(np.uint64)
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        return (both >> (np.uint64(32) - by) if left else both >> by).astype(np.uint32)

    return lanewise(program, one, np.uint32, function)


@instruction(r"bfe\.(?P<type>[us]32)")
def _extract(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """`length` bits from `start`, with zeros or copies of their highest above."""

    def function(bits, start, length):
        start, length = (np.minimum(v & 0xFF, 32).astype(np.int64) for v in (start, length))
        wide = bits.astype(np.int64)  # signed: bits past the end are copies of the sign
        found = (wide >> start) & ((np.int64(1) << length) - 1)
        if match["type"] == "s32":
            top = np.int64(1) << np.maximum(length - 1, 0)
            found = np.where(length == 0, 0, (found ^ top) - top)
        return found.astype(TYPES[match["type"]])

    return lanewise(program, one, TYPES[match["type"]], function)


@instruction(r"bfi\.b32")
def _insert(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    def function(bits, into, start, length):
        start, length = (np.minimum(v & 0xFF, 32).astype(np.int64) for v in (start, length))
        window = (((np.int64(1) << length) - 1) << start) & np.int64(0xFFFFFFFF)
        return (((bits.astype(np.int64) << start) & window) | (into.astype(np.int64) & ~window)).astype(np.uint32)

    return lanewise(program, one, np.uint32, function)


@instruction(r"prmt\.b32")
def _permute(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    """Four bytes chosen of eight; bit 3 of a choice copies the byte's sign."""

    def function(low, high, choice):
        both = low.astype(np.uint64) | (high.astype(np.uint64) << np.uint64(32))
        out = np.zeros(np.broadcast(low, high, choice).shape, np.uint32)
        for i in range(4):
            pick = (choice >> np.uint32(4 * i)) & np.uint32(15)
            byte = ((both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(0xFF)).astype(
                np.uint32
            )
            sign = np.where(byte & 0x80, np.uint32(0xFF), np.uint32(0))
            out |= np.where(pick & 8, sign, byte).astype(np.uint32) << np.uint32(8 * i)
        return out

    return lanewise(program, one, np.uint32, function)


@instruction(r"lop3\.b32")
def _three_way(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    table = int(one.operands[4], 0)

    def function(a, b, c, _):
        out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
        for i in range(8):
            if table >> i & 1:
                out |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        return out

    return lanewise(program, one, np.uint32, function)


@instruction(r"(?P<name>popc|clz)\.b32")
def _count_bits(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    count = np.bitwise_count

    def leading(bits):
        for by in (1, 2, 4, 8, 16):
            bits = bits | (bits >> np.uint32(by))
        return np.uint32(32) - count(bits)

    return lanewise(program, one, np.uint32, count if match["name"] == "popc" else leading)


# ------------------------------------------------------------------------------------------- moves, comparisons, choices


@instruction(r"mov\.(?P<type>[bus](?:16|32|64)|f(?:32|64))")
def _move(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    target, source = one.operands
    dtype = TYPES[match["type"]]
    bits = 8 * np.dtype(dtype).itemsize
    if "{" not in target + source:
        write, read = writer(program, target), reader(program, source, dtype)
        return lambda lanes, mask: write(lanes, read(lanes), mask)
    wide = TYPES[f"u{bits}"]
    names = [name.strip() for name in (target if target[0] == "{" else source).strip("{} ").split(",")]
    each = bits // len(names)
    part = TYPES[f"u{each}"]
    if target[0] == "{":
        writes, read = [writer(program, name) for name in names], reader(program, source, wide)

        def cut(lanes, mask):
            value = read(lanes)
            for i, write in enumerate(writes):
                write(lanes, (value >> wide(each * i)).astype(part), mask)

        return cut
    # A half that nobody wrote is common here and no fault: LLVM leaves it open when nobody will look at it.
    write = writer(program, target)
    slots = [program.registers[name][0] if name in program.registers else -1 for name in names]
    reads = [reader(program, name, part) for name in names]

    def join(lanes, mask):
        value = wide(0)
        for i, (slot, read) in enumerate(zip(slots, reads, strict=True)):
            blank = slot >= 0 and lanes.registers[slot] is None and slot not in lanes.flying
            half = part(-1 & (1 << each) - 1) if blank else read(lanes)
            value = value | (np.asarray(half).astype(wide) << wide(each * i))
        write(lanes, value, mask)

    return join


@instruction(r"mov\.pred")
def _move_predicate(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    write, read = writer(program, one.operands[0]), predicate(program, one.operands[1])
    return lambda lanes, mask: write(lanes, read(lanes), mask)


@instruction(r"selp\.(?P<type>[bus](?:16|32|64)|f(?:32|64))")
def _select(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    dtype = TYPES[match["type"]]
    write, choice = writer(program, one.operands[0]), predicate(program, one.operands[3])
    yes, no = (reader(program, operand, dtype) for operand in one.operands[1:3])
    return lambda lanes, mask: write(lanes, np.where(choice(lanes), yes(lanes), no(lanes)), mask)


_COMPARISONS: dict[str, Function] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}


def _comparison(name: str, is_float: bool) -> Function:
    """Ordered as in PTX: with a NaN `eq` and even `ne` are false, and the forms with a `u` are true."""
    if not is_float:
        return _COMPARISONS[name]
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name[-1] == "u" and name[:-1] in _COMPARISONS:
        return lambda a, b: _COMPARISONS[name[:-1]](a, b) | np.isnan(a) | np.isnan(b)
    return lambda a, b: _COMPARISONS[name](a, b) & ~np.isnan(a) & ~np.isnan(b)


@instruction(r"setp\.(?P<test>[a-z]+)(?:\.(?P<join>and|or|xor))?(?:\.ftz)?\.(?P<type>[bus](?:16|32|64)|f(?:16|32|64))")
def _compare(program: Program, one: Instruction, match: re.Match[str]) -> Step:
    dtype = TYPES[match["type"]]
    if match["test"] not in (*_COMPARISONS, "num", "nan", "equ", "neu", "ltu", "leu", "gtu", "geu"):
        raise UnknownPtx(f"opcode {one.opcode!r}")
    test = _comparison(match["test"], np.dtype(dtype).kind == "f")
    if "|" in one.operands[0]:
        raise UnknownPtx(f"two predicates at once: `{one}`")
    write = writer(program, one.operands[0])
    a, b = (reader(program, operand, dtype) for operand in one.operands[1:3])
    join = _LOGIC[match["join"]] if match["join"] else None
    other = predicate(program, one.operands[3]) if match["join"] else None

    def step(lanes, mask):
        found = test(a(lanes), b(lanes))
        write(lanes, found if join is None or other is None else join(found, other(lanes)), mask)

    return step
