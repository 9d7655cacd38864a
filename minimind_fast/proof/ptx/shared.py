"""Shared memory of some programs, and who may touch it when.

Purpose: reads and writes of shared memory, checked as a program's warps see it: in no order but that of its barriers.
Principle: each cell keeps the last warp that wrote and that read it, with the count of barriers before (an epoch). Two
    warps in one epoch, one of them writing: a race. Cells that a `cp.async` or a matmul under way uses are marked until
    the wait, and the copy lands no earlier.
Properties: a cell is as wide as the kernel's narrowest access, so that nothing slips between. Memory begins as ones, NaN
    as a float. Races within one warp are not seen: its lanes run in lockstep here.

Shapes: N lanes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minimind_fast.proof.ptx.formats import UNSIGNED
from minimind_fast.proof.ptx.threads import Mask, Threads

_WARPS = 64  # a stamp is epoch * _WARPS + warp; the last number stands for several warps
_SEVERAL = _WARPS - 1


@dataclass
class _Copy:
    """A `cp.async` of one instruction that has not landed."""

    lanes: np.ndarray  # (n,)
    at: np.ndarray  # (n,) byte in the program's memory
    values: np.ndarray  # (n, bytes)
    group: np.ndarray  # (n,) number of its group


class SharedMemory:
    """The shared memory of all programs that run together, one after the other in one array.

    Args:
        lanes: the threads.
        size: bytes of one program.
    """

    def __init__(self, lanes: Threads, size: int, cell: int = 1) -> None:
        self.lanes, self.size = lanes, size
        self.stride = (size + 63) // 32 * 32
        self.bytes = np.full(self.stride * lanes.count, 0xFF, np.uint8)
        self.warp = (lanes.warp_of % (lanes.threads // 32)).astype(np.int32)
        self.start = lanes.program_of * self.stride
        self.epoch = np.ones(lanes.count, np.int32)
        self.copies: list[_Copy] = []
        self.committed = np.zeros(lanes.size, np.int64)  # groups of cp.async, by lane
        self.set_cell(cell)

    def set_cell(self, cell: int) -> None:
        """Fix the width that is kept account of, before anything runs."""
        self.cell = cell
        cells = len(self.bytes) // cell + 1
        self.writer, self.reader = np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        self.in_copy, self.in_matmul = np.zeros(cells, bool), np.zeros(cells, np.int32)
        self.unfenced = np.zeros(cells, bool)

    # ------------------------------------------------------------------------------------------------- reads and writes

    def load(self, at: np.ndarray, unit: int, count: int, mask: Mask) -> np.ndarray:
        """Read `count` neighbouring units of `unit` bytes at (N,) addresses -> (N, count) unsigned."""
        lanes = self.lanes
        out = np.full((lanes.size, count), -1, np.int64).astype(UNSIGNED[unit])
        chosen = lanes.chosen(mask)
        who, place = self.checked(chosen, at[chosen], unit * count)
        self.note_read(who, place, unit * count)
        out[who] = self.bytes.view(UNSIGNED[unit])[(place // unit)[:, None] + np.arange(count)]
        return out

    def store(self, at: np.ndarray, values: np.ndarray, mask: Mask) -> None:
        """Write (N, count) unsigned values at (N,) addresses."""
        unit, count = values.itemsize, values.shape[1]
        chosen = self.lanes.chosen(mask)
        who, place = self.checked(chosen, at[chosen], unit * count)
        self.note_write(who, place, unit * count)
        view, index = self.bytes.view(UNSIGNED[unit]), (place // unit)[:, None] + np.arange(count)
        view[index] = values[who]
        # Lanes may write one place in one instruction, as Triton's copies of one number do, if they write the same.
        lost = (view[index] != values[who]).any(1)
        self._tell("two lanes write different values to one place", lost[:, None], who, place)
        cells = self._cells(place, unit * count)
        self.unfenced[cells] = True

    def checked(self, who: np.ndarray, at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Check bounds and alignment.

        Args:
            who: (n,) lanes.
            at: (n,) bytes in a program's memory.
            size: bytes of an access.

        Returns:
            The lanes whose access is possible, and its place in `bytes`.
        """
        bad = (at < 0) | (at + size > self.size)
        if bad.any():
            first = int(bad.argmax())
            detail = f"{int(bad.sum())} lanes, byte {int(at[first])} of {self.size}"
            self.lanes.note("shared memory out of bounds", int(who[first]), detail)
            who, at = who[~bad], at[~bad]
        crooked = at % size != 0
        if crooked.any():
            first = int(crooked.argmax())
            self.lanes.note("shared memory is misaligned", int(who[first]), f"{size} bytes at byte {int(at[first])}")
            at = at - at % size
        return who, at + self.start[who]

    def _cells(self, place: np.ndarray, size: int) -> np.ndarray:
        return (place // self.cell)[:, None] + np.arange(max(1, size // self.cell))

    def _stamps(self, who: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        stamp = self.epoch[self.lanes.program_of[who]] * _WARPS + self.warp[who]
        return np.broadcast_to(stamp[:, None], shape)

    def _tell(
        self, kind: str, bad: np.ndarray, who: np.ndarray, place: np.ndarray, by: np.ndarray | None = None
    ) -> None:
        if not bad.any():
            return
        lane, column = np.unravel_index(bad.argmax(), bad.shape)
        other = "" if by is None else f", warp {int(by[lane, column] % _WARPS)} before"
        offset = int(place[lane] - self.start[who[lane]]) + int(column) * self.cell
        self.lanes.note(kind, int(who[lane]), f"byte {offset}, warp {int(self.warp[who[lane]])}{other}")

    def note_read(self, who: np.ndarray, place: np.ndarray, size: int) -> None:
        """Hold a read against what was written.

        Args:
            who: (n,) lanes.
            place: (n,) of `checked`.
            size: bytes.
        """
        cells = self._cells(place, size)
        mine, written = self._stamps(who, cells.shape), self.writer[cells]
        self._tell("shared memory is read that nobody wrote", (written == 0) & ~self.in_copy[cells], who, place)
        self._tell("a copy's data is read before its wait", self.in_copy[cells], who, place)
        race = (written // _WARPS == mine // _WARPS) & (written != mine)
        self._tell("two warps, no barrier: a read of what another wrote", race, who, place, written)
        before = self.reader[cells]
        several = (before // _WARPS == mine // _WARPS) & (before != mine)
        self.reader[cells] = np.where(several, mine | _SEVERAL, mine)
        lost = self.reader[cells] // _WARPS * _WARPS + _SEVERAL
        self.reader[cells] = np.where(self.reader[cells] != mine, lost, self.reader[cells])

    def note_write(self, who: np.ndarray, place: np.ndarray, size: int, landing: bool = False) -> None:
        """Hold a write against reads and writes of others; `landing`: of a copy whose start was checked."""
        cells = self._cells(place, size)
        mine, written, read = self._stamps(who, cells.shape), self.writer[cells], self.reader[cells]
        if not landing:
            self._tell("a copy's place is written before its wait", self.in_copy[cells], who, place)
        self._tell("a matmul's operand is overwritten before its wait", self.in_matmul[cells] > 0, who, place)
        race = (written // _WARPS == mine // _WARPS) & (written != mine)
        self._tell("two warps, no barrier: both write", race, who, place, written)
        race = (read // _WARPS == mine // _WARPS) & (read != mine)
        self._tell("two warps, no barrier: a write of what another read", race, who, place, read)
        self.writer[cells] = mine

    # ----------------------------------------------------------------------------------------------- barriers and copies

    def barrier(self, programs: np.ndarray) -> None:
        """Every warp of these programs has arrived."""
        self.epoch[programs] += 1

    def start_copy(self, at: np.ndarray, values: np.ndarray, mask: Mask) -> None:
        """Begin a `cp.async` of (N, bytes) uint8 values; it lands at the wait for its group."""
        chosen = self.lanes.chosen(mask)
        who, place = self.checked(chosen, at[chosen], values.shape[1])
        self.note_write(who, place, values.shape[1])
        self.in_copy[self._cells(place, values.shape[1])] = True
        self.copies.append(_Copy(who, place, values[who], self.committed[who]))

    def commit(self, mask: Mask) -> None:
        """End the group of copies that these lanes began."""
        self.committed[self.lanes.chosen(mask)] += 1

    def wait(self, left: int, mask: Mask, uncommitted: bool = False) -> None:
        """Land all but the last `left` groups of these lanes; `uncommitted`: also what belongs to no group yet."""
        waiting = np.zeros(self.lanes.size, bool)
        waiting[self.lanes.chosen(mask)] = True
        rest = []
        for copy in self.copies:
            lands = waiting[copy.lanes]
            if not uncommitted:
                lands = lands & (copy.group < self.committed[copy.lanes] - left)
            if lands.any():
                size = copy.values.shape[1]
                who, place = copy.lanes[lands], copy.at[lands]
                self.in_copy[self._cells(place, size)] = False
                self.note_write(who, place, size, landing=True)
                self.bytes[place[:, None] + np.arange(size)] = copy.values[lands]
                self.unfenced[self._cells(place, size)] = False  # as Triton has it: no fence after a cp.async
            if not lands.all():
                stay = ~lands
                rest.append(_Copy(copy.lanes[stay], copy.at[stay], copy.values[stay], copy.group[stay]))
        self.copies = rest

    # ------------------------------------------------------------------------------------------------ a matmul's operands

    def fence(self, mask: Mask) -> None:
        """Make what these lanes' warps wrote visible to the matrix unit (`fence.proxy.async`)."""
        for program in np.unique(self.lanes.program_of[self.lanes.chosen(mask)]):
            cells = slice(program * self.stride // self.cell, (program + 1) * self.stride // self.cell)
            self.unfenced[cells] = False

    def matmul_reads(self, lane: int, at: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Elements that a group of four warps reads by itself.

        Args:
            lane: the first of its lanes.
            at: (rows, columns) bytes in the program's memory.
            size: bytes of an element.

        Returns:
            (rows, columns) unsigned, and the cells that it will read until its wait.
        """
        bad = (at < 0) | (at + size > self.size)
        if bad.any():
            self.lanes.note("shared memory out of bounds", lane, f"matmul, byte {int(at[bad][0])} of {self.size}")
            at = np.where(bad, 0, at)
        place = at + self.start[lane]
        cells = np.unique(place // self.cell)
        written = self.writer[cells]
        faults = {
            "shared memory is read that nobody wrote": (written == 0) & ~self.in_copy[cells],
            "a copy's data is read before its wait": self.in_copy[cells],
            "two warps, no barrier: a read of what another wrote": written // _WARPS
            == self.epoch[self.lanes.program_of[lane]],
            "a matmul reads what no fence made visible to it": self.unfenced[cells],
        }
        for kind, wrong in faults.items():
            if wrong.any():
                byte = int(cells[wrong.argmax()]) * self.cell - int(self.start[lane])
                self.lanes.note(kind, lane, f"matmul's operand, byte {byte}")
        self.reader[cells] = self.epoch[self.lanes.program_of[lane]] * _WARPS + _SEVERAL
        self.in_matmul[cells] += 1
        return self.bytes.view(UNSIGNED[size])[place // size], cells

    def matmul_done(self, cells: np.ndarray) -> None:
        """The wait for a matmul is over."""
        self.in_matmul[cells] -= 1
