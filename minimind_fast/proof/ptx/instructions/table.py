"""The table of instructions: from the spelling of an opcode to what it does.

Purpose: an opcode is known by all of its parts or not at all: "known up to a modifier" would be a guess.
Principle: a family registers a pattern that must match the whole opcode, and a function that reads the operands once and
    returns a step. A step is called with the lanes and a mask each time that the instruction is executed.
Properties: two patterns that match one opcode are an error, and so is an opcode that none matches.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from minimind_fast.proof.ptx.lanes import Lanes
from minimind_fast.proof.ptx.parse import Instruction, Program, UnknownPtx
from minimind_fast.proof.ptx.threads import Mask

Step = Callable[[Lanes, Mask], None]
Maker = Callable[[Program, Instruction, re.Match[str]], Step]
_families: list[tuple[re.Pattern[str], Maker]] = []


def instruction(pattern: str) -> Callable[[Maker], Maker]:
    """Register the maker of an instruction's step.

    Args:
        pattern: of the whole opcode, as for example r"add\\.(?P<type>f32|f64)".
    """

    def register(make: Maker) -> Maker:
        _families.append((re.compile(pattern), make))
        return make

    return register


def step_of(program: Program, one: Instruction) -> Step:
    """Decode an instruction.

    Args:
        program: whose registers.
        one: the instruction.

    Raises:
        UnknownPtx: no family knows this opcode; the message names it.
    """
    found = [(make, match) for pattern, make in _families if (match := pattern.fullmatch(one.opcode))]
    if not found:
        raise UnknownPtx(f"opcode {one.opcode!r} in {program.name} at {one.line or 'an unknown line'}: `{one}`")
    if len(found) > 1:
        raise AssertionError(f"{one.opcode} is claimed by {len(found)} families")
    make, match = found[0]
    return make(program, one, match)
