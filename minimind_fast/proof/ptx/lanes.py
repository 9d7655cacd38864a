"""The threads of several programs as lanes of numpy arrays.

Purpose: what an instruction needs: registers, the index of a thread, memory, and whom to tell about a fault.
Principle: a register is an array over all lanes, program by program, 32 lanes a warp. A numpy operation then costs as
    much for a few programs as for one, so that several run in lockstep. Writing under a mask leaves the other lanes.
Properties: a register that nobody wrote is a finding where it is read, and reads as all ones: NaN as a float, an address
    far outside as an integer. Accumulators of a matmul under way read the same until somebody waits for them.

Shapes: N lanes (programs x threads).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimind_fast.proof.ptx.findings import Record
from minimind_fast.proof.ptx.formats import UNSIGNED
from minimind_fast.proof.ptx.parse import Program, UnknownPtx
from minimind_fast.proof.ptx.shared import SharedMemory
from minimind_fast.proof.ptx.storage import GlobalMemory
from minimind_fast.proof.ptx.threads import WARP, Mask, Threads

Values = Any  # (N,) of any dtype, or one number for all lanes


@dataclass(frozen=True)
class Launch:
    """What the programs of a launch share.

    Attributes:
        program: the kernel.
        grid: programs in x, y, z.
        threads: of a program.
        shared_bytes: of a program.
        parameters: name -> its bytes.
        memory: the arguments' storages.
        record: takes findings.
        kernel: the Triton function's name.
    """

    program: Program
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    parameters: dict[str, bytes]
    memory: GlobalMemory
    record: Record
    kernel: str


class Lanes(Threads):
    """The threads of some programs of a launch.

    Args:
        launch: theirs.
        first: number of the first program in the grid, x fastest.
        count: of programs.
    """

    def __init__(self, launch: Launch, first: int, count: int) -> None:
        start = launch.program.instructions[0]
        super().__init__(launch.grid, launch.threads, first, count, launch.record, launch.kernel, start)
        self.launch = launch
        self.registers: list[np.ndarray | None] = [None] * len(launch.program.registers)
        self.names = list(launch.program.registers)
        self.shared = SharedMemory(self, launch.shared_bytes)
        self.flying: dict[int, np.ndarray] = {}  # slot -> accumulators of a matmul under way
        self.matmuls: list[tuple[int, list[int], list[np.ndarray]]] = []  # group, accumulators, cells that are read
        self.matmul_groups = 0
        self.special = self._special()

    def _special(self) -> dict[str, np.ndarray]:
        index = np.stack(np.unravel_index(self.number_of, self.launch.grid[::-1]))[::-1]
        one = np.ones(self.size, np.uint32)
        found = {"%laneid": self.lane, "%warpid": (self.all_lanes % self.threads // WARP).astype(np.uint32)}
        thread = (self.all_lanes % self.threads).astype(np.uint32)
        for axis, name in enumerate("xyz"):
            found[f"%ctaid.{name}"] = index[axis].astype(np.uint32)
            found[f"%nctaid.{name}"] = one * np.uint32(self.launch.grid[axis])
            found[f"%tid.{name}"] = thread if axis == 0 else 0 * one
            found[f"%ntid.{name}"] = one * np.uint32(self.threads) if axis == 0 else one
        return found

    def full(self, values: Values) -> np.ndarray:
        """One number for all lanes -> an array of all."""
        if isinstance(values, np.ndarray) and values.shape:
            return values
        return np.broadcast_to(values, (self.size,))

    def undefined(self, slot: int, width: int) -> np.ndarray:
        """Note that a register is read too early, and give poison."""
        early = slot in self.flying
        self.note(
            "a matmul's result is read before its wait" if early else "a register is read that nobody wrote",
            0,
            self.names[slot],
        )
        return poison(self.size, width)


def poison(size: int, width: int) -> np.ndarray:
    """All ones: NaN as a float. Predicates (width 0) are false."""
    return np.full(size, -1, np.int64).astype(UNSIGNED[width]) if width else np.zeros(size, bool)


Reader = Callable[[Lanes], Values]
Writer = Callable[[Lanes, Values, Mask], None]


def reader(program: Program, operand: str, dtype: Any) -> Reader:
    """How to read an operand.

    Args:
        program: whose registers.
        operand: a register, "%tid.x" and its like, a number, or the start of shared memory.
        dtype: numpy's, of the same or another width than the register: wider reads zeros, narrower the lower part.
    """
    dtype = np.dtype(dtype)
    if operand in program.registers:
        slot, width = program.registers[operand]
        if width == dtype.itemsize:

            def read(lanes: Lanes) -> Values:
                bits = lanes.registers[slot]
                return (lanes.undefined(slot, width) if bits is None else bits).view(dtype)

        else:
            same = np.dtype(UNSIGNED[dtype.itemsize])

            def read(lanes: Lanes) -> Values:
                bits = lanes.registers[slot]
                return (lanes.undefined(slot, width) if bits is None else bits).astype(same).view(dtype)

        return read
    if operand[0] == "%":
        return lambda lanes: lanes.special[operand].astype(UNSIGNED[dtype.itemsize]).view(dtype)
    value = number(operand, dtype)
    return lambda lanes: value


def number(operand: str, dtype: Any) -> Values:
    """A literal as a numpy number of a dtype."""
    dtype = np.dtype(dtype)
    if operand.startswith(("0f", "0d")):
        wide = operand[1] == "d"
        value = np.array(int(operand[2:], 16), np.uint64 if wide else np.uint32).view(
            np.float64 if wide else np.float32
        )
        # As bits where the widths agree; a move of a float into a wider or narrower register does not occur.
        return value.view(dtype)[()] if value.itemsize == dtype.itemsize else value.astype(dtype)[()]
    if operand == "global_smem":
        return dtype.type(0)
    try:
        value = int(operand.rstrip("U"), 0)
    except ValueError:
        raise UnknownPtx(f"operand {operand!r}") from None
    return np.array(value & (1 << 8 * dtype.itemsize) - 1, UNSIGNED[dtype.itemsize]).view(dtype)[()]


def predicate(program: Program, operand: str) -> Reader:
    """How to read a predicate: a register, perhaps negated, or a number."""
    if operand.lstrip("-").isdigit():
        truth = np.bool_(int(operand) != 0)
        return lambda lanes: truth
    negated, slot = operand[0] == "!", program.registers[operand.lstrip("!")][0]

    def read(lanes: Lanes) -> Values:
        bits = lanes.registers[slot]
        bits = lanes.undefined(slot, 0) if bits is None else bits
        return ~bits if negated else bits

    return read


def writer(program: Program, operand: str) -> Writer:
    """How to write a register; a value of another width is widened by its own sign, or cut.

    Args:
        program: whose registers.
        operand: a register, or "_" for none.
    """
    if operand == "_":
        return lambda lanes, values, mask: None
    slot, width = program.registers[operand]
    bits = np.dtype(UNSIGNED[width]) if width else np.dtype(bool)

    def write(lanes: Lanes, values: Values, mask: Mask) -> None:
        values = np.asarray(values)
        if values.dtype.itemsize != bits.itemsize:
            values = values.astype(np.dtype(f"{'i' if values.dtype.kind == 'i' else 'u'}{bits.itemsize}"))
        values = values.view(bits)
        if mask is None:
            lanes.registers[slot] = values if values.shape else np.full(lanes.size, values)
        else:
            old = lanes.registers[slot]
            lanes.registers[slot] = np.where(mask, values, poison(lanes.size, width) if old is None else old)
        if lanes.flying:
            lanes.flying.pop(slot, None)

    return write


def address(program: Program, operand: str, dtype: Any) -> Reader:
    """How to read "[register + offset]": int64 of all lanes.

    Args:
        program: whose registers.
        operand: as written.
        dtype: np.uint64 for global memory, np.uint32 for shared.
    """
    parts = operand.strip("[] ").replace("+", " ").split()
    read = reader(program, parts[0], dtype)
    offset = sum(int(part, 0) for part in parts[1:])
    return lambda lanes: lanes.full(np.asarray(read(lanes)).astype(np.int64) + offset)
