"""What a newcomer sees: the output of `make pretrain`, its middle left out.

    make pretrain 2>&1 | python benchmarks/first_minute.py

Purpose: the README shows what the first command prints; this writes it down, so that it stays what is printed.
Principle: lines are kept or left out whole, none is changed; dots stand where some are missing.
Properties: passes its input on while it comes. Writes benchmarks/results/make_pretrain.md.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from machine import processor

RESULTS = Path(__file__).with_name("results")
KEPT = ("Installing", "tiny:", "Validation loss", "Stopping", "The model continues", "  Once upon a time")


def shorten(lines: Iterable[str]) -> list[str]:
    """The lines worth showing, from a run's whole output.

    Args:
        lines: without their ends.
    """
    lines = list(lines)
    steps = [i for i, line in enumerate(lines) if re.match(r"step +\d+/", line)]
    done = next((i for i, line in enumerate(lines) if line.startswith("Done:")), len(lines))
    chosen = {*steps[:2], *steps[-1:], *range(done, len(lines))}
    chosen |= {i for i, line in enumerate(lines) if line.startswith(KEPT)}
    heading = next((i for i, line in enumerate(lines) if line.startswith("The model continues")), 0)
    if heading and not lines[heading - 1]:
        chosen.add(heading - 1)
    out, last = [], -1
    for i in sorted(chosen):
        out += ["..."] * (i > last + 1) + [lines[i]]
        last = i
    return out


def main() -> None:
    lines = []
    for line in sys.stdin:
        print(line, end="", flush=True)
        lines.append(line.rstrip("\n"))
    where = f"{len(os.sched_getaffinity(0))} threads of {processor()}"
    heading = f"Printed by `make pretrain` on {where}; lines are left out at the dots."
    body = "\n".join(shorten(lines))
    (RESULTS / "make_pretrain.md").write_text(f"{heading}\n\n```text\n{body}\n```\n", encoding="utf-8")


if __name__ == "__main__":
    main()
