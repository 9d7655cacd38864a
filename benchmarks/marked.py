"""Committed results in the marked sections of READMEs and docs: `python -m benchmarks.report pages`.

Purpose: no measured number in a README or in docs/ is typed by hand.
Principle: `<!-- results:NAME -->` ... `<!-- /results -->` is filled with benchmarks/results/NAME.md without its head; for
    aot_OP with two tables made from kernels_aot.json.
Properties: a test fails when a section and its file differ.
"""

from __future__ import annotations

import json
import re

from benchmarks import cost
from benchmarks.record import RESULTS, ROOT, body

PAGES = (ROOT / "README.md", ROOT / "README_zh.md", *sorted(ROOT.glob("docs/*/*.md")))
SECTION = re.compile(r"<!-- results:(\w+) -->\n(.*?)<!-- /results -->", re.DOTALL)


def compiled(op: str) -> str:
    """Compiler resources of an op's kernels, and the bytes of its launches.

    Returns:
        Markdown: a row per kernel and a column per GPU, the worst over the models; then a row per model and pass.
    """
    found = json.loads((RESULTS / "kernels_aot.json").read_text(encoding="utf-8"))
    targets = [target["name"] for target in found["targets"]]
    rows = [row for row in found["kernels"] if row["op"] == op]
    lines = [
        "| registers / spilled bytes / shared KB | " + " | ".join(targets) + " |",
        "|---" * (len(targets) + 1) + "|",
    ]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for target in targets:
            mine = [row for row in rows if row["kernel"] == kernel and row["target"] == target]
            registers, spilled, shared = (
                max(row[key] for row in mine) for key in ("registers", "spill_bytes", "shared_bytes")
            )
            cells.append(f"{registers} / {spilled} / {shared / 1024:.1f}")
        lines.append(f"| `{kernel}` | " + " | ".join(cells) + " |")
    head = (f"T = {found['tokens']:,}, bf16", "pass", "launches", "MB moved", "MB at least", "matmul GFLOP")
    lines += ["", "| " + " | ".join((*head, "floor on an H200, us")) + " |"]
    lines.append("|---" * 7 + "|")
    for row in (row for row in found["ops"] if row["op"] == op):
        cells = (row["preset"], row["direction"], row["launches"], f"{row['bytes_moved'] / 1e6:,.0f}")
        cells += (f"{row['floor_bytes'] / 1e6:,.0f}", f"{row['matmul_gflop']:,.0f}", f"{row['floor_us']:,.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    if any(row.get("cost") for row in rows):
        lines += ["", *cost.worst_table(rows)]
    return "\n".join(lines) + "\n"


def refreshed(text: str) -> str:
    """Replace every marked section in a page's text by its file."""

    def section(found: re.Match[str]) -> str:
        op = found[1].removeprefix("aot_")
        text = compiled(op) if op != found[1] else body((RESULTS / f"{found[1]}.md").read_text(encoding="utf-8"))
        return f"<!-- results:{found[1]} -->\n{text}<!-- /results -->"

    return SECTION.sub(section, text)


def refresh() -> None:
    """Rewrite every page."""
    for file in PAGES:
        file.write_text(refreshed(file.read_text(encoding="utf-8")), encoding="utf-8")
