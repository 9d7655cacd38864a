"""The project's goals beside the measurements: met, missed or not measured.

Purpose:    one table of every numeric goal, so that none is forgotten or softened.
Principle:  a goal is data: a row, one of its facts, an optional row to divide by, and the bound. The value is looked up in
            a run's rows or in another benchmark's committed result, never typed.
Properties: a goal without its row or its peer, or for another kind of machine, is "not measured". Goals in seconds,
            tokens/s and TFLOP/s are for one H200; all are bf16, forward and backward, unless stated otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

Row = dict[str, Any]
SOURCE = "project goal"  # of every bound below


class Goal(NamedTuple):
    """A bound on one number.

    Attributes:
        what: the goal in words.
        least: lower bound, or None.
        most: upper bound, or None.
        fact: key of a row's facts.
        row: facts that select the row (the first match). The implementation is "ours" unless given.
        over: differing facts of the row to divide by; None: no division.
        form: format string for the value.
        scale: unit of the printed value and bound.
        file: name in benchmarks/results, if `fact` is one of its keys.
    """

    what: str
    least: float | None
    most: float | None
    fact: str
    row: Row | None = None
    over: Row | None = None
    form: str = "{:.2f}x"
    scale: float = 1.0
    file: str | None = None


def _op(name: str, op: str, roofs: tuple[float, float], eager: float, compiled: list[float], liger: list[float]):
    """Goals of a memory-bound op: share of the roof and ratios, forward and backward."""
    ways = ("forward", "backward")
    at = {"kind": "kernel", "op": op, "preset": "minimind3", "tokens": 65536}
    for way, share in zip(ways, roofs, strict=True):
        yield Goal(
            f"{name} {way}: share of the roof", share, None, "share_of_roof", {**at, "direction": way}, form="{:.0%}"
        )
    yield Goal(f"{name}: x eager", eager, None, "times_eager", {**at, "direction": "both"})
    for other, bounds in (("compile", compiled), ("liger", liger)):
        directions = ways if len(bounds) == 2 else ("both",)
        for way, bound in zip(directions, bounds, strict=True):
            yield Goal(f"{name} {way}: x {other}", bound, None, f"times_{other}", {**at, "direction": way})


def _mixture(preset: str):
    at = {"kind": "MoE layer", "preset": preset, "tokens": 65536, "routing": "balanced", "direction": "both"}
    name = f"MoE layer {preset}"
    yield Goal(f"{name}: TFLOP/s", 430e12, None, "flop_per_s", at, form="{:,.0f}", scale=1e12)
    for other, bound in (("dense", 0.9), ("loop", 2.0), ("grouped_mm", 1.15), ("liger", 1.3), ("scattermoe", 1.5)):
        words = {"dense": "speed of the dense MLP of as many FLOPs", "loop": "x MiniMind's loop over experts"}
        yield Goal(f"{name}: {words.get(other, f'x {other}')}", bound, None, f"times_{other}", at)
    yield Goal(
        f"{name}: time at 70/10/10/10 over balanced", None, 1.15, "median_s", {**at, "routing": "70/10/10/10"}, at
    )


_HEAD = {"kind": "head", "preset": "minimind3", "tokens": 65536}
_STEP = {"kind": "model step", "tokens": 53191, "documents": "512"}
_DENSE = {**_STEP, "preset": "minimind3"}
GOALS = (
    *_op("add + RMSNorm", "rms_norm", (0.92, 0.85), 8.0, [1.1, 1.3], [1.05, 2.0]),
    *_op("q/k-norm + RoPE", "rope", (0.88, 0.85), 12.0, [1.3], [2.5]),
    *_op("SwiGLU", "swiglu", (0.93, 0.90), 1.8, [1.0, 1.0], [1.1, 1.1]),
    Goal("head's loss: ms", None, 3.6e-3, "median_s", _HEAD, form="{:.2f}", scale=1e-3),
    Goal(
        "head's loss: memory over eager's",
        None,
        0.1,
        "peak_bytes",
        _HEAD,
        {**_HEAD, "implementation": "eager"},
        "{:.0%}",
    ),
    Goal("head's loss: x eager", 2.0, None, "times_eager", _HEAD),
    Goal("head's loss: x compile", 1.2, None, "times_compile", _HEAD),
    Goal("head's loss: x liger", 1.25, None, "times_liger", _HEAD),
    *_mixture("minimind3-moe"),
    *_mixture("minimind2-moe"),
    Goal("minimind3 step: tokens/s", 1.05e6, None, "tokens_per_s", _DENSE, form="{:,.0f}"),
    Goal("minimind3 step, stretch: tokens/s", 1.2e6, None, "tokens_per_s", _DENSE, form="{:,.0f}"),
    Goal("minimind3 step: MFU", 0.42, None, "mfu", _DENSE, form="{:.0%}"),
    Goal("minimind3 step: x eager on the same packed data", 2.6, None, "times_eager", _DENSE),
    Goal("minimind3 step: x compile", 1.1, None, "times_compile", _DENSE),
    Goal("minimind3 step: x liger", 1.5, None, "times_liger", _DENSE),
    Goal(
        "minimind3 step of 6k tokens, --cuda_graphs: x eager",
        *(2.0, None, "times_eager", {**_DENSE, "tokens": 6144, "implementation": "graphs"}),
    ),
    Goal(
        "minimind3-moe step: tokens/s over minimind3's",
        *(0.92, None, "tokens_per_s", {**_STEP, "preset": "minimind3-moe"}, _DENSE),
    ),
    *(
        Goal(f"minimind2-small step{word}: tokens/s", bound, None, "tokens_per_s", row, form="{:,.0f}")
        for word, bound in (("", 2.0e6), (", stretch", 2.4e6))
        for row in ({**_STEP, "preset": "minimind2-small"},)
    ),
    *(
        Goal(
            f"training on a GPU, loader and engine included: useful tokens/s over the eager loop's{how}",
            *(bound, None, f"times_{other}"),
            file="train_step_gpu.json",
        )
        for other, bound, how in (
            ("eager", 4.0, ", padded"),
            ("joined", 2.6, ", the same packed data"),
            ("joined-compile", 1.1, " with torch.compile, the same packed data"),
        )
    ),
    Goal(
        "validation loss after equal samples, ours less eager's, mean of the seeds",
        *(None, 0.005, "difference", None, None, "{:+.4f}"),
        file="quality.json",
    ),
    Goal(
        "pretraining on a CPU: useful tokens/s over the padded eager loop", 12, None, "ratio", file="cpu_pretrain.json"
    ),
    Goal("minimind2-moe on a CPU: useful tokens/s over the dense twin's", 0.8, None, "ratio", file="cpu_moe.json"),
)


def _select(rows: list[Row], wanted: Row) -> Row:
    wanted = {"implementation": "ours", **wanted}
    return next((r for r in rows if all(r.get(key) == value for key, value in wanted.items())), {})


def value(goal: Goal, rows: list[Row], results: Sequence[Path]) -> float | None:
    """Look up a goal's measured value.

    Args:
        goal: one of GOALS.
        rows: extra_info of a run's rows.
        results: folders of other benchmarks' results; the first that has the file is used.

    Returns:
        The number, or None if it was not measured.
    """
    if goal.file is not None:
        files = (folder / goal.file for folder in results)
        file = next((file for file in files if file.exists()), None)
        return json.loads(file.read_text(encoding="utf-8")).get(goal.fact) if file else None
    assert goal.row is not None
    one = _select(rows, goal.row).get(goal.fact)
    other = 1.0 if goal.over is None else _select(rows, goal.over).get(goal.fact)
    return one / other if one is not None and other else None


def table(rows: list[Row], results: Sequence[Path]) -> list[str]:
    """Every goal with its bound, its value and the verdict.

    Args:
        rows: extra_info of a run's rows.
        results: folders of other benchmarks' results.

    Returns:
        Lines of Markdown.
    """
    lines = [f"| {SOURCE} | bound | measured | verdict |", "|---|---|---|---|"]
    for goal in GOALS:
        found = value(goal, rows, results)
        bound = goal.least if goal.least is not None else goal.most
        assert bound is not None
        met = found is not None and (found >= bound if goal.least is not None else found <= bound)
        verdict = "not measured" if found is None else "met" if met else "missed"
        sign = "at least" if goal.least is not None else "at most"
        shown = "-" if found is None else goal.form.format(found / goal.scale)
        lines.append(f"| {goal.what} | {sign} {goal.form.format(bound / goal.scale)} | {shown} | {verdict} |")
    return lines
