"""The whole chain's table and curves, from the logs that it left: `python benchmarks/pipeline_report.py [out/pipeline]`.

Purpose: what `make pipeline` did, for the README.
Principle: the numbers are read from the runs' own logs by the functions that the pipeline itself prints its table with.
Properties: writes benchmarks/results/pipeline.md and pipeline.png.
"""

from __future__ import annotations

import argparse
import json
import runpy
from pathlib import Path

import matplotlib
from machine import processor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "out" / "pipeline", help="its --save_dir")
    folder = parser.parse_args().folder
    pipeline = runpy.run_path(str(ROOT / "train" / "pipeline.py"))
    told = json.loads((folder / "pipeline.json").read_text(encoding="utf-8"))
    lines = [
        f"Made by `make pipeline` and `benchmarks/pipeline_report.py` on {told['threads']} threads of {processor()}.",
        "",
    ]
    lines += ["| stage | begins with | its measure | before | after | minutes |", "|---|---|---|---|---|---|"]
    for stage, begins, measure, before, after, seconds in told["rows"]:
        minutes = f"{seconds / 60:.1f}" if seconds else ""
        lines.append(f"| {stage} | {begins} | {measure} | {before:.3f} | {after:.3f} | {minutes} |")
    lines += ["", f"All of it in {told['seconds'] / 60:.1f} minutes. The last model, asked:", ""]
    lines += [f"> **{question}** {answer}\n>" for question, answer in told["answers"]]
    lines[-1] = lines[-1].removesuffix("\n>")
    lines += ["", "![curves](benchmarks/results/pipeline.png)"]
    (RESULTS / "pipeline.md").write_text("\n".join(lines) + "\n", encoding="utf-8")

    matplotlib.use("Agg")
    from matplotlib import pyplot

    stages = pipeline["STAGES"]
    figure, axes = pyplot.subplots(1, len(stages), figsize=(2.4 * len(stages), 2.4), layout="constrained")
    for stage, axis in zip(stages, axes, strict=True):
        log = (folder / stage.name / "log.jsonl").read_text(encoding="utf-8").splitlines()
        key = next(key for key in ("reward", "reward_margin", "loss") if any(key in json.loads(line) for line in log))
        points = [(row["step"], row[key]) for row in map(json.loads, log) if key in row]
        axis.plot(*zip(*points, strict=True))
        axis.set(title=stage.name, xlabel="step", ylabel=key.replace("_", " "))
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "pipeline.png", dpi=110)


if __name__ == "__main__":
    main()
