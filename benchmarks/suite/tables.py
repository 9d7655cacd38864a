"""From the suite's JSON to tables and charts: `python -m benchmarks.report suite RUN.json ...`.

Purpose:    benchmarks/results/<machine>.md with its charts, <machine>.json with the rows, suite.md for the READMEs.
Principle:  everything is computed from the files of `pytest benchmarks/ --benchmark-json=RUN.json`; several files of one
            machine make one report, in which later rows replace earlier ones of the same name.
Properties: nothing is typed by hand. Only a run's rows, roofs and limits are kept, nothing about the host. A missing number
            is a dash. Charts are drawn only if there is data: shares of a roof, several T, memory peaks.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, line
from benchmarks.record import write as write_result
from benchmarks.suite import goals

ORDER = (
    *("training", "model step", "MoE layer", "kernel", "head", "attention", "weight gradient", "optimizer step"),
    *("generation", "data loading"),
)
# Each is a column: its time over the row's.
OTHERS = ("eager", "compile", "liger", "joined", "dense", "loop", "grouped_mm", "scattermoe", "sonicmoe", "megablocks")
HEAD = ("made", "device", "on_gpu", "torch", "roofs", "limits", "skipped")  # kept from a run, and in a report's JSON
COLOURS = {
    **{"ours": "#1f77b4", "eager": "#bbbbbb", "compile": "#ff7f0e", "liger": "#2ca02c"},
    **{"dense": "#7f7f7f", "grouped_mm": "#e377c2", "loop": "#d3d3d3", "scattermoe": "#98df8a", "split-K": "#1f77b4"},
    **{"sdpa": "#9467bd", "flash_attn": "#8c564b", "torch_varlen": "#17becf", "foreach": "#bcbd22"},
}


def read(files: list[Path]) -> dict[str, Any]:
    """Merge runs of one machine.

    Args:
        files: pytest-benchmark's JSON from this suite, or a report's own JSON; oldest first.

    Returns:
        made (of the last file), device, on_gpu, torch, roofs, limits, skipped (reason -> rows without a time), and
        benchmarks: group and extra_info of each row that has a time.

    Raises:
        ValueError: a file of another program or another machine.
    """
    out: dict[str, Any] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        data = json.loads(file.read_text(encoding="utf-8"))
        head = data.get("minimind_fast") or ({k: data[k] for k in HEAD if k in data} if "roofs" in data else None)
        if head is None:
            raise ValueError(f"{file} was not written by this suite (pytest benchmarks/ --benchmark-json={file})")
        if out and head["device"] != out["device"]:
            raise ValueError(f"{file} is of {head['device']}, the others are of {out['device']}")
        skipped = out.get("skipped", {})
        for reason, names in head.get("skipped", {}).items():
            skipped[reason] = list(dict.fromkeys([*skipped.get(reason, []), *names]))
        out = {**head, "benchmarks": [], "skipped": skipped}
        for row in data["benchmarks"]:
            if row["extra_info"].get("median_s"):
                key = row["group"], row["extra_info"]["implementation"]
                rows[key] = {"group": row["group"], "extra_info": row["extra_info"]}
    for (group, _), row in rows.items():
        info = row["extra_info"]
        for other in OTHERS:  # the suite records some itself, when theirs is measured first
            theirs = [r["extra_info"]["median_s"] for (g, n), r in rows.items() if g == group and n.split()[0] == other]
            if theirs:  # the better of a peer's variants
                info.setdefault(f"times_{other}", min(theirs) / info["median_s"])
    order = {kind: i for i, kind in enumerate(ORDER)}
    found = sorted(rows.values(), key=lambda r: order[r["extra_info"]["kind"]])  # stable: groups as they ran
    return {**out, "benchmarks": found}


def machine(device: str) -> str:
    """A device's name, such as "NVIDIA H200", as a file name."""
    return re.sub(r"\W+", "_", device.lower()).strip("_")


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.2g} us"


def _cell(info: dict[str, Any], key: str, form: str) -> str:
    value = info.get(key)
    return "-" if value is None else form.format(value)


def _work(info: dict[str, Any]) -> str:
    if info.get("flops"):
        return f"{info['flops'] / 1e9:,.3g} GFLOP"
    return f"{info['bytes'] / 1e6:,.3g} MB" if info.get("bytes") else "-"


def table(rows: list[dict[str, Any]], on_gpu: bool) -> list[str]:
    """One kind's rows, group by group, as lines of Markdown.

    Args:
        rows: from `read`.
        on_gpu: include the columns that only a GPU fills.
    """
    infos = [row["extra_info"] for row in rows]
    others = [o for o in OTHERS if o in OTHERS[:3] and on_gpu or any(f"times_{o}" in info for info in infos)]
    gpu = ("TFLOP/s", "of roof", "of same-shape matmul", "MFU", "with launches", "peak MB") if on_gpu else ()
    names = ["group", "implementation", "median (p20-p80)", "tokens/s", *(f"x {other}" for other in others)]
    names += [*gpu, "at least", "error (eager's)"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in rows:
        info = row["extra_info"]
        spread = f"{_time(info['median_s'])} ({_time(info['p20_s'])}-{_time(info['p80_s'])})"
        cells = [row["group"], info["implementation"], spread, _cell(info, "tokens_per_s", "{:,.0f}")]
        cells += [_cell(info, f"times_{other}", "{:.2f}") for other in others]
        if on_gpu:
            peak = info.get("peak_bytes")
            launches = info.get("with_launch_s")
            cells.append(f"{info['flop_per_s'] / 1e12:,.0f}" if info.get("flop_per_s") else "-")
            cells += [_cell(info, "share_of_roof", "{:.0%}"), _cell(info, "share_of_same_shape", "{:.0%}")]
            cells.append(_cell(info, "mfu", "{:.1%}"))
            cells += ["-" if launches is None else _time(launches), "-" if peak is None else f"{peak / 1e6:,.0f}"]
        error = "-" if "error" not in info else f"{info['error']:.1e} ({info['eager_error']:.1e})"
        error += ", above the rule" if info.get("above_the_rule") else ""
        lines.append("| " + " | ".join([*cells, _work(info), error]) + " |")
    return lines


def without_a_time(skipped: dict[str, list[str]]) -> list[str]:
    """Why rows have no time: lines of Markdown, one per reason.

    Args:
        skipped: reason -> rows.
    """
    return [
        f"- {' '.join(reason.split())}: {len(names)} rows, such as `{names[0]}`"
        for reason, names in sorted(skipped.items(), key=lambda item: -len(item[1]))
    ]


def _figure(title: str, height: float = 4.0) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    axes.set_title(title)
    return plt, figure, axes


def _bars(rows: list[dict[str, Any]], key: str, scale: float, label: str, title: str, file: Path) -> bool:
    """Horizontal bars of one number, grouped; False if there is nothing to show."""
    shown = [r for r in rows if r["extra_info"].get(key)]
    if not shown:
        return False
    groups = list(dict.fromkeys(r["group"] for r in shown))
    plt, figure, axes = _figure(title, 1.5 + 0.45 * len(groups))
    slots = {id(r): sum(o["group"] == r["group"] for o in shown[:i]) for i, r in enumerate(shown)}
    for name in dict.fromkeys(r["extra_info"]["implementation"] for r in shown):
        mine = [r for r in shown if r["extra_info"]["implementation"] == name]
        places = [groups.index(r["group"]) + 0.2 * slots[id(r)] for r in mine]
        axes.barh(places, [r["extra_info"][key] * scale for r in mine], 0.19, label=name, color=COLOURS.get(name))
    axes.set(xlabel=label, yticks=[i + 0.2 for i in range(len(groups))], yticklabels=groups)
    axes.invert_yaxis()
    axes.legend()
    axes.grid(alpha=0.3, axis="x")
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True


def _curves(rows: list[dict[str, Any]], file: Path) -> bool:
    """Plot tokens/s of the training step against T; False with fewer than two T."""
    lines: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        info = row["extra_info"]
        if info["kind"] == "model step":
            lines.setdefault((info["preset"], info["implementation"]), []).append(
                (info["tokens"], info["tokens_per_s"])
            )
    if not any(len({t for t, _ in points}) > 1 for points in lines.values()):
        return False
    plt, figure, axes = _figure("Training step")
    for (preset, name), points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=f"{preset}, {name}")
    axes.set(xlabel="tokens in a step", ylabel="tokens/s", xscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)
    plt.close(figure)
    return True


def write(found: dict[str, Any], folder: Path) -> Path:
    """Write the machine's report, rows and charts.

    Args:
        found: from `read`.
        folder: output folder.

    Returns:
        The Markdown file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, rows, roof = machine(found["device"]), found["benchmarks"], found["roofs"]
    lines = [
        f"# {found['device']}",
        "",
        f"From `pytest benchmarks/`, torch {found['torch']}.",
    ]
    lines += ["", *found["limits"], ""]
    rates = [f"{what} {roof[f'{what}_bytes_per_s'] / 1e9:,.0f} GB/s" for what in ("copy", "memset")]
    rates.append(f"matmul {roof['matmul_flop_per_s'] / 1e12:.3g} TFLOP/s")
    lines.append(f"Roofs of this run: {', '.join(rates)}.")
    lines.append("Ratios are the other's time over this row's: above 1 is faster.")
    charts = {
        f"{name}_roof.png": _bars(
            [
                r
                for r in rows
                if r["extra_info"]["kind"] in ("kernel", "head", "attention", "MoE layer", "weight gradient")
            ],
            *("share_of_roof", 100, "% of the roof", "Share of the roof", folder / f"{name}_roof.png"),
        ),
        f"{name}_eager.png": not found["on_gpu"]
        and _bars(
            [r for r in rows if r["extra_info"]["implementation"] != "eager" and r["group"] != "data loading"],
            *("times_eager", 1, "times eager's speed", "Beside eager PyTorch", folder / f"{name}_eager.png"),
        ),
        f"{name}_tokens.png": _curves(rows, folder / f"{name}_tokens.png"),
        f"{name}_memory.png": _bars(
            rows, "peak_bytes", 1e-6, "MB beyond the inputs", "Peak memory", folder / f"{name}_memory.png"
        ),
    }
    lines += ["", *(f"![{file}]({file})" for file, drawn in charts.items() if drawn)]
    for kind in ORDER:
        mine = [r for r in rows if r["extra_info"]["kind"] == kind]
        if mine:
            lines += ["", f"## {kind[0].upper()}{kind[1:]}", "", *table(mine, found["on_gpu"])]
    lines += ["", "## Goals", ""]
    lines += ["Bounds in tokens/s, ms and TFLOP/s are for one H200; ratios are against rows of this run.", ""]
    lines += goals.table([row["extra_info"] for row in rows], [folder, RESULTS])
    if found["skipped"]:
        lines += ["", "## Without a time", "", *without_a_time(found["skipped"])]
    write_result(folder / name, found, "\n".join(lines) + "\n", found["made"])
    (folder / "suite.md").write_text(line(found["made"]) + summary(found, name), encoding="utf-8")
    return folder / f"{name}.md"


def summary(found: dict[str, Any], name: str) -> str:
    """A short table of our rows, for the READMEs.

    Args:
        found: from `read`.
        name: file name of the machine's report.
    """
    lines = [
        f"`pytest benchmarks/` on {found['device']}, torch {found['torch']} ([all rows](benchmarks/results/{name}.md)).",
        "",
    ]
    lines += ["| ours | time | tokens/s | x eager | x compile | x Liger | of roof |", "|---|---|---|---|---|---|---|"]
    for row in found["benchmarks"]:
        info = row["extra_info"]
        if info["implementation"] == "ours" and not row["group"].endswith((" forward", " backward")):
            cells = [row["group"], _time(info["median_s"]), _cell(info, "tokens_per_s", "{:,.0f}")]
            cells += [_cell(info, f"times_{other}", "{:.2f}") for other in OTHERS[:3]]
            lines.append("| " + " | ".join([*cells, _cell(info, "share_of_roof", "{:.0%}")]) + " |")
    if not found["on_gpu"]:
        lines += ["", *found["limits"]]
    return "\n".join(lines) + "\n"
