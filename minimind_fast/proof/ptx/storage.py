"""Global memory: the storages of a launch's arguments, and who may touch what.

Purpose: reads and writes of a kernel, each checked against the argument that its pointer came from.
Principle: every argument has addresses of its own, 2^44 apart, so that a pointer tells its argument: what runs over one
    argument never lands in another. The lower bits are the tensor's, so that alignment is the real one. Reads and writes
    are kept until the launch ends, then held against each other: the order of programs is nobody's promise.
Properties: found are accesses outside an argument or between the rows of a strided one, misaligned ones, elements read
    that nobody wrote (see `fresh.py`), and two programs on one place with a write among them. A stray read gives ones,
    a stray write goes nowhere.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

from minimind_fast.proof.ptx.formats import UNSIGNED
from minimind_fast.proof.ptx.fresh import pattern_of
from minimind_fast.proof.ptx.parse import Instruction
from minimind_fast.proof.ptx.threads import Mask, Threads

SHIFT = 44  # of an argument's number in an address
_LOW_BITS = 0xFFF


class Argument:
    """One tensor argument.

    Args:
        tensor: on the CPU, any strides.
        number: of the argument, from 1.
    """

    def __init__(self, tensor: Tensor, number: int) -> None:
        storage = tensor.untyped_storage()
        self.storage_key = storage.data_ptr()
        self.bytes = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()  # type: ignore[arg-type]
        item = tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        self.low = tensor.storage_offset() * item
        self.high = self.low + (last + 1) * item if tensor.numel() else self.low
        # The pointer keeps its lowest bits: they decide whether a vector is aligned.
        self.base = (number << SHIFT) + (storage.data_ptr() & _LOW_BITS)
        self.pointer = self.base + self.low
        self.owned = None if tensor.is_contiguous() else self._owned(tensor)
        self.shape = tuple(tensor.shape)
        self.pattern = pattern_of(tensor.dtype)
        if self.pattern is not None and not (self._cells() == self.pattern).any():
            self.pattern = None  # nothing is left that nobody wrote

    def _owned(self, tensor: Tensor) -> np.ndarray:
        """(bytes of the storage,) bool: what the view covers."""
        cover = torch.zeros(len(self.bytes) // tensor.element_size(), dtype=torch.bool)
        cover.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        return cover.repeat_interleave(tensor.element_size()).numpy()

    def _cells(self) -> np.ndarray:
        assert self.pattern is not None
        return self.bytes[: len(self.bytes) // self.pattern.itemsize * self.pattern.itemsize].view(self.pattern.dtype)

    def view(self, unit: int) -> np.ndarray:
        """The storage as unsigned integers of `unit` bytes."""
        return self.bytes[: len(self.bytes) // unit * unit].view(UNSIGNED[unit])


class GlobalMemory:
    """All arguments of a launch.

    Args:
        tensors: in the order of the kernel's pointer parameters.
        cell: bytes of the narrowest access of the kernel: who wrote and read is kept in these.
    """

    def __init__(self, tensors: list[Tensor], cell: int) -> None:
        self.arguments = [Argument(tensor, i + 1) for i, tensor in enumerate(tensors)]
        self.cell = cell
        # storage -> (instruction, (n,) program, (n, k) cells)
        self.reads: dict[int, list[tuple[Instruction, np.ndarray, np.ndarray]]] = defaultdict(list)
        self.writes: dict[int, list[tuple[Instruction, np.ndarray, np.ndarray]]] = defaultdict(list)

    def load(self, lanes: Threads, at: np.ndarray, unit: int, count: int, mask: Mask) -> np.ndarray:
        """Read `count` neighbouring units.

        Args:
            lanes: who reads.
            at: (N,) int64 addresses.
            unit: bytes of one.
            count: of a vector.
            mask: which lanes.

        Returns:
            (N, count) unsigned; ones where nothing could be read.
        """
        out = np.full((lanes.size, count), -1, np.int64).astype(UNSIGNED[unit])
        for argument, chosen, offset in self._split(lanes, at, unit * count, mask, "read"):
            index = (offset // unit)[:, None] + np.arange(count)
            found = argument.view(unit)[index]
            out[chosen] = found
            self._keep(self.reads, argument, lanes, chosen, offset, unit * count)
            if argument.pattern is not None and unit * count >= argument.pattern.itemsize:
                unwritten = (found.view(argument.pattern.dtype) == argument.pattern).any(1)
                if unwritten.any():
                    lane = int(chosen[unwritten.argmax()])
                    where = int(offset[unwritten.argmax()])
                    lanes.note("global memory is read that nobody wrote", lane, self._where(argument, where))
        return out

    def store(self, lanes: Threads, at: np.ndarray, values: np.ndarray, mask: Mask) -> None:
        """Write (N, count) unsigned values."""
        unit, count = values.itemsize, values.shape[1]
        for argument, chosen, offset in self._split(lanes, at, unit * count, mask, "written"):
            view, index = argument.view(unit), (offset // unit)[:, None] + np.arange(count)
            view[index] = values[chosen]
            lost = (view[index] != values[chosen]).any(1)
            if lost.any():
                lane = int(lost.argmax())
                where = self._where(argument, int(offset[lane]))
                lanes.note("two lanes write different values to one place", int(chosen[lane]), where)
            self._keep(self.writes, argument, lanes, chosen, offset, unit * count)

    def _split(self, lanes: Threads, at: np.ndarray, size: int, mask: Mask, verb: str):
        """Check addresses, and give those that are right by argument: (argument, lanes, offsets in its storage)."""
        chosen = lanes.chosen(mask)
        at = at[chosen]
        if not len(at):
            return
        if (at % size).any():
            lane = int((at % size != 0).argmax())
            lanes.note("global memory is misaligned", int(chosen[lane]), f"{size} bytes at {int(at[lane]):#x}")
            at = at - at % size
        owner = at >> SHIFT
        numbers = [int(owner[0])] if (owner == owner[0]).all() else np.unique(owner).tolist()
        for number in numbers:
            mine = slice(None) if len(numbers) == 1 else owner == number
            who, where = chosen[mine], at[mine]
            if not 1 <= number <= len(self.arguments):
                lanes.note(
                    f"{verb} outside every argument", int(who[0]), f"{len(who)} lanes, address {int(where[0]):#x}"
                )
                continue
            argument = self.arguments[number - 1]
            offset = where - argument.base
            good = (offset >= argument.low) & (offset + size <= argument.high)
            if argument.owned is not None and good.all():
                good = argument.owned[offset] & argument.owned[offset + size - 1]
            if not good.all():
                first = int((~good).argmax())
                detail = f"{int((~good).sum())} lanes, {self._where(argument, int(offset[first]))}"
                lanes.note(f"{verb} outside an argument", int(who[first]), detail)
                who, offset = who[good], offset[good]
            if len(who):
                yield argument, who, offset

    def _where(self, argument: Argument, offset: int) -> str:
        number = self.arguments.index(argument) + 1
        return f"pointer {number}, shape {argument.shape}, byte {offset - argument.low} from its first element"

    def _keep(self, log, argument: Argument, lanes: Threads, chosen: np.ndarray, offset: np.ndarray, size: int) -> None:
        cells = (offset // self.cell).astype(np.int32)[:, None] + np.arange(max(1, size // self.cell), dtype=np.int32)
        log[argument.storage_key].append((lanes.instruction, lanes.number_of[chosen], cells))

    def conflicts(self):
        """After the launch: places that one program wrote and another one wrote or read.

        Yields:
            (instruction, number of a program, what happened).
        """
        for key, writes in self.writes.items():
            size = next(len(argument.bytes) for argument in self.arguments if argument.storage_key == key)
            writer = np.full(size // self.cell + 1, -1, np.int32)
            for instruction, programs, cells in writes:
                mine = np.broadcast_to(programs[:, None], cells.shape)
                before = writer[cells]
                writer[cells] = mine
                # Of two in one instruction, the one that does not stay is seen.
                clash = ((before >= 0) & (before != mine)) | (writer[cells] != mine)
                if clash.any():
                    lane, column = np.unravel_index(clash.argmax(), clash.shape)
                    other = before[lane, column] if before[lane, column] >= 0 else writer[cells[lane, column]]
                    yield instruction, int(programs[lane]), f"writes what program number {int(other)} writes"
            for instruction, programs, cells in self.reads.get(key, ()):
                other = writer[cells]
                clash = (other >= 0) & (other != programs[:, None])
                if clash.any():
                    lane, column = np.unravel_index(clash.argmax(), clash.shape)
                    yield (
                        instruction,
                        int(programs[lane]),
                        f"reads what program number {int(other[lane, column])} writes",
                    )
