"""The whole chain in one go: tokenizer, pretraining, SFT, LoRA, DPO, distillation, reasoning, GRPO, and an answer.

Purpose: `make pipeline` runs every stage in under ten minutes on two CPU cores, on the shipped samples; with --data_path,
    --sft_data_path, ... the same on your own files.
Principle: a list of commands. Each stage is the script that you would start by hand, in its own process under the deepspeed
    launcher, and starts from the previous stage's folder; stages share nothing but files.
Properties: the final table is read from the runs' logs, except the last stage's row: the share of held-out sums that the
    model gets right, before and after. A failing stage ends the pipeline and is named. --STAGE_args passes any options to
    a stage and takes precedence.
"""

import argparse
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minimind_fast.data import samples
from minimind_fast.errors import UserError
from minimind_fast.training import setup
from minimind_fast.training.log import clock

TRAIN = Path(__file__).resolve().parent
QUESTIONS = ["What is 2 + 3?", "5加6等于多少？"]


@dataclass
class Stage:
    """A run of one script.

    Attributes:
        name: the script, and its folder in --save_dir.
        begins: the run whose weights it starts from, or none.
        share: fraction of --minutes.
        measures: keys in its log -> labels, best first; the first that the log has is shown.
        data: sample to train on, the script's default.
        val: sample to validate on, or "".
        extra: the stage's own options.
    """

    name: str
    begins: str
    share: float
    measures: dict[str, str]
    data: str
    val: str = ""
    extra: tuple[str, ...] = ()


LOSSES = {"val_loss": "validation loss", "loss": "training loss"}
STAGES = [
    Stage("pretrain", "none", 0.32, LOSSES, "pretrain", "pretrain_val"),
    Stage("sft", "pretrain", 0.19, LOSSES, "sft", "sft_val"),
    Stage("lora", "sft", 0.07, LOSSES, "lora_identity"),
    Stage("dpo", "lora", 0.05, {"reward_margin": "reward margin", **LOSSES}, "dpo", "dpo_val"),
    Stage("distill", "pretrain", 0.12, LOSSES, "sft", "sft_val", ("--teacher_path", "dpo")),
    Stage("reason", "distill", 0.06, LOSSES, "reason", "reason_val"),
    Stage("grpo", "reason", 0.19, {"reward": "reward"}, "grpo"),
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save_dir", default="out/pipeline", help="folder of all runs")
    parser.add_argument("--minutes", type=float, default=7.5, help="time of training, shared out among the stages")
    parser.add_argument("--max_steps", type=int, default=0, help="stop each stage after this many optimizer steps")
    parser.add_argument("--launcher", default="deepspeed", choices=["deepspeed", "python"], help="python: one process")
    parser.add_argument("--data_path", nargs="+", default=[], help="pretraining data, also for the tokenizer")
    parser.add_argument("--val_data_path", nargs="+", default=[], help="its validation data")
    for stage in STAGES[1:]:
        parser.add_argument(f"--{stage.name}_data_path", nargs="+", default=[], help=f"data of {stage.name}")
        if stage.val:
            parser.add_argument(f"--{stage.name}_val_data_path", nargs="+", default=[], help="its validation data")
    parser.add_argument("--args", default="", help='options for every stage, such as --args="--num_threads 2"')
    for name in ("tokenizer", *(stage.name for stage in STAGES)):
        parser.add_argument(f"--{name}_args", default="", help=f"options for {name}")
    return parser.parse_args(argv)


def run(name: str, command: list[str]) -> float:
    """Run one command and return its seconds; exits with a message if it fails."""
    print(f"\n=== {name}: {shlex.join(command[command.index(str(TRAIN / f'{name}.py')) :])}", flush=True)
    began = time.monotonic()
    code = subprocess.run(command, env=launcher_environment()).returncode
    if code:
        sys.exit(
            f"error: the stage {name} ended with exit code {code}; its output is above. The stages before it are done."
        )
    return time.monotonic() - began


def free_port() -> int:
    """A free TCP port: the launcher's default may be taken by another run."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launcher_environment() -> dict[str, str]:
    """The environment; without a GPU, it stops DeepSpeed's launcher from printing long warnings."""
    import torch

    return os.environ | ({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"})


def tokenizer_command(args: argparse.Namespace) -> list[str]:
    """Train a tokenizer; 3,000 tokens are enough for the sample's few words."""
    data = args.data_path or [str(samples.path("pretrain.jsonl"))]
    size = [] if args.data_path else ["--vocab_size", "3000"]
    where = ["--save_dir", str(Path(args.save_dir) / "tokenizer")]
    script = str(TRAIN / "tokenizer.py")
    return [sys.executable, script, "--data_path", *data, *size, *where, *shlex.split(args.tokenizer_args)]


def stage_command(args: argparse.Namespace, stage: Stage) -> list[str]:
    """The command that a user would type, with the stage's share of the time."""
    prefix = "" if stage.name == "pretrain" else f"{stage.name}_"
    options = vars(args)
    data, val = options[f"{prefix}data_path"], options.get(f"{prefix}val_data_path", [])
    if not data and stage.val:  # without a path the script uses its sample and matching defaults
        val = val or [str(samples.path(f"{stage.val}.jsonl"))]
    launcher = ["-m", "deepspeed.launcher.runner", "-q", "--master_port", str(free_port())]
    command = [sys.executable, *(launcher if args.launcher == "deepspeed" else []), str(TRAIN / f"{stage.name}.py")]
    command += ["--save_dir", args.save_dir, "--from_weight", stage.begins]
    command += ["--max_minutes", f"{args.minutes * stage.share:.3g}", "--max_steps", str(args.max_steps)]
    if stage.begins == "none":
        command += ["--tokenizer_path", str(Path(args.save_dir) / "tokenizer")]
    if data:
        command += ["--data_path", *data]
    if val:
        command += ["--val_data_path", *val]
    return [*command, *stage.extra, *shlex.split(args.args), *shlex.split(options[f"{stage.name}_args"])]


def change(log: Path, measures: dict[str, str]) -> tuple[str, float, float]:
    """How a run changed its measure: (label, first value, last value) in its log.

    Args:
        log: a log.jsonl.
        measures: keys to look for -> labels, best first.
    """
    rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    for key, name in measures.items():
        values = [row[key] for row in rows if key in row]
        if values:
            return name, values[0], values[-1]
    raise UserError(f"{log} has none of {', '.join(measures)}")


def share_right(weights: Path) -> float:
    """The share of held-out sums that a model gets right, thinking first, with greedy decoding."""
    from minimind_fast.data.tokenizer import Tokenizer
    from minimind_fast.infer.generate import generate_batch
    from minimind_fast.rl.rewards import correct
    from minimind_fast.weights.checkpoint import load_pretrained

    model, tokenizer = load_pretrained(weights), Tokenizer.load(weights)
    rows = [json.loads(line) for line in samples.path("grpo_val.jsonl").read_text(encoding="utf-8").splitlines()]
    prompts = [
        tokenizer.render_chat(row["conversations"][:1], add_generation_prompt=True, open_thinking=True) for row in rows
    ]
    outs = generate_batch(model, [tokenizer.encode(text) for text in prompts], max_new_tokens=64, temperature=0.0)
    answers = [tokenizer.decode(out, skip_special_tokens=True) for out in outs]
    return sum(correct(prompts, answers, rows)) / len(rows)


def chat(weights: Path) -> list[tuple[str, str]]:
    """Ask the last model with the command that a user would type -> (question, answer) pairs."""
    answers = []
    for question in QUESTIONS:
        command = [sys.executable, "-m", "minimind_fast.cli", "chat", str(weights), "--thinking"]
        command += ["--max_new_tokens", "64"]
        said = subprocess.run(command, input=question, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        answers.append((question, " ".join(said.stdout.split())))
        print("  {} → {}".format(*answers[-1]))
    return answers


def table(rows: list[tuple[Any, ...]]) -> str:
    """Format rows as aligned columns, numbers to the right.

    Args:
        rows: (stage, begins with, measure, before, after, seconds).
    """
    head = ("stage", "begins with", "measure", "before", "after", "time")
    shown = [(a, b, c, f"{x:.3f}", f"{y:.3f}", clock(s)) for a, b, c, x, y, s in rows]
    widths = [max(len(row[i]) for row in (head, *shown)) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in (head, *shown)
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    began = time.monotonic()
    folder = Path(args.save_dir)
    rows: list[tuple[Any, ...]] = []
    tokenizer_s = run("tokenizer", tokenizer_command(args))
    for stage in STAGES:
        seconds = run(stage.name, stage_command(args, stage))
        rows.append((stage.name, stage.begins, *change(folder / stage.name / "log.jsonl", stage.measures), seconds))
    last = folder / STAGES[-1].name / "weights"
    if not args.grpo_data_path:
        right = share_right(folder / "reason" / "weights"), share_right(last)
        rows.append(("", "", "sums never shown, right", *right, 0.0))
    print(f"\n{table(rows)}\n\nThe model of the last stage, asked:")
    answers = chat(last)
    total_s = time.monotonic() - began
    told = {"rows": rows, "seconds": total_s, "answers": answers, "threads": os.cpu_count()}
    (folder / "pipeline.json").write_text(json.dumps(told, ensure_ascii=False, indent=1), encoding="utf-8")
    print(f"Done: tokenizer in {clock(tokenizer_s)}, everything in {clock(total_s)}; all runs are in {folder}.")
    print(f"Next: minimind-fast chat {last} --thinking")


if __name__ == "__main__":
    setup.start(main)
