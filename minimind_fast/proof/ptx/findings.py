"""What was seen while a kernel ran: a finding names the kernel, the program, the instruction and the source line.

Purpose: a fault of memory or of timing is told by its place, not only by a wrong number.
Principle: one list for a run of `verify` or of a test; what is the same instruction and the same fault is counted.
Properties: a finding does not stop a kernel: it goes on with poison, so that its numbers are wrong as well.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from minimind_fast.proof.ptx.parse import Instruction


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        kind: what is wrong, in a few words.
        kernel: name of the Triton function.
        program: its index in the grid, (x, y, z).
        instruction: as written in the PTX.
        line: of the Triton source.
        detail: addresses, sizes, warps.
    """

    kind: str
    kernel: str
    program: tuple[int, ...]
    instruction: str
    line: str
    detail: str

    def __str__(self) -> str:
        where = f"{self.kernel}, program {self.program}, {self.line or 'line unknown'}, `{self.instruction}`"
        return f"{self.kind}: {where}: {self.detail}"


@dataclass
class Record:
    """What ran, and what was found.

    Attributes:
        opcodes: opcode -> how often a warp executed it.
        launches: kernel -> launches.
        programs: kernel -> programs of all its launches.
        findings: the first of each fault and instruction.
        repeats: how often each was seen.
    """

    opcodes: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    programs: Counter[str] = field(default_factory=Counter)
    findings: dict[tuple[str, str, int], Finding] = field(default_factory=dict)
    repeats: Counter[tuple[str, str, int]] = field(default_factory=Counter)

    def add(self, kind: str, kernel: str, program: tuple[int, ...], instruction: Instruction, detail: str) -> None:
        """Note a fault.

        Args:
            kind: what is wrong.
            kernel: where.
            program: which of the grid.
            instruction: which of the kernel.
            detail: numbers that help.
        """
        key = (kind, kernel, instruction.place)
        self.repeats[key] += 1
        if key not in self.findings:
            self.findings[key] = Finding(kind, kernel, program, str(instruction), instruction.line, detail)

    def matmuls(self) -> dict[str, int]:
        """Matrix instructions by their first word or two, and how often a warp executed each."""
        found: Counter[str] = Counter()
        for opcode, times in self.opcodes.items():
            if opcode.startswith(("mma.sync", "wgmma.mma_async")):
                found[".".join(opcode.split(".")[:2])] += times
        return dict(found)

    def take(self) -> Record:
        """What there is so far, in a record of its own; this one starts anew."""
        taken = Record(**vars(self))
        self.__init__()
        return taken
