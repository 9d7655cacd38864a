"""PTX text to a list of instructions.

Purpose: what is executed is the text that a card's driver would get, no other form of the kernel.
Principle: statements end at semicolons; each is an optional guard (`@%p1`, `@!%p1`), an opcode and operands. Labels become
    positions, `.reg` gives each register a slot and a width, `.loc` and `.file` the line of the Triton source.
Properties: comments and debug sections are skipped; a directive that it does not know is an error that names it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath

REGISTER_BYTES = {"pred": 0} | {f"{letter}{bits}": bits // 8 for letter in "busf" for bits in (16, 32, 64)}
# Directives that say nothing about what is computed.
_SILENT = re.compile(r"\.(pragma|reqntid|maxntid|minnctapersm|maxnreg)\b")


class UnknownPtx(NotImplementedError):
    """PTX that is not known here; it is named, never guessed."""


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: its whole spelling, such as "ld.global.v4.b32".
        operands: registers, numbers, "[address]" or "{vector}", as written.
        guard: the predicate register that it hangs on; "" if none.
        negated: it runs where the guard is false.
        line: of the Triton source, "file.py:12"; "" if unknown.
        place: its number in the program.
    """

    opcode: str
    operands: tuple[str, ...]
    guard: str = ""
    negated: bool = False
    line: str = ""
    place: int = 0

    def __str__(self) -> str:
        guard = f"@{'!' if self.negated else ''}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass(frozen=True)
class Program:
    """A kernel.

    Attributes:
        name: of its entry.
        parameters: (name, bytes, whether it is a pointer), in order.
        instructions: in order; the last is a `ret`.
        labels: name -> place of an instruction.
        registers: name -> (slot, bytes); predicates have 0 bytes.
    """

    name: str
    parameters: tuple[tuple[str, int, bool], ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, tuple[int, int]]


def split_operands(text: str) -> tuple[str, ...]:
    """Cut at commas that stand in no bracket.

    Args:
        text: operands as written.
    """
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return tuple(part.strip() for part in parts if part.strip())


def vector(operand: str) -> list[str]:
    """The registers of an operand: "{a, b}" -> ["a", "b"]; one that is no vector -> itself."""
    return [part.strip() for part in operand.strip("{} ").split(",")] if operand[0] == "{" else [operand]


@cache
def parse(text: str) -> Program:
    """Read one kernel.

    Args:
        text: PTX of one module with one entry.

    Raises:
        UnknownPtx: a directive inside the kernel that is not known.
    """
    files = {number: PurePath(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text)}
    text = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)", text, re.S)
    if entry is None:
        raise UnknownPtx("no .entry in this PTX")
    body = text[text.index("{", entry.end()) + 1 :].split(".section")[0]
    # A .loc has no semicolon: it is given one, so that it is a statement among the others.
    body = re.sub(r"^\s*(\.loc\b[^\n]*)$", r"\1;", body, flags=re.M)
    body = re.sub(r"^\s*\.file\b[^\n]*$", "", body, flags=re.M)
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    registers: dict[str, tuple[int, int]] = {}
    line = ""
    for statement in body.split(";"):
        statement = " ".join(statement.split())
        while match := re.match(r"(\$[\w.$]+):\s*|[{}]\s*", statement):
            if match[1]:
                labels[match[1]] = len(found)
            statement = statement[match.end() :]
        if not statement or _SILENT.match(statement):
            continue
        if match := re.match(r"\.loc (\d+) (\d+)", statement):
            line = f"{files.get(match[1], '?')}:{match[2]}"
        elif match := re.match(r"\.reg \.(\w+) (.+)$", statement):
            _declare(registers, match[1], match[2])
        elif statement[0] == ".":
            raise UnknownPtx(f"directive {statement!r}")
        else:
            found.append(_instruction(statement, line, len(found)))
    found.append(Instruction("ret", (), line=line, place=len(found)))
    return Program(entry[1], _parameters(entry[2]), tuple(found), labels, registers)


def _parameters(text: str) -> tuple[tuple[str, int, bool], ...]:
    found = re.findall(r"\.param\s+\.([a-z])(\d+)([^,]*?)(\w+)\s*(?:,|$)", text)
    return tuple((name, int(bits) // 8, ".ptr" in attributes) for _, bits, attributes, name in found)


def _declare(registers: dict[str, tuple[int, int]], kind: str, names: str) -> None:
    if kind not in REGISTER_BYTES:
        raise UnknownPtx(f"registers of type .{kind}")
    for name in split_operands(names):
        count = re.match(r"(%?\w+)<(\d+)>$", name)
        for one in [f"{count[1]}{i}" for i in range(int(count[2]))] if count else [name]:
            slot = registers[one][0] if one in registers else len(registers)
            registers[one] = slot, REGISTER_BYTES[kind]


def _instruction(statement: str, line: str, place: int) -> Instruction:
    match = re.match(r"(?:@(!?)(%?\w+)\s+)?([\w.:]+)\s*(.*)$", statement)
    if match is None:
        raise UnknownPtx(f"statement {statement!r}")
    return Instruction(match[3], split_operands(match[4]), match[2] or "", match[1] == "!", line, place)
