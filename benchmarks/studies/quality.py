"""Same samples, same quality: the eager loop and ours, seed by seed, on real text.

    python -m benchmarks.studies.quality --data_path pretrain.jsonl --val_data_path val.jsonl --tokenizer_path FOLDER

Purpose: a faster loop must not learn less. Compares validation loss after equally many optimizer steps on the same
    documents.
Principle: each seed draws one set of weights. MiniMind's eager loop trains on padded rows in float32 (autocast to bfloat16
    on a GPU); ours is the real Trainer in bfloat16 with its engine, on packs of the same rows. Learning rates, betas and
    weight decay are the same. One float32 evaluator scores both models.
Properties: the model is small, so three seeds take minutes on a CPU. Writes benchmarks/results/quality.json, .md and .png.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import matplotlib
import numpy as np
import torch

from benchmarks.peers.eager_minimind import EagerMiniMind, EagerTraining
from benchmarks.peers.eager_minimind import loss as eager_loss
from benchmarks.record import RESULTS, processor, write
from minimind_fast.config import IGNORE_INDEX, ModelConfig
from minimind_fast.data.batches import Batch
from minimind_fast.data.cache import build_cache
from minimind_fast.data.packing import PaddedBatches
from minimind_fast.model import MiniMind
from minimind_fast.training import setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.run import Run, Stage

SHAPE = dict(hidden_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
LEARNING_RATE = 5e-4  # MiniMind's; at twice this, without warmup, rounding alone moves the final loss by 0.04


class PackedRows(PaddedBatches):
    """The rows of a padded batch, packed end to end without padding."""

    def _assemble(self, items: np.ndarray) -> Batch:
        padded = super()._assemble(items)
        live = padded.targets != IGNORE_INDEX
        cu = torch.nn.functional.pad(live.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        longest = int(live.sum(1).max())
        return Batch(padded.input_ids[live], padded.targets[live], cu, longest, padded.num_targets, padded.num_docs)


def judge(model: EagerMiniMind, rows: PaddedBatches) -> float:
    """Mean validation loss per token, in float32."""
    total = count = 0.0
    with torch.no_grad():
        for batch in setup.one_pass(rows)():
            total += float(eager_loss(model, batch.input_ids, batch.targets)) * batch.num_targets
            count += batch.num_targets
    return total / count


def run_seed(args: argparse.Namespace, seed: int, run: Run, caches: list[Any], tokenizer: Any) -> dict[str, Any]:
    """Train both loops from one set of weights."""
    torch.manual_seed(seed)
    start = MiniMind(ModelConfig.preset("minimind2-small", **SHAPE))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = PaddedBatches(caches[0], batch_size=args.rows, max_seq_len=args.length)
    eager = EagerTraining(EagerMiniMind.from_ours(start).to(device), rows, 1, args.steps, LEARNING_RATE)
    for group in eager.optimizer.param_groups:
        group.update(betas=(run.config.beta1, run.config.beta2), weight_decay=run.config.weight_decay)
    data = PackedRows(caches[0], batch_size=args.rows, max_seq_len=args.length)
    trainer = setup.make_trainer(run, start, tokenizer, data, setup.next_token_loss)
    trainer.total_steps = args.steps
    groups, curves = trainer.groups(), {"eager": [], "ours": []}
    for _ in range(args.steps):
        curves["eager"].append(eager.take_step()[1])
        group, window = next(groups), Window()
        counted = sum(b.num_targets for b in group)
        trainer.train_step(group, counted, window)
        curves["ours"].append(float(window.sums["loss"]) / counted)
    ours = EagerMiniMind.from_ours(trainer.model.cpu())
    val = PaddedBatches(caches[1], batch_size=args.rows, max_seq_len=args.length)
    return {
        "seed": seed,
        "val_loss": {"eager": judge(eager.model.cpu(), val), "ours": judge(ours, val)},
        "curves": curves,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data_path", required=True)
    add("--val_data_path", required=True)
    add("--tokenizer_path", required=True)
    add("--cache_dir", default="", help="where the tokenised data is cached; beside it if not given")
    add("--steps", type=int, default=250, help="optimizer steps of each loop")
    add("--seeds", type=int, default=3)
    add("--rows", type=int, default=16, help="documents in an optimizer step")
    add("--length", type=int, default=128, help="tokens of a document, longer ones are cut off")
    args = parser.parse_args()
    config = TrainConfig(
        tokenizer_path=args.tokenizer_path, batch_size=args.rows, max_seq_len=args.length, accumulation_steps=1,
        learning_rate=LEARNING_RATE, save_dir=tempfile.mkdtemp(), beta2=0.999,
    )  # fmt: skip
    run = setup.begin(config, Stage("quality"))
    tokenizer = setup.load_tokenizer(run.config)
    caches = [
        build_cache(path, tokenizer, cache_dir=args.cache_dir or None) for path in (args.data_path, args.val_data_path)
    ]
    runs = []
    for seed in range(args.seeds):
        runs.append(run_seed(args, seed, run, caches, tokenizer))
        print(f"seed {seed}: validation loss {runs[-1]['val_loss']}", flush=True)
    means = {name: statistics.mean(run["val_loss"][name] for run in runs) for name in ("eager", "ours")}
    result = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor(),
        "torch": str(torch.__version__),
        "steps": args.steps,
        "documents_a_step": args.rows,
        "parameters": MiniMind(ModelConfig.preset("minimind2-small", **SHAPE)).num_parameters(),
        "mean_val_loss": means,
        "difference": means["ours"] - means["eager"],
        "runs": runs,
    }
    write(RESULTS / "quality", result, table(result))
    draw(result)
    print(table(result))


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"By `benchmarks/studies/quality.py` on {r['device']}, torch {r['torch']}, {r['parameters'] / 1e6:.1f}M weights: "
        f"{r['steps']} optimizer steps of the same {r['documents_a_step']} documents.",
        "",
        "| seed | eager, validation loss | ours | difference |",
        "|---|---|---|---|",
    ]
    for run in r["runs"]:
        eager, ours = run["val_loss"]["eager"], run["val_loss"]["ours"]
        lines.append(f"| {run['seed']} | {eager:.4f} | {ours:.4f} | {ours - eager:+.4f} |")
    means = r["mean_val_loss"]
    lines.append(f"| mean | {means['eager']:.4f} | {means['ours']:.4f} | **{r['difference']:+.4f}** |")
    return "\n".join(lines) + "\n"


def draw(r: dict[str, Any]) -> None:
    """Plot the training losses of all seeds, overlaid."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, style in (("eager", "-"), ("ours", ":")):
        for i, run in enumerate(r["runs"]):
            axis.plot(run["curves"][name], style, color=f"C{i}", label=f"{name}, seed {run['seed']}", linewidth=1.5)
    axis.set(xlabel="optimizer step", ylabel="loss, nats per token")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(RESULTS / "quality.png", dpi=110)


if __name__ == "__main__":
    setup.start(main)
