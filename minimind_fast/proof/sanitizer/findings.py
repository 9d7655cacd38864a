"""What a watched kernel did wrong, and where.

Purpose: one line for each kind of fault, kernel, argument and line of source, however often it happens.
Principle: the line is that of the innermost frame which is neither Triton's nor ours.
Properties: the first occurrence is told in full, the rest are counted.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import triton

_NOT_KERNELS = (str(Path(triton.__file__).parent), str(Path(__file__).parent))


@dataclass
class Finding:
    """A fault of a kernel."""

    kind: str
    kernel: str
    argument: str  # "" where the fault is not an access
    line: str  # "file:number"
    program: int  # the first that did it
    detail: str
    count: int = 1

    def __str__(self) -> str:
        where = f"{self.kernel}({self.argument}) at {self.line}, program {self.program}"
        return f"{self.kind}: {where}: {self.detail} ({self.count} times)"


class Findings(dict[tuple[str, str, str, str], Finding]):
    """Findings by kind, kernel, argument and line."""

    def add(self, kind: str, kernel: str, argument: str, program: int, detail: str = "") -> None:
        line = _line_of_source()
        key = kind, kernel, argument, line
        if key in self:
            self[key].count += 1
        else:
            self[key] = Finding(kind, kernel, argument, line, program, detail)

    @property
    def kinds(self) -> set[str]:
        return {finding.kind for finding in self.values()}

    def __str__(self) -> str:
        return "\n".join(map(str, self.values()))


def _line_of_source() -> str:
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_KERNELS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"
