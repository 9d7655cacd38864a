"""The cost of DeepSpeed's engine in a training step: ZeRO 0 to 3 on one and two ranks against a bare loop.

    python -m benchmarks.studies.engine_share [--preset PRESET] [--tokens N] [--accumulation 1 4] [--world 1 2]

Purpose: the engine's milliseconds in an optimizer step, their share of it, and where they go.
Principle: the bare loop (bare_loop.py) has the same model, ops, batches, learning rates, clipping and fused AdamW; the other
    side is the real Trainer. Each loop has its own processes, one per rank, and all take single steps in turns, so other
    load hits all equally. The breakdown is measured afterwards, with clocks around the functions of both.
Properties: batches of one size, so all do the same work. A loop whose losses or weights differ from the bare loop's gets no
    time. Writes benchmarks/results/cpu_engine_share.json and .md, gpu_ on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib.metadata
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.record import RESULTS, environment, processor
from benchmarks.record import write as write_result
from benchmarks.studies.bare_loop import PHASES, BareLoop, FixedBatches, Phases
from benchmarks.timing import percentiles
from minimind_fast.config import ModelConfig
from minimind_fast.data import samples
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.training import ranks, setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.run import Stage
from minimind_fast.training.trainer import Trainer

PLAIN = "ZeRO 1 plain"  # DeepSpeed's defaults where `engine` overrides them
LOOPS = ("bare", "ZeRO 0", "ZeRO 1", PLAIN, "ZeRO 2", "ZeRO 3")
# Tolerance of the final loss against the bare loop's, in nats per token: stages sum in different orders, and in bf16 some
# of them round gradients that others sum in float32.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}


# phase -> owner -> functions: of the trainer, the engine, its optimizer (one class per stage) and that class's module, the
# fetching and releasing of weights at stage 3, ... Time counts for the innermost function named here.
CLOCKED: dict[str, dict[str, tuple[str, ...]]] = {
    "forward": {"trainer": ("loss",)},
    "backward": {"engine": ("backward",)},
    "gradients": {  # copied, summed and reduced
        "engine": ("allreduce_gradients",),
        "optimizer": (
            *("update_hp_grads", "accumulate_hp_grads_and_remove_lp", "reduce_ready_partitions_and_remove_grads"),
            *("reduce_independent_p_g_buckets_and_remove_grads", "independent_gradient_partition_epilogue"),
            *("flatten", "flatten_dense_tensors_aligned", "_prepare_sub_group"),
        ),
    },
    "norm, clip": {  # and the check that all is finite
        "optimizer": ("check_overflow", "scaled_global_norm", "_get_norm_groups", "unscale_and_clip_grads"),
        "optimizer's module": (
            *("get_global_norm_of_tensors", "is_invalid_grad_norm", "clip_tensors_by_global_norm", "get_weight_norm"),
        ),
        "overflow checker": ("check",),
        "torch.nn.utils": ("clip_grad_norm_",),
    },
    "AdamW": {"AdamW": ("step",)},
    "weights": {  # from the masters, from the other ranks
        "optimizer": (
            *("update_lp_params", "_update_model_bit16_weights", "_reassign_or_swap_out_partitioned_parameters"),
            *("_partition_all_parameters", "_post_step"),
        ),
        "optimizer's module": ("all_gather_dp_groups",),
        "coordinator": ("fetch_sub_module", "release_sub_module", "reset_step"),
    },
    "clearing": {"optimizer": ("clear_hp_grads", "clear_lp_grads", "zero_grad"), "engine": ("zero_grad",)},
}


def clock_engine(trainer: Trainer, phases: Phases) -> None:
    """Clock the parts of a trainer's step into `phases`."""
    engine = trainer.engine._ds
    optimizer = engine.optimizer
    offload = getattr(optimizer, "parameter_offload", None)
    owners = {
        "trainer": trainer,
        "engine": engine,
        "optimizer": optimizer,
        "optimizer's module": sys.modules[type(optimizer).__module__],
        "overflow checker": getattr(optimizer, "overflow_checker", None),
        "torch.nn.utils": torch.nn.utils,
        "AdamW": engine.basic_optimizer,
        "coordinator": offload and offload.get_param_coordinator(),
    }
    for phase, functions in CLOCKED.items():
        for owner, names in functions.items():
            for name in names:
                phases.wrap(owners[owner], name, phase)


def plain_config(ds: Mapping[str, Any]) -> dict[str, Any]:
    """A run's DeepSpeed config without our changes for speed."""
    made = copy.deepcopy(dict(ds))
    del made["timers"], made["zero_optimization"]["reduce_bucket_size"]
    made.pop("communication_data_type", None)
    if "bf16" in made:
        made["bf16"] = {"enabled": True}
    return made


def make_model(preset: str) -> MiniMind:
    """The model that every loop and rank starts with."""
    torch.manual_seed(0)
    return MiniMind(ModelConfig.preset(preset, max_position_embeddings=4096))


class Loop:
    """One of LOOPS as something that takes steps.

    Args:
        args: preset, dtype, tokens, accumulation (one number), threads, total_steps.
        name: one of LOOPS.
    """

    def __init__(self, args: Any, name: str) -> None:
        self.total_steps, self.accumulation = args.total_steps, args.accumulation
        config = TrainConfig(
            preset=args.preset, batch_size=1, max_seq_len=args.tokens, accumulation_steps=args.accumulation,
            dtype=args.dtype, num_threads=args.threads, learning_rate=5e-4, save_dir=tempfile.mkdtemp(),
            zero_stage=-1 if name == "bare" else int(name.split()[1]),
        )  # fmt: skip
        run = setup.begin(config, Stage("share"))
        self.device, (self.rank, self.world_size) = ranks.device(), ranks.world()
        model = make_model(args.preset)
        self.phases = Phases(self.device)
        data = FixedBatches(args.tokens, model.config.vocab_size, self.rank)
        self.batches = iter(data)
        if name == "bare":
            self.bare = BareLoop(model.to(self.device), run.config, self.phases)
            self.train_step: Callable[..., Any] = functools.partial(self.bare.train_step, total_steps=self.total_steps)
            self.trainer = None
        else:
            if name == PLAIN:
                run = dataclasses.replace(run, deepspeed=plain_config(run.deepspeed))
            tokenizer = Tokenizer.load(samples.path("tokenizer"))
            self.trainer = setup.make_trainer(run, model, tokenizer, data, setup.next_token_loss)
            self.trainer.total_steps = self.total_steps
            self.train_step = self.trainer.train_step
            if name == PLAIN:
                self.trainer.engine._ds.enable_backward_allreduce = True
                vars(self.trainer.engine._ds.optimizer).pop("zero_grad", None)

    def take(self, steps: int) -> dict[str, Any]:
        """Take steps in a row.

        Returns:
            seconds per step, and rank 0's mean loss per token in the last.
        """
        groups = [[next(self.batches) for _ in range(self.accumulation)] for _ in range(steps)]
        counted = sum(b.num_targets for b in groups[0])
        window = Window()
        if self.world_size > 1:
            dist.barrier()
        self._wait()
        begin = time.perf_counter()
        for group in groups:
            window = Window()
            with self.phases("rest"):
                self.train_step(group, float(counted * self.world_size), window)
        self._wait()
        seconds = (time.perf_counter() - begin) / steps
        return {"seconds": seconds, "loss": (window.sums["loss"] / counted).item()}

    def take_clocked(self, steps: int) -> dict[str, Any]:
        """Milliseconds per step by phase; clocks add overhead, and a GPU waits at each. Call it once."""
        if self.trainer is not None:
            clock_engine(self.trainer, self.phases)
        self.phases.on = True
        self.take(steps)
        self.phases.on = False
        return {"phases": {name: 1e3 * self.phases.seconds[name] / steps for name in PHASES}}

    def save(self, file: str) -> dict[str, Any]:
        """Write rank 0's full weights, in float32."""
        if self.trainer is None:
            whole, model = contextlib.nullcontext(), self.bare.module
        else:
            whole, model = self.trainer.engine.gathered(), self.trainer.model
        with whole:
            if self.rank == 0:
                torch.save([p.detach().float().cpu() for p in model.parameters()], file)
        return {}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def work(args: argparse.Namespace) -> None:
    """A rank's process: read a command line, run it, write an answer line."""
    loop = Loop(args, args.loop)
    for line in sys.stdin:
        what, value = line.split()
        done = loop.save(value) if what == "save" else getattr(loop, what)(int(value))
        print(json.dumps(done), flush=True)
    ranks.leave()


class Ranks:
    """A loop's processes, which answer one request at a time.

    Args:
        args: options of this program.
        loop: one of LOOPS.
        world: number of ranks.
        accumulation: micro-batches per step.
        total_steps: length of the schedule.
    """

    def __init__(self, args: argparse.Namespace, loop: str, world: int, accumulation: int, total_steps: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        given = dict(preset=args.preset, dtype=args.dtype, tokens=args.tokens, threads=args.threads)
        given.update(loop=loop, accumulation=accumulation, total_steps=total_steps)
        options = [part for name, value in given.items() for part in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "benchmarks.studies.engine_share", *options]
        ours = ("RANK", "WORLD_SIZE", "MASTER_")
        alone = {k: v for k, v in environment().items() if not any(word in k for word in ours)}
        self.processes = []
        for rank in range(world):
            own = dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
            own.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            pipes: dict[str, Any] = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.processes.append(subprocess.Popen(command, env={**alone, **own}, **pipes))

    def ask(self, what: str) -> dict[str, Any]:
        """Run `take N`, `take_clocked N` or `save FILE` on all ranks and return rank 0's answer."""
        for process in self.processes:
            assert process.stdin
            process.stdin.write(what + "\n")
            process.stdin.flush()
        return [self._answer(process) for process in self.processes][0]

    def _answer(self, process: subprocess.Popen) -> dict[str, Any]:
        assert process.stdout
        for line in process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise ValueError(f"a rank ended with exit code {process.wait()}; what it said is above")

    def close(self) -> None:
        for process in self.processes:
            assert process.stdin
            process.stdin.close()
        for process in self.processes:
            process.wait()


def distance(file: Path, bare: Path, start: list[torch.Tensor]) -> float:
    """Distance of weights from the bare loop's, relative to how far those moved from the start.

    Args:
        file, bare: written by `Loop.save`.
        start: initial weights.
    """
    mine, theirs = torch.load(file), torch.load(bare)
    apart = sum((a - b).double().square().sum() for a, b in zip(mine, theirs, strict=True))
    gone = sum((b - s).double().square().sum() for b, s in zip(theirs, start, strict=True))
    return float(apart / gone) ** 0.5


def measure(args: argparse.Namespace, world: int, accumulation: int) -> dict[str, Any]:
    """Measure all loops at one number of ranks and micro-batches.

    Args:
        args: loops, warm, turns, steps, and what `Ranks` reads.
        world: number of ranks.
        accumulation: micro-batches per optimizer step.

    Returns:
        world, accumulation, and a row for each loop.

    Raises:
        ValueError: a loop's loss differs from the bare loop's.
    """
    loops = ["bare", *(name for name in args.loops if name != "bare")]
    total_steps = args.warm + args.turns * args.steps + args.clocked
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    losses: dict[str, float] = {}
    phases: dict[str, dict[str, float]] = {}
    apart: dict[str, float] = {}
    start = [p.detach().to(precision.of(args.dtype)).float() for p in make_model(args.preset).parameters()]
    # On a GPU one loop at a time, since all would not fit in memory; on a CPU all wait while one computes.
    together = [[name] for name in loops] if torch.cuda.is_available() else [loops]
    with tempfile.TemporaryDirectory() as folder:
        for names in together:
            ranks = {name: Ranks(args, name, world, accumulation, total_steps) for name in names}
            for name in names:
                ranks[name].ask(f"take {args.warm}")
                print(f"{world} x {accumulation}, {name}: warm", flush=True)
            for _turn in range(args.turns):
                for name in names:
                    got = ranks[name].ask(f"take {args.steps}")
                    seconds[name].append(got["seconds"])
                    losses[name] = got["loss"]
            for name in names:
                ranks[name].ask(f"save {folder}/{name.replace(' ', '')}.pt")
                phases[name] = ranks[name].ask(f"take_clocked {args.clocked}")["phases"]
                ranks[name].close()
        for name in loops:
            apart[name] = distance(Path(folder, f"{name.replace(' ', '')}.pt"), Path(folder, "bare.pt"), start)
    rows = []
    for name in loops:
        middle, low, high = percentiles([1e3 * s for s in seconds[name]])
        more = [1e3 * (s - b) for s, b in zip(seconds[name], seconds["bare"], strict=True)]
        cost, cost_low, cost_high = percentiles(more)
        row = {"loop": name, "ms": middle, "p20_ms": low, "p80_ms": high, "loss": losses[name], "weights": apart[name]}
        row.update(engine_ms=cost, engine_p20_ms=cost_low, engine_p80_ms=cost_high, share=cost / middle)
        rows.append({**row, "phases": phases[name], "turns_ms": [1e3 * s for s in seconds[name]]})
        print(f"{world} x {accumulation}, {name}: {middle:.1f} ms, loss {losses[name]:.4f}", flush=True)
        if not abs(losses[name] - losses["bare"]) <= TOLERANCE[args.dtype]:
            raise ValueError(f"{name} lost {losses[name]}, the bare loop {losses['bare']}: no time without agreement")
    return {"world": world, "accumulation": accumulation, "rows": rows}


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    where = r["device"] if r["on_gpu"] else f"{r['threads']} threads of {r['device']}"
    shape = f"{r['preset']} ({r['parameters'] / 1e6:.1f}M parameters), {r['dtype']}, micro-batches of {r['tokens']:,} tokens"
    lines = [
        f"By `benchmarks/studies/engine_share.py` on {where}, torch {r['torch']}, DeepSpeed {r['deepspeed']}: {shape}.",
        f"`{PLAIN}` is with DeepSpeed's own defaults. The engine's time is a step's less the bare loop's of the same turn.",
        "",
        "| ranks | micro-batches | loop | a step, ms (p20-p80) | engine, ms (p20-p80) | share of the step | "
        "ms a million parameters | loss | weights apart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in r["cases"]:
        for row in case["rows"]:
            time = f"{row['ms']:,.0f} ({row['p20_ms']:,.0f}-{row['p80_ms']:,.0f})"
            first = f"| {case['world']} | {case['accumulation']} | {row['loop']} | {time}"
            cells = ["-"] * 3
            if row["loop"] != "bare":
                span = f"({row['engine_p20_ms']:+,.0f} to {row['engine_p80_ms']:+,.0f})"
                cells = [f"{row['engine_ms']:+,.0f} {span}", f"{row['share']:+.1%}"]
                cells.append(f"{row['engine_ms'] / r['parameters'] * 1e6:+.2f}")
            lines.append(f"{first} | {' | '.join(cells)} | {row['loss']:.4f} | {row['weights']:.1%} |")
    lines += ["", "Where a step's milliseconds go on rank 0, clocked in steps of their own:", ""]
    lines += ["| ranks | micro-batches | loop | " + " | ".join(PHASES) + " |", "|---" * (3 + len(PHASES)) + "|"]
    for case in r["cases"]:
        for row in case["rows"]:
            cells = " | ".join(f"{row['phases'][name]:,.1f}" for name in PHASES)
            lines.append(f"| {case['world']} | {case['accumulation']} | {row['loop']} | {cells} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    on_gpu = torch.cuda.is_available()
    add = parser.add_argument
    add("--preset", default="minimind3" if on_gpu else "minimind2-small")
    add("--dtype", default=precision.choose("auto"), choices=list(TOLERANCE))
    add("--tokens", type=int, default=53191 if on_gpu else 1024, help="of a micro-batch of one rank")
    add("--accumulation", type=int, nargs="+", default=[1, 4], help="micro-batches of an optimizer step")
    add("--world", type=int, nargs="+", default=[1] if on_gpu else [1, 2], help="ranks; a CPU's share its cores")
    add("--loops", nargs="+", default=list(LOOPS), choices=LOOPS)
    add("--warm", type=int, default=5 if on_gpu else 2, help="steps before the clock runs")
    add("--turns", type=int, default=5, help="times that each loop is timed")
    add("--steps", type=int, default=10 if on_gpu else 1, help="optimizer steps of a turn")
    add("--clocked", type=int, default=1, help="steps with clocks around phases")
    add("--threads", type=int, default=0, help="of a rank (0: the cores shared among the ranks)")
    add("--out", default=str(RESULTS), help="folder of the results")
    add("--loop", default="", help=argparse.SUPPRESS)
    add("--total_steps", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    if args.loop:
        args.accumulation = args.accumulation[0]
        return work(args)
    cases = [measure(args, world, accumulation) for world in args.world for accumulation in args.accumulation]
    on_gpu = torch.cuda.is_available()
    result = {
        "device": torch.cuda.get_device_name() if on_gpu else processor(),
        "on_gpu": on_gpu,
        "threads": args.threads or os.cpu_count(),
        "torch": str(torch.__version__),
        "deepspeed": importlib.metadata.version("deepspeed"),
        "preset": args.preset,
        "parameters": make_model(args.preset).num_parameters(),
        "dtype": args.dtype,
        "tokens": args.tokens,
        "cases": cases,
    }
    write(result, Path(args.out))


def write(result: dict[str, Any], folder: Path) -> None:
    """Write the result's files into a folder."""
    name = f"{'gpu' if result['on_gpu'] else 'cpu'}_engine_share"
    write_result(folder / name, result, table(result))
    print("\n" + table(result))


if __name__ == "__main__":
    setup.start(main)
