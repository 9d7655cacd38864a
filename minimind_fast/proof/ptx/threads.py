"""Who runs: the threads of some programs, numbered as lanes.

Purpose: what the memories and the instructions ask of a thread: its program, its warp, and whom to tell about a fault.
Principle: lanes are numbered program by program, warp by warp; arrays of all lanes answer at once.
Properties: knows no registers and no memory.

Shapes: N lanes (programs x threads).
"""

from __future__ import annotations

import numpy as np

from minimind_fast.proof.ptx.findings import Record
from minimind_fast.proof.ptx.parse import Instruction

WARP = 32
Mask = np.ndarray | None  # (N,) bool; None: all lanes


class Threads:
    """The threads of some programs of a launch.

    Args:
        grid: programs in x, y, z.
        threads: of a program.
        first: number of the first program in the grid, x fastest.
        count: of programs.
        record: takes findings.
        kernel: the Triton function's name.
        instruction: the one that runs; whoever executes sets it.
    """

    def __init__(
        self,
        grid: tuple[int, int, int],
        threads: int,
        first: int,
        count: int,
        record: Record,
        kernel: str,
        instruction: Instruction,
    ) -> None:
        self.grid, self.threads, self.first, self.count = grid, threads, first, count
        self.record, self.kernel, self.instruction = record, kernel, instruction
        self.size = count * threads
        self.all_lanes = np.arange(self.size)
        self.program_of = self.all_lanes // threads  # within these programs
        self.warp_of = self.all_lanes // WARP
        self.lane = (self.all_lanes % WARP).astype(np.uint32)
        self.number_of = (self.program_of + first).astype(np.int32)  # within the grid

    def chosen(self, mask: Mask) -> np.ndarray:
        """Numbers of the lanes of a mask."""
        return self.all_lanes if mask is None else np.flatnonzero(mask)

    def note(self, kind: str, lane: int, detail: str) -> None:
        """Tell a fault of the instruction that is running.

        Args:
            kind: what is wrong.
            lane: one that did it.
            detail: numbers that help.
        """
        index = program_index(self.first + lane // self.threads, self.grid)
        self.record.add(kind, self.kernel, index, self.instruction, detail)


def program_index(number: int, grid: tuple[int, int, int]) -> tuple[int, ...]:
    """Number of a program, x fastest -> (x, y, z)."""
    return tuple(int(i) for i in np.unravel_index(number, grid[::-1]))[::-1]
