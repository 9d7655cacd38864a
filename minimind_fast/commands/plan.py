"""`minimind-fast plan`: what a run will need, before paying for it.

Purpose: parameters, FLOPs and bytes per token, memory under each ZeRO stage, step time, tokens/s, all-reduce, hours and
    cost for a corpus, and scaling from 1 to 1,024 GPUs.
Principle: memory is counted on the model itself (`memory.py`). Time is the card's roofline (`roofline.py`), divided by the
    share of it that committed measurements on such a card reached. Ranks exchange gradients in rings: 2 (W - 1) / W of
    their bytes, at the speed of the slowest link.
Properties: each number is labelled counted, modelled or measured. Communication is assumed not to overlap with compute, so
    scaling is a lower bound. Without a measurement, times are the roofline's, which no run reaches.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from minimind_fast.config import PRESETS, ModelConfig
from minimind_fast.data.minimind import sets
from minimind_fast.errors import UserError
from minimind_fast.ops import precision
from minimind_fast.ops.cards import model_of, peak_flops
from minimind_fast.proof.cards import CARDS, Card
from minimind_fast.proof.memory import ITEM_BYTES, MicroBatch, held, micro_batch, peak_bytes
from minimind_fast.proof.roofline import OPTIMIZER_BYTES, shape_of, step_work
from minimind_fast.training.log import clock

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
RUNTIME_GIB = 1.0  # the driver's context, cuBLAS and NCCL; a guess, not measured
SCALES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
BANDWIDTHS_GB_PER_S = (1.25, 12.5, 25, 50, 100, 450)  # 10 and 100 GbE, 200 and 400 and 800 Gb InfiniBand, NVLink 4


@dataclass(frozen=True)
class Run:
    """The run to plan.

    Attributes:
        config: the model's shape.
        card: each rank's device.
        gpus: number of ranks.
        tokens: positions per micro-batch and rank.
        accumulation: micro-batches in an optimizer step.
        document: tokens in each document.
        dtype: training dtype.
        kernels: True for a GPU's kernels, False for a CPU's path.
        gradient_checkpointing: recompute blocks.
        node: ranks that share fast links.
        network_bytes_per_s: from each rank to other nodes, one direction.
    """

    config: ModelConfig
    card: Card
    gpus: int = 1
    tokens: int = 16384
    accumulation: int = 1
    document: int = 512
    dtype: str = "bfloat16"
    kernels: bool = True
    gradient_checkpointing: bool = False
    node: int = 8
    network_bytes_per_s: float = 50e9


def compute_seconds(run: Run) -> dict[str, float]:
    """Roofline of an optimizer step on one rank, without communication: part -> seconds."""
    work = step_work(run.config, run.tokens, run.document, ITEM_BYTES[run.dtype])
    rates = run.card.bytes_per_s, run.card.flop_per_s
    parts = {name: w.seconds(*rates) * run.accumulation for name, w in work.items()}
    if run.gradient_checkpointing:  # one more forward, a third of the step, without the head
        parts["recomputation"] = sum(parts.values()) / 3
    parts["optimizer"] = OPTIMIZER_BYTES * shape_of(run.config).num_parameters() / run.card.bytes_per_s
    return parts


def exchanged_bytes(parameters: int, stage: int, dtype: str, world_size: int, accumulation: int) -> float:
    """Bytes that each rank sends in an optimizer step.

    A ring sends (W - 1) / W of a buffer to reduce-scatter it, and as much to gather it.

    Args:
        parameters: number of the model's parameters.
        stage: ZeRO stage.
        dtype: training dtype.
        world_size: number of ranks.
        accumulation: micro-batches in the step.
    """
    ring = (world_size - 1) / world_size
    item = ITEM_BYTES[dtype]
    gradient = 4 if stage == 1 and dtype == "bfloat16" else item  # summed in fp32 at stage 1
    if stage in (0, 1):  # gradients are all-reduced once; stage 1 also gathers the new weights
        return ring * parameters * (2 * gradient + (item if stage == 1 else 0))
    if stage == 2:
        return ring * parameters * (item * accumulation + item)
    return ring * parameters * item * 3 * accumulation  # weights gathered in forward and backward, gradients scattered


def exchange_seconds(run: Run, parameters: int, stage: int) -> float:
    """Seconds of communication over the slowest link, without overlap."""
    if run.gpus == 1:
        return 0.0
    rate = run.card.links_bytes_per_s if run.gpus <= run.node else run.network_bytes_per_s
    return exchanged_bytes(parameters, stage, run.dtype, run.gpus, run.accumulation) / rate


def measured(folder: Path, card: str) -> dict[str, float]:
    """Share of the roofline that committed training steps reached on such a device.

    Args:
        folder: holds the benchmark's JSON files.
        card: a card's name, or "CPU".

    Returns:
        preset -> its best share; empty if nothing is committed.
    """
    found: dict[str, float] = {}
    for file in sorted(folder.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        for row in data.get("benchmarks", []) if isinstance(data, dict) else []:
            info = row.get("extra_info", {})
            ours = (info.get("kind"), info.get("implementation")) == ("model step", "ours")
            if ours and card.lower() in str(info.get("device", "")).lower() and info.get("share_of_roof"):
                found[info["preset"]] = max(found.get(info["preset"], 0.0), info["share_of_roof"])
        if card == "CPU" and isinstance(data, dict) and isinstance(data.get("ours"), dict):
            machine = data["machine"]
            here = Card("CPU", 0, machine.get("copy_bytes_per_s", 20e9), machine["matmul_bf16_gflops"] * 1e9, 1e9, "")
            # The benchmark packs 8,192 tokens.
            seconds = sum(compute_seconds(Run(ModelConfig.preset(data["preset"]), here, tokens=8192)).values())
            found[data["preset"]] = data["ours"]["useful_tokens_per_s"] * seconds / 8192
    return found


def make(run: Run, need: MicroBatch, stage: int, shares: dict[str, float], preset: str) -> dict[str, Any]:
    """The whole plan as plain data.

    Args:
        run: the run to plan.
        need: its `micro_batch`.
        stage: ZeRO stage of the times.
        shares: from `measured`.
        preset: the model's name.

    Returns:
        model, work, memory, time and scaling, as `show` prints them.
    """
    model, c = shape_of(run.config), run.config
    n = model.num_parameters()
    work = step_work(c, run.tokens, run.document, ITEM_BYTES[run.dtype])
    parts = compute_seconds(run)
    share = shares.get(preset) or (sum(shares.values()) / len(shares) if shares else None)
    step = sum(parts.values()) / (share or 1.0)
    tokens = run.tokens * run.accumulation
    stages = {}
    for s in range(4):
        part = held(s, run.dtype, run.gpus)
        stages[s] = {
            "weights": part.weights * n + need.buffer_bytes,
            "gradients": part.gradients * n,
            "optimizer": part.optimizer * n,
            "activations": need.saved_bytes,
            "peak": peak_bytes(need, s, run.dtype, run.gpus),
            "exchanged": exchanged_bytes(n, s, run.dtype, run.gpus, run.accumulation),
        }
    scaling = {}
    for gpus in sorted({*SCALES, run.gpus}):
        some = replace(run, gpus=gpus)
        exchange = exchange_seconds(some, n, stage)
        scaling[gpus] = {
            "step_s": step + exchange,
            "exchange_s": exchange,
            "tokens_per_s": gpus * tokens / (step + exchange),
            "efficiency": step / (step + exchange),
        }
    return {
        "preset": preset,
        "parameters": n,
        "active_parameters": model.num_parameters(active=True),
        "flops_per_token": sum(w.flops for w in work.values()) / run.tokens,
        "bytes_per_token": sum(w.bytes for w in work.values()) / run.tokens,
        "saved_bytes_per_token": need.saved_bytes / run.tokens,
        "card": asdict(run.card),
        "gpus": run.gpus,
        "zero_stage": stage,
        "tokens_per_gpu_step": tokens,
        "stages": stages,
        "roofline_s": parts,
        "measured_share_of_roofline": share,
        "measured_on": sorted(shares),
        "step_s": step,
        "all_reduce_s": {
            gb: exchanged_bytes(n, stage, run.dtype, max(run.gpus, 2), run.accumulation) / (gb * 1e9)
            for gb in BANDWIDTHS_GB_PER_S
        },
        "scaling": scaling,
    }


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g} ms" if seconds < 1 else f"{seconds:,.2f} s"


def show(plan: dict[str, Any], run: Run, corpus: float, epochs: float, price: float, on_cpu: bool) -> str:
    """Format a plan as text.

    Args:
        plan: from `make`.
        run: the planned run.
        corpus: tokens in the corpus, 0 for none.
        epochs: passes over the corpus.
        price: price of a GPU hour, 0 if unknown.
        on_cpu: there is no card's memory to compare with.
    """
    card, share, n = run.card, plan["measured_share_of_roofline"], plan["parameters"]
    active = "" if plan["active_parameters"] == n else f", {plan['active_parameters']:,} active"
    lines = [
        f"{plan['preset']}: {n:,} parameters{active}; {run.dtype}; {run.gpus} x {card.name}",
        f"A token, counted: {plan['flops_per_token'] / 1e6:,.0f} MFLOP forward and backward, at least "
        f"{plan['bytes_per_token'] / 1e3:,.0f} KB moved, {plan['saved_bytes_per_token'] / 1e3:,.0f} KB kept for backward "
        f"(documents of {run.document}).",
        f"A step: {run.tokens:,} tokens x {run.accumulation} micro-batches x {run.gpus} = "
        f"{plan['tokens_per_gpu_step'] * run.gpus:,} tokens.",
        "",
        f"Memory of a rank, counted (ranks: {run.gpus})",
        f"{'ZeRO':>5}{'weights':>12}{'gradients':>12}{'optimizer':>12}{'activations':>13}{'peak':>12}{'sent a step':>13}",
    ]
    for stage, s in plan["stages"].items():
        cells = [_size(s[key]) for key in ("weights", "gradients", "optimizer")]
        fits = on_cpu or s["peak"] / 2**30 + RUNTIME_GIB <= card.memory_gib
        lines.append(
            f"{stage:>5}{cells[0]:>12}{cells[1]:>12}{cells[2]:>12}{_size(s['activations']):>13}{_size(s['peak']):>12}"
            f"{_size(s['exchanged']):>13}" + ("" if fits else f"  does not fit {card.memory_gib:g} GiB")
        )
    lines.append("Peak: with temporaries and gradients in flight; a GPU's driver and libraries take about 1 GiB more.")
    lines += [
        "",
        f"Time of a step on one rank, modelled: {card.bytes_per_s / 1e12:.3g} TB/s, {card.flop_per_s / 1e12:.3g} ",
    ]
    lines[-1] += f"TFLOP/s ({card.how})"
    total = sum(plan["roofline_s"].values())
    for part, seconds in plan["roofline_s"].items():
        lines.append(f"  {part:14}{_milliseconds(seconds):>10}  {seconds / total:4.0%}")
    tokens = plan["tokens_per_gpu_step"]
    lines.append(f"  {'roofline':14}{_milliseconds(total):>10}  {tokens / total:,.0f} tokens/s")
    if share:
        lines.append(
            f"  {'expected':14}{_milliseconds(plan['step_s']):>10}  {tokens / plan['step_s']:,.0f} tokens/s: {share:.0%} of "
            f"the roofline, as measured with {', '.join(plan['measured_on'])}"
        )
    else:
        lines.append(
            f"  No measurement on {card.name} is committed: what follows is the roofline, which no run reaches."
        )
    stage = plan["zero_stage"]
    lines += ["", f"Exchange of a step at ZeRO {stage}, {max(run.gpus, 2)} ranks, by bandwidth of a rank"]
    lines.append("  " + "   ".join(f"{gb:g} GB/s {_milliseconds(s)}" for gb, s in plan["all_reduce_s"].items()))
    lines += [
        "",
        f"Scaling at ZeRO {stage}, nothing overlapped: {run.node} a node at {card.links_bytes_per_s / 1e9:g} GB/s, "
        f"nodes at {run.network_bytes_per_s / 1e9:g} GB/s a rank",
    ]
    header = f"{'GPUs':>6}{'step':>11}{'exchange':>11}{'tokens/s':>15}{'efficiency':>12}"
    lines.append(header + (f"{'hours':>10}{'cost':>12}" if corpus else ""))
    for gpus, s in plan["scaling"].items():
        line = f"{gpus:>6}{_milliseconds(s['step_s']):>11}{_milliseconds(s['exchange_s']):>11}"
        line += f"{s['tokens_per_s']:>15,.0f}{s['efficiency']:>12.0%}"
        if corpus:
            hours = corpus * epochs / s["tokens_per_s"] / 3600
            line += f"{hours:>10,.2f}" + (f"{hours * gpus * price:>12,.2f}" if price else f"{'-':>12}")
        lines.append(line + ("  <- planned" if gpus == run.gpus else ""))
    if corpus:
        seconds = corpus * epochs / plan["scaling"][run.gpus]["tokens_per_s"]
        lines.append(f"The corpus: {corpus:,.0f} tokens x {epochs:g} epochs in {clock(seconds)}.")
    return "\n".join(lines)


def this_machine(dtype: str) -> tuple[Card, bool]:
    """This machine's device: a card from the table, or another card or the CPU, measured.

    Args:
        dtype: dtype of the measured matmul.

    Returns:
        (Card, whether it is a CPU).
    """
    gpu = torch.cuda.is_available()
    name = torch.cuda.get_device_name() if gpu else "CPU"
    memory = torch.cuda.get_device_properties(0).total_memory if gpu else _host_memory()
    card = CARDS.get(model_of(name))
    if card is not None and abs(memory / 2**30 / card.memory_gib - 1) < 0.15:  # an A100 has 40 or 80 GB, at two speeds
        return card, False
    device = torch.device("cuda" if gpu else "cpu")
    flop_per_s, how = peak_flops(device, getattr(torch, dtype))
    source = torch.randn(1 << 25, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(4):
        begin = _now(device)
        target.copy_(source)
        seconds.append(_now(device) - begin)
    rate = 2 * source.numel() * 4 / min(seconds)
    return Card(name, memory / 2**30, rate, flop_per_s, 32e9 if gpu else 10e9, f"{how}, 128 MiB copy"), not gpu


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def main(argv: list[str] | None = None) -> int:
    """`minimind-fast plan`: print what a run will need.

    Args:
        argv: arguments after `plan`; the process's own if None.

    Returns:
        0.

    Raises:
        ValueError: invalid options.
    """
    p = argparse.ArgumentParser(
        prog="minimind-fast plan", description="What a training run needs: memory, time, exchange, hours, cost."
    )
    p.add_argument("--preset", default="minimind3", choices=sorted(PRESETS), help="the model (default: minimind3)")
    p.add_argument("--hidden_size", type=int, default=0, help="override the preset's width")
    p.add_argument("--num_hidden_layers", type=int, default=0, help="override the preset's depth")
    p.add_argument("--vocab_size", type=int, default=0, help="override the preset's vocabulary")
    p.add_argument("--gpus", type=int, default=1, help="ranks (default: 1)")
    p.add_argument(
        "--card", default="", choices=["", "here", *CARDS], help="device (default: this machine's GPU, or H200)"
    )
    p.add_argument("--batch_size", type=int, default=32, help="rows of max_seq_len in a rank's micro-batch")
    p.add_argument("--max_seq_len", type=int, default=512, help="length of a row in tokens")
    p.add_argument("--document", type=int, default=0, help="tokens of a document (default: max_seq_len)")
    p.add_argument("--accumulation_steps", type=int, default=1, help="micro-batches in an optimizer step")
    p.add_argument("--dtype", default="auto", choices=["auto", *sorted(ITEM_BYTES)], help="as in training")
    p.add_argument(
        "--zero_stage", type=int, default=1, choices=range(4), help="stage of the times; memory is shown for each"
    )
    p.add_argument("--gradient_checkpointing", action="store_true", help="recompute each block")
    p.add_argument("--gpus_per_node", type=int, default=8)
    p.add_argument(
        "--network", type=float, default=50.0, metavar="GB/S", help="of each rank to other nodes (default: 50)"
    )
    p.add_argument("--corpus_tokens", type=float, default=0.0, metavar="N", help="e.g. 1e9: hours for such a corpus")
    p.add_argument(
        "--corpus", default="", metavar="NAME", help="the same for one of MiniMind's data sets: pretrain_t2t_mini, ..."
    )
    p.add_argument("--epochs", type=float, default=1.0, help="passes over the corpus")
    p.add_argument("--price", type=float, default=0.0, help="price of a GPU hour, in your currency")
    p.add_argument("--results", type=Path, default=RESULTS, help="folder with committed measurements")
    p.add_argument("--json", metavar="FILE", default="", help="also write every number to this file")
    args = p.parse_args(argv)
    if min(args.gpus, args.batch_size, args.max_seq_len, args.accumulation_steps, args.gpus_per_node) < 1:
        raise UserError("--gpus, --batch_size, --max_seq_len, --accumulation_steps and --gpus_per_node are at least 1")
    if args.corpus and args.corpus_tokens:
        raise UserError("--corpus and --corpus_tokens say the same: give one of them")
    corpus = sets.find(args.corpus).tokens if args.corpus else args.corpus_tokens
    changes = {k: getattr(args, k) for k in ("hidden_size", "num_hidden_layers", "vocab_size") if getattr(args, k)}
    config = ModelConfig.preset(args.preset, **changes)
    here = args.card == "here" or not args.card and torch.cuda.is_available()
    dtype = precision.choose(args.dtype) if here else args.dtype.replace("auto", "bfloat16")
    on_cpu = False
    if args.card in CARDS:
        card = CARDS[args.card]
    elif here:
        card, on_cpu = this_machine(dtype)
    else:
        card = CARDS["H200"]
    document = args.document or args.max_seq_len
    tokens = max(args.batch_size * args.max_seq_len // document, 1) * document
    run = Run(
        config, card, args.gpus, tokens, args.accumulation_steps, document, dtype, not on_cpu,
        args.gradient_checkpointing, args.gpus_per_node, args.network * 1e9,
    )  # fmt: skip
    need = micro_batch(config, tokens, document, dtype, run.kernels, run.gradient_checkpointing)
    plan = make(run, need, args.zero_stage, measured(args.results, card.name), args.preset)
    print(show(plan, run, corpus, args.epochs, args.price, on_cpu))
    if args.json:
        Path(args.json).write_text(json.dumps(plan, indent=1) + "\n", encoding="utf-8")
    return 0
