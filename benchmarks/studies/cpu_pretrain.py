"""Pretraining on a CPU: ours against MiniMind's eager loop, side by side in one run.

    python -m benchmarks.studies.cpu_pretrain --data_path pretrain.jsonl --val_data_path val.jsonl --tokenizer_path FOLDER

Purpose: useful tokens per second of both loops, losses at equal useful tokens, and where our time goes.
Principle: the same weights, documents, threads and learning rates. The baseline runs in its own process with the default
    allocator; ours configures its own. Steps alternate, so other load hits both equally; medians count. Useful tokens are
    positions with a target.
Properties: the baseline gets tokenised data, so only its padding costs it; ours is the real Trainer with its DeepSpeed
    engine and loader. Writes benchmarks/results/cpu_pretrain.json and .md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.eager_minimind import EagerMiniMind, EagerTraining
from benchmarks.peers.eager_minimind import loss as eager_loss
from benchmarks.record import RESULTS, environment, processor, write
from minimind_fast.data.cache import build_cache
from minimind_fast.data.packing import PackedBatches, PaddedBatches
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.ops.cards import peak_flops
from minimind_fast.training import ranks, setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window, clock
from minimind_fast.training.run import Stage
from minimind_fast.training.trainer import Trainer
from minimind_fast.weights.checkpoint import load_pretrained, save_pretrained

ROWS, LENGTH = 8, 512  # the baseline's micro-batch: rows of 512, batch 8
LEARNING_RATE = 5e-4
ATTENTION = ("bmm", "baddbmm", "_softmax", "_softmax_backward_data")  # operators used only by attention


class BaselineProcess:
    """The baseline in its own process, which answers one request at a time."""

    def __init__(self, args: argparse.Namespace, model: Any, accumulation: int) -> None:
        weights = Path(tempfile.mkdtemp()) / "start"
        save_pretrained(model, weights, dtype=torch.float32)
        command = [
            sys.executable,
            "-m",
            "benchmarks.studies.cpu_pretrain",
            "--role",
            "baseline",
            "--weights",
            str(weights),
        ]
        command += ["--accumulation", str(accumulation), "--threads", str(torch.get_num_threads())]
        for name in ("data_path", "val_data_path", "tokenizer_path", "cache_dir", "turns"):
            command += [f"--{name}", str(getattr(args, name))]
        self.process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.ask("ready")  # loaded before the first turn is timed

    def ask(self, what: str) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def take_step(self) -> tuple[int, float]:
        useful, value = self.ask("step")
        return useful, value


def answer_as_baseline(args: argparse.Namespace) -> None:
    """The baseline process: run a step or a validation for each line on standard input."""
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.load(args.tokenizer_path)
    caches = [
        build_cache(p, tokenizer, cache_dir=args.cache_dir or None, log=lambda _: None)
        for p in (args.data_path, args.val_data_path)
    ]
    model = EagerMiniMind.from_ours(load_pretrained(args.weights))
    data, rows = (PaddedBatches(cache, batch_size=ROWS, max_seq_len=LENGTH + 1) for cache in caches)
    baseline = EagerTraining(model, data, args.accumulation, args.turns, LEARNING_RATE)

    def total(batch: Any) -> torch.Tensor:
        return eager_loss(model, batch.input_ids, batch.targets) * batch.num_targets

    for line in sys.stdin:
        what = line.strip()
        result = baseline.take_step() if what == "step" else None
        if what == "val":
            result = validation_loss(total, setup.one_pass(rows))
        print(json.dumps(result), flush=True)


class Ours:
    """The Trainer, one step at a time."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.groups = trainer, trainer.groups()

    def take_step(self) -> tuple[int, float]:
        group, window = next(self.groups), Window()
        useful = sum(b.num_targets for b in group)
        self.trainer.train_step(group, useful, window)
        return useful, (window.sums["loss"] / useful).item()


def validation_loss(call: Any, batches: Any) -> float:
    total = count = 0.0
    with torch.no_grad():
        for batch in batches():
            total += float(call(batch))
            count += batch.num_targets
    return total / count


def profile(ours: Ours) -> dict[str, float]:
    """Share of our step's self CPU time by kind of operator."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with record(activities=[ProfilerActivity.CPU]) as recorded:
        ours.take_step()
    kinds = {"matmul": 0.0, "attention": 0.0, "optimizer": 0.0, "everything elementwise and copies": 0.0}
    for row in recorded.key_averages():
        key = row.key
        kind = (
            "matmul" if key in ("aten::mm", "aten::addmm") else
            "attention" if key.removeprefix("aten::") in ATTENTION or "attention" in key else
            "optimizer" if "adam" in key.lower() else
            "everything elementwise and copies"
        )  # fmt: skip
        kinds[kind] += row.self_cpu_time_total
    whole = sum(kinds.values())
    return {kind: value / whole for kind, value in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--val_data_path", required=True)
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--preset", default="minimind2-small")
    parser.add_argument(
        "--cache_dir", default="", help="where the tokenised data is cached; beside the data if not given"
    )
    parser.add_argument("--turns", type=int, default=8, help="optimizer steps of each loop, taken in turns")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--role", default="", help=argparse.SUPPRESS)
    parser.add_argument("--weights", default="", help=argparse.SUPPRESS)
    parser.add_argument("--accumulation", type=int, default=1, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "baseline":
        return answer_as_baseline(args)

    config = TrainConfig(
        preset=args.preset, tokenizer_path=args.tokenizer_path, data_path=[args.data_path], batch_size=16,
        max_seq_len=LENGTH, accumulation_steps=1, learning_rate=LEARNING_RATE, num_threads=args.threads,
        save_dir=tempfile.mkdtemp(), sample_tokens=0,
    )  # fmt: skip
    our_tokens = config.batch_size * LENGTH
    run, device = setup.begin(config, Stage("bench")), ranks.device()
    config = run.config
    tokenizer = setup.load_tokenizer(config)
    model = setup.load_model(config, tokenizer)
    cache = build_cache(args.data_path, tokenizer, cache_dir=args.cache_dir or None)
    val_cache = build_cache(args.val_data_path, tokenizer, cache_dir=args.cache_dir or None)
    fp32, fp32_how = peak_flops(device, torch.float32)
    bf16, _ = peak_flops(device, torch.bfloat16)
    precision = "bf16" if config.dtype == "bfloat16" else "fp32"

    # Equal useful tokens: a baseline step has as many micro-batches of rows as match one of our packs.
    rows = PaddedBatches(cache, batch_size=ROWS, max_seq_len=LENGTH + 1)
    mean_useful = statistics.mean(b.num_targets for b, _ in zip(rows, range(50), strict=False))
    accumulation = max(1, round(our_tokens / mean_useful))
    baseline = BaselineProcess(args, model, accumulation)
    data = PackedBatches(cache, batch_tokens=our_tokens, max_seq_len=LENGTH, seed=42)
    trainer = setup.make_trainer(run, model, tokenizer, data, setup.next_token_loss)
    trainer.total_steps = args.turns
    ours = Ours(trainer)
    some = PackedBatches(cache, batch_tokens=our_tokens, max_seq_len=LENGTH, seed=42)
    fill = statistics.mean(b.num_targets / our_tokens for b, _ in zip(some, range(50), strict=False))

    curves: dict[str, list[tuple[int, float]]] = {"baseline": [], "ours": []}
    rates: dict[str, list[float]] = {"baseline": [], "ours": []}
    for turn in range(args.turns):
        for name, loop in (("baseline", baseline), ("ours", ours)):
            begin = time.perf_counter()
            useful, value = loop.take_step()
            rates[name].append(useful / (time.perf_counter() - begin))
            curves[name].append(((curves[name][-1][0] if curves[name] else 0) + useful, value))
            print(
                f"turn {turn + 1}/{args.turns} {name:8} {rates[name][-1]:8,.0f} useful tok/s  loss {value:.3f}",
                flush=True,
            )

    val_packs = PackedBatches(val_cache, batch_tokens=8192, max_seq_len=LENGTH, seed=0, shuffle=False)
    trainer.model.eval()
    val = {
        "baseline": baseline.ask("val"),
        "ours": validation_loss(lambda b: setup.next_token_loss(trainer.engine, b).total, setup.one_pass(val_packs)),
    }
    trainer.model.train()
    median = {name: statistics.median(values) for name, values in rates.items()}
    pairs = LENGTH * (LENGTH + 1) // 2
    flops_a_token = model.flops(1, 0)
    positions_per_s = median["baseline"] / (mean_useful / (ROWS * LENGTH))
    flops_a_position = flops_a_token + model.flops(0, pairs) / LENGTH
    result = {
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "matmul_fp32_gflops": fp32 / 1e9,
            "matmul_bf16_gflops": bf16 / 1e9,
            "measured_by": fp32_how,
        },
        "preset": args.preset,
        "baseline": {
            "what": f"eager fp32, rows of {LENGTH} padded, batch {ROWS} x {accumulation}, whole logits, AdamW",
            "useful_tokens_per_s": median["baseline"],
            "turns": rates["baseline"],
            "useful_share": mean_useful / (ROWS * LENGTH),
            "positions_per_s": positions_per_s,
            "share_of_fp32_matmul": positions_per_s * flops_a_position / fp32,
            "curve": curves["baseline"],
            "val_loss": val["baseline"],
        },
        "ours": {
            "what": f"Trainer, {'bf16 with fp32 masters' if precision == 'bf16' else 'fp32'}, ZeRO {config.zero_stage}, "
            f"packs of {our_tokens} tokens",
            "precision": precision,
            "useful_tokens_per_s": median["ours"],
            "turns": rates["ours"],
            "useful_share": fill,
            "share_of_matmul": median["ours"] * flops_a_token / (bf16 if precision == "bf16" else fp32),
            "curve": curves["ours"],
            "val_loss": val["ours"],
            "profile": profile(ours),
        },
        "ratio": median["ours"] / median["baseline"],
        "epoch": {name: clock(cache.num_tokens / rate) for name, rate in median.items()},
    }
    write(RESULTS / "cpu_pretrain", result, table(result))
    print("\n" + table(result))


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    b, o, m = r["baseline"], r["ours"], r["machine"]
    shares = ", ".join(f"{kind} {share:.0%}" for kind, share in o["profile"].items())
    return f"""By `benchmarks/studies/cpu_pretrain.py` on {m["threads"]} threads of {m["processor"]}, torch {m["torch"]}, {r["preset"]}.

| loop | useful tokens/s | useful share of positions | share of the matmul rate | one epoch | validation loss |
|---|---|---|---|---|---|
| {b["what"]} | {b["useful_tokens_per_s"]:,.0f} | {b["useful_share"]:.1%} | {b["share_of_fp32_matmul"]:.0%} of fp32 | {r["epoch"]["baseline"]} | {b["val_loss"]:.3f} |
| {o["what"]} | {o["useful_tokens_per_s"]:,.0f} | {o["useful_share"]:.1%} | {o["share_of_matmul"]:.0%} of {o["precision"]} | {r["epoch"]["ours"]} | {o["val_loss"]:.3f} |
| ratio | **{r["ratio"]:.1f}x** | | | | |

Losses after {b["curve"][-1][0]:,} and {o["curve"][-1][0]:,} useful tokens. These cores multiply matrices at {m["matmul_fp32_gflops"]:.0f} GFLOP/s in
fp32 and {m["matmul_bf16_gflops"]:.3g} in bf16 ({m["measured_by"]}). Our step: {shares}.
"""  # noqa: E501


if __name__ == "__main__":
    setup.start(main)
