"""The proof as a table and a picture, for the README.

    minimind-fast verify --json benchmarks/results/verify.json
    python benchmarks/verify_table.py

Purpose: shows at a glance that no kernel is less exact than the plain PyTorch that it replaces.
Principle: each output and each gradient of each case is one comparison: the kernel's distance from float64 (norm of the
    difference over norm of the truth) beside eager's. Where both are no more than the roundings of a float32 sum, their
    ratio means nothing and is left out of the column of ratios; the picture shows them all.
Properties: reads what `verify` wrote, computes nothing anew. Writes verify.md and verify.png beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

from minimind_fast.proof.rule import FLOAT32_NOISE, NORM_FACTOR

RESULTS = Path(__file__).with_name("results") / "verify.json"


def comparisons(row: dict[str, Any]) -> list[tuple[float, float]]:
    """(eager's error, the kernel's error) of each output and gradient of a row that holds floating-point numbers."""
    pairs = [(r["eager_norm_error"], r["norm_error"]) for r in row["results"].values()]
    return [pair for pair in pairs if max(pair) > 0]


def table(found: dict[str, Any]) -> str:
    """The result as Markdown: a line for each op and dtype.

    Args:
        found: what `minimind-fast verify --json` wrote.
    """
    rows = found["rows"]
    passed, where = sum(r["passed"] for r in rows), f"{found['device']}, torch {found['torch']}"
    lines = [
        f"Made by `minimind-fast verify` and `benchmarks/verify_table.py`: {passed} of {len(rows)} cases pass ({where}).",
        "",
        "| op | dtype | cases | outputs and gradients | error over eager's: median | worst | |",
        "|---|---|---|---|---|---|---|",
    ]
    for op, dtype in dict.fromkeys((r["op"], r["dtype"]) for r in rows):
        mine = [r for r in rows if (r["op"], r["dtype"]) == (op, dtype)]
        ratios = [ours / eager for r in mine for eager, ours in comparisons(r) if max(eager, ours) > FLOAT32_NOISE]
        middle, worst = (f"{f(ratios):.2f}" if ratios else "-" for f in (statistics.median, max))
        checked, passed = sum(len(r["results"]) for r in mine), all(r["passed"] for r in mine)
        lines.append(
            f"| {op} | {dtype} | {len(mine)} | {checked} | {middle} | {worst} | {'pass' if passed else '**FAIL**'} |"
        )
    lines += ["", "`all` are whole models with every kernel on. A ratio is beside the point, and may pass above "]
    lines[-1] += f"{NORM_FACTOR}, where errors are near the roundings of float32 sums, or few numbers make them up."
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], file: Path) -> None:
    """Every comparison as a point: eager's error to the right, the kernel's upwards, the rule as a line.

    Args:
        found: as for `table`.
        file: to write.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 5.5), layout="constrained")
    ops = list(dict.fromkeys(r["op"] for r in found["rows"]))
    floor = 1e-9  # where both errors are 0 there is no point; one that is 0 stands on the edge
    for i, op in enumerate(ops):
        points = [pair for r in found["rows"] if r["op"] == op for pair in comparisons(r)]
        if points:
            x, y = zip(*points, strict=True)
            axis.scatter([max(v, floor) for v in x], [max(v, floor) for v in y], s=12, color=f"C{i}", label=op)
    line = [floor * 10 ** (i / 8) for i in range(65)]
    axis.plot(line, line, color="grey", linewidth=1)
    axis.plot(line, [NORM_FACTOR * e + FLOAT32_NOISE for e in line], "--", color="black", linewidth=1, label="the rule")
    axis.set(xscale="log", yscale="log", xlabel="error of eager PyTorch", ylabel="error of the kernel")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="?", type=Path, default=RESULTS, help="of `minimind-fast verify --json`")
    file = parser.parse_args().file
    found = json.loads(file.read_text(encoding="utf-8"))
    file.with_suffix(".md").write_text(table(found), encoding="utf-8")
    draw(found, file.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
