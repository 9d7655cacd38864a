"""The report: one row per case and dtype, from one process or several.

Purpose: what `minimind-fast verify` prints and writes.
Principle: a row holds a Comparison for each output and each gradient.
Properties: one process per op and per model, several in parallel: compiling takes most of the time, and on a CPU Triton
    chooses its interpreter at import. There small cases run in float32 and float16: the interpreter is wrong in bfloat16.
    "ptx:sm_90" and the like compile for that card and execute the PTX on the CPU, in all three; a finding on the way
    fails its row. Rows arrive as they are made, so a stopped check leaves what it found. A process that dies becomes a
    failed row.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from minimind_fast import ops
from minimind_fast.proof.cases import CASES, MODELS, check, large_cases
from minimind_fast.proof.models import check_model
from minimind_fast.proof.rule import Comparison

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def report(
    names: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    alone: bool = True,
    presets: Sequence[str] = MODELS,
    only: str = "",
) -> Iterator[dict[str, Any]]:
    """Check ops, then whole models.

    Args:
        names: ops.
        dtypes: keys of DTYPES.
        device: "cpu", "cuda", or "ptx:" and a card.
        alone: check each op by itself.
        presets: whole models to check, from MODELS.
        only: check only cases with this in their names.

    Yields:
        One row per case and dtype: op, case, dtype, results (a Comparison for each tensor), passed, seconds.
    """

    if device.startswith("ptx:"):
        from minimind_fast.proof.ptx.launch import executed  # imports Triton, for its compiler

        with executed(device.removeprefix("ptx:")) as record:
            for row in report(names, dtypes, "cpu", alone, presets, only):
                yield _with_record(row, record.take())
        return

    def finish(row: dict[str, Any], dtype: str, started: float) -> dict[str, Any]:
        passed = all(result.passed for result in row["results"].values())
        return {**row, "dtype": dtype, "passed": passed, "seconds": round(time.perf_counter() - started, 2)}

    for name in names if alone else ():
        cases = CASES[name] + (large_cases(name) if device == "cuda" else [])
        for case in cases:
            for dtype in dtypes:
                if only not in case.name or (case.only and dtype not in case.only):
                    continue
                started = time.perf_counter()
                results = check(case, ops.kernel(name), DTYPES[dtype], device)
                yield finish({"op": name, "case": case.name, "results": results}, dtype, started)
    for preset in presets:
        for dtype in dtypes:
            started = time.perf_counter()
            for row in check_model(preset, DTYPES[dtype], device, names):
                yield finish(row, dtype, started)
                started = time.perf_counter()


def _with_record(row: dict[str, Any], record: Any) -> dict[str, Any]:
    """A row with what ran for it; each finding is a failure."""
    faults = {f"finding {i}": Comparison(False, str(found)) for i, found in enumerate(record.findings.values(), 1)}
    ran = {name: dict(getattr(record, name)) for name in ("opcodes", "launches", "programs")}
    return {**row, "results": {**row["results"], **faults}, "passed": row["passed"] and not faults, "executed": ran}


def executed_summary(rows: Sequence[dict[str, Any]]) -> str:
    """What ran, over all rows: launches, programs, matrix instructions, opcodes.

    Args:
        rows: of `report` with "ptx:".

    Returns:
        A few lines; "" if nothing was executed so.
    """
    total: dict[str, Counter[str]] = {name: Counter() for name in ("opcodes", "launches", "programs")}
    for row in rows:
        for name, counts in row.get("executed", {}).items():
            total[name].update(counts)
    if not total["opcodes"]:
        return ""
    matmuls: Counter[str] = Counter()
    for opcode, times in total["opcodes"].items():
        if opcode.startswith(("mma.sync", "wgmma.mma_async")):
            matmuls[opcode.split(".")[0]] += times
    kernels = ", ".join(f"{name} {times}" for name, times in sorted(total["launches"].items()))
    lines = [
        f"Executed from PTX: {total['launches'].total():,} launches, {total['programs'].total():,} programs, "
        f"{total['opcodes'].total():,} warp instructions.",
        "Matrix instructions: " + (", ".join(f"{name} {n:,}" for name, n in sorted(matmuls.items())) or "none") + ".",
        f"Launches: {kernels}.",
        f"{len(total['opcodes'])} opcodes: {', '.join(sorted(total['opcodes']))}.",
    ]
    return "\n".join(lines)


def smallest_failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """For each op and dtype that failed, its smallest case: where to begin to look.

    Args:
        rows: of `report`.
    """
    lines = []
    failed = [row for row in rows if not row["passed"]]
    for op, dtype in dict.fromkeys((row["op"], row["dtype"]) for row in failed):
        mine = [row for row in failed if (row["op"], row["dtype"]) == (op, dtype)]
        least = min(mine, key=lambda row: sum(result.elements for result in row["results"].values()))
        lines.append(f"FAIL {op}: {least['case']} {dtype}" + (f", the smallest of {len(mine)}" if mine[1:] else ""))
    return lines


HEADER = (
    f"{'op':21}{'case':32}{'dtype':9} {'output error (eager)':>24} {'gradient error (eager)':>24} "
    f"{'worst max':>10}  result"
)


def format_row(row: dict[str, Any]) -> str:
    """Format a row: one line with the worst relative norm error of each kind, and one per failed tensor."""

    def worst(keys: list[str]) -> str:
        if not keys:
            return ""
        result = max((row["results"][k] for k in keys), key=lambda r: r.norm_error)
        return f"{result.norm_error:.2e} ({result.eager_norm_error:.2e})"

    is_gradient = [k for k in row["results"] if k.startswith("d ") or k == "gradients"]
    outputs = [k for k in row["results"] if k not in is_gradient]
    most = max((r.max_error for r in row["results"].values()), default=0.0)
    note = ""
    if "loss_difference" in row:
        note = f"  on against off: loss {row['loss_difference']:.1e}, gradients {row['gradient_difference']:.1e}"
        if row["expert_choices_that_differed"]:
            note += f", {row['expert_choices_that_differed']} expert choices differed"
    line = (
        f"{row['op']:21}{row['case']:32}{row['dtype']:9} {worst(outputs):>24} {worst(is_gradient):>24} {most:10.1e}  "
        f"{'pass' if row['passed'] else 'FAIL'}{note}"
    )
    failed = [f"    {key}: {r.reason}" for key, r in row["results"].items() if not r.passed]
    return "\n".join([line, *failed])


def to_json(row: dict[str, Any]) -> dict[str, Any]:
    """A row as plain data."""
    return {**row, "results": {key: vars(result) for key, result in row["results"].items()}}


def from_json(row: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `to_json`."""
    return {**row, "results": {key: Comparison(**numbers) for key, numbers in row["results"].items()}}


def report_by_processes(
    names: Sequence[str],
    dtypes: Sequence[str],
    device: str,
    models: str,
    presets: Sequence[str],
    jobs: int,
    only: str = "",
) -> Iterator[dict[str, Any]]:
    """The same report from one process per op and per model (on a GPU also per dtype), `jobs` at a time, as rows arrive."""
    env = dict(os.environ)
    if device == "cpu":  # Triton chooses the interpreter at import
        env.update(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    if device.startswith("ptx:"):
        env.pop("TRITON_INTERPRET", None)
        env["OMP_NUM_THREADS"] = "1"
    # Compiling, and executing PTX, is most of the time, and dtypes do it apart: spread, moe_mlp takes a third as long.
    # Training's own dtype first, so that a stopped check has shown the most.
    split = [list(dtypes)] if device == "cpu" else [[dtype] for dtype in sorted(dtypes, key=_training_first)]
    parts = [["--ops", name, "--models", "no"] for name in names] if models != "only" else []
    if models != "no":
        parts += [["--ops", ",".join(names), "--models", "only", "--preset", preset] for preset in presets]
    tasks = [[*part, "--dtype", ",".join(some)] for some in split for part in parts]
    same = ["--device", device, "--jobs", "0", "--case", only, "--json", "-"]
    found: queue.Queue[dict[str, Any] | None] = queue.Queue()
    running: set[subprocess.Popen[str]] = set()

    def run(task: list[str]) -> None:
        command = [sys.executable, "-m", "minimind_fast.commands.verify", *task, *same]
        with (
            tempfile.TemporaryFile("w+") as errors,
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True) as process,
        ):
            running.add(process)
            assert process.stdout is not None
            failures = 0
            for line in process.stdout:
                row = from_json(json.loads(line))
                failures += not row["passed"]
                found.put(row)
            process.wait()
            running.discard(process)
            if process.returncode and not (process.returncode == 1 and failures):
                errors.seek(0)
                said = f"the process ended with {process.returncode}: {errors.read().strip()[-2000:]}"
                failure = {"run": Comparison(False, said)}
                found.put({"op": task[1], "case": " ".join(task), "dtype": "", "passed": False, "results": failure})

    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run, task) for task in tasks]
        for task in waiting:
            task.add_done_callback(lambda _: found.put(None))
        try:
            for _ in waiting:
                yield from iter(found.get, None)
            for task in waiting:
                task.result()
        finally:  # also when the reader stops early
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()


def _training_first(dtype: str) -> bool:
    return dtype != "bfloat16"
