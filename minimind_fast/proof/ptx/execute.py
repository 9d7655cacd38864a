"""Programs to their end: decoding, branches, barriers.

Purpose: from a launch to written memory.
Principle: some programs at a time in lockstep. As long as all lanes agree there is one program counter; where they part,
    each has its own and the smallest runs first, so that they meet again.
Properties: a barrier opens for a program when all its lanes that have not returned are there. The same for any number of
    programs at a time. Instructions are decoded once a kernel, before any runs: an unknown one is an error at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minimind_fast.proof.ptx.formats import TYPES
from minimind_fast.proof.ptx.instructions import arithmetic, convert, matrices, moves, narrow, warp, wgmma
from minimind_fast.proof.ptx.instructions.table import Step, step_of
from minimind_fast.proof.ptx.lanes import Lanes, Launch, Reader, predicate
from minimind_fast.proof.ptx.parse import Instruction, Program, UnknownPtx, vector
from minimind_fast.proof.ptx.threads import Mask, program_index

FAMILIES = (arithmetic, convert, matrices, moves, narrow, warp, wgmma)  # their import fills the table
LANES_AT_ONCE = 8192  # numpy's overhead is small by then, and registers stay in a core's cache
STEP, BRANCH, RETURN, BARRIER = range(4)


@dataclass(frozen=True)
class Code:
    """An instruction, decoded.

    Attributes:
        kind: STEP, BRANCH, RETURN or BARRIER.
        one: the instruction.
        guard: reads its predicate; None if it has none.
        step: what a STEP does.
        target: where a BRANCH goes.
    """

    kind: int
    one: Instruction
    guard: Reader | None
    step: Step | None = None
    target: int = 0


def decode(program: Program) -> list[Code]:
    """Decode every instruction of a kernel.

    Args:
        program: of `parse`.

    Raises:
        UnknownPtx: an instruction that is not known, by name.
    """
    return [_decode(program, one) for one in program.instructions]


def _decode(program: Program, one: Instruction) -> Code:
    guard = predicate(program, f"{'!' if one.negated else ''}{one.guard}") if one.guard else None
    if one.opcode in ("bra", "bra.uni"):
        return Code(BRANCH, one, guard, target=program.labels[one.operands[0]])
    if one.opcode in ("ret", "exit"):
        return Code(RETURN, one, guard)
    if one.opcode in ("bar.sync", "barrier.sync.aligned"):
        if one.operands != ("0",) or guard:
            raise UnknownPtx(f"a barrier of some threads only: `{one}` in {program.name}")
        return Code(BARRIER, one, guard)
    return Code(STEP, one, guard, step_of(program, one))


def narrowest(program: Program, space: str) -> int:
    """Bytes of the narrowest access of a kernel to "global" or "shared" memory: the cells that are kept account of.

    Args:
        program: the kernel.
        space: which memory.
    """
    sizes = [16]
    for one in program.instructions:
        if match := re.match(rf"(?:ld|st)\.{space}\b.*\.(\w+)$", one.opcode):
            registers = one.operands[0] if one.opcode.startswith("ld") else one.operands[1]
            sizes.append(np.dtype(TYPES[match[1]]).itemsize * len(vector(registers)))
        elif one.opcode.startswith("cp.async.c") and len(one.operands) > 2:
            sizes.append(int(one.operands[2], 0))
    return min(sizes)


def run(launch: Launch, code: list[Code], at_once: int = LANES_AT_ONCE) -> None:
    """Run all programs of a launch.

    Args:
        launch: kernel, grid and memory.
        code: of `decode`.
        at_once: lanes in lockstep.
    """
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    together = max(1, at_once // launch.threads)
    executed = np.zeros(len(code), np.int64)
    cell = narrowest(launch.program, "shared")
    with np.errstate(all="ignore"):
        for first in range(0, total, together):
            lanes = Lanes(launch, first, min(together, total - first))
            lanes.shared.set_cell(cell)
            _run_lanes(lanes, code, executed)
    record = launch.record
    for place, times in enumerate(executed.tolist()):
        if times:
            record.opcodes[code[place].one.opcode] += times
    record.launches[launch.kernel] += 1
    record.programs[launch.kernel] += total
    for one, number, what in launch.memory.conflicts():
        index = program_index(number, launch.grid)
        record.add("two programs on one place of global memory", launch.kernel, index, one, what)


def run_some(launch: Launch, code: list[Code], numbers: Sequence[int]) -> np.ndarray:
    """Run a few programs of a launch, one at a time.

    Args:
        launch: kernel, grid and memory.
        code: of `decode`.
        numbers: of the programs, x fastest.

    Returns:
        (instructions,) int64: how often a warp executed each.
    """
    executed = np.zeros(len(code), np.int64)
    with np.errstate(all="ignore"):
        for number in numbers:
            lanes = Lanes(launch, number, 1)
            lanes.shared.set_cell(narrowest(launch.program, "shared"))
            _run_lanes(lanes, code, executed)
    return executed


class _Flow:
    """Where the lanes are: one counter while they agree, else one each."""

    def __init__(self, lanes: Lanes) -> None:
        self.lanes, self.size = lanes, lanes.size
        self.at = 0
        self.each: np.ndarray | None = None
        self.alive, self.waiting = np.ones(self.size, bool), np.zeros(self.size, bool)

    def next(self) -> tuple[int, Mask] | None:
        """The place of the next instruction and its lanes; None when all have returned."""
        if self.each is None:
            return self.at, None
        while True:
            running = self.alive & ~self.waiting
            if not running.any():
                if not self.alive.any():
                    return None
                self._open()
                continue
            place = int(self.each[running].min())
            active = running & (self.each == place)
            if active.all():
                self.at, self.each = place, None
                return place, None
            return place, active

    def go(self, active: Mask, to: int) -> None:
        if self.each is None:
            self.at = to
        else:
            self.each[active] = to

    def part(self, active: Mask, taken: np.ndarray, to: int, otherwise: int) -> None:
        """A branch that some of the active lanes take."""
        if self.each is None:
            self.each = np.where(taken, to, otherwise)
        else:
            self.each[active] = np.where(taken, to, otherwise)[active]

    def end(self, active: Mask, done: np.ndarray, otherwise: int) -> None:
        """Some of the active lanes return."""
        if self.each is None:
            self.each = np.full(self.size, otherwise)
        else:
            self.each[active] = otherwise
        self.alive &= ~done

    def arrive(self, active: Mask) -> None:
        """Active lanes stand at a barrier and have been sent past it; it opens where all are there."""
        if active is None:
            self.lanes.shared.barrier(np.arange(self.lanes.count))
            return
        self.waiting |= active
        self._open()

    def _open(self) -> None:
        there = (self.waiting | ~self.alive).reshape(self.lanes.count, -1).all(1)
        there &= self.waiting.reshape(self.lanes.count, -1).any(1)
        if there.any():
            self.lanes.shared.barrier(np.flatnonzero(there))
            self.waiting &= ~np.repeat(there, self.lanes.threads)


def _run_lanes(lanes: Lanes, code: list[Code], executed: np.ndarray) -> None:
    flow, warps = _Flow(lanes), lanes.size // 32
    following: Callable[[], tuple[int, Mask] | None] = flow.next
    while (now := following()) is not None:
        place, active = now
        this = code[place]
        lanes.instruction = this.one
        executed[place] += warps if active is None else int(active.reshape(-1, 32).any(1).sum())
        mask = active
        if this.guard is not None:
            chosen = lanes.full(this.guard(lanes))
            mask = chosen if active is None else chosen & active
            if this.kind == STEP:
                if not mask.any():
                    flow.go(active, place + 1)
                    continue
                if active is None and mask.all():
                    mask = None
        if this.kind == STEP:
            this.step(lanes, mask)  # type: ignore[misc]
            flow.go(active, place + 1)
        elif this.kind == BRANCH:
            taken = np.ones(lanes.size, bool) if mask is None else mask
            if active is None and (mask is None or taken.all()):
                flow.at = this.target
            elif active is None and not taken.any():
                flow.at = place + 1
            else:
                flow.part(active, taken, this.target, place + 1)
        elif this.kind == RETURN:
            done = np.ones(lanes.size, bool) if mask is None else mask
            if done.all():
                return
            flow.end(active, done, place + 1)
        else:
            flow.go(active, place + 1)
            flow.arrive(active)
