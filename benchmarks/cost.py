"""A cost model of compiled kernels: the time that issuing instructions takes, beside the time that the bytes take.

Purpose: says of a kernel that has not run whether instructions, bytes or too few warps will hold it back.
Principle: the PTX of the program in the middle of the grid is executed and counted (`proof/ptx/sample.py`). What ptxas made
    of it is read from the disassembly: a block of SASS runs as often as its loads, stores, shuffles, exponentials and matrix
    instructions, which PTX and SASS share, ran in the PTX, by source line. A scheduler issues one instruction a clock, and
    one of the special functions in eight; the bytes are those of all tensors that the launches are given, once each.
Properties: a model, calibrated on no card. Latencies, bank conflicts and instructions that wait for each other are left out:
    issue time is a lower bound. The two times overlap on a card as far as enough warps are in flight.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from minimind_fast.proof.cards import CARDS
from minimind_fast.proof.targets import TARGETS, Target

SCHEDULERS, REGISTERS, SPECIAL_CLOCKS = 4, 65536, 8  # of a multiprocessor; a special unit takes four lanes a clock
ISSUE_LIMIT = 0.6  # of the bytes' time: beyond it, a memory-bound kernel's record says why
JUDGED_US = 3.0  # of either: a kernel of less is a matter of launching
# What PTX and SASS share, one for one -> the name of both.
PTX_MARKS = {
    r"ld\.global": "LDG",
    r"st\.global": "STG",
    r"cp\.async\.c[ag]": "LDGSTS",
    r"ld\.shared": "LDS",
    r"st\.shared": "STS",
    r"shfl": "SHFL",
    r"redux": "REDUX",
    r"bar\.sync": "BAR",
    r"ex2": "EX2",
    r"lg2": "LG2",
    r"rsqrt": "RSQ",
    r"mma\.sync": "HMMA",
    r"wgmma\.mma_async": "HGMMA",
    r"ldmatrix": "LDSM",
    r"stmatrix": "STSM",
}
SASS_MARKS = {name: name for name in PTX_MARKS.values()} | {"MUFU.EX2": "EX2", "MUFU.LG2": "LG2", "MUFU.RSQ": "RSQ"}
Mark = tuple[str, str]  # name, source line


@dataclass
class Block:
    """Instructions of SASS without a jump into or out of their midst.

    Attributes:
        opcodes: in order, predicates cut off.
        marks: those that PTX has too.
        jumps: labels that its last instruction may go to.
        label: its own; "" if it has none.
    """

    opcodes: list[str]
    marks: list[Mark]
    jumps: list[str]
    label: str = ""


def blocks_of(sass: str) -> list[Block]:
    """Read a disassembly.

    Args:
        sass: of `nvdisasm -c -g`.
    """
    found, line = [Block([], [], [])], ""
    for text in sass.splitlines():
        if match := re.match(r"\s*//## File \"([^\"]*)\", line (\d+)", text):
            line = f"{PurePath(match[1]).name}:{match[2]}"
        elif match := re.match(r"(\.L_x_\d+|\$[\w$]+):", text.strip()):
            found.append(Block([], [], [], match[1]))
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", text):
            opcode = match[1]
            if opcode == "NOP":
                continue
            found[-1].opcodes.append(opcode)
            mark = SASS_MARKS.get(".".join(opcode.split(".")[:2])) or SASS_MARKS.get(opcode.split(".")[0])
            if mark:
                found[-1].marks.append((mark, line))
            if opcode.startswith(("BRA", "EXIT", "RET", "CALL", "BRX", "WARPSYNC.COLLECTIVE")):
                found[-1].jumps += re.findall(r"\.L_x_\d+", match[2])
                found.append(Block([], [], []))
    return [block for block in found if block.opcodes or block.label]


def marks_of(executed: Mapping[tuple[str, str], int]) -> Counter[Mark]:
    """What PTX and SASS share, of (opcode, line) -> times."""
    found: Counter[Mark] = Counter()
    for (opcode, line), times in executed.items():
        for pattern, mark in PTX_MARKS.items():
            if re.match(rf"{pattern}\b", opcode):
                found[mark, line] += times
    return found


def instructions(sass: str, executed: Mapping[tuple[str, str], int], warps: int) -> tuple[float, float]:
    """Estimate how many instructions of SASS a program issues.

    Args:
        sass: of `nvdisasm -c -g`.
        executed: (opcode of PTX, source line) -> how often a warp of the program executed it.
        warps: of the program.

    Returns:
        Warp instructions, and how many of them go to the special functions.
    """
    blocks = blocks_of(sass)
    times, static = marks_of(executed), Counter(mark for block in blocks for mark in block.marks)
    lost: defaultdict[str, int] = defaultdict(int)  # executed on a line where SASS has none: spread over the others
    for mark, count in times.items():
        if not static[mark]:
            lost[mark[0]] += count
    known = Counter(name for name, _ in static.elements())

    def runs(mark: Mark) -> float:
        return times[mark] / static[mark] + lost[mark[0]] / known[mark[0]]

    places = {block.label: i for i, block in enumerate(blocks) if block.label}
    own: list[float | None] = [
        sorted(map(runs, block.marks))[len(block.marks) // 2] if block.marks else None for block in blocks
    ]
    inside: list[list[int]] = [[] for _ in blocks]  # the loops around each block: their blocks
    for i, block in enumerate(blocks):
        for first in (places[label] for label in block.jumps if label in places):
            if first <= i:
                for j in range(first, i + 1):
                    if not inside[j] or len(inside[j]) > i + 1 - first:
                        inside[j] = list(range(first, i + 1))
    total = special = 0.0
    for i, block in enumerate(blocks):
        often = own[i]
        if often is None:  # as its innermost loop, or once
            often = max((own[j] or 0.0 for j in inside[i]), default=float(warps)) or float(warps)
        total += often * len(block.opcodes)
        special += often * sum(opcode.startswith("MUFU") for opcode in block.opcodes)
    return total, special


def resident_warps(row: Mapping[str, Any]) -> int:
    """Warps that a multiprocessor holds of a kernel: limited by registers, by shared memory and by their own number.

    Args:
        row: of `aot.compile_target`.
    """
    target, warps = TARGETS[row["target"]], row["num_warps"]
    registers = -(-row["registers"] * 32 // 256) * 256 * warps  # allocated in units of 256 a warp
    shared = row["shared_bytes"] + 1024  # of the system, in each block
    blocks = min(target.warps // warps, target.blocks, REGISTERS // max(registers, 1), target.shared_bytes // shared)
    return blocks * warps


def times(row: Mapping[str, Any], target: Target) -> dict[str, float]:
    """The model of one kernel.

    Args:
        row: of `aot.compile_target`, with its launches summed, and `issued` and `special` a program.
        target: with a card.

    Returns:
        issue_us and byte_us of all its launches; waves of its largest; idle, the share of the last wave's places that stay
        empty, weighed by the number of waves.
    """
    per_s = target.multiprocessors * SCHEDULERS * target.clock_ghz * 1e9
    clocks = max(row["issued"], SPECIAL_CLOCKS * row["special"])
    waves = row["programs"] * row["num_warps"] / (max(resident_warps(row), 1) * target.multiprocessors)
    whole = -(-waves // 1)
    return {
        "issue_us": round(row["all_programs"] * clocks / per_s * 1e6, 2),
        "byte_us": round(row["bytes_moved"] / CARDS[target.card].bytes_per_s * 1e6, 2),
        "resident_warps": resident_warps(row),
        "waves": round(waves, 2),
        "idle": round(1 - waves / whole, 3) if whole else 0.0,
    }


def issue_share(row: Mapping[str, Any]) -> float | None:
    """Issue time over byte time of a memory-bound kernel.

    Args:
        row: of the table.

    Returns:
        None for a kernel that multiplies matrices, is not modelled, or is too short to be judged.
    """
    cost = row.get("cost")
    if not cost or row["mma"] is not None or max(cost["issue_us"], cost["byte_us"]) < JUDGED_US:
        return None
    return cost["issue_us"] / max(cost["byte_us"], 0.01)


def unexplained(rows: Sequence[Mapping[str, Any]], reasons: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Memory-bound kernels whose instructions take too long, and reasons that nothing asks for.

    Args:
        rows: of the table.
        reasons: op -> kernel -> why its issue time is what it is.

    Returns:
        Sentences.
    """
    worst: dict[tuple[str, str], tuple[float, str]] = {}
    for row in rows:
        if (share := issue_share(row)) is not None:
            found = share, f"{row['preset']}, {row['target']}, {row['direction']}"
            worst[row["op"], row["kernel"]] = max(found, worst.get((row["op"], row["kernel"]), (0.0, "")))
    out = []
    for (op, kernel), (share, where) in worst.items():
        said = kernel in reasons.get(op, {})
        if share > ISSUE_LIMIT and not said:
            what = f"issuing takes {share:.0%} of the bytes' time ({where})"
            out.append(f"{kernel}: {what}; mend it, or say why in the record of {op}")
        if share <= ISSUE_LIMIT and said:
            out.append(f"{kernel}: the record of {op} explains what is not so (at most {share:.0%}, {where})")
    return out


HEAD = ("kernel", "model", "pass", "warp instructions", "of PTX", "issue, us", "bytes, us", "issue / bytes")
MORE = ("16-byte loads", "behind a reduction", "warps an SM", "waves", "idle", "chunk, MiB of L2")


def table(rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """A line of Markdown for each kernel and model on one card.

    Args:
        rows: of the table.
        name: the target's.
    """
    target = TARGETS[name]
    lines = ["| " + " | ".join((*HEAD, *MORE)) + " |", "|---" * len(HEAD + MORE) + "|"]
    for row in rows:
        found = row.get("cost")
        if row["target"] != name or not found:
            continue
        dots = "matmul" if row["mma"] is not None else f"{found['issue_us'] / max(found['byte_us'], 0.01):.0%}"
        cells = [row["kernel"], row["preset"], row["direction"], f"{found['issued']:,}", f"{found['ptx']:,}"]
        cells += [f"{found['issue_us']:,.1f}", f"{found['byte_us']:,.1f}", dots]
        cells += [f"{found['wide']:.0%}", f"{found['behind']:.0%}", found["resident_warps"], f"{found['waves']:.1f}"]
        cells += [f"{found['idle']:.0%}"]
        cells += [f"{row['chunk_bytes'] / 2**20:.0f} of {target.l2_mib}" if row["chunk_bytes"] else ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def worst_table(rows: Sequence[Mapping[str, Any]], op: str = "") -> list[str]:
    """Issue time over byte time of the memory-bound kernels, the worst model, a column for each card.

    Args:
        rows: of the table.
        op: only this op's; all if "".
    """
    names = [name for name in TARGETS if any(row["target"] == name and row.get("cost") for row in rows)]
    lines = [
        "| instructions' time / bytes' time, a model | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    mine = [row for row in rows if not op or row["op"] == op]
    for kernel in dict.fromkeys(row["kernel"] for row in mine):
        cells = []
        for name in names:
            shares = [issue_share(row) for row in mine if (row["kernel"], row["target"]) == (kernel, name)]
            known = [share for share in shares if share is not None]
            cells.append(f"{max(known):.0%}" if known else "-")
        if set(cells) != {"-"}:
            lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    return lines
