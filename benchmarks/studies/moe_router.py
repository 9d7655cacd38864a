"""Which router a new mixture should have: five of them on the same real text, seed by seed.

    python -m benchmarks.studies.moe_router --data_path pretrain.jsonl --val_data_path val.jsonl --tokenizer_path FOLDER

Purpose: decides the default of the preset minimind3-moe.
Principle: one small MiniMind3 whose mixtures differ only in how scores become weights and in how many experts a token meets.
    A seed draws the weights and the order of the text; every mixture sees the same packs. Loss is measured in float32 on the
    whole validation file.
Properties: equal tokens, not equal time: two full experts a token cost about twice the arithmetic, which the table says.
    The load is the busiest expert's share of the tokens times the number of experts, the mean over layers and validation
    packs: 1 is even. Writes benchmarks/results/moe_router.json and .md after every
    run.

Source: Switch Transformers (Fedus et al., 2021) for the unnormalised score; DeepSeekMoE (Dai et al., 2024) for many narrow
    experts; Bengio et al., 2013, for straight-through gradients.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from typing import Any

import torch

from benchmarks.record import RESULTS, processor, write
from minimind_fast.config import ModelConfig
from minimind_fast.data.batches import Batch
from minimind_fast.data.cache import build_cache
from minimind_fast.data.packing import PackedBatches
from minimind_fast.data.tokenizer import Tokenizer
from minimind_fast.model import MiniMind, MoE

SHAPE = dict(
    generation=3, num_attention_heads=4, num_key_value_heads=2, use_moe=True, max_position_embeddings=4096
)  # fmt: skip
ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "top1_normalised": ("top-1, normalised (MiniMind3)", dict(norm_topk_prob=True)),
    "top1_straight": ("top-1, normalised, gradient passed through", dict(straight_through_router=True)),
    "top1_score": ("top-1, the score itself", dict(norm_topk_prob=False)),
    "top2": ("top-2, normalised", dict(num_experts_per_tok=2)),
    "top2_narrow": ("top-2 of 8 experts, half as wide, normalised", dict(num_experts_per_tok=2, num_experts=8)),
}
WARMUP, PEAK, BETAS, DECAY = 0.1, 3e-3, (0.9, 0.95), 0.1


def shape(args: argparse.Namespace, name: str, vocab: int) -> ModelConfig:
    """A mixture of the study; narrow experts have half the width."""
    config = ModelConfig(
        vocab_size=vocab, hidden_size=args.hidden, num_hidden_layers=args.layers, **SHAPE, **ROUTERS[name][1]
    )
    if name == "top2_narrow":
        assert config.intermediate_size
        config.moe_intermediate_size = config.intermediate_size // 2
    return config


def rate(step: int, steps: int) -> float:
    """Linear warmup, then a cosine to a tenth."""
    begun = min(1.0, (step + 1) / (WARMUP * steps))
    return PEAK * begun * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def learn(model: MiniMind, data: PackedBatches, steps: int) -> list[float]:
    """Train; the training loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=BETAS, weight_decay=DECAY, fused=True)
    packs, losses = iter(data), []
    for step in range(steps):
        try:
            batch = next(packs)
        except StopIteration:
            packs = iter(data)
            batch = next(packs)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        out = forward(model, batch)
        loss = -out.logprobs.sum() / batch.num_targets
        optimizer.zero_grad()
        (loss + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def forward(model: MiniMind, batch: Batch) -> Any:
    """One pack through the model."""
    return model(batch.input_ids, targets=batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)


@torch.no_grad()
def judge(model: MiniMind, data: PackedBatches) -> tuple[float, float]:
    """(loss per token, load) over one pass of the validation text."""
    total, count, loads = 0.0, 0, []
    mixtures = [m for m in model.modules() if isinstance(m, MoE)]
    model.train()  # the loads are noted in training only; there is no dropout
    for batch in data:
        out = forward(model, batch)
        total, count = total - float(out.logprobs.sum()), count + batch.num_targets
        for m in mixtures:
            assert m.last_counts is not None
            loads.append(float(m.last_counts.max() / m.last_counts.sum()) * len(m.last_counts))
    return total / count, statistics.mean(loads)


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--data_path", required=True)
    add("--val_data_path", required=True)
    add("--tokenizer_path", required=True)
    add("--cache_dir", default="", help="where the tokenised data is cached; beside it if not given")
    add("--steps", type=int, default=300)
    add("--seeds", type=int, default=3)
    add("--hidden", type=int, default=96)
    add("--layers", type=int, default=3)
    add("--tokens", type=int, default=1024, help="tokens in a step")
    add("--length", type=int, default=256, help="longest piece of a document, in tokens")
    add("--threads", type=int, default=1)
    add("--routers", nargs="+", default=list(ROUTERS), choices=list(ROUTERS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokenizer = Tokenizer.load(args.tokenizer_path)
    text, held_out = (
        build_cache(path, tokenizer, cache_dir=args.cache_dir or None) for path in (args.data_path, args.val_data_path)
    )
    packing = dict(batch_tokens=args.tokens, max_seq_len=args.length)
    runs: list[dict[str, Any]] = []
    models: dict[str, Any] = {}
    for seed in range(args.seeds):
        for name in args.routers:
            config = shape(args, name, max(tokenizer.vocab_size, 6400))
            torch.manual_seed(seed)
            model = MiniMind(config).train()
            models[name] = {"parameters": model.num_parameters(), "active": model.num_parameters(active=True)}
            begin = time.perf_counter()
            losses = learn(model, PackedBatches(text, **packing, seed=seed), args.steps)
            seconds = time.perf_counter() - begin
            loss, load = judge(model, PackedBatches(held_out, **packing, seed=0, shuffle=False))
            runs.append({"seed": seed, "router": name, "val_loss": loss, "load": load, "curve": losses})
            print(f"seed {seed} {name:16} loss {loss:.4f} load {load:.2f} ({seconds:.0f} s)", flush=True)
            result = {
                "processor": processor(),
                "torch": str(torch.__version__),
                "shape": {"hidden_size": args.hidden, "num_hidden_layers": args.layers},
                "steps": args.steps,
                "tokens_a_step": args.tokens,
                "models": models,
                "runs": runs,
            }
            write(RESULTS / "moe_router", result, table(result))
    print("\n" + table(result))


def table(r: dict[str, Any]) -> str:
    """The result as Markdown."""
    tokens = r["steps"] * r["tokens_a_step"] / 1e6
    seeds = len({run["seed"] for run in r["runs"]})
    lines = [
        f"By `benchmarks/studies/moe_router.py` on {r['processor']}, torch {r['torch']}: {r['shape']['hidden_size']} wide, "
        f"{r['shape']['num_hidden_layers']} layers, {tokens:.1f}M tokens of real text, {seeds} seeds. Load: the busiest "
        "expert's share of the tokens times the number of experts; 1 is even.",
        "",
        "| router | weights | a token meets | validation loss, mean | by seed | against MiniMind3's, by seed | load |",
        "|---|---|---|---|---|---|---|",
    ]
    usual = {run["seed"]: run["val_loss"] for run in r["runs"] if run["router"] == "top1_normalised"}
    for name, model in r["models"].items():
        runs = [run for run in r["runs"] if run["router"] == name]
        losses = [run["val_loss"] for run in runs]
        sizes = f"{model['parameters'] / 1e6:.2f}M | {model['active'] / 1e6:.2f}M"
        each = ", ".join(f"{x:.3f}" for x in losses)
        gaps = ", ".join(f"{run['val_loss'] - usual[run['seed']]:+.3f}" for run in runs if run["seed"] in usual)
        load = statistics.mean(run["load"] for run in runs)
        lines.append(f"| {ROUTERS[name][0]} | {sizes} | {statistics.mean(losses):.4f} | {each} | {gaps} | {load:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
