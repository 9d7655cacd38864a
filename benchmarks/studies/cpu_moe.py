"""MoE on a CPU against a dense model with the same active parameters, in alternating steps.

    python -m benchmarks.studies.cpu_moe --data_path pretrain.jsonl --tokenizer_path FOLDER

Purpose: the cost of routing and dispatch on top of the arithmetic that both models share.
Principle: the dense model is minimind2-moe with its experts replaced by one MLP as wide as a token's active experts (two
    routed and one shared). Both train on the same packs through the real Trainer and its DeepSpeed engine.
Properties: medians over alternating turns. Writes benchmarks/results/cpu_moe.json and .md.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

from benchmarks.record import RESULTS, processor, write
from minimind_fast.config import ModelConfig
from minimind_fast.data.cache import build_cache
from minimind_fast.data.packing import PackedBatches
from minimind_fast.model import MiniMind
from minimind_fast.training import setup
from minimind_fast.training.config import TrainConfig
from minimind_fast.training.log import Window
from minimind_fast.training.run import Stage

ROWS, LENGTH = 8, 512


def active_twin(moe: ModelConfig) -> ModelConfig:
    """The dense model with the same active parameters, except the router's."""
    assert moe.moe_intermediate_size and moe.num_experts_per_tok and moe.num_shared_experts is not None
    met = moe.num_experts_per_tok + moe.num_shared_experts
    return ModelConfig.preset("minimind2-moe", use_moe=False, intermediate_size=met * moe.moe_intermediate_size)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--tokenizer_path", required=True)
    parser.add_argument("--cache_dir", default="", help="where the tokenised data is cached; beside it if not given")
    parser.add_argument("--turns", type=int, default=6, help="optimizer steps of each model; the first is not counted")
    args = parser.parse_args()
    config = TrainConfig(
        data_path=[args.data_path], tokenizer_path=args.tokenizer_path, batch_size=ROWS, max_seq_len=LENGTH,
        accumulation_steps=1, save_dir=tempfile.mkdtemp(), sample_tokens=0,
    )  # fmt: skip
    run = setup.begin(config, Stage("moe"))
    tokenizer = setup.load_tokenizer(run.config)
    cache = build_cache(args.data_path, tokenizer, cache_dir=args.cache_dir or None)
    moe = ModelConfig.preset("minimind2-moe")
    runs: dict[str, Any] = {}
    for name, shape in (("moe", moe), ("dense", active_twin(moe))):
        torch.manual_seed(0)
        data = PackedBatches(cache, batch_tokens=ROWS * LENGTH, max_seq_len=LENGTH, seed=42)
        trainer = setup.make_trainer(run, MiniMind(shape), tokenizer, data, setup.next_token_loss)
        runs[name] = (trainer, trainer.groups())
    rates: dict[str, list[float]] = {"moe": [], "dense": []}
    for turn in range(args.turns):
        for name, (trainer, groups) in runs.items():
            begin, group = time.perf_counter(), next(groups)
            useful = sum(b.num_targets for b in group)
            trainer.train_step(group, useful, Window())
            seconds = time.perf_counter() - begin
            print(f"turn {turn + 1}/{args.turns} {name:5} {useful / seconds:8,.0f} useful tok/s", flush=True)
            if turn:
                rates[name].append(useful / seconds)
    models = {
        name: {
            "parameters": trainer.model.num_parameters(),
            "active_parameters": trainer.model.num_parameters(active=True),
            "useful_tokens_per_s": statistics.median(rates[name]),
            "turns": rates[name],
        }
        for name, (trainer, _) in runs.items()
    }
    result = {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "pack_tokens": ROWS * LENGTH,
        "models": models,
        "ratio": models["moe"]["useful_tokens_per_s"] / models["dense"]["useful_tokens_per_s"],
    }
    write(RESULTS / "cpu_moe", result, table(result))
    print("\n" + table(result))


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"By `benchmarks/studies/cpu_moe.py` on {r['threads']} threads of {r['processor']}, torch {r['torch']}, packs of "
        f"{r['pack_tokens']:,} tokens.",
        "",
        "| model | parameters | a token meets | useful tokens/s |",
        "|---|---|---|---|",
    ]
    names = {"moe": "minimind2-moe", "dense": "dense, as wide as the experts that a token meets"}
    for name, m in r["models"].items():
        sizes = f"{m['parameters'] / 1e6:.0f}M | {m['active_parameters'] / 1e6:.0f}M"
        lines.append(f"| {names[name]} | {sizes} | {m['useful_tokens_per_s']:,.0f} |")
    return "\n".join([*lines, f"| ratio | | | **{r['ratio']:.2f}x** |"]) + "\n"


if __name__ == "__main__":
    setup.start(main)
