"""Kernels on against off over many training steps on real text, compared with rounding noise.

    python -m benchmarks.studies.loss_curves [--corpus FOLDER] [--steps 200] [--dry_run]

Purpose: an op that passes its own test may still be used wrongly. Here the same weights see the same batches with all
    kernels on and with all off, and the losses are compared at each step.
Principle: two 16-bit training curves are never equal, so the question is whether they differ by more than rounding. Two
    more runs with kernels off measure that: one starts from weights perturbed by up to half a unit in bf16's last place,
    one runs in float32. Distances are means over steps of the loss difference.
Properties: the real Trainer and engine. The exit code is 1 if kernels move the curve by more than FACTOR times the larger
    noise, or if the loss did not fall. Writes loss_curves.json, .md and .png. A dry run (on a CPU) uses small kernels in
    Triton's interpreter, in float32: it tests the path and proves nothing. On a CPU without --dry_run, `--kernels auto`
    applies the same rule to the CPU's own ops.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch

from benchmarks.pack_for_gpu import FOLDER, find_corpus
from benchmarks.record import RESULTS, processor, write
from minimind_fast import ops
from minimind_fast.config import ModelConfig
from minimind_fast.data.cache import build_cache, encode_pretrain
from minimind_fast.data.packing import PackedBatches
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind
from minimind_fast.ops import precision
from minimind_fast.ops.attention import chosen
from minimind_fast.training import setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.run import Stage, resolve
from minimind_fast.weights.checkpoint import load_pretrained, save_pretrained

LEARNING_RATE, WARMUP = 5e-4, 20
FACTOR = 2.0  # the two noises, each drawn once, differ by as much
VAL_TOLERANCE = 0.005  # nats; this project's tolerance for validation loss
LEAST_FALL = 0.5  # nats from the first tenth to the last; without a fall, curves prove nothing
SUMMATION = 1e-5  # nats; error of a mean over some thousand float32 losses
TINY = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)  # for the interpreter


class Run(NamedTuple):
    """One variant of the same steps."""

    kernels: str
    dtype: str
    nudged: bool = False


def runs(kernels: str, dtype: str) -> dict[str, Run]:
    """Name -> run; the others are compared with "off".

    Args:
        kernels: `--kernels` of the run under test.
        dtype: dtype of all runs but the float32 one.
    """
    return {
        "off": Run("none", dtype),
        "on": Run(kernels, dtype),
        "off, start nudged": Run("none", dtype, nudged=True),
        "off, float32": Run("none", "float32"),
    }


@torch.no_grad()
def nudge(model: MiniMind, eps: float) -> None:
    """Perturb each weight in place by up to half a unit in the last place of a format with this eps."""
    draw = torch.Generator().manual_seed(1)
    for p in model.parameters():
        p.mul_(1 + eps * (torch.rand(p.shape, generator=draw) - 0.5))


@precision.exact_matmuls()  # the float32 run is a yardstick
def train(
    args: argparse.Namespace, name: str, run: Run, caches: list[Any], tokenizer: Any, start: Path
) -> dict[str, Any]:
    """Train one variant.

    Args:
        args: command-line options.
        name: the run's name.
        run: the variant's settings.
        caches: token caches for training and validation.
        tokenizer: the caches' tokenizer.
        start: folder with the initial weights of every run.

    Returns:
        losses of each step, val_loss after the last, seconds, and the implementation of each op.
    """
    config = TrainConfig(
        batch_size=args.batch_size, max_seq_len=args.max_seq_len, accumulation_steps=1, learning_rate=LEARNING_RATE,
        warmup_steps=min(WARMUP, args.steps // 2), dtype=run.dtype, kernels=run.kernels, save_dir=tempfile.mkdtemp(),
    )  # fmt: skip
    ops.use(run.kernels)
    settled = resolve(config, Stage("loss"))
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_pretrained(start)
    if run.nudged:
        nudge(model, torch.finfo(getattr(torch, run.dtype)).eps)
    shape = dict(batch_tokens=args.batch_size * args.max_seq_len, max_seq_len=args.max_seq_len, seed=config.seed)
    data = PackedBatches(caches[0], **shape)
    trainer = setup.make_trainer(settled, model, tokenizer, data, setup.next_token_loss)
    trainer.total_steps = args.steps
    groups, losses, began = trainer.groups(), [], time.perf_counter()
    for _ in range(args.steps):
        group, window = next(groups), Window()
        counted = sum(batch.num_targets for batch in group)
        trainer.train_step(group, counted, window)
        losses.append(window.sums["loss"] / counted)
    losses = torch.stack(losses).tolist()  # the only synchronisation
    seconds = time.perf_counter() - began
    trainer.model.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in PackedBatches(caches[1], **shape, shuffle=False):
            total += float(setup.next_token_loss(trainer.engine, batch.to(device)).total)
            count += batch.num_targets
            if count >= args.val_tokens:
                break
    print(
        f"{name:20} loss {losses[0]:.4f} to {losses[-1]:.4f}, validation {total / count:.4f}, {seconds:.0f} s",
        flush=True,
    )
    attention, _ = chosen(device.type, settled.dtype)
    told = {"seconds": seconds, "ops": ops.describe(device.type), "attention": attention}
    return {"losses": losses, "val_loss": total / count, **told, **run._asdict()}


def judged(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Distances from the run with kernels off, and whether the run with kernels on is within the noise.

    Args:
        found: run name -> its losses and val_loss.

    Returns:
        distances (name -> mean absolute, mean signed, and validation difference), noise, within_noise, reasons.
    """
    off = found["off"]
    distances = {}
    for name, run in found.items():
        gaps = [a - b for a, b in zip(run["losses"], off["losses"], strict=True)]
        absolute = statistics.fmean(map(abs, gaps))
        distances[name] = {
            "mean_absolute": absolute,
            "mean_signed": statistics.fmean(gaps),
            "val_loss": run["val_loss"] - off["val_loss"],
        }
    others = [d for name, d in distances.items() if name not in ("off", "on")]
    noise = max(d["mean_absolute"] for d in others)
    val_noise = max(abs(d["val_loss"]) for d in others)
    on = distances["on"]
    reasons = []
    if not on["mean_absolute"] <= FACTOR * noise + SUMMATION:
        reasons.append(f"losses differ by {on['mean_absolute']:.2g} on average where noise is {noise:.2g}")
    if not abs(on["val_loss"]) <= max(VAL_TOLERANCE, FACTOR * val_noise):
        reasons.append(f"validation losses differ by {on['val_loss']:.2g} where noise is {val_noise:.2g}")
    return {"distances": distances, "noise": noise, "within_noise": not reasons, "reasons": reasons}


def fall(losses: list[float]) -> float:
    """Drop in nats from the mean of the first tenth to that of the last."""
    tenth = max(len(losses) // 10, 1)
    return statistics.fmean(losses[:tenth]) - statistics.fmean(losses[-tenth:])


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"By `benchmarks/studies/loss_curves.py` on {r['device']}, torch {r['torch']}: {r['preset']}, {r['steps']} "
        f"optimizer steps of {r['tokens_a_step']:,} tokens, the same weights and batches in each run.",
        "",
        "| kernels | precision | mean distance from off | signed | validation loss | difference |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in r["runs"].items():
        d = r["distances"][name]
        cells = (name, run["dtype"], f"{d['mean_absolute']:.5f}", f"{d['mean_signed']:+.5f}")
        lines.append("| " + " | ".join((*cells, f"{run['val_loss']:.4f}", f"{d['val_loss']:+.4f}")) + " |")
    verdict = "within" if r["within_noise"] else "NOT within (" + "; ".join(r["reasons"]) + ")"
    lines += [
        "",
        f"Distances in nats per token. The kernels' curve is {verdict} {FACTOR:g} times the noise of rounding.",
    ]
    return "\n".join(lines) + "\n"


def draw(r: dict[str, Any], picture: Path) -> None:
    """Plot the curves, and below them each run's distance from the run with kernels off."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")
    for i, (name, run) in enumerate(r["runs"].items()):
        above.plot(run["losses"], label=name, color=f"C{i}", linewidth=1.2, linestyle="-" if i < 2 else ":")
        if name != "off":
            gaps = [a - b for a, b in zip(run["losses"], r["runs"]["off"]["losses"], strict=True)]
            below.plot(gaps, label=name, color=f"C{i}", linewidth=1)
    above.set(ylabel="loss, nats per token", title=f"{r['preset']} on {r['device']}")
    below.set(xlabel="optimizer step", ylabel="loss minus off")
    for axis in (above, below):
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--corpus", type=Path, default=FOLDER, help="folder made by pack_for_gpu.py")
    add("--preset", default="minimind3")
    add("--steps", type=int, default=200)
    add("--batch_size", type=int, default=16, help="a step holds batch_size * max_seq_len tokens")
    add("--max_seq_len", type=int, default=512)
    add("--val_tokens", type=int, default=65536, help="of the validation text, at most")
    add("--kernels", default="all", help="of the run to be judged")
    add("--dtype", default="bfloat16")
    add("--hidden_size", type=int, default=0, help="override the preset's width")
    add("--num_hidden_layers", type=int, default=0, help="override the preset's depth")
    add("--out", type=Path, default=RESULTS)
    add("--sample", action="store_true", help="without a corpus take the shipped sample, many times over")
    add("--dry_run", action="store_true", help="small, on a CPU, kernels in Triton's interpreter")
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("hidden_size", "num_hidden_layers") if getattr(args, name)}
    if args.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
        args.preset, args.dtype, shape = "tiny", "float32", TINY
        args.steps, args.batch_size, args.max_seq_len, args.val_tokens = min(args.steps, 3), 1, 48, 48
    elif not torch.cuda.is_available() and args.kernels == "all":
        raise ValueError(
            "PyTorch sees no GPU here. --dry_run goes through it on a CPU; --kernels auto judges the CPU's own ops"
        )
    corpus = find_corpus(args.corpus, args.dry_run or args.sample)
    setup.begin(TrainConfig(kernels="none"), Stage("loss"))
    tokenizer = Tokenizer.load(corpus.tokenizer)
    folder = Path(tempfile.mkdtemp())
    caches = [
        build_cache(path, tokenizer, cache_dir=folder, encode=encode_pretrain) for path in (corpus.pretrain, corpus.val)
    ]
    model = MiniMind(ModelConfig.preset(args.preset, vocab_size=max(tokenizer.vocab_size, 6400), **shape))
    save_pretrained(model, folder / "start", dtype=torch.float32)
    found = {}
    for name, run in runs(args.kernels, args.dtype).items():
        found[name] = train(args, name, run, caches, tokenizer, folder / "start")
        gc.collect()  # engines contain reference cycles
    on_gpu = torch.cuda.is_available()
    result = {
        "on_gpu": on_gpu,
        "dry_run": args.dry_run,
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU {processor()}",
        "torch": str(torch.__version__),
        "preset": args.preset,
        "steps": args.steps,
        "tokens_a_step": args.batch_size * args.max_seq_len,
        "runs": found,
        **judged(found),
    }
    if not args.dry_run and (fell := fall(found["off"]["losses"])) < LEAST_FALL:
        result["within_noise"] = False
        result["reasons"].append(f"the loss fell by {fell:.2f} nats only: too little training to tell anything")
    write(args.out / "loss_curves", result, table(result))
    draw(result, args.out / "loss_curves.png")
    print("\n" + table(result))
    if result["reasons"]:
        raise ValueError("the curves are written, but they do not agree: " + "; ".join(result["reasons"]))


if __name__ == "__main__":
    setup.start(main)
