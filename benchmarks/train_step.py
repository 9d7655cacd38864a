"""Training end to end, one lever after another: useful tokens/s of a whole step, engine and loader included.

    python benchmarks/train_step.py --data_path pretrain.jsonl --tokenizer_path FOLDER [--preset minimind3] [--steps N]

Purpose: the headline of the project, and what each lever gives of it.
Principle: rungs of a ladder. The first is MiniMind's eager loop over padded rows (on a GPU also compiled); the second is
    our Trainer with plain reference ops on packed data, so that packing is credited apart; each further one switches one
    lever on. A rung runs in a process of its own; the processes wait for each other and take their steps in turns, so that
    whatever else the machine does meets them all.
Properties: the same weights, documents and learning rates for all. Useful tokens are positions with a target. Writes
    benchmarks/results/train_step_<device>.json and .md, with the loss of each rung's last step as a check.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cpu_pretrain import processor
from eager_minimind import EagerMiniMind, EagerTraining

from minimind_fast import attention_rows, engine, ops, stage
from minimind_fast.checkpoint import load_pretrained, save_pretrained
from minimind_fast.config import TrainConfig
from minimind_fast.data import PackedBatches, PaddedBatches
from minimind_fast.progress import peak_flops
from minimind_fast.token_cache import build_cache
from minimind_fast.trainer import Trainer, Window

RESULTS = Path(__file__).with_name("results")
LEARNING_RATE = 5e-4
LENGTH = 512


@dataclass(frozen=True)
class Rung:
    """One configuration: what is switched on beside the rung before."""

    name: str
    eager: bool = False
    compiled: bool = False
    dtype: str = "bfloat16"
    kernels: str = "auto"
    own_attention: bool = True  # by matmuls (CPU)
    kept_memory: bool = True  # freed blocks stay with the process (CPU)
    zero_stage: int = -1
    graphs: bool = False  # forward and backward replayed


PLAIN: dict[str, Any] = dict(kernels="none", own_attention=False, kept_memory=False)
CPU_LADDER = [
    Rung("MiniMind's eager loop: fp32, padded rows", eager=True, dtype="float32"),
    Rung("+ packed documents, fused projections (our model, reference ops)", dtype="float32", **PLAIN),
    Rung("+ bf16 with fp32 masters", **PLAIN),
    Rung("+ freed memory kept", **{**PLAIN, "kept_memory": True}),
    Rung("+ attention as matmuls", kernels="none"),
    Rung("+ ops in chunks that fit the cache: all of ours"),
    Rung("all of ours, --use_compile", compiled=True),
]
NAMES = [name for name in ops.NAMES if not name.startswith("moe") and name != "linear_kl"]
GPU_LADDER = [
    Rung("MiniMind's eager loop: autocast, padded rows", eager=True),
    Rung("MiniMind's eager loop, torch.compile", eager=True, compiled=True),
    Rung("packed, fused projections, bf16, fused AdamW (our model, reference ops)", kernels="none"),
    Rung("the same, torch.compile", kernels="none", compiled=True),
    *(Rung(f"+ {name}", kernels=",".join(NAMES[: i + 1])) for i, name in enumerate(NAMES)),
    Rung("all of ours, ZeRO 0", zero_stage=0),
    Rung("all of ours, ZeRO 2", zero_stage=2),
    Rung("all of ours, --cuda_graphs", graphs=True),
    Rung("all of ours"),
]


def ladder() -> list[Rung]:
    """The rungs of this machine."""
    return GPU_LADDER if torch.cuda.is_available() else CPU_LADDER


class _PlainRows:
    """PyTorch's own attention, forward and backward, in the place of `attention_rows._Rows`."""

    apply = staticmethod(attention_rows.plain_rows)


def make_step(args: argparse.Namespace, rung: Rung) -> Any:
    """A function that takes one optimizer step and gives (useful tokens, their loss, FLOPs of our model or 0)."""
    if not rung.own_attention:
        attention_rows._Rows = _PlainRows  # type: ignore[assignment]
    if not rung.kept_memory:
        engine.keep_freed_memory = lambda: None
    config = TrainConfig(
        tokenizer_path=args.tokenizer_path, data_path=[args.data_path], batch_size=args.pack_tokens // LENGTH,
        max_seq_len=LENGTH, accumulation_steps=1, learning_rate=LEARNING_RATE, num_threads=args.threads, dtype=rung.dtype,
        kernels=rung.kernels, use_compile=rung.compiled, zero_stage=rung.zero_stage,
        cuda_graphs=rung.graphs, save_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    device = stage.begin(config)
    tokenizer = stage.load_tokenizer(config)
    cache = build_cache(args.data_path, tokenizer, cache_dir=args.cache_dir or None, log=lambda _: None)
    model = load_pretrained(args.weights)
    if rung.eager:
        rows = 32 if device.type == "cuda" else 8  # MiniMind's batch sizes on a GPU, and one that a CPU's memory holds
        padded = PaddedBatches(cache, batch_size=rows, max_seq_len=LENGTH + 1)
        useful = statistics.mean(b.num_targets for b, _ in zip(padded, range(50), strict=False))
        eager = EagerMiniMind.from_ours(model).to(device)
        if rung.compiled:
            eager.compile()
        accumulation = max(1, round(args.pack_tokens / useful))  # as many useful tokens in an optimizer step
        training = EagerTraining(eager, cache, rows, LENGTH, accumulation, args.steps, LEARNING_RATE)
        return lambda: (*training.take_step(), 0)
    data = PackedBatches(cache, batch_tokens=args.pack_tokens, max_seq_len=LENGTH, seed=42)
    trainer = Trainer(config, "bench", model, tokenizer, data, stage.next_token_loss, device)
    trainer.total_steps = args.steps
    groups = trainer.groups()

    def step() -> tuple[int, float, int]:
        group, window = next(groups), Window()
        counted = sum(b.num_targets for b in group)
        trainer.train_step(group, counted, window)
        loss = (window.sums["loss"] / counted).item()  # waits for the device
        return counted, loss, model.flops(window.tokens, window.pairs)

    return step


def work(args: argparse.Namespace) -> None:
    """A rung's process: a line in, some steps, a line out."""
    step = make_step(args, ladder()[args.rung])
    for line in sys.stdin:
        begin, useful, flops, value = time.perf_counter(), 0, 0, 0.0
        for _ in range(int(line)):
            more, value, work_done = step()
            useful, flops = useful + more, flops + work_done
        seconds = time.perf_counter() - begin
        got = {"rate": useful / seconds, "loss": value, "seconds": seconds, "flops": flops / max(useful, 1)}
        print(json.dumps(got), flush=True)


class Process:
    """A rung in a process of its own."""

    def __init__(self, args: argparse.Namespace, rung: int) -> None:
        names = ("data_path", "tokenizer_path", "cache_dir", "threads", "pack_tokens", "steps", "weights")
        options = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
        command = [sys.executable, __file__, "--rung", str(rung), *options]
        # This process is a rank already; the rung's is to become one of its own.
        alone = {
            k: v for k, v in os.environ.items() if "RANK" not in k and "WORLD_SIZE" not in k and "MASTER_" not in k
        }
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone)

    def take(self, steps: int) -> dict[str, float]:
        """Steps in a row -> useful tokens/s over all of them, the last one's loss, seconds, FLOPs a useful token."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ValueError(f"a rung's process ended with exit code {self.process.wait()}; what it said is above")

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--data_path", required=True)
    add("--tokenizer_path", required=True)
    add("--cache_dir", default="", help="where the tokenised data is cached; beside it if not given")
    add("--preset", default="minimind3" if on_gpu else "minimind2-small")
    add("--pack_tokens", type=int, default=53248 if on_gpu else 8192, help="positions of a packed optimizer step")
    add("--warm", type=int, default=20 if on_gpu else 2, help="steps before the clock runs")
    add("--steps", type=int, default=60 if on_gpu else 3, help="timed steps of each rung")
    add("--turns", type=int, default=3, help="the timed steps are taken in this many turns")
    add("--threads", type=int, default=0)
    add("--rungs", type=int, nargs="*", help="which of the ladder, from 0 (default: all)")
    add("--rung", type=int, default=-1, help=argparse.SUPPRESS)
    add("--weights", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rung >= 0:
        return work(args)
    args.weights = str(Path(tempfile.mkdtemp()) / "start")
    config = TrainConfig(preset=args.preset, tokenizer_path=args.tokenizer_path, num_threads=args.threads)
    stage.begin(config)
    model = stage.load_model(config, stage.load_tokenizer(config))
    save_pretrained(model, args.weights, dtype=torch.float32)
    rungs = args.rungs if args.rungs is not None else range(len(ladder()))
    rates: dict[int, list[float]] = {i: [] for i in rungs}
    losses, first_s, flops = {}, {}, 0.0
    # On a GPU one rung at a time, as their memory would not fit together; on a CPU all wait while one computes.
    groups = [[i] for i in rungs] if on_gpu else [list(rungs)]
    for together in groups:
        running = {i: Process(args, i) for i in together}
        for i, process in running.items():
            first_s[i] = process.take(1)["seconds"]
            process.take(args.warm - 1)
            print(f"{ladder()[i].name}: warm", flush=True)
        for _turn in range(args.turns):
            for i, process in running.items():
                got = process.take(max(1, args.steps // args.turns))
                rates[i].append(got["rate"])
                losses[i], flops = got["loss"], got["flops"] or flops
                print(f"{ladder()[i].name}: {got['rate']:,.0f} useful tok/s, loss {got['loss']:.3f}", flush=True)
        for process in running.values():
            process.close()
    peak, source = peak_flops(torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16)
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "preset": args.preset,
        "pack_tokens": args.pack_tokens,
        "peak_flop_per_s": peak,
        "peak_is": source,
        "flop_per_useful_token": flops,
        "rungs": [
            {
                "name": ladder()[i].name,
                "useful_tokens_per_s": statistics.median(rates[i]),
                "turns": rates[i],
                "first_step_s": first_s[i],
                "loss": losses[i],
            }
            for i in rungs
        ],
    }
    name = f"train_step_{'gpu' if on_gpu else 'cpu'}"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(table(result), encoding="utf-8")
    print("\n" + table(result))


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = r["device"] if torch.cuda.is_available() else f"{r['threads']} threads of {r['device']}"
    lines = [
        f"Measured by `benchmarks/train_step.py` on {where}, torch {r['torch']}, {r['preset']}, about "
        f"{r['pack_tokens']:,} useful tokens an optimizer step.",
        "",
        "| what runs | useful tokens/s | of the first | of the rung before | loss | first step |",
        "|---|---|---|---|---|---|",
    ]
    first = before = r["rungs"][0]["useful_tokens_per_s"]
    for rung in r["rungs"]:
        rate = rung["useful_tokens_per_s"]
        lines.append(
            f"| {rung['name']} | {rate:,.0f} | {rate / first:.2f}x | {rate / before:.2f}x | {rung['loss']:.3f} | "
            f"{rung['first_step_s']:.1f} s |"
        )
        before = rate
    if r["flop_per_useful_token"]:
        roof = r["peak_flop_per_s"] / r["flop_per_useful_token"]
        lines += [
            "",
            f"The arithmetic of our step, {r['flop_per_useful_token'] / 1e6:.0f} MFLOP a useful token, at "
            f"{r['peak_flop_per_s'] / 1e9:,.0f} GFLOP/s ({r['peak_is']}) and with nothing beside it would be "
            f"{roof:,.0f} useful tokens/s, {roof / first:.1f}x the first row.",
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    stage.start(main)
