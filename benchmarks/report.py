"""Turn measurements into tables and charts: `python -m benchmarks.report MAKER [options]`.

Purpose: tables and charts in benchmarks/results, and from there in the marked sections of READMEs and docs.
Principle: each maker is a function in MAKERS, named after what it shows; `suite`'s tables are in `suite/tables.py`. A maker
    that writes to the committed results also refreshes the pages.
Properties: nothing is measured or typed here: every number is read from a run's own files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import marked
from benchmarks.record import RESULTS, ROOT, line, made, processor, write
from benchmarks.suite import tables

# -------------------------------------------------------------------------------------------------------------- the suite


def suite(args: argparse.Namespace) -> None:
    """tables and charts of `pytest benchmarks/ --benchmark-json=RUN.json`"""
    print(tables.write(tables.read(args.files), args.out))


# -------------------------------------------------------------------------------------------------------------- the proof


def comparisons(row: dict[str, Any]) -> list[tuple[float, float]]:
    """(eager's error, the kernel's error) of each floating-point output and gradient in a row."""
    pairs = [(r["eager_norm_error"], r["norm_error"]) for r in row["results"].values()]
    return [pair for pair in pairs if max(pair) > 0]


def proof_table(found: dict[str, Any]) -> str:
    """The output of `minimind-fast verify --json` as Markdown: a line for each op and dtype."""
    from minimind_fast.proof.rule import FLOAT32_NOISE, NORM_FACTOR

    rows = found["rows"]
    passed, where = sum(r["passed"] for r in rows), f"{found['device']}, torch {found['torch']}"
    lines = [
        f"By `minimind-fast verify`: {passed} of {len(rows)} cases pass ({where})"
        + (". It was stopped before the end." if not found.get("complete", True) else "."),
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


def draw_proof(found: dict[str, Any], file: Path) -> None:
    """Plot every comparison as a point: eager's error on x, the kernel's on y, the rule as a line.

    Args:
        found: as for `proof_table`.
        file: image to write.
    """
    import matplotlib

    from minimind_fast.proof.rule import FLOAT32_NOISE, NORM_FACTOR

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 5.5), layout="constrained")
    ops = list(dict.fromkeys(r["op"] for r in found["rows"]))
    floor = 1e-9  # two zero errors draw no point; a single one is drawn at the edge
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


def verify(args: argparse.Namespace) -> None:
    """table and chart of `minimind-fast verify --json FILE`: no kernel is less exact than the PyTorch that it replaces"""
    found = json.loads(args.file.read_text(encoding="utf-8"))
    head = found.get("made") or made()
    # Add the head to the JSON: `verify` does not know the commit.
    args.file.write_text(json.dumps({"made": head, **found}, indent=1) + "\n", encoding="utf-8")
    args.file.with_suffix(".md").write_text(line(head) + proof_table(found), encoding="utf-8")
    draw_proof(found, args.file.with_suffix(".png"))
    print(proof_table(found))


def executed_table(found: Sequence[dict[str, Any]]) -> str:
    """What was executed from PTX as Markdown: a line for each op and dtype, a column for each card.

    Args:
        found: of `executed_rows`.
    """
    targets = list(dict.fromkeys(row["target"] for row in found))
    lines = ["| op | dtype | " + " | ".join(targets) + " |", "|---" * (len(targets) + 2) + "|"]
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in found):
        cells = []
        for target in targets:
            mine = [row for row in found if (row["op"], row["dtype"], row["target"]) == (op, dtype, target)]
            for row in mine:
                wrong = f"**{row['failed']} fail**" if row["failed"] else "pass"
                cells.append(f"{row['cases']} {wrong}, {row['seconds']:.0f} s")
            cells += [] if mine else ["not run"]
        lines.append(f"| {op} | {dtype} | " + " | ".join(cells) + " |")
    faults = [f"- {row['target']} {row['op']} {row['dtype']}: {text}" for row in found for text in row["findings"]]
    lines += ["", "Findings:", "", *(faults or ["None."])]
    return "\n".join(lines) + "\n"


def executed_rows(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Sum the reports of `verify --device ptx:CARD --json FILE` by card, op and dtype.

    Args:
        files: the reports; of several with one op and dtype for a card, the last counts.

    Returns:
        A row for each: cases, failed, seconds, launches, programs, instructions, findings.

    Raises:
        ValueError: a report of another device, or one that was stopped.
    """
    sums: dict[tuple[str, str, str], dict[str, Any]] = {}
    for file in files:
        mine: dict[tuple[str, str, str], dict[str, Any]] = {}
        report = json.loads(file.read_text(encoding="utf-8"))
        device = re.search(r"PTX compiled for (\w+)", report["device"])
        if device is None:
            raise ValueError(f"{file}: not from verify --device ptx:...: {report['device']}")
        if not report["complete"]:
            raise ValueError(f"{file}: stopped before its end; let verify run through")
        for row in report["rows"]:
            key = device[1], row["op"], row["dtype"]
            empty = {"cases": 0, "failed": 0, "seconds": 0.0, "launches": 0, "programs": 0, "instructions": 0}
            total = mine.setdefault(key, {**empty, "findings": []})
            ran = row.get("executed", {})
            total["cases"] += 1
            total["failed"] += not row["passed"]
            total["seconds"] = round(total["seconds"] + row["seconds"], 2)
            for name, counts in (("launches", "launches"), ("programs", "programs"), ("instructions", "opcodes")):
                total[name] += sum(ran.get(counts, {}).values())
            wrong = [f"{key}: {r['reason']}" for key, r in row["results"].items() if not r["passed"]]
            total["findings"] += [f"{row['case']}: {text}" for text in wrong]
        sums |= mine
    return [dict(zip(("target", "op", "dtype"), key, strict=True)) | total for key, total in sorted(sums.items())]


def executed(args: argparse.Namespace) -> None:
    """what compiled kernels did without a GPU: the reports of `minimind-fast verify --device ptx:CARD --json FILE`"""
    rows = executed_rows(args.files)
    head = {**made(), "command": "minimind-fast verify --device ptx:CARD --json FILE, for each card"}
    write(args.out / "executed", {"rows": rows}, executed_table(rows), head)
    print(executed_table(rows))


# ---------------------------------------------------------------------------------------------------------- the pipeline


def pipeline(args: argparse.Namespace) -> None:
    """table and curves of `make pipeline`, from its runs' logs"""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from minimind_fast.stages.pipeline import STAGES

    told = json.loads((args.folder / "pipeline.json").read_text(encoding="utf-8"))
    head = {**made(), "command": "make pipeline"}
    lines = [f"By `make pipeline` on {told['threads']} threads of {processor()}.", ""]
    lines += ["| stage | begins with | its measure | before | after | minutes |", "|---|---|---|---|---|---|"]
    for stage, begins, measure, before, after, seconds in told["rows"]:
        minutes = f"{seconds / 60:.1f}" if seconds else ""
        lines.append(f"| {stage} | {begins} | {measure} | {before:.3f} | {after:.3f} | {minutes} |")
    lines += ["", f"All of it in {told['seconds'] / 60:.1f} minutes. The last model, asked:", ""]
    lines += [f"> **{question}** {answer}\n>" for question, answer in told["answers"]]
    lines[-1] = lines[-1].removesuffix("\n>")
    lines += ["", "![curves](benchmarks/results/pipeline.png)"]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "pipeline.md").write_text(line(head) + "\n".join(lines) + "\n", encoding="utf-8")
    figure, axes = pyplot.subplots(1, len(STAGES), figsize=(2.4 * len(STAGES), 2.4), layout="constrained")
    for stage, axis in zip(STAGES, axes, strict=True):
        log = (args.folder / stage.name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        key = next(key for key in ("reward", "reward_margin", "loss") if any(key in json.loads(row) for row in log))
        points = [(row["step"], row[key]) for row in map(json.loads, log) if key in row]
        axis.plot(*zip(*points, strict=True))
        axis.set(title=stage.name, xlabel="step", ylabel=key.replace("_", " "))
        axis.grid(alpha=0.3)
    figure.savefig(args.out / "pipeline.png", dpi=110)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------ the first minute

KEPT = ("Installing", "tiny:", "Validation loss", "Stopping", "The model continues", "  Once upon a time")


def shorten(lines: Iterable[str]) -> list[str]:
    """The lines of a run's output worth showing, unchanged, with dots for omitted ones.

    Args:
        lines: without line ends.
    """
    lines = list(lines)
    steps = [i for i, text in enumerate(lines) if re.match(r"step +\d+/", text)]
    done = next((i for i, text in enumerate(lines) if text.startswith("Done:")), len(lines))
    chosen = {*steps[:2], *steps[-1:], *range(done, len(lines))}
    chosen |= {i for i, text in enumerate(lines) if text.startswith(KEPT)}
    heading = next((i for i, text in enumerate(lines) if text.startswith("The model continues")), 0)
    if heading and not lines[heading - 1]:
        chosen.add(heading - 1)
    out, last = [], -1
    for i in sorted(chosen):
        out += ["..."] * (i > last + 1) + [lines[i]]
        last = i
    return out


def minute(args: argparse.Namespace) -> None:
    """what a newcomer sees: `make pretrain 2>&1 | python -m benchmarks.report minute`"""
    lines = []
    for text in sys.stdin:
        print(text, end="", flush=True)  # pass it on as it arrives
        lines.append(text.rstrip("\n"))
    head = {**made(), "command": "make pretrain"}
    where = f"{len(os.sched_getaffinity(0))} threads of {processor()}"
    heading = f"Printed by `make pretrain` on {where}; lines are left out at the dots."
    body = "\n".join(shorten(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    text = f"{line(head)}{heading}\n\n```text\n{body}\n```\n"
    (args.out / "make_pretrain.md").write_text(text, encoding="utf-8")


def pages(args: argparse.Namespace) -> None:
    """the marked sections of READMEs and docs, and nothing else"""


# name -> function; its docstring is the help text
MAKERS: dict[str, Callable[[argparse.Namespace], None]] = {
    maker.__name__: maker for maker in (suite, verify, executed, pipeline, minute, pages)
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=(__doc__ or "").splitlines()[0])
    makers = parser.add_subparsers(dest="maker", required=True, metavar="MAKER")
    add = {
        name: makers.add_parser(name, help=maker.__doc__, description=maker.__doc__) for name, maker in MAKERS.items()
    }
    add["suite"].add_argument("files", nargs="+", type=Path, help="of `pytest benchmarks/ --benchmark-json=FILE`")
    add["verify"].add_argument("file", nargs="?", type=Path, default=RESULTS / "verify.json", help="of verify --json")
    add["pipeline"].add_argument(
        "folder", nargs="?", type=Path, default=ROOT / "out" / "pipeline", help="its --save_dir"
    )
    add["executed"].add_argument("files", nargs="+", type=Path, help="of verify --device ptx:CARD --json FILE")
    for name in ("suite", "executed", "pipeline", "minute"):
        add[name].add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Make one report; refresh the pages if it lies among the committed results.

    Args:
        argv: arguments; the process's own if None.

    Returns:
        0, or 2 if a file is unusable.
    """
    args = parse(argv)
    try:
        MAKERS[args.maker](args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    written = args.file.parent if args.maker == "verify" else getattr(args, "out", RESULTS)
    if written.resolve() == RESULTS.resolve():
        marked.refresh()
    return 0


if __name__ == "__main__":
    sys.exit(main())
