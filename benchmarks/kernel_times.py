"""How fast each kernel is, beside the roofs of the card it runs on and beside others' implementations.

Purpose:    per op, model and pass: microseconds, share of the copy rate or of the matmul rate, ratio to eager, to
            torch.compile and to Liger-Kernel where that is installed.
Principle:  correct first: an implementation is timed only if it passes the error rule at this dtype (verify.py), on as
            many tokens as the check of a large case has. Roofs are measured in the same run. A time is the median of
            replays of a CUDA graph that holds one call for each of several input sets, together larger than three L2
            caches, so that no call finds its inputs there. Backward is (forward + backward) - forward, medians.
Properties: random data, never zeros. The floor is that of aot.py: each input and output once, or the matmul's FLOPs.
            p20 and p80 say how quiet the card was. On a CPU only the reference is timed, at toy sizes, to show that the
            script runs; it says nothing about the kernels.

usage: python benchmarks/kernel_times.py [--ops rope] [--presets minimind3] [--tokens 65536] [--out benchmarks/results]
"""
# Not named after the folder kernels/: a script's own folder comes first on sys.path, and others probe for that name.

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from aot import floor
from torch import Tensor

from minimind_fast import ops, reference
from minimind_fast.verify import DIFFERENTIABLE, DTYPES, MODELS, Case, Draw, check, preset_case

CHECK_TOKENS = 4099  # of the check that goes before a time: odd, and more than one program for every kernel
REPLAYS = 40


def _percentiles(samples: list[float]) -> tuple[float, float, float]:
    """(median, p20, p80)."""
    values = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64))
    return tuple(values.tolist())  # type: ignore[return-value]


def _time_us(calls: list[Callable[[], Any]], on_gpu: bool, capture: bool = True) -> dict[str, Any]:
    """Time calls that do the same work on different inputs.

    Args:
        calls: one for each input set.
        on_gpu: device events around the replay of a graph of all calls; else a host clock around each.
        capture: False for what waits for the host, which no graph can hold; then its launches count too.

    Returns:
        us, p20_us, p80_us of one call, and how they were taken.
    """
    if not on_gpu:
        calls[0]()
        samples = []
        for call in calls * 3:
            started = time.perf_counter()
            call()
            samples.append((time.perf_counter() - started) * 1e6)
        how = "host clock"
    else:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                for call in calls:
                    call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=side):
                for call in calls:
                    call()
            run, how = graph.replay, "graph replay"
        else:

            def run() -> None:
                for call in calls:
                    call()

            how = "plain calls"
        run()
        samples = []
        for _ in range(REPLAYS):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) * 1e3 / len(calls))
    median, low, high = _percentiles(samples)
    return {"us": median, "p20_us": low, "p80_us": high, "how": how}


def roofs(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this card can do: copy and fill rates, and the rate of a large matmul.

    Args:
        device: "cuda" or "cpu" (then at toy sizes).
        dtype: of the matmul.

    Returns:
        copy_bytes_per_s (read plus written), memset_bytes_per_s, matmul_flop_per_s.
    """
    on_gpu = device == "cuda"
    count, n = (1 << 28, 8192) if on_gpu else (1 << 20, 256)  # 1 GiB of float32
    a, b = (torch.randn(count, device=device) for _ in range(2))
    x, y = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    copy = _time_us([lambda: b.copy_(a)], on_gpu)["us"]
    fill = _time_us([b.zero_], on_gpu)["us"]
    matmul = _time_us([lambda: torch.mm(x, y, out=out)], on_gpu)["us"]
    return {
        "copy_bytes_per_s": 8 * count / copy * 1e6,
        "memset_bytes_per_s": 4 * count / fill * 1e6,
        "matmul_flop_per_s": 2 * n**3 / matmul * 1e6,
    }


def _liger(op: str) -> Callable | None:
    """Liger-Kernel's form of an op, with our signature; None if there is none, or Liger is not installed."""
    try:
        if op == "swiglu":
            swiglu = importlib.import_module("liger_kernel.ops.swiglu").LigerFusedGateUpSiLUMulFunction
            return lambda gate_up: swiglu.apply(gate_up)
        if op == "rms_norm":
            norm = importlib.import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction

            def rms_norm(x, weight, eps, residual, cast_first):
                return norm.apply(x, residual, weight, eps, 0.0, "llama" if cast_first else "gemma")

            return rms_norm
    except (ImportError, AttributeError):
        return None
    return None


def implementations(op: str, device: str) -> dict[str, Callable]:
    """What there is to time for an op.

    Args:
        op: its name.
        device: "cuda" or "cpu" (then the reference only).

    Returns:
        name -> function with the op's signature.
    """
    eager = getattr(reference, op)
    if device != "cuda":
        return {"eager": eager}
    found = {"kernel": ops.kernel(op), "eager": eager}
    if op != "moe_mlp":  # reads counts on the host: there is nothing whole to compile
        found["compile"] = torch.compile(eager, dynamic=False)
    liger = _liger(op)
    return {**found, "liger": liger} if liger is not None else found


def measure(case: Case, function: Callable, dtype: torch.dtype, device: str, capture: bool = True) -> dict[str, Any]:
    """Time one implementation, forward and backward.

    Args:
        case: of `preset_case`.
        function: the implementation.
        dtype: of the inputs.
        device: "cuda" or "cpu".
        capture: see `_time_us`.

    Returns:
        forward and forward_backward (see `_time_us`), backward_us, peak_bytes beyond the inputs.
    """
    on_gpu = device == "cuda"
    first = case.tensors(Draw(dtype, device))
    size = sum(t.numel() * t.element_size() for t in first.values() if t is not None)
    wanted = 3 * torch.cuda.get_device_properties(0).L2_cache_size if on_gpu else 0
    sets = [first] + [case.tensors(Draw(dtype, device, seed=2 + i)) for i in range(min(wanted // size, 15))]
    leaves, grads = [], []
    for tensors in sets:
        leaves.append([tensors[k].requires_grad_() for k in DIFFERENTIABLE[case.op] if tensors[k] is not None])
        out = case.call(function, tensors)
        grads.append([torch.randn_like(o) if o.requires_grad else None for o in out])
        del out

    def forward(i: int) -> None:
        case.call(function, sets[i])

    def both(i: int) -> None:
        out = case.call(function, sets[i])
        pairs: list[tuple[Tensor, Tensor]] = [(o, g) for o, g in zip(out, grads[i], strict=True) if g is not None]
        torch.autograd.grad([o for o, _ in pairs], leaves[i], [g for _, g in pairs], allow_unused=True)

    peak = 0
    if on_gpu:
        both(0)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both(0)
        peak = torch.cuda.max_memory_allocated() - before
    one = _time_us([lambda i=i: forward(i) for i in range(len(sets))], on_gpu, capture)
    two = _time_us([lambda i=i: both(i) for i in range(len(sets))], on_gpu, capture)
    return {"forward": one, "forward_backward": two, "backward_us": two["us"] - one["us"], "peak_bytes": peak}


def rows_of(op: str, preset: str, tokens: int, dtype: str, device: str, roof: dict[str, float]) -> list[dict[str, Any]]:
    """Check and time every implementation of one op at one model's shapes.

    Args:
        op: its name.
        preset: the model.
        tokens: T.
        dtype: key of DTYPES.
        device: "cuda" or "cpu".
        roof: of `roofs`.

    Returns:
        One row an implementation; empty where the model does not call the op.
    """
    case, small = preset_case(op, preset, tokens), preset_case(op, preset, min(tokens, CHECK_TOKENS))
    if case is None or small is None:
        return []
    rows = []
    for name, function in implementations(op, device).items():
        row: dict[str, Any] = {"op": op, "preset": preset, "tokens": tokens, "dtype": dtype, "implementation": name}
        rows.append(row)
        try:
            failed = [k for k, r in check(small, function, DTYPES[dtype], device).items() if not r.passed]
            row["passed"] = not failed
            if failed:  # no time without a right answer
                row["error"] = f"breaks the error rule: {', '.join(failed)}"
                continue
            capture = name == "kernel" or not op.startswith("moe")  # the reference's sort and counts wait for the host
            row.update(measure(case, function, DTYPES[dtype], device, capture))
        except Exception as error:  # the table goes on
            row["passed"] = False
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        finally:
            if device == "cuda":
                torch.cuda.empty_cache()
        for direction, us in (("forward", row["forward"]["us"]), ("backward", row["backward_us"])):
            least, flops = floor(op, preset, direction, tokens, DTYPES[dtype].itemsize)
            floor_s = max(least / roof["copy_bytes_per_s"], flops / roof["matmul_flop_per_s"])
            row[f"{direction}_share_of_roof"] = floor_s * 1e6 / us if us > 0 else 0.0
    return rows


def _ratio(rows: list[dict[str, Any]], mine: dict[str, Any], other: str, direction: str) -> str:
    for row in rows:
        if row["implementation"] == other and row["op"] == mine["op"] and row["preset"] == mine["preset"]:
            if not row["passed"]:
                return "failed"
            theirs = row["forward"]["us"] if direction == "forward" else row["backward_us"]
            ours = mine["forward"]["us"] if direction == "forward" else mine["backward_us"]
            return f"{theirs / ours:.2f}x"
    return "-"


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """The results for a reader.

    Args:
        rows: of `rows_of`.
        facts: device, versions and roofs.

    Returns:
        Markdown.
    """
    roof = facts["roofs"]
    lines = [
        "# Kernel times",
        "",
        f"{facts['device']}, torch {facts['torch']}. Roofs of this run: copy {roof['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
        f"memset {roof['memset_bytes_per_s'] / 1e12:.2f} TB/s, matmul {roof['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s.",
        facts["note"],
        "Ratios are the other's time over this one's. MB: the peak beyond the inputs, forward and backward.",
        "",
        "| op | model | tokens | pass | implementation | us (p20-p80) | of roof | x eager | x compile | x Liger | MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['op']} | {row['preset']} | {row['tokens']} |"
        if not row["passed"]:
            lines.append(f"{start} | {row['implementation']} | {row['error']} | | | | | |")
            continue
        for direction in ("forward", "backward"):
            spread = row["forward"] if direction == "forward" else row["forward_backward"]
            us = row["forward"]["us"] if direction == "forward" else row["backward_us"]
            both = "" if direction == "forward" else " both"
            ratios = " | ".join(_ratio(rows, row, other, direction) for other in ("eager", "compile", "liger"))
            lines.append(
                f"{start} {direction} | {row['implementation']} | {us:.1f} "
                f"({spread['p20_us']:.1f}-{spread['p80_us']:.1f}{both}) | {row[f'{direction}_share_of_roof']:.0%} | "
                f"{ratios} | {row['peak_bytes'] / 1e6:.0f} |"
            )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measure and write kernel_times.json and kernel_times.md, after each op anew.

    Args:
        argv: arguments; the process's own if None.

    Returns:
        1 if one of our own kernels fails its check, else 0.
    """
    parser = argparse.ArgumentParser(
        description="Time every kernel beside the card's roofs and others' implementations."
    )
    parser.add_argument("--ops", default=",".join(ops.NAMES))
    parser.add_argument("--presets", default="minimind3,minimind2-small,minimind2-moe,minimind3-moe")
    parser.add_argument("--tokens", type=int, default=0, help="T (default: 65536 on a GPU, 64 on a CPU)")
    parser.add_argument("--dtype", default="", choices=("", *DTYPES), help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--out", default="benchmarks/results", metavar="FOLDER")
    parser.add_argument("--budget_s", type=float, default=1e9, help="begin no op after this many seconds")
    args = parser.parse_args(argv)
    names, presets = args.ops.split(","), args.presets.split(",")
    if unknown := [n for n in names if n not in ops.NAMES] + [p for p in presets if p not in MODELS]:
        parser.error(f"unknown {', '.join(unknown)}; choose of {', '.join([*ops.NAMES, *MODELS])}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = args.dtype or ("bfloat16" if device == "cuda" else "float32")
    tokens = args.tokens or (65536 if device == "cuda" else 64)
    started, rows = time.perf_counter(), []
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "torch": torch.__version__,
        "roofs": roofs(device, DTYPES[dtype]),
        "note": "Times are of bare ops between device events."
        if device == "cuda"
        else "No GPU: only the reference was timed, at toy sizes. This shows that the script runs, and says nothing about "
        "the kernels, their share of any roof, or other implementations.",
    }
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    for preset in presets:
        for op in names:
            if time.perf_counter() - started > args.budget_s:
                print(f"out of time: {preset} {op} left out", flush=True)
                continue
            mine = rows_of(op, preset, tokens, dtype, device, facts["roofs"])
            rows += mine
            for row in mine:
                said = (
                    row.get("error") or f"{row['forward']['us']:.1f} us forward, {row['backward_us']:.1f} us backward"
                )
                print(f"{preset:16} {op:21} {row['implementation']:8} {said}", flush=True)
            text = json.dumps({**facts, "rows": rows}, indent=1) + "\n"
            (folder / "kernel_times.json").write_text(text, encoding="utf-8")
            (folder / "kernel_times.md").write_text(table(rows, facts), encoding="utf-8")
    return 0 if all(row["passed"] for row in rows if row["implementation"] == "kernel") else 1


if __name__ == "__main__":
    sys.exit(main())
