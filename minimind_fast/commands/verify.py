"""`minimind-fast verify`: check every kernel against the reference in float64, then whole models.

Purpose: shows that the kernels on this machine are at least as exact as plain PyTorch.
Principle: prints the report's rows as they arrive; the exit code says pass or fail.
Properties: runs the compiled kernels on a GPU, Triton's interpreter elsewhere. `--device ptx:sm_90` and the like compile
    for that card and execute the PTX here, without the card.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from minimind_fast import ops
from minimind_fast.errors import UserError
from minimind_fast.proof.cases import MODELS
from minimind_fast.proof.report import (
    DTYPES,
    HEADER,
    executed_summary,
    format_row,
    report,
    report_by_processes,
    smallest_failures,
    to_json,
)
from minimind_fast.weights.files import written_aside

# "ptx:" and a card: what proof/ptx executes. Named here too, since that folder imports Triton.
DEVICES = ("cpu", "cuda", "ptx:sm_80", "ptx:sm_86", "ptx:sm_89", "ptx:sm_90", "ptx:sm_120")
WRITE_EVERY_S = 1.0  # seconds between two versions of the file of --json


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    names = [part.strip() for part in text.split(",") if part.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise UserError(f"unknown {what} {', '.join(unknown) or repr(text)}; choose of {', '.join(known)}")
    return names


def main(argv: list[str] | None = None) -> int:
    """`minimind-fast verify`: check every kernel, then whole models, and report pass or fail.

    Args:
        argv: arguments after `verify`; the process's own if None.

    Returns:
        The exit code: 0 if everything passes, 1 if not (2 for wrong usage).
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="minimind-fast verify", description=main.__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--ops", default=",".join(ops.NAMES), help="ops to check, joined by commas (default: all)")
    parser.add_argument("--case", default="", metavar="TEXT", help="only the cases with this in their names")
    parser.add_argument("--dtype", default="", help=f"of {', '.join(DTYPES)}, joined by commas (default: all that can)")
    parser.add_argument(
        "--device", default="", help=f"{', '.join(DEVICES)} (default: cuda where there is one, else cpu)"
    )
    parser.add_argument("--models", choices=("yes", "no", "only"), default="yes", help="whole models, two layers each")
    parser.add_argument("--preset", default=",".join(MODELS), help="which models (default: all)")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 8), help="processes (0: in this one)")
    parser.add_argument(
        "--json", metavar="FILE", help="also write every number to this file, as rows arrive (-: only rows, to stdout)"
    )
    args = parser.parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    executed = device.startswith("ptx:")
    possible = ["float32", "float16"] if device == "cpu" else list(DTYPES)
    try:
        _names(device, DEVICES, "device")
        names, presets = _names(args.ops, ops.NAMES, "op"), _names(args.preset, MODELS, "preset")
        dtypes = _names(args.dtype, list(DTYPES), "dtype") if args.dtype else possible
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here; leave --device out to check on the CPU")
        if set(dtypes) - set(possible):
            raise UserError("--dtype bfloat16: Triton's interpreter is wrong in it; use a GPU, or --device ptx:sm_90")
    except ValueError as error:
        parser.error(str(error))
    jobs = args.jobs
    if device != "cuda" and (os.environ.get("TRITON_INTERPRET") == "1") == executed:
        jobs = max(jobs, 1)  # processes of their own, which choose between interpreter and compiler

    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, Triton's interpreter: small cases"
    if executed:
        where = f"CPU, the PTX compiled for {device.removeprefix('ptx:')}: small cases"
    streamed = args.json == "-"
    if not streamed:
        print(f"torch {torch.__version__}, {where}, {', '.join(dtypes)}")
        if device == "cpu":
            print("No GPU: this proves the arithmetic in float32 and float16; bfloat16 and speed need a GPU.")
        print(HEADER)
    rows: list[dict[str, Any]] = []
    written = 0.0
    if jobs:
        found = report_by_processes(names, dtypes, device, args.models, presets, jobs, args.case)
    else:
        found = report(names, dtypes, device, args.models != "only", presets if args.models != "no" else (), args.case)

    def write(complete: bool) -> None:
        """Rewritten as rows arrive: what a stopped check has found stays."""
        passed = complete and all(row["passed"] for row in rows)
        summary = {"torch": torch.__version__, "device": where, "passed": passed, "complete": complete}
        text = json.dumps({**summary, "rows": [to_json(r) for r in rows]}, indent=1)
        with written_aside(args.json) as file:
            file.write_text(text + "\n", encoding="utf-8")

    for row in found:
        rows.append(row)
        if args.json and not streamed and time.monotonic() > written + WRITE_EVERY_S:
            write(complete=False)
            written = time.monotonic()
        print(json.dumps(to_json(row)) if streamed else format_row(row), flush=True)
    failed = [row for row in rows if not row["passed"]]
    if streamed:
        return 1 if failed else 0
    if args.json:
        write(complete=True)
    if summary_text := executed_summary(rows):
        print(summary_text)
    print("\n".join([f"{len(rows) - len(failed)} of {len(rows)} pass", *smallest_failures(rows)]))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
