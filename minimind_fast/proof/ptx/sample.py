"""A few programs of a large launch, counted: how many instructions a program executes, and what it reads and writes.

Purpose: what a cost model needs of a kernel at a model's real size, whose tensors no memory here holds.
Principle: the PTX runs on made-up data: 0.5, or what such an index tensor holds. Programs take the way that they take on a
    card, as our kernels branch on indices only; matrix instructions give zeros.
Properties: counts, no values. A load stands behind a reduction if a shuffle came before it in its program.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from minimind_fast.proof.held import held
from minimind_fast.proof.ptx.execute import Code, decode, run_some
from minimind_fast.proof.ptx.findings import Record
from minimind_fast.proof.ptx.formats import UNSIGNED
from minimind_fast.proof.ptx.lanes import Launch, writer
from minimind_fast.proof.ptx.parse import Program, parse, vector
from minimind_fast.proof.ptx.storage import SHIFT
from minimind_fast.proof.ptx.threads import WARP, Mask, Threads

SECTOR_BYTES = 32  # what L2 hands out
WIDEST_BYTES = 16
_HALVES = {"fp16": np.float16(0.5), "fp32": np.float32(0.5), "fp64": np.float64(0.5), "bf16": np.uint16(0x3F00)}
_INTEGERS = {"i1": np.uint8, "u1": np.uint8, "i8": np.int8, "u8": np.uint8, "i32": np.int32, "i64": np.int64}


@dataclass(frozen=True)
class Pointer:
    """A tensor that is not there.

    Attributes:
        name: of the kernel's parameter.
        kind: Triton's name of its dtype.
        offset_bytes: of its first element in its storage, which decides whether vectors are aligned.
    """

    name: str
    kind: str
    offset_bytes: int = 0


@dataclass
class Sample:
    """What some programs did.

    Attributes:
        programs: how many.
        executed: (opcode, line of the Triton source) -> how often a warp executed it.
        loaded: opcode -> bytes that lanes read from global memory.
        stored: bytes that lanes wrote to it.
        wide: bytes read by loads of 16 bytes a lane.
        behind: bytes read by loads that stand behind a reduction.
        sectors: pieces of 32 bytes that warps touched, each once an instruction.
    """

    programs: int
    executed: Counter[tuple[str, str]]
    loaded: int = 0
    stored: int = 0
    wide: int = 0
    behind: int = 0
    sectors: int = 0

    @property
    def instructions(self) -> int:
        """Warp instructions of PTX."""
        return self.executed.total()


class _MadeUp:
    """Global memory without data, in the place of `storage.GlobalMemory`."""

    def __init__(self, pointers: Sequence[Pointer], sizes: dict[str, int], sample: Sample) -> None:
        self.pointers, self.sizes, self.sample = pointers, sizes, sample
        self.reduced = False  # has this program met a shuffle?

    def address(self, number: int) -> int:
        return (number + 1 << SHIFT) + self.pointers[number].offset_bytes

    def load(self, lanes: Threads, at: np.ndarray, unit: int, count: int, mask: Mask) -> np.ndarray:
        out, size, chosen = np.zeros((lanes.size, count), UNSIGNED[unit]), unit * count, lanes.chosen(mask)
        bytes_read = size * len(chosen)
        self.sample.loaded += bytes_read
        self.sample.wide += bytes_read * (size >= WIDEST_BYTES)
        self.sample.behind += bytes_read * self.reduced
        self._touch(lanes, chosen, at)
        owner = at[chosen] >> SHIFT
        for number in np.unique(owner).tolist():
            mine = chosen[owner == number]
            pointer = self.pointers[number - 1]
            offset = at[mine] - self.address(number - 1)
            if pointer.kind in _HALVES:
                half = np.frombuffer(_HALVES[pointer.kind].tobytes() * (16 // _HALVES[pointer.kind].itemsize), np.uint8)
                raw = np.broadcast_to(half[:size], (len(mine), size))
            else:
                item = np.dtype(_INTEGERS[pointer.kind])
                elements = offset[:, None] // item.itemsize + np.arange(max(1, size // item.itemsize))
                raw = held(pointer.name, elements, self.sizes).astype(item).view(np.uint8)[:, :size]
            out[mine] = np.ascontiguousarray(raw).view(UNSIGNED[unit])
        return out

    def store(self, lanes: Threads, at: np.ndarray, values: np.ndarray, mask: Mask) -> None:
        chosen = lanes.chosen(mask)
        self.sample.stored += values.itemsize * values.shape[1] * len(chosen)
        self._touch(lanes, chosen, at)

    def _touch(self, lanes: Threads, chosen: np.ndarray, at: np.ndarray) -> None:
        pairs = np.stack([lanes.warp_of[chosen], at[chosen] // SECTOR_BYTES])
        self.sample.sectors += np.unique(pairs, axis=1).shape[1]


def _counting(program: Program, code: list[Code], memory: _MadeUp) -> list[Code]:
    """The same code, with shuffles that are noted, and matrix instructions that give zeros."""

    def noting(this: Code) -> Code:
        def step(lanes, mask):
            memory.reduced = True
            this.step(lanes, mask)  # type: ignore[misc]

        return replace(this, step=step)

    def empty(this: Code) -> Code:
        writes = [writer(program, name) for name in vector(this.one.operands[0])]

        def step(lanes, mask):
            for write in writes:
                write(lanes, np.float32(0), mask)

        return replace(this, step=step)

    changed = []
    for this in code:
        if this.one.opcode.startswith(("mma.sync", "wgmma.mma_async")):
            changed.append(empty(this))
        elif this.one.opcode.startswith(("shfl.", "redux.")):
            changed.append(noting(this))
        else:
            changed.append(this)
    return changed


def sample(
    text: str, values: Sequence[Any], sizes: dict[str, int], grid: tuple[int, int, int], warps: int, shared_bytes: int
) -> Sample:
    """Run the program in the middle of a grid.

    Args:
        text: PTX.
        values: for each parameter that the compiler kept, a Pointer or its bytes.
        sizes: the kernel's integers by name, for what index tensors hold.
        grid: programs in x, y, z.
        warps: of a program.
        shared_bytes: of a program.

    Raises:
        UnknownPtx: an instruction that is not known, such as those of sm_100's matrix units.
        LookupError: an index tensor of unknown contents.
    """
    program = parse(text)
    found = Sample(1, Counter())
    pointers = [value for value in values if isinstance(value, Pointer)]
    memory = _MadeUp(pointers, sizes, found)
    addresses = iter(range(len(pointers)))
    given = [
        np.uint64(memory.address(next(addresses))).tobytes() if isinstance(value, Pointer) else value
        for value in values
    ]
    names = [name for name, _, _ in program.parameters]
    # Triton's own last parameters, scratch memory for instruments, are null.
    parameters = dict(zip(names, [*given, *[bytes(8)] * (len(names) - len(given))], strict=True))
    code = _counting(program, decode(program), memory)
    launch = Launch(program, grid, warps * WARP, shared_bytes, parameters, memory, Record(), program.name)  # type: ignore[arg-type]
    executed = run_some(launch, code, [grid[0] * grid[1] * grid[2] // 2])
    for this, times in zip(code, executed.tolist(), strict=True):
        if times:
            found.executed[this.one.opcode, this.one.line] += times
    return found
