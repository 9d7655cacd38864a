"""Tokens, and seconds, to the loss that MiniMind's own recipe reaches in one pass over a text.

    python -m benchmarks.studies.time_to_loss --data_path pretrain.jsonl --val_data_path val.jsonl --tokenizer_path FOLDER

Purpose: what a recipe is worth: fewer tokens to the same held-out loss, and whether its dearer steps leave that in seconds.
Principle: one model and one text. MiniMind's recipe (its padded rows, its batch, its learning rate) sets the loss to reach.
    The others get packed batches and five learning rates each: the first seed finds the best, all seeds run it. A curve of
    validation losses is interpolated where it first comes below the target.
Properties: the real Trainer and engine, in one process. Only training is timed, not validation. Every run is written as it
    ends; the same command goes on after the last one. Writes STEM.json, .md and .png; by default into benchmarks/results.

Source: Keller Jordan's speed runs of NanoGPT, 2024, for the question.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

from benchmarks.record import RESULTS, processor, write
from minimind_fast.config import PRESETS, ModelConfig
from minimind_fast.data.cache import encode_pretrain
from minimind_fast.model import MiniMind
from minimind_fast.training import setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.run import Stage, resolve
from minimind_fast.training.trainer import Hooks

RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
TARGET = "minimind"
# name -> (options, learning rates to choose from); {} is our packed loop.
RECIPES: dict[str, tuple[dict[str, Any], Sequence[float]]] = {
    TARGET: (dict(recipe="minimind3", packing=False, batch_size=32, accumulation_steps=8), (5e-4,)),
    "adamw": ({}, RATES),
    "muon": (dict(optimizer="muon"), RATES),
}
WARMUP_SHARE, POINTS = 0.05, 20

Curve = list[tuple[int, float, float]]  # (tokens, seconds of training, validation loss)


def crossing(curve: Curve, target: float) -> tuple[float, float] | None:
    """(tokens, seconds) where a curve first comes below a loss, between two points on a line; None: never."""
    for (tokens, seconds, loss), (more, later, lower) in zip(curve, curve[1:], strict=False):
        if lower <= target < loss:
            share = (loss - target) / (loss - lower)
            return tokens + share * (more - tokens), seconds + share * (later - seconds)
    return None


def learn(args: argparse.Namespace, recipe: str, rate: float, seed: int) -> Curve:
    """Train one model by one recipe; its curve."""
    options = dict(RECIPES[recipe][0])
    common = dict(
        data_path=[args.data_path], val_data_path=[args.val_data_path], tokenizer_path=args.tokenizer_path, epochs=1,
        cache_dir=args.cache_dir, save_dir=tempfile.mkdtemp(), max_seq_len=args.length, dtype=args.dtype, seed=seed,
        learning_rate=rate, sample_tokens=0,
    )  # fmt: skip
    packed = dict(batch_size=max(1, args.step_tokens // args.length), accumulation_steps=1)
    run = resolve(TrainConfig(**{**common, **packed, **options}), Stage("loss"))
    tokenizer = setup.load_tokenizer(run.config)
    torch.manual_seed(seed)
    shape = {name: value for name, value in (("hidden_size", args.hidden), ("num_hidden_layers", args.layers)) if value}
    model = MiniMind(ModelConfig.preset(args.preset, vocab_size=max(tokenizer.vocab_size, 6400), **shape))
    data = setup.open_data(run.config, run.config.data_path, tokenizer, encode_pretrain, training=True)
    val_config = resolve(TrainConfig(**common, batch_size=8), Stage("loss")).config  # packed, whatever the recipe
    val = setup.open_data(val_config, [args.val_data_path], tokenizer, encode_pretrain, training=False)
    trainer = setup.make_trainer(
        run, model, tokenizer, data, setup.next_token_loss, Hooks(val_data=setup.one_pass(val))
    )
    total = max(1, round(args.share * trainer.total_steps))
    warmup = 0 if recipe == TARGET else round(WARMUP_SHARE * total)
    trainer.config, trainer.total_steps = run.config.settle("a share of the run", warmup_steps=warmup), total
    points = {round(total * i / POINTS) for i in range(1, POINTS + 1)}
    groups, tokens, seconds = trainer.groups(), 0, 0.0
    curve: Curve = [(0, 0.0, trainer.validate() or 0.0)]
    for step in range(1, total + 1):
        group = next(groups)
        counted = sum(batch.num_targets for batch in group)
        begin = time.perf_counter()
        trainer.train_step(group, counted, Window())
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds, tokens = seconds + time.perf_counter() - begin, tokens + counted
        if step in points:
            curve.append((tokens, seconds, trainer.validate() or 0.0))
            print(f"{recipe} {rate:g} seed {seed}: {tokens:,} tokens, {seconds:.0f} s, {curve[-1][2]:.4f}", flush=True)
    del trainer, model
    gc.collect()
    return curve


def judge(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each recipe: the best of its learning rates, and what it took to reach the target of the same seed."""
    final = {(r["recipe"], r["rate"], r["seed"]): r["curve"][-1] for r in runs}
    curves = {(r["recipe"], r["rate"], r["seed"]): r["curve"] for r in runs}
    targets = {seed: end for (recipe, _, seed), end in final.items() if recipe == TARGET}
    rows = []
    for recipe in dict.fromkeys(r["recipe"] for r in runs):
        first = min(seed for name, _, seed in final if name == recipe)
        rate = best_rate(runs, recipe, first)
        seeds = [seed for name, r, seed in final if (name, r) == (recipe, rate) and seed in targets]
        reached = [crossing(curves[recipe, rate, seed], targets[seed][2]) for seed in seeds]
        if recipe == TARGET:
            reached = [targets[seed][:2] for seed in seeds]
        all_did = bool(reached) and None not in reached
        rows.append({
            "recipe": recipe,
            "rate": rate,
            "seeds": len(seeds),
            "loss": statistics.mean(final[recipe, rate, seed][2] for seed in seeds) if seeds else None,
            "tokens": statistics.mean(at[0] for at in reached if at) if all_did else None,
            "seconds": statistics.mean(at[1] for at in reached if at) if all_did else None,
            "losses_by_rate": {f"{r:g}": final[recipe, r, first][2] for n, r, s in final if (n, s) == (recipe, first)},
        })  # fmt: skip
    return rows


def best_rate(runs: list[dict[str, Any]], recipe: str, seed: int) -> float:
    """The learning rate with the lowest loss at the end."""
    mine = [r for r in runs if (r["recipe"], r["seed"]) == (recipe, seed)]
    return min(mine, key=lambda r: r["curve"][-1][2])["rate"]


def table(found: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows = judge(found["runs"])
    base = next((row for row in rows if row["recipe"] == TARGET), None)
    lines = [
        f"By `benchmarks/studies/time_to_loss.py` on {found['threads']} threads of {found['processor']}, torch "
        f"{found['torch']}: {found['model']}, {found['share']:g} of a pass over the text, packed steps of "
        f"{found['step_tokens']:,} tokens. The loss to reach is that of `{TARGET}` at its end, seed by seed.",
        "",
        "| recipe | learning rate | seeds | loss at the end | tokens to the target | seconds to it |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = []
        for part, form in (("tokens", "{:,.0f}"), ("seconds", "{:,.0f}")):
            if row[part] is None or base is None or base[part] is None:
                cells.append("not reached")
            else:
                cells.append(f"{form.format(row[part])} ({row[part] / base[part]:.2f})")
        loss = "-" if row["loss"] is None else f"{row['loss']:.3f}"
        lines.append(f"| {row['recipe']} | {row['rate']:g} | {row['seeds']} | {loss} | {' | '.join(cells)} |")
    lines += ["", "Loss at the end by learning rate, first seed:", ""]
    for row in rows:
        losses = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in row["losses_by_rate"].items())
        lines.append(f"- {row['recipe']}: {losses}")
    return "\n".join(lines) + "\n"


def draw(found: dict[str, Any], file: Path) -> None:
    """Validation loss over tokens: the best learning rate of each recipe, a line a seed."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for i, row in enumerate(judge(found["runs"])):
        mine = [r for r in found["runs"] if (r["recipe"], r["rate"]) == (row["recipe"], row["rate"])]
        for n, run in enumerate(mine):
            label = f"{row['recipe']} {row['rate']:g}" if n == 0 else None
            axis.plot(*zip(*((t, loss) for t, _, loss in run["curve"][1:]), strict=True), f"C{i}", label=label)
    axis.set(xlabel="tokens", ylabel="validation loss")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data_path", required=True)
    add("--val_data_path", required=True)
    add("--tokenizer_path", required=True)
    add("--cache_dir", default="", help="where the tokenised data is cached; beside it if not given")
    add("--preset", default="tiny", choices=PRESETS)
    add("--hidden", type=int, default=0, help="override the preset's width")
    add("--layers", type=int, default=0, help="override the preset's depth")
    add("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    add("--seeds", type=int, default=3)
    add("--share", type=float, default=1.0, help="how much of one pass over the text")
    add("--step_tokens", type=int, default=8192, help="in a packed optimizer step")
    add("--length", type=int, default=340, help="longest document in tokens")
    add("--dtype", default="auto")
    add("--rates", type=float, nargs="+", default=[], help="learning rates to choose from, instead of the recipes' own")
    add("--out", type=Path, default=RESULTS / "time_to_loss", help="path of the result, without a suffix")
    args = parser.parse_args(argv)
    setup.begin(TrainConfig(save_dir=tempfile.mkdtemp()), Stage("loss"))
    shape = " x ".join(str(n) for n in (args.hidden, args.layers) if n)
    found: dict[str, Any] = {
        "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "model": f"{args.preset} {shape}".strip(),
        "share": args.share,
        "step_tokens": args.step_tokens,
        "length": args.length,
        "dtype": args.dtype,
        "runs": [],
    }
    before = args.out.with_suffix(".json")
    if before.exists():
        old = json.loads(before.read_text(encoding="utf-8"))
        if all(old.get(key) == value for key, value in found.items() if key != "runs"):
            found["runs"] = old["runs"]
    done = {(r["recipe"], r["rate"], r["seed"]) for r in found["runs"]}

    def run(recipe: str, rate: float, seed: int) -> None:
        if (recipe, rate, seed) not in done:
            found["runs"].append(
                {"recipe": recipe, "rate": rate, "seed": seed, "curve": learn(args, recipe, rate, seed)}
            )
            write(args.out, found, table(found))

    for recipe in args.recipes:
        rates = args.rates if args.rates and recipe != TARGET else RECIPES[recipe][1]
        for rate in rates:
            run(recipe, rate, 0)
        for seed in range(1, args.seeds):
            run(recipe, best_rate(found["runs"], recipe, 0), seed)
    draw(found, args.out.with_suffix(".png"))
    print("\n" + table(found))


if __name__ == "__main__":
    setup.start(main)
