"""What Muon's step costs: measured on this machine's CPU, and by the roofline on GPUs.

    python -m benchmarks.studies.muon_cost --model minimind2-small --tokens 8192

Purpose: decides whether fewer tokens to a loss are also fewer seconds.
Principle: one model takes the same steps through the real engine with either optimizer, in turns; the engine's `step` is
    timed apart from forward and backward. On GPUs both are bounded by the machine's rates: matmuls of the micro-batches and
    of Newton-Schulz, bytes of the rest.
Properties: the time of a step does not depend on the words, so tokens are drawn. Medians over alternating turns; the first
    is not counted. The roofline is the least for either, not a forecast. Writes benchmarks/results/muon_cost.json and .md.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks.record import RESULTS, processor, write
from minimind_fast.config import PRESETS, ModelConfig
from minimind_fast.data.batches import Batch
from minimind_fast.model import MiniMind
from minimind_fast.ops.documents import run as run_packed
from minimind_fast.proof.cards import CARDS
from minimind_fast.proof.roofline import MUON_BYTES, OPTIMIZER_BYTES, muon_work, shape_of, step_work
from minimind_fast.training import setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.optimizers.muon import matrices
from minimind_fast.training.run import Stage

DOCUMENT, MICRO_BATCH = 256, 2048
GPU_TOKENS = (8_192, 53_000)
OPTIMIZERS = ("adamw", "muon")


def drawn(vocab: int, tokens: int) -> Batch:
    """A pack of documents of equal length, with random tokens."""
    ids = torch.randint(3, vocab, (tokens,))
    bounds = torch.arange(0, tokens + 1, DOCUMENT, dtype=torch.int32)
    return Batch(ids, ids.roll(-1), bounds, DOCUMENT, tokens, tokens // DOCUMENT)


def measure(model: str, dtype: str, tokens: int, turns: int) -> dict[str, Any]:
    """Seconds of forward and backward, and of the optimizer's step, by optimizer."""
    engines = {}
    for name in OPTIMIZERS:
        config = TrainConfig(
            optimizer=name, dtype=dtype, batch_size=1, accumulation_steps=1, save_dir=tempfile.mkdtemp(), max_steps=1
        )
        run = setup.begin(config, Stage("cost"))
        torch.manual_seed(0)
        engines[name] = setup.make_engine(run, MiniMind(ModelConfig.preset(model)), torch.device("cpu"))
    found: dict[str, dict[str, list[float]]] = {name: {"passes_s": [], "step_s": []} for name in OPTIMIZERS}
    batches = tokens // MICRO_BATCH
    for turn in range(turns + 1):
        for name, engine in engines.items():
            begin = time.perf_counter()
            for i in range(batches):
                batch = drawn(engine.config.vocab_size, MICRO_BATCH)
                out = run_packed(engine, batch, targets=batch.targets)
                loss = -out.logprobs.sum() / tokens + out.aux_loss
                engine.backward(loss, last=i == batches - 1)
            middle = time.perf_counter()
            engine.step(1e-4)
            end = time.perf_counter()
            print(
                f"{model} {dtype} turn {turn}/{turns} {name:5} {middle - begin:.2f} + {end - middle:.3f} s", flush=True
            )
            if turn:
                found[name]["passes_s"].append(middle - begin)
                found[name]["step_s"].append(end - middle)
    return {
        name: {part: statistics.median(seconds) for part, seconds in parts.items()} for name, parts in found.items()
    }


def modelled(model: str, tokens: int) -> dict[str, Any]:
    """Muon's share of a step on each card, by the roofline: without and with half of the symmetric products."""
    c = dataclasses.replace(ModelConfig.preset(model))
    shape = shape_of(c)
    inside = sum(p.numel() for p in matrices(shape))
    shares = {}
    for name, card in CARDS.items():
        rates = (card.bytes_per_s, card.flop_per_s)
        rest = OPTIMIZER_BYTES * (shape.num_parameters() - inside) / card.bytes_per_s
        passes = sum(work.seconds(*rates) for work in step_work(c, tokens, DOCUMENT).values())
        shares[name] = []
        for halved in (False, True):
            work = muon_work(c, halved=halved)
            # Newton-Schulz and the passes over the weights follow one another.
            muon = work.flops / card.flop_per_s + MUON_BYTES * inside / card.bytes_per_s
            shares[name].append(muon / (passes + rest + muon))
    return {"model": model, "tokens": tokens, "shares": shares}


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"By `benchmarks/studies/muon_cost.py` on {found['threads']} threads of {found['processor']}, "
        f"torch {found['torch']}: optimizer steps of {found['tokens']:,} tokens.",
        "",
        "| model | dtype | forward and backward | AdamW's step | Muon's step | Muon's share of its step |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["measured"]:
        adamw, muon = (row["seconds"][name] for name in OPTIMIZERS)
        share = muon["step_s"] / (muon["step_s"] + muon["passes_s"])
        lines.append(
            f"| {row['model']} | {row['dtype']} | {muon['passes_s']:.2f} s | {adamw['step_s']:.3f} s | "
            f"{muon['step_s']:.3f} s | {100 * share:.1f}% |"
        )
    lines += [
        "",
        "On GPUs by the roofline (the least that either must take; not measured): Muon's share of a step on one card, with "
        "whole symmetric products and, in bold, with half of them, as `symmetric_product` computes.",
        "",
        f"| model | tokens | {' | '.join(CARDS)} |",
        f"|---|---|{'---|' * len(CARDS)}",
    ]
    for row in found["modelled"]:
        cells = [f"{100 * whole:.1f}%, **{100 * half:.1f}%**" for whole, half in row["shares"].values()]
        lines.append(f"| {row['model']} | {row['tokens']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", default=["tiny", "minimind2-small"], choices=PRESETS)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--tokens", type=int, default=8192, help="in an optimizer step; a multiple of 2,048")
    parser.add_argument("--turns", type=int, default=3, help="steps of each optimizer; one more is not counted")
    args = parser.parse_args()
    measured = [
        {"model": model, "dtype": dtype, "seconds": measure(model, dtype, args.tokens, args.turns)}
        for model in args.model
        for dtype in args.dtype
    ]
    models = [name for name in PRESETS if name not in ("tiny",)]
    found = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "tokens": args.tokens,
        "measured": measured,
        "modelled": [modelled(model, tokens) for model in models for tokens in GPU_TOKENS],
    }
    write(RESULTS / "muon_cost", found, table(found))
    print("\n" + table(found))


if __name__ == "__main__":
    setup.start(main)
