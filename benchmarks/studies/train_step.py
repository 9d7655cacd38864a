"""End-to-end training, one optimization after another: useful tokens/s, including engine and loader.

    python -m benchmarks.studies.train_step [--data_path pretrain.jsonl --tokenizer_path FOLDER] [--rungs ...]

Purpose: the project's headline speed, and what each optimization contributes.
Principle: a ladder of rungs. The first is MiniMind's eager loop over padded rows; then over rows filled with joined
    documents, to credit packing separately; then our Trainer with plain reference ops, and from there one optimization per
    rung. Variants beside the ladder (torch.compile, ZeRO stages, graphs, one thread) are compared with the rung they
    change. Each rung runs in its own process; on a CPU, groups of four alternate steps, so other load hits all equally.
Properties: the same weights, documents and learning rates for all. Useful tokens are positions with a target. Writes
    train_step_<device>.json and .md, with each rung's last loss as a check: rows of joined documents attend to the
    previous document, all others compute the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.eager_minimind import EagerMiniMind, EagerTraining
from benchmarks.record import RESULTS, environment, processor, write
from minimind_fast import ops
from minimind_fast.config import IGNORE_INDEX
from minimind_fast.data import samples
from minimind_fast.data.batches import Batch
from minimind_fast.data.cache import TokenCache, build_cache
from minimind_fast.data.packing import PackedBatches, PaddedBatches
from minimind_fast.ops import precision
from minimind_fast.ops.cards import peak_flops
from minimind_fast.ops.cpu import attention as attention_rows
from minimind_fast.training import ranks, setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.run import Stage
from minimind_fast.weights.checkpoint import load_pretrained, save_pretrained

LEARNING_RATE = 5e-4
LENGTH = 512
OTHERS = ("eager", "eager-compile", "joined", "joined-compile", "compile")  # baselines for our speed-up


@dataclass(frozen=True)
class Rung:
    """One configuration: what it turns on relative to the rung before."""

    key: str
    name: str
    aside: str = ""  # key of the rung to compare with, if not the one before; such a rung is not part of the ladder
    eager: bool = False
    joined: bool = False  # fill the eager loop's rows with documents
    compiled: bool = False
    dtype: str = field(default_factory=lambda: precision.choose("auto"))
    kernels: str = "auto"
    attention: str = "auto"
    fused_adam: bool = True
    micro_batches: int = 1
    own_attention: bool = True  # our attention by matmuls (CPU)
    kept_memory: bool = True  # keep freed blocks in the process (CPU)
    zero_stage: int = -1
    graphs: bool = False  # replay forward and backward
    threads: int = 0


def _cpu_ladder() -> list[Rung]:
    eager = Rung("eager", "MiniMind's eager loop: fp32, padded rows", eager=True, dtype="float32", kept_memory=False)
    plain = Rung("packed", "+ documents apart, fused projections (our model, reference ops)", dtype="float32")
    plain = replace(plain, kernels="none", fused_adam=False, own_attention=False, kept_memory=False)
    adam = replace(plain, key="adam", name="+ fused AdamW", fused_adam=True)
    bf16 = replace(adam, key="bf16", name="+ bf16 with fp32 masters", dtype=precision.choose("auto"))
    masters = [bf16] if bf16.dtype != adam.dtype else []
    kept = replace(bf16, key="kept", name="+ freed memory kept", kept_memory=True)
    matmuls = replace(kept, key="attention", name="+ attention as matmuls", own_attention=True)
    return [
        *(eager, replace(eager, key="joined", name="the same, rows filled with joined documents", joined=True)),
        *(plain, adam, *masters, kept, matmuls),
        Rung("ours", "+ ops in chunks that fit the cache: **all of ours**"),
        Rung("compile", "ours with --use_compile", "ours", compiled=True),
        Rung("thread", "ours on one thread", "ours", threads=1),
    ]


def _gpu_ladder() -> list[Rung]:
    eager = Rung("eager", "MiniMind's eager loop: autocast, padded rows", eager=True)
    joined = replace(eager, key="joined", name="the same, rows filled with joined documents", joined=True)
    plain = Rung("packed", "+ documents apart, fused projections, bf16 with fp32 masters (our model, reference ops)")
    plain = replace(plain, kernels="none", attention="sdpa", fused_adam=False, micro_batches=8)
    adam = replace(plain, key="adam", name="+ fused AdamW", fused_adam=True)
    whole = replace(adam, key="whole", name="+ one micro-batch in place of 8", micro_batches=1)
    varlen = replace(whole, key="attention", name="+ attention that knows documents", attention="auto")
    names = [name for name, op in ops.OPS.items() if op.in_forward and op.preset_case("minimind3", 1)]
    some = [",".join(names[: i + 1]) for i in range(len(names))]
    kernels = [replace(varlen, key=n, name=f"+ {n}", kernels=k) for n, k in zip(names, some, strict=True)]
    return [
        *(eager, replace(eager, key="eager-compile", name="with torch.compile", aside="eager", compiled=True)),
        *(joined, replace(joined, key="joined-compile", name="with torch.compile", aside="joined", compiled=True)),
        *(plain, adam, whole, varlen),
        replace(varlen, key="compile", name="with torch.compile", aside="attention", compiled=True),
        *kernels[:-1],
        replace(kernels[-1], key="ours", name=f"{kernels[-1].name}: **all of ours**", kernels="auto"),
        Rung("graphs", "ours with --cuda_graphs", "ours", graphs=True),
        Rung("zero0", "ours with --zero_stage 0", "ours", zero_stage=0),
        Rung("zero2", "ours with --zero_stage 2", "ours", zero_stage=2),
    ]


def ladder() -> list[Rung]:
    """The rungs for this machine."""
    return _gpu_ladder() if torch.cuda.is_available() else _cpu_ladder()


class _PlainRows:
    """PyTorch's attention, forward and backward, replacing `attention_rows._Rows`."""

    apply = staticmethod(attention_rows.plain_rows)


class _UnfusedAdamW(torch.optim.AdamW):
    """PyTorch's default: foreach on a GPU, one tensor at a time on a CPU."""

    def __init__(self, *groups: Any, **how: Any) -> None:
        super().__init__(*groups, **{**how, "fused": False, "foreach": torch.cuda.is_available()})


class JoinedRows:
    """Packs cut into rows of one length; an incomplete row is dropped.

    Args:
        packs: documents end to end.
        length: positions per row.
    """

    def __init__(self, packs: PackedBatches, length: int) -> None:
        self.packs, self.length = packs, length

    def __iter__(self) -> Iterator[Batch]:
        for pack in self.packs:
            tokens = pack.input_ids.numel() // self.length * self.length
            if not tokens:
                continue
            ids, targets = (x[:tokens].view(-1, self.length) for x in (pack.input_ids, pack.targets))
            rows, counted = len(ids), int((targets != IGNORE_INDEX).sum())
            yield Batch(ids, targets, None, self.length, counted, rows)


def make_eager(args: argparse.Namespace, rung: Rung, device: torch.device, cache: TokenCache) -> Any:
    """Build the eager loop's step."""
    rows = 32 if device.type == "cuda" else 8  # MiniMind's batch size on a GPU, and one that fits in a CPU's memory
    rows = min(rows, args.pack_tokens // LENGTH)
    padded = PaddedBatches(cache, batch_size=rows, max_seq_len=LENGTH + 1)
    useful = statistics.mean(b.num_targets for b, _ in zip(padded, range(50), strict=False))
    batches: Iterable[Batch] = padded
    if rung.joined:
        packs = PackedBatches(cache, batch_tokens=rows * LENGTH, max_seq_len=LENGTH, seed=42)
        batches, useful = JoinedRows(packs, LENGTH), rows * LENGTH
    model = EagerMiniMind.from_ours(load_pretrained(args.weights)).to(device)
    if rung.compiled:
        model.compile()
    accumulation = max(1, round(args.pack_tokens / useful))  # equal useful tokens per optimizer step
    training = EagerTraining(model, batches, accumulation, args.steps, LEARNING_RATE)
    return lambda: (*training.take_step(), 0)


def make_step(args: argparse.Namespace, rung: Rung) -> Any:
    """A function that takes one optimizer step and returns (useful tokens, their loss, FLOPs of our model or 0)."""
    if not rung.own_attention:
        attention_rows._Rows = _PlainRows  # type: ignore[assignment]
    if not rung.kept_memory:
        ranks.keep_freed_memory = lambda: None
    tokens = args.pack_tokens // rung.micro_batches
    config = TrainConfig(
        tokenizer_path=args.tokenizer_path, data_path=[args.data_path], batch_size=tokens // LENGTH, max_seq_len=LENGTH,
        accumulation_steps=rung.micro_batches, learning_rate=LEARNING_RATE, dtype=rung.dtype, kernels=rung.kernels,
        attention=rung.attention, use_compile=rung.compiled, zero_stage=rung.zero_stage, cuda_graphs=rung.graphs,
        num_threads=rung.threads or args.threads, save_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    run, device = setup.begin(config, Stage("bench")), ranks.device()
    if not rung.fused_adam:
        torch.optim.AdamW = _UnfusedAdamW  # type: ignore[misc]
    tokenizer = setup.load_tokenizer(run.config)
    cache = build_cache(args.data_path, tokenizer, cache_dir=args.cache_dir or None, log=lambda _: None)
    if rung.eager:
        return make_eager(args, rung, device, cache)
    model = load_pretrained(args.weights)
    data = PackedBatches(cache, batch_tokens=tokens, max_seq_len=LENGTH, seed=42)
    trainer = setup.make_trainer(run, model, tokenizer, data, setup.next_token_loss)
    trainer.total_steps = args.steps
    groups = trainer.groups()

    def step() -> tuple[int, float, int]:
        group, window = next(groups), Window()
        counted = sum(b.num_targets for b in group)
        trainer.train_step(group, counted, window)
        loss = (window.sums["loss"] / counted).item()  # synchronises
        return counted, loss, model.flops(window.tokens, window.pairs)

    return step


def work(args: argparse.Namespace) -> None:
    """A rung's process: read a line, take steps, write a line."""
    step = make_step(args, next(r for r in ladder() if r.key == args.rung))
    for line in sys.stdin:
        begin, useful, flops, value = time.perf_counter(), 0, 0, 0.0
        for _ in range(int(line)):
            more, value, work_done = step()
            useful, flops = useful + more, flops + work_done
        seconds = time.perf_counter() - begin
        got = {"rate": useful / seconds, "loss": value, "seconds": seconds, "flops": flops / max(useful, 1)}
        print(json.dumps(got), flush=True)


class Process:
    """A rung in its own process."""

    def __init__(self, args: argparse.Namespace, rung: str) -> None:
        names = ("data_path", "tokenizer_path", "cache_dir", "threads", "pack_tokens", "steps", "weights")
        options = [part for name in names for part in (f"--{name}", str(getattr(args, name)))]
        command = [sys.executable, "-m", "benchmarks.studies.train_step", "--rung", rung, *options]
        # This process is already a rank; the rung's must become its own.
        alone = {
            k: v for k, v in environment().items() if "RANK" not in k and "WORLD_SIZE" not in k and "MASTER_" not in k
        }
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone)

    def take(self, steps: int) -> dict[str, float]:
        """Take steps in a row -> useful tokens/s over all, the last loss, seconds, FLOPs per useful token."""
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
    add("--data_path", default="", help="JSONL; the shipped sample if not given")
    add("--tokenizer_path", default=str(samples.path("tokenizer")))
    add("--cache_dir", default="", help="where the tokenised data is cached; beside it if not given")
    add("--preset", default="minimind3" if on_gpu else "minimind2-small")
    add("--pack_tokens", type=int, default=53248 if on_gpu else 8192, help="positions of a packed optimizer step")
    add("--warm", type=int, default=200 if on_gpu else 2, help="steps before the clock runs")
    add("--steps", type=int, default=1000 if on_gpu else 3, help="timed steps of each rung")
    add("--turns", type=int, default=3, help="the timed steps are taken in this many turns")
    add("--threads", type=int, default=0)
    add("--rungs", nargs="*", choices=[rung.key for rung in ladder()], help="which of the ladder (default: all)")
    add("--out", type=Path, default=RESULTS)
    add("--rung", default="", help=argparse.SUPPRESS)
    add("--weights", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rung:
        return work(args)
    if not args.data_path:
        args.data_path, args.cache_dir = str(samples.path("pretrain.jsonl")), args.cache_dir or tempfile.mkdtemp()
    args.weights = start_weights(args)
    rungs = [rung for rung in ladder() if args.rungs is None or rung.key in args.rungs]
    rates: dict[str, list[float]] = {rung.key: [] for rung in rungs}
    losses, first_s, flops = {}, {}, 0.0
    together = 1 if on_gpu else 4  # rungs that fit in memory together
    for some in (rungs[i : i + together] for i in range(0, len(rungs), together)):
        running = {rung: Process(args, rung.key) for rung in some}
        for rung, process in running.items():
            first_s[rung.key] = process.take(1)["seconds"]
            process.take(args.warm - 1)
            print(f"{rung.name}: warm", flush=True)
        for _turn in range(args.turns):
            for rung, process in running.items():
                got = process.take(max(1, args.steps // args.turns))
                rates[rung.key].append(got["rate"])
                losses[rung.key], flops = got["loss"], got["flops"] or flops
                print(f"{rung.name}: {got['rate']:,.0f} useful tok/s, loss {got['loss']:.3f}", flush=True)
        for process in running.values():
            process.close()
    peak, source = peak_flops(torch.device("cuda" if on_gpu else "cpu"), precision.of("auto"))
    medians = {key: statistics.median(values) for key, values in rates.items()}
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "on_gpu": on_gpu,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "preset": args.preset,
        "pack_tokens": args.pack_tokens,
        "peak_flop_per_s": peak,
        "peak_is": source,
        "flop_per_useful_token": flops,
        **{f"times_{other}": medians["ours"] / medians[other] for other in OTHERS if {"ours", other} <= set(medians)},
        "rungs": [
            {
                "key": rung.key,
                "name": rung.name,
                "compared_with": rung.aside,
                "useful_tokens_per_s": medians[rung.key],
                "turns": rates[rung.key],
                "first_step_s": first_s[rung.key],
                "loss": losses[rung.key],
            }
            for rung in rungs
        ],
    }
    name = f"train_step_{'gpu' if on_gpu else 'cpu'}"
    write(args.out / name, result, table(result))
    print("\n" + table(result))


def start_weights(args: argparse.Namespace) -> str:
    """A folder with the initial weights of all rungs."""
    folder = str(Path(tempfile.mkdtemp()) / "start")
    config = TrainConfig(preset=args.preset, tokenizer_path=args.tokenizer_path, num_threads=args.threads)
    config = setup.begin(config, Stage("start")).config
    model = setup.load_model(config, setup.load_tokenizer(config))
    save_pretrained(model, folder, dtype=torch.float32)
    return folder


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = r["device"] if r["on_gpu"] else f"{r['threads']} threads of {r['device']}"
    lines = [
        f"By `benchmarks/studies/train_step.py` on {where}, torch {r['torch']}, {r['preset']}, about "
        f"{r['pack_tokens']:,} useful tokens an optimizer step.",
        "",
        "| what runs | useful tokens/s | of the first | of the rung before, or as named | loss | first step |",
        "|---|---|---|---|---|---|",
    ]
    speeds = {rung["key"]: rung["useful_tokens_per_s"] for rung in r["rungs"]}
    first = before = r["rungs"][0]["useful_tokens_per_s"]
    for rung in r["rungs"]:
        rate, other = rung["useful_tokens_per_s"], speeds.get(rung["compared_with"], before)
        lines.append(
            f"| {rung['name']} | {rate:,.0f} | {rate / first:.2f}x | {rate / other:.2f}x | {rung['loss']:.3f} | "
            f"{rung['first_step_s']:.1f} s |"
        )
        before = before if rung["compared_with"] else rate
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
    setup.start(main)
