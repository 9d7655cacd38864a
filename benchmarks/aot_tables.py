"""The tables of kernels that were compiled ahead of time: kernels_aot.md.

Purpose: resources, bytes, floors and the cost model, as `aot.py` found them.
Principle: from rows to Markdown; what a kernel does is not known here.
Properties: every number is compiled, counted or modelled, none is measured.
"""

from __future__ import annotations

from typing import Any

from benchmarks import cost
from minimind_fast.config import ModelConfig
from minimind_fast.proof.roofline import op_work
from minimind_fast.proof.targets import TARGETS

TOKENS = 65536
COPY_BYTES_PER_S, MATMUL_FLOP_PER_S = 4.3e12, 790e12  # measured on an H200
MODEL = (
    "Not measured: a model, calibrated on no card. Warp instructions of a program, as executed from PTX and scaled to the "
    "disassembly; the time of issuing them if each scheduler issues one a clock; the time of the bytes at 90% of the data "
    "sheet's rate. Past 60%, instructions may hold the kernel back, not memory."
)


def ops_table(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum the launches of each op, preset and direction, and give the floor.

    Args:
        rows: from `compile_target` for sm_90.
    """
    sums: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["op"], row["preset"], row["direction"]
        total = sums.setdefault(key, {"launches": 0, "bytes_moved": 0})
        total["launches"] += row["launches"]
        total["bytes_moved"] += row["bytes_moved"]
    out = []
    for (op, preset, direction), total in sums.items():
        element_bytes = 4 if rows[0]["dtype"] == "float32" else 2
        least, flops = op_work(op, ModelConfig.preset(preset), direction, TOKENS, element_bytes)
        out.append(
            {
                "op": op,
                "preset": preset,
                "direction": direction,
                **total,
                "floor_bytes": least,
                "floor_us": round(max(least / COPY_BYTES_PER_S, flops / MATMUL_FLOP_PER_S) * 1e6, 1),
                "matmul_gflop": round(flops / 1e9, 1),
                # Meaningless where the matmul sets the floor.
                "bytes_share_of_floor": None
                if flops or not total["bytes_moved"]
                else round(least / total["bytes_moved"], 3),
            }
        )
    return out


def markdown(rows: list[dict[str, Any]], summary: list[dict[str, Any]], version: str) -> str:
    """The tables of kernels_aot.md.

    Args:
        rows: from `aot.compile_target`.
        summary: from `ops_table`.
        version: Triton's.
    """
    lines = [
        "# Kernels, compiled ahead of time",
        "",
        f"Made by `python -m benchmarks.aot` with triton {version}, T = {TOKENS:,} tokens, {rows[0]['dtype']}. "
        "Compiled, not run: no number here is a measurement of speed.",
        "",
        "Each cell: registers a thread / spilled bytes a thread / shared memory a block in KB, the worst over the models.",
        "",
    ]
    targets = [name for name in TARGETS if any(row["target"] == name for row in rows)]
    lines += ["| kernel | " + " | ".join(targets) + " | tensor cores |", "|---" * (len(targets) + 2) + "|"]
    for kernel in dict.fromkeys(row["kernel"] for row in rows):
        cells = []
        for name in targets:
            mine = [r for r in rows if r["kernel"] == kernel and r["target"] == name]
            if any("error" in r for r in mine):
                cells.append("does not compile")
                continue
            worst = [max(r[key] for r in mine) for key in ("registers", "spill_bytes", "shared_bytes")]
            cells.append(f"{worst[0]} / {worst[1]} / {worst[2] / 1024:.1f}")
        mma = sorted({r["mma"] for r in rows if r["kernel"] == kernel and r.get("mma")})
        lines.append(f"| {kernel} | {' | '.join(cells)} | {', '.join(mma) or '-'} |")
    bad = [f"- {r['target']} {r['preset']} {r['kernel']}: {'; '.join(r['problems'])}" for r in rows if r["problems"]]
    lines += ["", "## Problems", "", *(bad or ["None."])]
    if summary:
        lines += [
            "",
            "## Bytes and floors on an H200",
            "",
            f"A simple model: {COPY_BYTES_PER_S / 1e12} TB/s, {MATMUL_FLOP_PER_S / 1e12:.0f} TFLOP/s. Bytes moved are those "
            "of all tensors that the launches are given, whole (of a fused projection also the part that is not read), "
            "without cuBLAS's matmuls.",
            "",
            "| op | model | pass | launches | MB moved | MB at least | share | matmul GFLOP | floor, us |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for s in summary:
            share = "-" if s["bytes_share_of_floor"] is None else f"{s['bytes_share_of_floor']:.0%}"
            lines.append(
                f"| {s['op']} | {s['preset']} | {s['direction']} | {s['launches']} | {s['bytes_moved'] / 1e6:.0f} | "
                f"{s['floor_bytes'] / 1e6:.0f} | {share} | {s['matmul_gflop']:.0f} | {s['floor_us']} |"
            )
        lines += [
            "",
            "## Launches on an H200",
            "",
            "| kernel | model | pass | launches | programs | warps | registers | shared KB | resident warps an SM |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for r in rows:
            if r["target"] == "sm_90" and "error" not in r:
                lines.append(
                    f"| {r['kernel']} | {r['preset']} | {r['direction']} | {r['launches']} | {r['programs']} | "
                    f"{r['num_warps']} | {r['registers']} | {r['shared_bytes'] / 1024:.1f} | {cost.resident_warps(r)} |"
                )
    if any(row.get("cost") for row in rows):
        lines += ["", "## A model of the time", "", MODEL, "", *cost.table(rows, "sm_90"), "", *cost.worst_table(rows)]
    return "\n".join(lines) + "\n"
