"""A real run from scratch to a chat, by the commands that a user types.

    python -m benchmarks.studies.real_run [--corpus FOLDER] [--minutes 3] [--dry_run]

Purpose: the full path at full speed on one GPU: a minimind3 is pretrained for some minutes on real text, fine-tuned on
    chats, then asked questions.
Principle: three commands, each in its own process: `deepspeed train/pretrain.py`, `deepspeed train/sft.py`, and questions
    piped into `minimind-fast chat`. Every number is read from their logs.
Properties: writes real_run.json, .md and .png. Speeds are medians over log lines after the first tenth. The text is small,
    so minutes of training read it many times: the loss is not a benchmark. --dry_run takes seconds on a CPU with a tiny
    model, on the shipped samples if there is no corpus.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.pack_for_gpu import FOLDER, Corpus, find_corpus
from benchmarks.record import RESULTS, ROOT, environment, processor
from benchmarks.record import write as write_result

QUESTIONS = ["你好，请介绍一下你自己。", "为什么天空是蓝色的？", "What is the capital of France?"]
# 53,248 tokens per step, as in the table of goals; more epochs than the minutes allow.
PRETRAIN = (
    "--preset minimind3 --batch_size 104 --max_seq_len 512 --accumulation_steps 1 --epochs 24 --learning_rate 1e-3 "
)
PRETRAIN += "--warmup_steps 100 --log_interval 20 --val_interval 500"
SFT = "--batch_size 32 --max_seq_len 768 --epochs 8 --learning_rate 2e-4 --warmup_steps 20 --log_interval 10"
DRY_PRETRAIN = "--preset tiny --hidden_size 64 --num_hidden_layers 2 --batch_size 8 --max_seq_len 128 --epochs 2 "
DRY_PRETRAIN += "--accumulation_steps 1 --log_interval 1"
DRY_SFT = "--batch_size 1 --max_seq_len 512 --epochs 1 --log_interval 1"


def free_port() -> int:
    """A TCP port that is free right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def commands(corpus: Corpus, folder: Path, minutes: float, dry_run: bool) -> dict[str, list[str]]:
    """Stage -> the command a user would type.

    Args:
        corpus: paths of the text.
        folder: where runs and caches go.
        minutes: duration of pretraining.
        dry_run: use a tiny model.
    """
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "-q", "--num_gpus", "1"]
    where = ["--save_dir", str(folder), "--cache_dir", str(folder / "cache")]
    pretrain = ["--data_path", corpus.pretrain, "--val_data_path", corpus.val, "--tokenizer_path", corpus.tokenizer]
    pretrain += ["--max_minutes", f"{minutes:g}", *(DRY_PRETRAIN if dry_run else PRETRAIN).split()]
    sft = ["--data_path", corpus.sft, "--max_minutes", f"{minutes / 4:g}", *(DRY_SFT if dry_run else SFT).split()]
    scripts = {"pretrain": pretrain, "sft": sft}
    return {
        name: [
            *launch,
            "--master_port",
            str(free_port()),
            str(ROOT / "train" / f"{name}.py"),
            *map(str, options),
            *where,
        ]
        for name, options in scripts.items()
    }


def run(name: str, command: list[str], question: str | None = None) -> tuple[str, float]:
    """Run one command and show its output.

    Args:
        name: label for messages.
        command: the command and its arguments.
        question: text for its standard input.

    Returns:
        (its standard output, seconds).

    Raises:
        ValueError: the command failed.
    """
    print(f"\n=== {name}: {shlex.join(command[1:])}", flush=True)
    env = environment(**({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}))
    began, lines = time.monotonic(), []
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8", env=env, cwd=ROOT
    )
    assert process.stdin and process.stdout
    process.stdin.write(question or "")
    process.stdin.close()
    try:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
    except KeyboardInterrupt:  # time is up; the trainer saves on a signal
        process.wait()
        raise
    if code := process.wait():
        raise ValueError(f"{name} ended with exit code {code}; what it said is above")
    return "".join(lines), time.monotonic() - began


def said(output: str, word: str) -> dict[str, str]:
    """Prompt -> text, from the end of a stage's output; `word` is "continues" or "answers"."""
    _, _, rest = output.partition(f"The model {word}")
    return dict(re.findall(r"^  (.+?) → (.*)$", rest, re.MULTILINE))


def summary(log: str) -> dict[str, Any]:
    """Summarise the text of a run's log.jsonl.

    Returns:
        steps, tokens, curve [(step, loss)], val_curve, tokens_per_s, mfu (medians after the first tenth), memory_gib.
    """
    rows = [json.loads(line) for line in log.splitlines()]
    steps = [row for row in rows if "loss" in row]
    settled = steps[len(steps) // 10 :]
    return {
        "steps": steps[-1]["step"],
        "tokens": steps[-1]["useful_tokens"],
        "curve": [(row["step"], row["loss"]) for row in steps],
        "val_curve": [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row],
        "tokens_per_s": statistics.median(row["tokens_per_s"] for row in settled),
        "mfu": statistics.median(row["mfu"] for row in settled),
        "memory_gib": max(row["memory_gib"] for row in steps),
    }


def quoted(text: str) -> str:
    """A text as one line of Markdown that cannot break a table or a quote."""
    return re.sub(r"([|<>`*_\\])", r"\\\1", " ".join(text.split()))


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"By `benchmarks/studies/real_run.py` on {r['device']}, torch {r['torch']}: {r['preset']}, {r['minutes']:g} minutes "
        "of pretraining through `deepspeed train/pretrain.py`, then `train/sft.py`.",
        "",
        "| stage | steps | tokens | tokens/s | MFU | memory | first loss | last loss | validation | wall clock |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, s in r["stages"].items():
        val = f"{s['val_curve'][0][1]:.3f} to {s['val_curve'][-1][1]:.3f}" if s["val_curve"] else "-"
        cells = (name, f"{s['steps']:,}", f"{s['tokens']:,}", f"{s['tokens_per_s']:,.0f}", f"{s['mfu']:.1%}")
        cells += (f"{s['memory_gib']:.1f} GiB", f"{s['curve'][0][1]:.3f}", f"{s['curve'][-1][1]:.3f}", val)
        lines.append("| " + " | ".join((*cells, f"{s['seconds']:.0f} s")) + " |")
    for title, texts in (("After pretraining it continues:", r["continues"]), ("After SFT, asked:", r["answers"])):
        lines += ["", title, ""]
        lines += [f"> **{quoted(prompt)}** {quoted(text)}\n>" for prompt, text in texts.items()]
        lines[-1] = lines[-1].removesuffix("\n>")
    return "\n".join([*lines, "", "![curves](benchmarks/results/real_run.png)"]) + "\n"


def draw(r: dict[str, Any], picture: Path) -> None:
    """Plot training and validation loss of each stage."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(r["stages"]), figsize=(10, 4), layout="constrained", squeeze=False)
    for (name, s), axis in zip(r["stages"].items(), axes[0], strict=True):
        axis.plot(*zip(*s["curve"], strict=True), label="training", linewidth=1)
        if s["val_curve"]:
            axis.plot(*zip(*s["val_curve"], strict=True), label="validation", marker="o", markersize=3)
        axis.set(title=f"{name}: {s['tokens_per_s']:,.0f} tokens/s", xlabel="optimizer step", ylabel="nats per token")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def write(result: dict[str, Any], out: Path) -> None:
    """Write the results so far; called after each stage, so nothing measured is lost."""
    write_result(out / "real_run", result, table(result))
    draw(result, out / "real_run.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--corpus", type=Path, default=FOLDER, help="folder made by pack_for_gpu.py")
    add("--minutes", type=float, default=3.0, help="of pretraining; SFT may take a quarter of them")
    add("--out", type=Path, default=RESULTS)
    add("--dry_run", action="store_true", help="a very small model for seconds, on a CPU")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    try:
        if not on_gpu and not args.dry_run:
            raise ValueError("PyTorch sees no GPU here; --dry_run goes through it on a CPU")
        corpus = find_corpus(args.corpus, args.dry_run)
        minutes = min(args.minutes, 1 / 6) if args.dry_run else args.minutes
        folder = Path(tempfile.mkdtemp())
        result: dict[str, Any] = {
            "on_gpu": on_gpu,
            "dry_run": args.dry_run,
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU {processor()}",
            "torch": str(torch.__version__),
            "preset": "tiny" if args.dry_run else "minimind3",
            "minutes": round(minutes, 2),
            "stages": {},
            "continues": {},
            "answers": {},
        }
        args.out.mkdir(parents=True, exist_ok=True)
        for name, command in commands(corpus, folder, minutes, args.dry_run).items():
            output, seconds = run(name, command)
            log = (folder / name / "log.jsonl").read_text(encoding="utf-8")
            told = next((line for line in output.splitlines() if line.startswith("Ops: ")), "")
            result["stages"][name] = {**summary(log), "seconds": seconds, "ops": told}
            if name == "pretrain":
                result["continues"] = said(output, "continues")
            write(result, args.out)
        chat = [sys.executable, "-m", "minimind_fast.cli", "chat", str(folder / "sft" / "weights")]
        for question in QUESTIONS[: 1 if args.dry_run else None]:
            output, _ = run(
                "chat", [*chat, "--max_new_tokens", "16" if args.dry_run else "120", "--seed", "0"], question
            )
            result["answers"][question] = output.strip()
        write(result, args.out)
    except ValueError as error:
        print(f"\nError: {error}", file=sys.stderr)
        return 1
    print("\n" + table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
